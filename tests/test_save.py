"""Saving and loading: nothing changes on the way, and what does not fit is named."""

import errno
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vlm(nb, tiny, images):
    """A small model, trained for a moment so that nothing is at its start any more."""
    cfg = nb.replace(tiny, VOCAB_SIZE=300, epochs=4, batch_size=8)
    captions = ["a dog .", "a red ball .", "two boys run .", "snow .", "a boat ."] * 3
    tokenizer = nb.train_tokenizer(captions, cfg)
    token_ids = [nb.encode_captions(tokenizer, captions[n : n + 2], cfg) for n in range(8)]
    device = torch.device("cpu")
    batches = nb.CaptionBatches(images.numpy(), token_ids, cfg, device)
    model, _ = nb.train_model(cfg, batches, lambda model: 0.0, device, torch.float32)
    return nb.SupraVLNano(model, tokenizer)


@pytest.fixture
def folder(vlm, tmp_path):
    """A fresh folder of saved files."""
    vlm.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def captions(vlm, images):
    return [
        vlm.generate_greedy(images),
        vlm.generate_beam(images),
        vlm.generate_topk(images, generator=torch.Generator().manual_seed(0)),
    ]


# There and back


def test_round_trip(nb, vlm, folder, images):
    again = nb.SupraVLNano.from_pretrained(folder)
    assert captions(again, images) == captions(vlm, images)
    assert len({text for texts in captions(vlm, images) for text in texts}) > 3
    assert again.model.cfg.model_dict() == vlm.model.cfg.model_dict()
    assert again.tokenizer.to_str() == vlm.tokenizer.to_str()
    weights = vlm.model.state_dict()
    assert again.model.state_dict().keys() == weights.keys()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
        assert value.dtype == weights[key].dtype
    assert not again.model.training


def test_tied_weights_are_tied_after_loading(nb, folder):
    model = nb.SupraVLNano.from_pretrained(str(folder)).model
    assert model.lm_head.weight is model.tok_emb.weight
    with torch.no_grad():
        model.tok_emb.weight[5] = 7
    assert (model.lm_head.weight[5] == 7).all()


