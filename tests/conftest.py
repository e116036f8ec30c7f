"""What the tests share: the notebook's own cells, and a model small enough to run in no time."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")  # no window
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on more
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = Path(os.environ.get("SUPRAVL_NOTEBOOK") or ROOT / "SupraVL_Nano.ipynb")


def component_cells():
    """The sources of the notebook's component cells, in order."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "component" in cell["metadata"].get("tags", [])
    ]


def load_components():
    """A module of everything that the component cells define."""
    notebook = types.ModuleType("notebook_components")
    sys.modules[notebook.__name__] = notebook  # what is pickled between processes needs a home
    for source in component_cells():
        exec(compile(source, source.partition("\n")[0], "exec"), notebook.__dict__)
    return notebook


@pytest.fixture(scope="session")
def nb():
    """Everything that the component cells define, as attributes: `nb.Config`, `nb.MiniVLM`, ..."""
    return load_components()


@pytest.fixture(scope="session")
def tiny(nb):
    """A Config of a few thousand parameters."""
    return nb.Config(
        D_MODEL=16, N_HEADS=2, N_LAYERS=2, D_FF=32, VIS_CH=8, N_VIS=4, VOCAB_SIZE=20, MAX_SEQ=8,
        IMG_SIZE=16,
    )  # fmt: skip


@pytest.fixture(scope="session")
def numbers(nb):
    """A tokenizer of `tiny`'s vocabulary, whose texts are ids: "5 7" is 5 and 7."""
    words = {"<pad>": nb.PAD, "<bos>": nb.BOS, "<eos>": nb.EOS} | {str(i): i for i in range(3, 20)}
    tokenizer = nb.Tokenizer(nb.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = nb.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture(scope="session")
def make(nb, tiny):
    """A random model with opinions: `make(seed, VOCAB_SIZE=...)`."""
    torch = nb.torch

    def build(seed=0, **how):
        torch.manual_seed(seed)
        model = nb.MiniVLM(nb.replace(tiny, **how)).eval()
        with torch.no_grad():  # let pictures differ, blocks matter, and some sentences end
            model.tok_emb.weight.normal_().mul_(0.5)[nb.EOS].mul_(1.5)
            model.pos_emb.weight.normal_()
            model.vis_enc.proj.weight.normal_().mul_(2)
            for block in model.blocks:
                for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                    layer.weight.normal_().mul_(0.7)
        return model

    return build


def plain_greedy(model, img, max_new=48):
    """The likeliest token of one picture (1, 3, H, W) at each step, all read anew: ids."""
    import torch

    ids = [1]
    with torch.no_grad():
        img_tokens = model.vis_enc(img)
        while len(ids) <= min(max_new, model.cfg.MAX_SEQ) and ids[-1] != 2:
            ids.append(model.text_logits(img_tokens, torch.tensor([ids]))[0, -1].argmax().item())
    return ids[1:]


@pytest.fixture(scope="session")
def pictures(nb):
    """Six pictures of a few colours that a random encoder can tell apart, uint8 (6, 3, 16, 16)."""
    generator = nb.torch.Generator().manual_seed(0)
    colours = nb.torch.randint(0, 256, (6, 3, 2, 2), generator=generator, dtype=nb.torch.uint8)
    return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="session")
def img(nb, pictures):
    """The same pictures as generation takes them."""
    return nb.normalise(pictures)
