"""The weights in assets/: their files, their shapes, and what they write for a few photographs.

`python tests/test_shipped.py` writes tests/known_captions.json anew, for new weights.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, PHOTOS = ROOT / "assets" / "supravl-nano", ROOT / "assets" / "photos"
FILE = Path(__file__).with_name("known_captions.json")
KNOWN = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


@pytest.fixture(scope="module")
def model(nb):
    return nb.MiniVLM.from_pretrained(WEIGHTS)


def test_the_files():
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in WEIGHTS.iterdir()} == names
    assert (WEIGHTS / "model.safetensors").stat().st_size < 3e6


def test_the_config_is_the_published_one(nb):
    config = json.loads((WEIGHTS / "config.json").read_text(encoding="utf-8"))
    assert config == {
        "D_MODEL": 128, "N_HEADS": 4, "N_LAYERS": 3, "D_FF": 256, "VIS_CH": 64, "N_VIS": 16,
        "VOCAB_SIZE": 2048, "MAX_SEQ": 48, "IMG_SIZE": 112, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert config == nb.asdict(nb.Config())


def test_the_weights_are_of_the_published_names_and_shapes(nb):
    weights = nb.load_file(WEIGHTS / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    some = {
        "tok_emb.weight": (2048, 128), "pos_emb.weight": (64, 128), "ln_f.weight": (128,),
        "vis_enc.conv1.0.weight": (16, 3, 3, 3), "vis_enc.conv3.1.running_var": (64,),
        "vis_enc.proj.weight": (128, 64), "blocks.0.attn.qkv.weight": (384, 128),
        "blocks.2.mlp.fc1.weight": (256, 128),
    }  # fmt: skip
    assert some.items() <= shapes.items()
    assert len(shapes) == 57 and "lm_head.weight" not in shapes  # it is tied
    fixed = ("running_mean", "running_var", "num_batches_tracked")
    learned = [v.numel() for name, v in weights.items() if not name.endswith(fixed)]
    assert sum(learned) == 698_624
    assert all(value.isfinite().all() for value in weights.values())


def test_the_tokenizer_belongs_to_them(model):
    assert model.tokenizer.get_vocab_size() == 2048
    assert [model.tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    ids = model.tokenizer.encode("A brown dog runs .").ids
    assert model.tokenizer.decode(ids) == "a brown dog runs ."


def test_captions_are_known():
    assert len(KNOWN) >= 5, "run python tests/test_shipped.py"


@pytest.mark.parametrize("name", KNOWN)
def test_known_captions(model, name):
    assert model.caption(PHOTOS / name) == [KNOWN[name]]


def test_the_readmes_program_runs(tmp_path, capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = readme.split("```python\n")[1].split("```")[0]
    name = program.split("assets/photos/")[1].split('"')[0]
    monkeypatch.chdir(ROOT)
    exec(compile(program, "README.md", "exec"), {"__name__": "program"})
    assert KNOWN[name] in capsys.readouterr().out


if __name__ == "__main__":
    import conftest

    shipped = conftest.load_components().MiniVLM.from_pretrained(WEIGHTS)
    captions = {file.name: shipped.caption(file)[0] for file in sorted(PHOTOS.glob("*.jpg"))}
    FILE.write_text(json.dumps(captions, indent=1) + "\n", encoding="utf-8")
    json.dump(captions, sys.stdout, indent=1)