def test_the_three_files(vlm, folder):
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert json.loads((folder / "config.json").read_text()) == {
        "D_MODEL": 16, "N_HEADS": 2, "N_LAYERS": 2, "D_FF": 32, "VIS_CH": 8, "N_VIS": 4,
        "VOCAB_SIZE": 300, "MAX_SEQ": 8, "IMG_SIZE": 16, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == vlm.model.state_dict().keys() - {"lm_head.weight"}  # stored once


def test_saving_does_not_change_the_model_and_may_overwrite(nb, vlm, folder, images):
    before = captions(vlm, images)
    vlm.save_pretrained(folder)
    assert captions(vlm, images) == before
    assert captions(nb.SupraVLNano.from_pretrained(folder), images) == before


def test_a_saved_tokenizer_still_takes_special_names_for_text(nb, folder):
    again = nb.SupraVLNano.from_pretrained(folder).tokenizer
    assert min(again.encode("<eos> <pad> <bos>").ids) > 2


@pytest.mark.parametrize("failing", FILES)
def test_a_full_disk_leaves_the_old_files(nb, vlm, folder, monkeypatch, failing):
    old = {file.name: file.read_bytes() for file in folder.iterdir()}

    def replace(part, path):
        if path.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        os_replace(part, path)

    os_replace = nb.os.replace
    monkeypatch.setattr(nb.os, "replace", replace)
    with pytest.raises(OSError, match=failing):
        vlm.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == old


# Files of other implementations


def rewrite(folder, change):
    """Change the saved weights: `change` gets the dict of tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_foreign_file_loads(nb, vlm, folder, images):
    """With the tied matrix twice and the causal masks, as other implementations write them."""

    def add(weights):
        weights["lm_head.weight"] = weights["tok_emb.weight"].clone()
        for n in range(2):
            weights[f"blocks.{n}.attn.mask"] = torch.ones(1, 1, 12, 12).tril()

    rewrite(folder, add)
    again = nb.SupraVLNano.from_pretrained(folder)
    assert captions(again, images) == captions(vlm, images)
    assert again.model.lm_head.weight is again.model.tok_emb.weight
    assert again.model.state_dict().keys() == vlm.model.state_dict().keys()


def test_a_foreign_config_may_hold_more(nb, folder):
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "supravl", "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values))
    nb.SupraVLNano.from_pretrained(folder)


def test_weights_in_half_precision_load(nb, folder):
    def halve(weights):
        for key, value in weights.items():
            weights[key] = value.half() if value.is_floating_point() else value

    rewrite(folder, halve)
    model = nb.SupraVLNano.from_pretrained(folder).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def missing(key):
    return lambda weights: weights.pop(key)


def extra(key, *shape):
    return lambda weights: weights.update({key: torch.ones(shape)})


WRONG = {
    "missing_embedding": (missing("tok_emb.weight"), "tok_emb.weight is missing"),
    "missing_norm": (missing("ln_f.bias"), "ln_f.bias is missing"),
    "missing_statistic": (
        missing("vis_enc.conv2.1.running_var"),
        "vis_enc.conv2.1.running_var is missing",
    ),
    "extra": (extra("vis_enc.conv4.0.weight", 2), "vis_enc.conv4.0.weight is not part"),
    "extra_block": (extra("blocks.2.ln1.weight", 16), "blocks.2.ln1.weight is not part"),
    "extra_bias": (extra("lm_head.bias", 300), "lm_head.bias is not part"),
    "almost_a_mask": (extra("blocks.0.attn.masks", 4), "blocks.0.attn.masks is not part"),
    "mask_elsewhere": (extra("blocks.0.mlp.mask", 4), "blocks.0.mlp.mask is not part"),
    "shape": (extra("pos_emb.weight", 13, 16), r"pos_emb.weight has shape (13, 16)"),
    "transposed": (extra("blocks.1.mlp.fc1.weight", 16, 32), "blocks.1.mlp.fc1.weight has shape"),
    "scalar": (extra("ln_f.weight"), "ln_f.weight has shape ()"),
    "untied": (extra("lm_head.weight", 300, 16), "lm_head.weight differs"),
    "head_of_another_shape": (extra("lm_head.weight", 16, 300), "lm_head.weight differs"),
}


@pytest.mark.parametrize("change, named", WRONG.values(), ids=WRONG)
def test_a_key_that_does_not_fit_is_named(nb, folder, change, named):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        nb.SupraVLNano.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_all_that_does_not_fit_is_named_at_once(nb, folder):
    def change(weights):
        missing("ln_f.bias")(weights)
        extra("nonsense", 1)(weights)
        extra("pos_emb.weight", 1)(weights)

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        nb.SupraVLNano.from_pretrained(folder)
    assert all(key in str(caught.value) for key in ("ln_f.bias", "nonsense", "pos_emb.weight"))


def test_weights_of_another_size_are_refused(nb, folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"D_MODEL": 32}))
    with pytest.raises(ValueError, match=r"tok_emb\.weight has shape"):
        nb.SupraVLNano.from_pretrained(folder)


def test_a_refused_file_changes_nothing(nb, vlm, folder):
    rewrite(folder, missing("ln_f.bias"))
    model = nb.MiniVLM(vlm.model.cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        nb.load_weights(model, folder / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Broken and dangerous files


class Explosive:
    """An object whose pickle runs code when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_never_loaded(nb, folder, tmp_path):
    torch.save({"tok_emb.weight": Explosive(tmp_path / "ran")}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        nb.SupraVLNano.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_even_looked_for(nb, vlm, folder):
    (folder / "model.safetensors").unlink()
    torch.save(vlm.model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        nb.SupraVLNano.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(nb, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        nb.SupraVLNano.from_pretrained(folder)


@pytest.mark.parametrize("how", ["empty", "truncated", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(nb, folder, name, how):
    whole = (folder / name).read_bytes()
    broken = {"empty": b"", "truncated": whole[: len(whole) // 2], "noise": b"\xff\x00\x81" * 99}
    (folder / name).write_bytes(broken[how])
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        nb.SupraVLNano.from_pretrained(folder)


@pytest.mark.parametrize("text", ["null", "3", "[]", '"D_MODEL"'])
def test_a_config_that_is_no_object_is_named(nb, folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json lacks D_MODEL"):
        nb.SupraVLNano.from_pretrained(folder)


KEYS = (
    "D_MODEL N_HEADS N_LAYERS D_FF VIS_CH N_VIS VOCAB_SIZE MAX_SEQ IMG_SIZE "
    "bos_token_id eos_token_id"
).split()


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(nb, folder, key):
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"lacks {key}"):
        nb.SupraVLNano.from_pretrained(folder)


@pytest.mark.parametrize("value", [0, -1, 1.5, "16", None, True, [16], 1e300], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_a_senseless_value_is_named(nb, folder, key, value):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(ValueError, match=key):
        nb.SupraVLNano.from_pretrained(folder)


@pytest.mark.parametrize(
    "how",
    [
        {"N_HEADS": 3},
        {"N_VIS": 15},
        {"MAX_SEQ": 2},
        {"bos_token_id": 2},
        {"eos_token_id": 3},
        {"init": "zeros"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"crop": 0.0},
        {"jitter": 1.5},
        {"label_smoothing": 1.0},
        {"ema": 1.5},
        {"lr": -1e-3},
        {"lr": float("nan")},
        {"batch_size": 0},
        {"captions_per_image": 0},
        {"epochs": -1},
    ],
    ids=str,
)
def test_config_refuses_numbers_that_do_not_work(nb, how):
    with pytest.raises(ValueError, match=next(iter(how))):
        nb.Config(**how)


def test_a_tokenizer_larger_than_the_weights_is_refused(nb, folder):
    captions = ["the quick brown fox jumps over the lazy dog beside a waterfall"] * 5
    nb.train_tokenizer(captions, nb.Config(VOCAB_SIZE=310)).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, the weights only 300"):
        nb.SupraVLNano.from_pretrained(folder)


# The Hub


def test_a_hub_repository_is_fetched_at_its_revision(nb, vlm, folder, images, monkeypatch):
    calls = []

    def snapshot_download(repo, revision=None, allow_patterns=None):
        calls.append((repo, revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(nb, "snapshot_download", snapshot_download)
    again = nb.SupraVLNano.from_pretrained("some-one/supra.vl_nano", revision="v1.2")
    assert captions(again, images) == captions(vlm, images)
    nb.SupraVLNano.from_pretrained("some-one/supra.vl_nano")
    assert calls == [
        ("some-one/supra.vl_nano", "v1.2", FILES),  # no pickled weights among them
        ("some-one/supra.vl_nano", None, FILES),
    ]


def test_a_folder_is_never_looked_up_on_the_hub(nb, folder, monkeypatch):
    monkeypatch.setattr(nb, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(folder.parent.parent)
    nb.SupraVLNano.from_pretrained(f"{folder.parent.name}/saved")


@pytest.mark.parametrize("source", ["/no/such/folder", "nowhere", "./a", "../a", "a/b/c", "a/"])
def test_neither_a_folder_nor_a_repository(nb, tmp_path, monkeypatch, source):
    monkeypatch.setattr(nb, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(source)):
        nb.SupraVLNano.from_pretrained(source)


def test_a_repository_that_cannot_be_had_is_told_from_a_folder(nb, tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(nb, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no folder assets/supravl-nan here.*no network"):
        nb.SupraVLNano.from_pretrained("assets/supravl-nan")


def test_a_bad_value_in_a_config_file_is_named_with_the_file(nb, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(nb.Config().model_dict() | {"N_HEADS": -4}))
    with pytest.raises(ValueError, match="config.json: N_HEADS is -4"):
        nb.Config.from_json(file)


@pytest.mark.parametrize(
    "how",
    [{"lr": "0.1"}, {"jitter": None}, {"min_lr": "x"}, {"seed": -1}, {"seed": 0.5},
     {"weight_decay": -1}, {"grad_clip": 0}, {"flip": 3}, {"IMG_SIZE": 1}],
)  # fmt: skip
def test_a_senseless_number_of_the_recipe_is_named(nb, how):
    (key,) = how
    with pytest.raises(ValueError, match=f"^{key} is "):
        nb.Config(**how)
