"""The model: the published format, attention by the formula, and that nothing looks ahead."""

import math

import pytest
import torch
import torch.nn.functional as F


def test_the_published_format(nb):
    model = nb.MiniVLM(nb.Config())
    assert sum(p.numel() for p in model.parameters()) == 698_624
    keys = {"tok_emb.weight", "pos_emb.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight"}
    parts = [f"ln{n}.{x}" for n in (1, 2) for x in ("weight", "bias")]
    parts += ["attn.qkv.weight", "attn.proj.weight"]
    parts += [f"mlp.fc{n}.{x}" for n in (1, 2) for x in ("weight", "bias")]
    keys |= {f"blocks.{n}.{part}" for n in range(3) for part in parts}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for n in (1, 2, 3):
        keys |= {f"vis_enc.conv{n}.0.{x}" for x in ("weight", "bias")}
        keys |= {f"vis_enc.conv{n}.1.{x}" for x in norm}
    keys |= {"vis_enc.proj.weight", "vis_enc.proj.bias"}
    assert model.state_dict().keys() == keys
    assert model.lm_head.weight is model.tok_emb.weight
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["pos_emb.weight"] == (64, 128) and shapes["blocks.2.mlp.fc1.weight"] == (256, 128)
    assert shapes["vis_enc.conv3.0.weight"] == (64, 32, 3, 3)


def test_a_convolution_is_normalised_and_then_cut_at_zero(nb):
    block, x = nb.conv_block(3, 5), torch.randn(4, 3, 8, 8)
    y = block[0](x)
    assert y.shape == (4, 5, 4, 4) and (block[0].stride, block[0].kernel_size) == ((2, 2), (3, 3))
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(block(x), ((y - mean) / (var + 1e-5).sqrt()).clamp(min=0))


@pytest.mark.parametrize("rows, T", [(1, 1), (3, 5), (2, 8)])
def test_logits_have_a_row_for_each_position(make, img, rows, T):
    model, ids = make(), torch.randint(3, 20, (rows, T))
    x = model.vis_enc(img[:rows])
    assert x.shape == (rows, 4, 16)
    assert model(x, ids).shape == (rows, 4 + T, 20)
    torch.testing.assert_close(model.text_logits(x, ids), model(x, ids)[:, 4:])


def test_visual_tokens_run_over_the_grid_row_by_row(make, img):
    model = make()
    with torch.no_grad():
        before = model.vis_enc(img[:1])
        for number, (y, x) in enumerate([(0, 0), (0, 15), (15, 0), (15, 15)]):
            changed = img[:1].clone()
            changed[0, :, y, x] += 3
            different = (model.vis_enc(changed) != before).any(-1)[0]
            assert different.tolist() == [n == number for n in range(4)]


def test_normalise_is_imagenets_and_pictures_are_bytes(nb, pictures):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (pictures / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(nb.normalise(pictures), by_hand)
    torch.testing.assert_close(nb.as_input(pictures), by_hand)
    with pytest.raises(TypeError, match="float32.*uint8"):
        nb.as_input(pictures / 1.0)
    features = torch.randn(2, 49, 8)
    assert nb.as_input(features) is features


def test_transform_squashes_the_published_way(nb, pictures):
    image = nb.Image.fromarray(pictures[0].permute(1, 2, 0).numpy()).resize((40, 16))
    out = nb.make_transform(16)(image)
    assert out.shape == (3, 16, 16) and out.dtype == torch.float32
    assert nb.transform(image).shape == (3, 112, 112)
    small = nb.v2.functional.resize(image, [16, 16], antialias=True)
    expected = nb.normalise(nb.v2.functional.pil_to_tensor(small))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("Q, S", [(5, 5), (1, 5), (3, 7), (1, 1)])
def test_attention_by_a_loop(nb, Q, S):
    q, k, v = torch.randn(2, 3, Q, 4), torch.randn(2, 3, S, 4), torch.randn(2, 3, S, 4)
    expected = torch.zeros(2, 3, Q, 4)
    for b in range(2):
        for head in range(3):
            for i in range(Q):
                sees = S - Q + i + 1
                scores = [q[b, head, i] @ k[b, head, j] / 2.0 for j in range(sees)]
                weights = torch.stack(scores).softmax(0)
                expected[b, head, i] = sum(w * v[b, head, j] for j, w in enumerate(weights))
    torch.testing.assert_close(nb.attention(q, k, v), expected)


def test_attention_with_a_mask(nb):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    y = nb.attention(q, k, v, mask)
    assert torch.equal(y[:, :, 1], v[:, :, 3]) and torch.equal(y[:, :, 3], v[:, :, 1])


def test_block_is_pre_norm_with_residuals_and_the_exact_gelu(nb, make):
    model = make()
    block, x = model.blocks[0], torch.randn(2, 5, 16)
    q, k, v = block.attn.qkv(F.layer_norm(x, (16,))).split(16, -1)
    heads = [nb.attention(*(t[..., n * 8 : n * 8 + 8] for t in (q, k, v))) for n in (0, 1)]
    y = x + block.attn.proj(torch.cat(heads, -1))
    h = block.mlp.fc1(F.layer_norm(y, (16,)))
    expected = y + block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)
    mask = torch.ones(5, 5, dtype=torch.bool)
    assert not torch.allclose(block(x, mask=mask)[:, 0], expected[:, 0])


