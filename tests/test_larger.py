"""Sections 15 and 16: the module that takes the code along, several processes, shards.

torchrun starts this file as a script to train in each process; pytest compares.
"""

import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import NOTEBOOK, load_components
from PIL import Image

CPU = torch.device("cpu")
CHILD = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


# The code, taken along

BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name))

sys.meta_path.insert(0, Missing())
"""


def run_python(folder, code, missing=()):
    """`python -c` in `folder`, where the modules named are not installed."""
    command = [sys.executable, "-c", BLOCK.format(missing=set(missing)) + code]
    env = {key: value for key, value in CHILD.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_module_loads_and_captions_without_the_notebook(nb, make, tmp_path):
    """In an environment of torch, torchvision, pillow, tokenizers, safetensors alone."""
    nb.write_module(tmp_path / "supravl.py", "from_pretrained", "caption", notebook=NOTEBOOK)
    model = make(VOCAB_SIZE=300)
    model.tokenizer = nb.train_tokenizer(["a dog and a cat"], 300)
    model.save_pretrained(tmp_path / "saved")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    code = "import supravl as s; print(s.MiniVLM.from_pretrained('saved').caption('red.png'))"
    done = run_python(tmp_path, code, ["matplotlib", "IPython", "webdataset", "pycocoevalcap"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(model.caption(tmp_path / "red.png"))
    assert run_python(tmp_path, "import IPython", ["IPython"]).returncode  # they are hidden indeed


def test_the_module_of_all_and_its_imports(nb, tmp_path):
    nb.write_module(tmp_path / "everything.py", notebook=NOTEBOOK)
    nb.write_module(tmp_path / "little.py", "Config", "attention", notebook=NOTEBOOK)
    little = (tmp_path / "little.py").read_text()
    assert "def attention" in little and "class MiniVLM" not in little
    assert not any(name in little for name in ("torchvision", "tokenizers", "safetensors"))
    names = "write_module, train_everywhere, MiniVLM, CiderD, train_self_critical, first_nonfinite"
    code = f"from everything import {names}; import little; print(little.Config().D_MODEL)"
    done = run_python(tmp_path, code)
    assert done.returncode == 0 and done.stdout == "128\n", done.stderr
    with pytest.raises(KeyError, match="no_such_name"):
        nb.write_module(tmp_path / "none.py", "no_such_name", notebook=NOTEBOOK)


# Several processes

BATCH = {
    "epochs": 3, "batch_size": 8, "captions_per_view": 2, "lr": 1e-2, "warmup": 2, "ema": 0.9,
    "crop": 1, "flip": 0, "jitter": 0, "naming": 0.05,
}  # fmt: skip


def small(nb):
    return nb.Config(
        D_MODEL=16, N_HEADS=2, N_LAYERS=1, D_FF=16, VIS_CH=8, N_VIS=4, VOCAB_SIZE=259, MAX_SEQ=24,
        IMG_SIZE=16,
    )  # fmt: skip


def child(folder, fails):
    """What each process runs: training on sixteen pictures with captions of equal length."""
    nb = load_components()
    draws, rank = [], int(os.environ["RANK"])
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    words = ("red", "cat", "dog", "sun", "sea", "man")
    captions = [[f"the {words[i % 6]} and {words[(i + k) % 5]}" for k in (0, 1)] for i in range(16)]
    split = nb.Split(list("abcdefghijklmnop"), images, captions, False)
    asked = []

    def get_data(size):
        open(folder / f"asked-{rank}", "w").close()
        asked.append((folder / "asked-0").exists())  # the first process comes first
        return "own", {"train": split, "dev": split, "test": split}

    def make_augment(recipe, size):
        return lambda picture: (draws.append(torch.rand(1).item()), picture)[1]

    def conv_block(a, b):  # no batch statistics, which on CPUs are each process's own
        return torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.ReLU())

    def validate(model, *data):
        assert rank == 0
        calls.append(plain_validate(model, *data))
        if fails and len(calls) == 2:
            raise ConnectionError("the machine went away")
        return calls[-1]

    calls, plain_validate = [], nb.validate
    nb.get_data, nb.make_augment, nb.conv_block, nb.validate = (
        get_data, make_augment, conv_block, validate,
    )  # fmt: skip
    recipe = nb.Recipe(**BATCH)
    model, history = nb.train_everywhere(recipe, small(nb), folder / "model", folder / "points")
    print(f"process {rank} prints")
    assert asked == [True]
    losses = [(h["train"], h["val"]) for h in history]
    torch.save([model.state_dict(), losses, draws], folder / f"rank{rank}.pt")


def torchrun(folder, fails=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, str(folder), "fails" * fails]
    return subprocess.run(command, env=CHILD, capture_output=True, text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """One process, this one, uninterrupted; and two that break off after an epoch and go on."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for key, value in (alone | {"MASTER_PORT": str(free.getsockname()[1])}).items():
            patch.setenv(key, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        free.close()
        own = sys.modules.get("notebook_components")  # which what workers pickle belongs to
        patch.setitem(sys.modules, "notebook_components", own)
        child(one, fails=False)
    broken = torchrun(two, fails=True)
    assert broken.returncode != 0 and "the machine went away" in broken.stderr
    done = torchrun(two)
    assert done.returncode == 0, done.stderr
    assert "1 epochs are done" in done.stdout
    assert "process 0 prints" in done.stdout and "process 1 prints" not in done.stdout
    assert len(list((two / "points").glob("*.pt"))) == 1
    return one, two


def test_two_processes_train_as_one(two):
    """Also when they break off and go on: nothing differs but the order of additions."""
    weights, losses, _ = torch.load(two[0] / "rank0.pt")
    both_weights, both_losses, _ = torch.load(two[1] / "rank0.pt")
    assert losses[0][0] - losses[-1][0] > 0.3  # it learns, so the order of the batches matters
    assert [x[1] for x in both_losses] == pytest.approx([x[1] for x in losses], rel=1e-3)
    for key, weight in weights.items():
        torch.testing.assert_close(both_weights[key], weight, rtol=1e-2, atol=1e-3)


def test_both_end_with_the_same_weights_from_other_random_numbers(two, nb):
    first, second = (torch.load(two[1] / f"rank{rank}.pt") for rank in (0, 1))
    for key, weight in first[0].items():
        assert torch.equal(weight, second[0][key])
    assert len(first[2]) == len(second[2]) == 2 * 16 // 2  # two epochs after going on
    assert not set(first[2]) & set(second[2])
    saved = nb.read_weights(two[1] / "model" / "model.safetensors", lambda: plain(nb))
    assert all(torch.equal(first[0][key], value) for key, value in saved.items())


def plain(nb):
    model = nb.MiniVLM(small(nb))
    for block in ("conv1", "conv2", "conv3"):
        layers = getattr(model.vis_enc, block)
        setattr(model.vis_enc, block, torch.nn.Sequential(layers[0], torch.nn.ReLU()))
    return model


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shared_buckets_deal_out_every_view(nb, world):
    lengths = [(i % 5 + 1, 2) for i in range(11)]
    token_ids = [[torch.ones(2 + n, dtype=torch.int64) for n in own] for own in lengths]
    recipe = nb.Recipe(**BATCH | {"captions_per_view": 1, "batch_size": 4})
    whole = nb.LengthBuckets(token_ids, recipe)
    whole.epoch = 3
    batches = list(whole)
    shared = [nb.SharedBuckets(nb.LengthBuckets(token_ids, recipe), r, world) for r in range(world)]
    for part in shared:
        part.epoch = 3
        assert len(part) == len(batches)
    for batch, *parts in zip(batches, *shared, strict=True):
        assert all(parts)
        views = [view for part in parts for view in part]
        assert {v[0] for v in views} == {v[0] for v in batch}
        assert len(views) == max(len(batch), world)


# Shards


def jpeg(value):
    """A picture of one grey value, which it can be recognised by."""
    file = io.BytesIO()
    Image.new("RGB", (30, 24), (value,) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path, samples):
    """`samples`: {file name: bytes}, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(n):
    return {
        f"part/{n:04}.jpg": jpeg(5 * n),
        f"part/{n:04}.txt": f" {n} {n}\n".encode(),
        f"part/{n:04}.json": b'{"status": "success"}',
    }  # as img2dataset, and so LAION, has it


@pytest.fixture
def shards(tmp_path):
    """Four shards of twelve pictures; picture n has the grey value 5 n and the caption 'n n'."""
    paths = [tmp_path / f"{s:04}.tar" for s in range(4)]
    for s, path in enumerate(paths):
        write_tar(path, {k: v for n in range(12 * s, 12 * s + 12) for k, v in sample(n).items()})
    return [str(path) for path in paths]


@pytest.fixture
def stream(nb, shards):
    tokenizer = nb.train_tokenizer([f"{n} {n}" for n in range(60)], 300)
    cfg = nb.replace(small(nb), VOCAB_SIZE=300)

    def start(shards=shards, per_epoch=4, pictures=48, batch=4, **how):
        recipe = nb.Recipe(**BATCH | {"batch_size": batch, "captions_per_view": 1})
        return nb.ShardStream(tokenizer, recipe, cfg, shards, per_epoch, pictures, **how)

    return start


def numbers(stream, epoch=0, workers=0, seed=0):
    """The numbers of an epoch's pictures in order, having checked each against its caption."""
    torch.manual_seed(seed)
    loader, seen = stream.loader(workers), []
    loader.batch_sampler.epoch = epoch
    for images, owner, ids, named in loader:
        assert images.dtype == torch.uint8 and images.shape == (stream.size, 3, 16, 16)
        assert owner.tolist() == list(range(stream.size)) and named.shape == (stream.size, 0)
        for image, row in zip(images, ids.tolist()):
            first, second = stream.tokenizer.decode(row).split()
            assert first == second and abs(image.float().mean().item() - 5 * int(first)) < 2
            seen.append(int(first))
    assert len(seen) == len(stream) and len(loader) == stream.steps
    return seen


def test_every_sample_once_shuffled_the_same_way_again(stream):
    seen = numbers(stream())
    assert sorted(seen) == list(range(48)) and seen != sorted(seen)
    assert len({n // 12 for n in seen[:12]}) > 1  # the buffer mixes shards
    assert seen == numbers(stream()) and seen != numbers(stream(), seed=1)
    one = stream()
    numbers(one)
    assert one.skipped.sum() == 0


def test_epochs_walk_through_the_shards_and_resume_at_one(stream):
    """Two shards an epoch; a fresh start at epoch 1 reads what would have come."""
    walk = stream(per_epoch=2, pictures=24)
    parts = [numbers(walk, epoch) for epoch in range(3)]
    assert sorted(parts[0] + parts[1]) == list(range(48))
    assert sorted(parts[2]) == sorted(parts[0])
    assert numbers(stream(per_epoch=2, pictures=24), 1) == parts[1]


def test_ranks_and_workers_share_the_shards(stream):
    seen = [numbers(stream(rank=rank, world=2), workers=2) for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 24
    assert sorted(seen[0] + seen[1]) == list(range(48))


def test_with_more_workers_than_shards_none_is_without(stream):
    assert sorted(numbers(stream(per_epoch=2, pictures=24), workers=5, seed=3)) == sorted(
        numbers(stream(per_epoch=2, pictures=24))
    )


def break_shards(shards):
    """Six pictures of shard 0 and the end of shard 1 are lost, shard 2 is no tar at all."""
    files = {k: v for n in range(12) for k, v in sample(n).items()}
    files["part/0001.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0"  # a program, which Pillow would run
    files["part/0003.jpg"] = b"not a picture"
    files["part/0004.jpg"] = files["part/0004.jpg"][:100]
    files["part/0005.txt"] = b" \n "
    files["part/0007.txt"] = b"\xff\xfe"
    del files["part/0006.txt"], files["part/0008.jpg"]
    write_tar(shards[0], files)
    whole = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(whole[: 512 * 4 * 3 * 5 + 700])
    Path(shards[2]).write_bytes(b"<html>not found</html>" * 100)
    return set(range(12)) - {1, 3, 4, 5, 6, 7, 8} | set(range(36, 48))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_broken_is_counted_and_skipped(stream, shards, workers, capfd):
    good = break_shards(shards)
    one = stream(batch=1)
    seen = set(numbers(one, workers=workers))
    assert good <= seen and not seen & {1, 3, 4, 5, 6, 7, 8, *range(24, 36)}
    assert 12 in seen and 23 not in seen  # of a shard that is cut short, the beginning
    assert one.skipped.sum() >= 9  # seven samples and two shards, in the first round
    assert "0002.tar breaks off" in capfd.readouterr().out


def test_the_count_is_exact_where_nothing_is_read_twice(stream, shards):
    good = break_shards(shards)
    one = stream([shards[0], shards[3]], per_epoch=2, pictures=len(good), batch=1)
    assert set(numbers(one)) <= good and one.skipped.sum() <= 7
    one = stream(shards[:1], per_epoch=1, pictures=5, batch=1)
    numbers(one)  # stops at the fifth that is good: 0, 2, 9, 10, 11
    assert one.skipped.sum() == 7


def test_shards_that_hold_nothing_are_an_error(stream, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        numbers(stream([str(tmp_path / "nowhere.tar")], per_epoch=1))
    with pytest.raises(ValueError, match="per_epoch"):
        stream(per_epoch=1, world=2)
    with pytest.raises(ValueError, match="per_epoch"):
        stream(per_epoch=5)


def test_a_shard_comes_from_the_network(nb, shards):
    files = list(nb.read_shard(Path(shards[0]).resolve().as_uri()))
    assert [list(f) for f in files] == [["jpg", "txt", "json"]] * 12
    assert list(nb.read_shard("http://127.0.0.1:9/0000.tar")) == [{}]  # nobody is there


def test_the_training_loop_takes_them(nb, stream):
    torch.manual_seed(0)
    one = stream(per_epoch=2, pictures=24)
    loss_of = nb.CaptionLoss(nb.MiniVLM(one.cfg))
    told = []
    start = one.loader()
    _, history = nb.train(
        loss_of, start, one.recipe, lambda model: told.append(start.batch_sampler.epoch) or 0.0,
        torch.float32,
    )  # fmt: skip
    assert told == [0, 1, 2] and history[-1]["train"] < history[0]["train"] - 0.3


# When it goes wrong


def test_the_first_bad_layer_is_found(nb, make, img):
    model, ids = make(), torch.tensor([[1, 5, 6]] * len(img))
    batch = ((img * 20 + 100).clamp(0, 255).byte(), torch.arange(len(img)), ids, torch.zeros(6, 0))
    loss_of = nb.CaptionLoss(model)
    assert nb.first_nonfinite(loss_of, *batch) is None
    model.blocks[1].attn.proj.weight.data[0, 0] = torch.inf
    assert nb.first_nonfinite(loss_of, *batch) == "model.blocks.1.attn.proj"
    assert not any(module._forward_hooks for module in loss_of.modules())


if __name__ == "__main__":
    child(Path(sys.argv[1]), fails=sys.argv[2:] == ["fails"])
