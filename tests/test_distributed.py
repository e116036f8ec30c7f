"""Two processes (gloo, CPU) train as one does, and end together when one of them fails.

torchrun starts this file as a script to train in each process; pytest compares.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment(**more):
    """The environment of a child: no window, one thread for each process."""
    return os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"} | more


def train(nb, tiny, batch_norm):
    """Train on 17 pictures in batches of 8: the last batch has a picture for one process only.

    Returns the history as rows of (training loss, validation loss), and the weights.
    """
    cfg = nb.replace(tiny, batch_size=16, epochs=4)
    plain_block = nb.conv_block
    if not batch_norm:
        nb.conv_block = lambda a, b: torch.nn.Sequential(
            torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.ReLU()
        )
    device = nb.pick_device() if torch.distributed.is_initialized() else torch.device("cpu")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (17, 3, 16, 16), dtype=np.uint8)
    words = [[rng.integers(3, 20, rng.integers(1, 6)).tolist() for _ in range(2)] for _ in images]
    ids = [[[nb.BOS, *caption, nb.EOS] for caption in captions] for captions in words]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    batches = nb.CaptionBatches(images, ids, cfg, device, rank, world)

    def validate(model):
        return nb.evaluate_loss(model, images, ids, device, torch.float32)

    model, history = nb.train_model(
        cfg, batches, validate, device, torch.float32, rank=rank, world=world
    )
    nb.conv_block = plain_block
    return [(h["train"], h["val"]) for h in history], model.state_dict()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes made of both kinds of training."""
    out = tmp_path_factory.mktemp("two") / "out.pt"
    command = [*TORCHRUN, __file__, str(out)]
    done = subprocess.run(
        command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 0 prints") == 1 and "rank 1 prints" not in done.stdout
    return torch.load(out, weights_only=True)


def test_two_processes_train_as_one(nb, tiny, two_processes):
    """Without batch statistics, nothing may differ but the order of additions."""
    losses, weights = train(nb, tiny, batch_norm=False)
    both_losses, both_weights = two_processes["without batch norm"]
    assert losses[0][0] - losses[-1][0] > 0.2  # it learns, so the order of the batches matters
    np.testing.assert_allclose(both_losses, losses, rtol=1e-4)
    assert both_weights.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(both_weights[key], weight, rtol=1e-3, atol=1e-4)


def test_the_curve_is_the_same_with_batch_norm(nb, tiny, two_processes):
    """On a CPU each process normalises with its own half of the pictures: nearly the same curve."""
    losses, weights = train(nb, tiny, batch_norm=True)
    both_losses, both_weights = two_processes["as it is"]
    np.testing.assert_allclose(both_losses, losses, atol=0.1)
    assert both_weights.keys() == weights.keys()


FAIL = """
if rank == 1 and "FAIL" in os.environ:
    whole_epoch = batches.epoch

    def epoch(number):
        if number == 3:
            raise RuntimeError("picture 7 is upside down")
        return whole_epoch(number)

    batches.epoch = epoch
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the notebook up to the end of its training, and two dozen scenes."""
    folder = tmp_path_factory.mktemp("work")
    notebook = json.loads((ROOT / "SupraVL_Nano.ipynb").read_text(encoding="utf-8"))
    cells = notebook["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    last = next(i for i, text in enumerate(sources) if "destroy_process_group()" in text)
    real = next(i for i, text in enumerate(sources) if "training_file = checkpoint_path(" in text)

    def code(source):
        return {"cell_type": "code", "metadata": {}, "source": source, "outputs": []} | {
            "execution_count": None,
            "id": f"test-{abs(hash(source)) % 10**8}",
        }

    end = 'print("rank", rank, "goes on alone")'
    notebook["cells"] = [*cells[:real], code(FAIL), *cells[real : last + 1], code(end)]
    (folder / "notebook.ipynb").write_text(json.dumps(notebook), encoding="utf-8")

    scenes, data = ROOT / "assets" / "scenes", folder / "scenes"
    pictures = "Flicker8k_Dataset"
    (data / pictures).mkdir(parents=True)
    for split in ("train", "dev", "test"):
        name = f"Flickr_8k.{split}Images.txt"
        names = (scenes / name).read_text().split()[:8]
        (data / name).write_text("\n".join(names))
        for picture in names:
            (data / pictures / picture).symlink_to(scenes / pictures / picture)
    captions = (scenes / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in captions if (data / pictures / line.split("#")[0]).exists()]
    (data / "Flickr8k.token.txt").write_text("\n".join(kept), encoding="utf-8")
    return folder


def test_the_notebook_itself_fails_as_one_and_goes_on(workplace, nb):
    """torchrun runs the very notebook; a process that fails ends all; the next run resumes."""
    command = [*TORCHRUN, "--no-python", sys.executable, "-m", "IPython", "notebook.ipynb"]
    where = {"FLICKR8K_DIR": str(workplace / "scenes"), "CUDA_VISIBLE_DEVICES": ""}
    where["IPYTHONDIR"] = str(workplace / "ipython")

    def run(**more):
        return subprocess.run(
            command, cwd=workplace, env=environment(**where, **more), capture_output=True, text=True
        )

    failed = run(FAIL="1")
    assert failed.returncode != 0
    assert "Process 1 of 2 failed (RuntimeError: picture 7 is upside down)" in failed.stderr
    assert "goes on alone" not in failed.stdout

    resumed = run()
    assert resumed.returncode == 0, resumed.stderr
    epochs = [int(n) for n in re.findall(r"^epoch +(\d+) +training loss", resumed.stdout, re.M)]
    assert 2 <= epochs[0] <= 4  # not from the start
    last = nb.PRESETS["nano"].epochs
    assert epochs == list(range(epochs[0], last + 1))  # and each epoch reported once, by rank 0
    assert resumed.stdout.count("goes on alone") == 1
    assert "rank 0 goes on alone" in resumed.stdout


def test_the_notebook_trains_on_shards(workplace):
    """`SUPRAVL_SHARDS` makes the very notebook train on a stream, in 24 parts, and resume."""
    webdataset = pytest.importorskip("webdataset")
    scenes = ROOT / "assets" / "scenes"
    files = sorted((scenes / "Flicker8k_Dataset").glob("*.jpg"))[:200]
    for number in range(2):
        with webdataset.TarWriter(str(workplace / f"shard-{number:04}.tar")) as shard:
            for file in files[100 * number : 100 * number + 100]:
                sample = {"jpg": file.read_bytes(), "txt": "a dog runs on the beach"}
                shard.write({"__key__": file.stem} | sample)
    more = {
        "SUPRAVL_SHARDS": str(workplace / "shard-{0000..0001}.tar"),
        "FLICKR8K_DIR": str(workplace / "scenes"), "IPYTHONDIR": str(workplace / "ipython"),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "IPython", "notebook.ipynb"]
    done = subprocess.run(
        command, cwd=workplace, env=environment(**more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    reported = r"^epoch +(\d+) +training loss +([\d.]+)"
    epochs = re.findall(reported, done.stdout, re.M)
    assert [int(epoch) for epoch, _ in epochs] == list(range(1, 25)), done.stdout[-2000:]
    losses = [float(loss) for _, loss in epochs]
    assert losses[-1] < losses[0] - 0.5, "24 steps of the warm-up should learn this much"
    assert "rank 0 goes on alone" in done.stdout
    assert list((workplace / "checkpoints").glob("shards-*.pt"))


if __name__ == "__main__":
    from conftest import TINY, component_cells

    class Notebook:
        """The components as attributes that can be replaced."""

        def __getattr__(self, name):
            return names[name]

        def __setattr__(self, name, value):
            names[name] = value

    names = {"__name__": "components"}
    for cell in component_cells():
        exec(cell, names)
    nb = Notebook()
    rank, _ = nb.join_processes(torch.device("cpu"))
    print(f"rank {rank} prints")
    tiny = nb.Config(**TINY)
    results = {
        name: train(nb, tiny, batch_norm)
        for name, batch_norm in (("without batch norm", False), ("as it is", True))
    }
    if rank == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.destroy_process_group()
