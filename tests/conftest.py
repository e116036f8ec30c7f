"""What the tests share: the notebook's own cells, and a model small enough to run in no time."""

import json
import os
import types
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")  # no window
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "SupraVL_Nano.ipynb"


def component_cells():
    """The sources of the notebook's component cells, in order."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "component" in cell["metadata"].get("tags", [])
    ]


@pytest.fixture(scope="session")
def nb():
    """Everything that the component cells define, as attributes: `nb.Config`, `nb.MiniVLM`, ..."""
    notebook = types.ModuleType("notebook_components")
    for source in component_cells():
        exec(compile(source, source.partition("\n")[0], "exec"), notebook.__dict__)
    return notebook


TINY = {
    "D_MODEL": 16, "N_HEADS": 2, "N_LAYERS": 2, "D_FF": 32, "VIS_CH": 8, "N_VIS": 4,
    "VOCAB_SIZE": 20, "MAX_SEQ": 8, "IMG_SIZE": 16, "init": "gpt2", "epochs": 3, "batch_size": 4,
    "captions_per_image": 2, "lr": 1e-2, "min_lr": 1e-5, "warmup": 2, "weight_decay": 0.01,
    "decay_all": False, "grad_clip": 1.0, "dropout": 0, "crop": 1, "flip": False, "jitter": 0,
    "label_smoothing": 0, "ema": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(nb):
    """A Config of a few thousand parameters, with all randomness of training turned off."""
    return nb.Config(**TINY)