def test_nothing_looks_ahead(make, img):
    model, ids = make(), torch.randint(3, 20, (1, 6))
    x = model.vis_enc(img[:1]).detach().requires_grad_()
    logits = model(x, ids)
    for position in range(10):
        reached = torch.autograd.grad(logits[0, position].sum(), x, retain_graph=True)[0]
        assert (reached[0].abs().sum(-1) > 0).tolist() == [n <= position for n in range(4)]
    for t in range(6):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % 17 + 3
        changed = (model(x, other) - logits).abs()[0].amax(-1)
        assert (changed[: 4 + t] == 0).all() and (changed[4 + t :] > 1e-4).all()


def test_positions_count_pictures_first(make, img):
    """Position 4 is the first word's; what the model writes depends on it."""
    model, ids = make(), torch.randint(3, 20, (1, 3))
    x = model.vis_enc(img[:1])
    before = model(x, ids)
    with torch.no_grad():
        model.pos_emb.weight[5, :8] += 1
    changed = (model(x, ids) - before).abs()[0].amax(-1) > 1e-4
    assert changed.tolist() == [False] * 5 + [True] * 2


def test_cached_hidden_states_equal_plain_ones(nb, make, img):
    model, ids = make(), torch.randint(3, 20, (6, 8))
    with torch.no_grad():
        x = model.vis_enc(img)
        plain, caches = model.hidden_states(x, ids), [[] for _ in model.blocks]
        first = model.hidden_states(x, ids[:, :3], caches)
        torch.testing.assert_close(first, plain[:, :7])
        for t in range(3, 8):
            step = model.hidden_states(x, ids[:, t : t + 1], caches)
            torch.testing.assert_close(step, plain[:, 4 + t : 5 + t])
        assert [x.shape for x in caches[1]] == [(6, 2, 12, 8)] * 2


def test_another_eye(nb, tiny, make, img):
    class Eye(nb.nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None, None].expand(-1, 4, 16)

    model = nb.MiniVLM(tiny, Eye())
    assert not [key for key in model.state_dict() if "vis_enc" in key]
    assert model(model.vis_enc(img), torch.ones(6, 1, dtype=torch.int64)).shape == (6, 5, 20)


def test_how_the_weights_start(nb):
    torch.manual_seed(0)
    model = nb.MiniVLM(nb.Config())
    for name, parameter in model.named_parameters():
        if "ln" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif "vis_enc" in name:
            continue
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    eye = model.vis_enc.proj.weight.abs().max().item()  # PyTorch's own start
    assert eye == pytest.approx(1 / math.sqrt(64), rel=0.02)


@pytest.mark.parametrize(
    "how",
    [
        {"D_MODEL": 0}, {"D_MODEL": "128"}, {"D_MODEL": 128.0}, {"N_LAYERS": True},
        {"D_MODEL": 10**9}, {"N_LAYERS": 10**9}, {"N_LAYERS": 101}, {"IMG_SIZE": 20_000},
        {"VOCAB_SIZE": 5_000_000}, {"N_HEADS": 3}, {"N_VIS": 15}, {"bos_token_id": 2},
        {"eos_token_id": 1}, {"MAX_SEQ": None}, {"D_FF": -1},
    ],
    ids=str,
)  # fmt: skip
def test_config_names_key_and_value(nb, how):
    ((key, value),) = how.items()
    with pytest.raises(ValueError, match=rf"{key}.*{value}" if "token" not in key else key):
        nb.Config(**how)


@pytest.mark.parametrize(
    "how",
    [
        {"lr": True}, {"lr": float("nan")}, {"seed": 2**70}, {"seed": -1},
        {"seed": 1.0}, {"epochs": 1.5}, {"epochs": -1}, {"batch_size": 0.5}, {"flip": -0.1},
        {"flip": "no"}, {"scst_lr": float("inf")}, {"scst_lr": -1},
        {"scst_lr": "0.01"}, {"scst_lr": None}, {"warmup": 1e3},
    ],
    ids=str,
)  # fmt: skip
def test_recipe_names_key_and_value(nb, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        nb.Recipe(**how)


def test_the_published_shape(nb):
    assert nb.asdict(nb.Config()) == {
        "D_MODEL": 128, "N_HEADS": 4, "N_LAYERS": 3, "D_FF": 256, "VIS_CH": 64, "N_VIS": 16,
        "VOCAB_SIZE": 2048, "MAX_SEQ": 48, "IMG_SIZE": 112, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert nb.RECIPES["nano"] == nb.Recipe()


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_a_gpu_has_it(nb, monkeypatch, native):
    """A T4 says that it supports bfloat16, and emulates it."""
    asked = {}
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )  # fmt: skip
    expected = torch.bfloat16 if native else torch.float16
    assert nb.pick_precision(torch.device("cuda")) == expected and not asked
    assert nb.pick_precision(torch.device("mps")) == torch.float32
    assert nb.pick_precision(torch.device("cpu")) in (torch.float32, torch.bfloat16)
