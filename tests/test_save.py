"""Saving and loading: three published files, there and back, and nothing that does not fit."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def model(nb, make):
    model = make(0, VOCAB_SIZE=300)
    model.tokenizer = nb.train_tokenizer(["a dog runs", "two boys play ."] * 9, 300)
    with torch.no_grad():
        model.vis_enc.conv1[1].running_mean += 0.1
    return model


@pytest.fixture
def folder(model, tmp_path):
    """A fresh folder of saved files."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(nb, folder):
    return nb.MiniVLM.from_pretrained(folder)


def test_round_trip(nb, model, folder, img):
    for source in (folder, str(folder)):
        again = load(nb, source)
        assert again.generate_beam(img) == model.generate_beam(img)
        assert again.cfg == model.cfg and again.tokenizer.to_str() == model.tokenizer.to_str()
        assert again.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
        assert not again.training and again.lm_head.weight is again.tok_emb.weight
    ids = nb.encode_captions(again.tokenizer, ["<eos> <pad>"])[0][1:-1]
    assert min(ids) > 2, "names of special tokens are text"
    model.save_pretrained(folder)
    assert load(nb, folder).generate_greedy(img) == model.generate_greedy(img)


def test_the_three_files(model, folder):
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert json.loads((folder / "config.json").read_text()) == {
        "D_MODEL": 16, "N_HEADS": 2, "N_LAYERS": 2, "D_FF": 32, "VIS_CH": 8, "N_VIS": 4,
        "VOCAB_SIZE": 300, "MAX_SEQ": 8, "IMG_SIZE": 16, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys() - {"lm_head.weight"}  # stored once


@pytest.mark.parametrize("failing", FILES)
def test_a_crash_while_saving_leaves_nothing_half_new(
    nb, make, model, folder, monkeypatch, failing
):
    """Old weights with a new config, or the reverse, must not load."""
    other, replace = make(1, VOCAB_SIZE=300), nb.os.replace
    other.tokenizer = model.tokenizer

    def stop(part, path):
        if path.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        replace(part, path)

    monkeypatch.setattr(nb.os, "replace", stop)
    with pytest.raises(OSError, match=failing):
        other.save_pretrained(folder)
    with pytest.raises(ValueError, match="config.json"):
        load(nb, folder)
    monkeypatch.undo()
    other.save_pretrained(folder)
    assert torch.equal(load(nb, folder).tok_emb.weight, other.tok_emb.weight)


# Files of other implementations


def rewrite(folder, change):
    """Change the saved weights: `change` gets the dict of tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_foreign_file_loads(nb, model, folder, img):
    def foreign(weights):
        weights["lm_head.weight"] = weights["tok_emb.weight"].clone()
        for n in range(2):
            weights[f"blocks.{n}.attn.mask"] = torch.ones(1, 1, 12, 12).tril()

    rewrite(folder, foreign)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "something"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(nb, folder).generate_beam(img) == model.generate_beam(img)
    rewrite(
        folder, lambda w: w.update({k: v.half() for k, v in w.items() if v.is_floating_point()})
    )
    again = load(nb, folder)
    assert again.tok_emb.weight.dtype == torch.float32
    torch.testing.assert_close(again.tok_emb.weight, model.tok_emb.weight, rtol=1e-2, atol=1e-3)


QKV, VAR, COUNT = "blocks.1.attn.qkv.weight", "vis_enc.conv2.1.running_var", "num_batches_tracked"


def spoil(key, value):
    return lambda weights: weights[key].view(-1)[3:4].fill_(value)


CHANGES = {
    "missing": (lambda w: w.pop(QKV), QKV),
    "extra": (lambda w: w.update({"extra.weight": torch.ones(2)}), "extra.weight"),
    "extra block": (lambda w: w.update({QKV.replace("1", "2"): w[QKV].clone()}), "blocks.2"),
    "shape": (lambda w: w.update({QKV: w[QKV][:9].clone()}), QKV),
    "nan": (spoil(QKV, torch.nan), QKV),
    "inf": (spoil("tok_emb.weight", torch.inf), "tok_emb"),
    "negative variance": (spoil(VAR, -1), VAR),
    "integers": (lambda w: w.update({QKV: w[QKV].long()}), QKV),
    "bytes": (lambda w: w.update({QKV: w[QKV].byte()}), QKV),
    "complex": (lambda w: w.update({QKV: w[QKV].to(torch.complex64)}), "loaded"),
    "count": (lambda w: w.update({f"vis_enc.conv1.1.{COUNT}": torch.tensor(1.5)}), COUNT),
    "untied": (lambda w: w.update({"lm_head.weight": w["tok_emb.weight"] + 1}), "lm_head"),
    "no embedding": (lambda w: w.pop("tok_emb.weight"), "lm_head|tok_emb"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_do_not_fit_are_named(nb, folder, how):
    change, named = CHANGES[how]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*({named})"):
        load(nb, folder)


class Explosive:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "empty", "text", "pickle", "missing"])
def test_a_broken_file_is_named_and_runs_no_code(nb, folder, name, how, monkeypatch):
    monkeypatch.chdir(folder)
    file, data = folder / name, (folder / name).read_bytes()
    file.unlink()
    if how == "pickle":
        torch.save({"tok_emb.weight": Explosive()}, file)
    elif how != "missing":
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"[1, 2]"}[how])
    if how == "missing":
        torch.save({"x": Explosive()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=name):
        load(nb, folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("VOCAB_SIZE", 5_000_000), ("VOCAB_SIZE", 900_000), ("D_MODEL", 10**9),
        ("D_MODEL", 900_000), ("N_LAYERS", 10**9), ("N_LAYERS", 100), ("IMG_SIZE", 20_000),
        ("MAX_SEQ", 900_000),
        ("N_HEADS", 3), ("D_FF", "32"), ("D_FF", 33), ("N_VIS", 5), ("VIS_CH", None),
        ("bos_token_id", 0), ("VOCAB_SIZE", 299), ("N_LAYERS", 1), ("D_FF", ...),
    ],
)  # fmt: skip
def test_a_hostile_config_is_refused_before_anything_is_built(nb, folder, key, value, monkeypatch):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    if value is ...:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    empty, largest = torch.Tensor.normal_, [0]

    def normal(self, *args, **kwargs):
        if self.device.type != "meta":
            largest[0] = max(largest[0], self.numel())
        return empty(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", normal)
    with pytest.raises(ValueError, match="json|safetensors") as caught:
        load(nb, folder)
    assert largest[0] == 0, "weights were made"
    if not isinstance(value, int) or value > 10**6:
        assert key in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(nb, folder):
    other = nb.train_tokenizer([f"{n} words of many kinds {n * 7}" for n in range(500)], 320)
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json.*320 tokens"):
        load(nb, folder)
    plain = nb.Tokenizer(nb.models.BPE())
    plain.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json"):
        load(nb, folder)


def test_a_variant_says_its_name_and_takes_its_parts(nb, model, tmp_path, img):
    class Other(nb.MiniVLM):
        variant = "other"

    class Eye(nb.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nb.nn.Linear(3, 16)

        def forward(self, x):
            return self.line(x.mean((2, 3)))[:, None].expand(-1, 4, -1)

    torch.manual_seed(0)
    other = Other(model.cfg, Eye()).eval()
    other.tokenizer = model.tokenizer
    other.save_pretrained(tmp_path / "x")
    again = Other.from_pretrained(tmp_path / "x", vis_enc=Eye())
    assert again.generate_greedy(img) == other.generate_greedy(img)
    with pytest.raises(ValueError, match="variant is 'other'"):
        load(nb, tmp_path / "x")
    model.save_pretrained(tmp_path / "y")
    with pytest.raises(ValueError, match="variant is None"):
        Other.from_pretrained(tmp_path / "y")


# The Hub


def test_an_eye_of_ones_own_may_hold_whole_numbers(nb, tiny, model, img, tmp_path):
    class Eye(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("where", torch.arange(tiny.N_VIS * tiny.D_MODEL))

        def forward(self, x):
            return x.flatten(1)[:, self.where].view(len(x), tiny.N_VIS, tiny.D_MODEL)

    cfg = nb.replace(tiny, VOCAB_SIZE=300)
    own = nb.MiniVLM(cfg, Eye(), model.tokenizer).eval()
    own.save_pretrained(tmp_path / "own")
    again = nb.MiniVLM.from_pretrained(tmp_path / "own", vis_enc=Eye())
    assert again.vis_enc.where.dtype == torch.int64
    with pytest.raises(ValueError, match="Missing.*vis_enc.conv1.*Unexpected.*vis_enc.where"):
        nb.MiniVLM.from_pretrained(tmp_path / "own")
    assert again.generate_greedy(img) == own.generate_greedy(img)


def test_a_hub_repository_is_fetched_at_its_revision(nb, model, folder, img, monkeypatch):
    asked = {}

    def snapshot(repo, **how):
        asked.update(how, repo=repo)
        return str(folder)

    monkeypatch.setattr(nb, "snapshot_download", snapshot)
    again = nb.MiniVLM.from_pretrained("somebody/something", revision="abc")
    assert again.generate_greedy(img) == model.generate_greedy(img)
    assert asked["repo"] == "somebody/something" and asked["revision"] == "abc"
    assert sorted(asked["allow_patterns"]) == FILES, "nothing else is fetched"
    asked.clear()
    load(nb, folder)
    assert not asked, "a folder is never looked up"


@pytest.mark.parametrize("source", ["no/such", "nowhere", "a/b/c", ""])
def test_neither_a_folder_nor_a_repository(nb, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=source or "config.json"):
        load(nb, source)


def test_push(nb, model, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok=False):
            calls.append((repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path, **how):
            calls.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir()), how))
            return "address"

    monkeypatch.setattr(nb, "HfApi", Api)
    assert model.push_to_hub("me/mine", commit_message="x") == "address"
    assert calls == [("me/mine", True), ("me/mine", FILES, {"commit_message": "x"})]
