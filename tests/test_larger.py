"""Sections 15 and 16: the module that takes the code along, several processes, shards.

torchrun starts this file as a script to train in each process; pytest compares.
"""

import io
import os
import socket
import subprocess
import sys
import tarfile
import types
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
    "epochs": 3, "batch_size": 8, "lr": 1e-2, "warmup": 2, "flip": 0.5,
}  # fmt: skip


def small(nb):
    return nb.Config(
        D_MODEL=16, N_HEADS=2, N_LAYERS=1, D_FF=16, VIS_CH=8, N_VIS=4, VOCAB_SIZE=259, MAX_SEQ=24,
        IMG_SIZE=16,
    )  # fmt: skip


def child(folder, what="pictures"):
    """What each process runs: training on 16 pictures with captions of equal length."""
    nb = load_components()
    draws, rank = [], int(os.environ["RANK"])
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    words = ("red", "cat", "dog", "sun", "sea", "man")
    captions = [[f"the {words[i % 6]} and {words[(i + k) % 5]}" for k in (0, 1)] for i in range(16)]
    split = nb.Split(list("abcdefghijklmnop"), images, captions)
    asked = []

    def get_data(size):
        open(folder / f"asked-{rank}", "w").close()
        asked.append((folder / "asked-0").exists())  # the first process comes first
        return "own", {"train": split, "dev": split, "test": split}

    def mirror(share):
        """Draws as the real one does, but turns nothing; none for what is only validated."""
        return lambda picture: (share and draws.append(torch.rand(1).item()), picture)[1]

    def conv_block(a, b):  # no batch statistics, which on CPUs are each process's own
        return torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, stride=2, padding=1), torch.nn.ReLU())

    def validate(model, split):
        assert rank == 0
        calls.append(plain_validate(model, split))
        if what == "fails" and len(calls) == 2:
            raise ConnectionError("the machine went away")
        return calls[-1]

    calls, plain_validate = [], nb.validate
    nb.get_data, nb.conv_block, nb.validate = get_data, conv_block, validate
    nb.v2 = types.SimpleNamespace(RandomHorizontalFlip=mirror, functional=nb.v2.functional)
    recipe = nb.Recipe(**BATCH)
    if what != "shards":
        model, history = nb.train_everywhere(recipe, small(nb), folder / "model", folder / "points")
        print(f"process {rank} prints")
        assert asked == [True]
        losses = [(h["train"], h["val"]) for h in history]
        torch.save([model.state_dict(), losses, draws], folder / f"rank{rank}.pt")
    else:  # two epochs of six steps
        shards = sorted(map(str, folder.glob("*.tar")))
        read, read_shard = [], nb.read_shard
        nb.read_shard = lambda shard, **how: (read.append(shard), read_shard(shard, **how))[1]
        recipe, how = nb.replace(recipe, epochs=2), {"shards": shards, "per_epoch": 2, "steps": 6}
        model, _ = nb.train_everywhere(recipe, small(nb), folder / "more", folder / "more", **how)
        torch.save([model.state_dict(), read, draws], folder / f"shards{rank}.pt")


def torchrun(folder, what="pictures"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, str(folder), what]
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
        child(one)
    broken = torchrun(two, "fails")
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
    assert len(first[2]) == len(second[2]) == 2 * 16  # of 32, twice after going on
    assert not set(first[2]) & set(second[2])
    saved = nb.load_file(two[1] / "model" / "model.safetensors")
    assert all(torch.equal(first[0][key], value) for key, value in saved.items())


def test_processes_share_the_shards(two):
    """Each reads its own ones once an epoch, and all of them, and they stay in step."""
    write_shards(two[1])
    done = torchrun(two[1], "shards")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(two[1] / f"shards{rank}.pt") for rank in (0, 1))
    for own, places in ((first, "02"), (second, "13")):
        assert sorted(Path(shard).stem[-1] for shard in own[1]) == sorted(places * 2)
        assert len(own[2]) == 2 * 24  # a picture of a shard once an epoch
    assert not set(first[2]) & set(second[2])
    for key, weight in first[0].items():
        assert torch.equal(weight, second[0][key])


def plain(nb):
    model = nb.MiniVLM(small(nb))
    for block in ("conv1", "conv2", "conv3"):
        layers = getattr(model.vis_enc, block)
        setattr(model.vis_enc, block, torch.nn.Sequential(layers[0], torch.nn.ReLU()))
    return model


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


def write_shards(folder):
    """Four shards of twelve pictures; picture n has the grey value 5 n and the caption 'n n'."""
    paths = [folder / f"{s:04}.tar" for s in range(4)]
    for s, path in enumerate(paths):
        write_tar(path, {k: v for n in range(12 * s, 12 * s + 12) for k, v in sample(n).items()})
    return [str(path) for path in paths]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


@pytest.fixture
def stream(nb, shards):
    tokenizer = nb.train_tokenizer([f"{n} {n}" for n in range(60)], 300)
    cfg = nb.replace(small(nb), VOCAB_SIZE=300)

    def start(shards=shards, per_epoch=4, steps=12, batch=4, **how):
        recipe = nb.Recipe(**BATCH | {"batch_size": batch})
        return nb.ShardStream(tokenizer, recipe, cfg, shards, per_epoch, steps, **how)

    return start


def numbers(stream, epoch=0, seed=0):
    """The numbers of an epoch's pictures in order, having checked each against its caption."""
    torch.manual_seed(seed)
    stream.sampler.set_epoch(epoch)
    seen = []
    for images, ids, places in stream:
        assert images.dtype == torch.uint8 and images.shape == (stream.size, 3, 16, 16)
        assert len(ids) == len(places) == stream.size
        for image, row in zip(images, ids.tolist()):
            first, second = stream.tokenizer.decode(row).split()
            assert first == second and abs(image.float().mean().item() - 5 * int(first)) < 2
            seen.append(int(first))
    assert len(seen) == len(stream) * stream.size
    return seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [0, 2, 5])
def test_every_sample_once_shuffled_the_same_way_again(stream, workers):
    one = stream(num_workers=workers)
    seen = numbers(one)
    assert sorted(seen) == list(range(48)) and one.broken == 0
    places = [n // 12 for n in seen]  # shards, and pictures within each, are shuffled
    assert sorted(places) != places and seen[:12] != sorted(seen[:12])
    assert seen == numbers(stream(num_workers=workers))
    assert seen != numbers(stream(num_workers=workers), seed=1)


def test_epochs_walk_through_the_shards_and_resume_at_one(stream):
    """Two shards an epoch; a fresh start at epoch 1 reads what would have come."""
    walk = stream(per_epoch=2, steps=6)
    parts = [numbers(walk, epoch) for epoch in range(3)]
    assert sorted(parts[0] + parts[1]) == list(range(48))
    assert sorted(parts[2]) == sorted(parts[0])
    assert numbers(stream(per_epoch=2, steps=6), 1) == parts[1]


def test_an_epoch_can_begin_among_the_last_shards(stream):
    walk = stream(per_epoch=3, steps=9)
    parts = [{n // 12 for n in numbers(walk, epoch)} for epoch in range(4)]
    assert [len(part) for part in parts] == [3] * 4
    assert len(set(map(frozenset, parts))) == 4  # each leaves out another one


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
    one = stream(steps=48, batch=1, num_workers=workers)
    seen = set(numbers(one))
    assert good <= seen and not seen & {1, 3, 4, 5, 6, 7, 8, *range(24, 36)}
    assert 12 in seen and 23 not in seen  # of a shard that is cut short, the beginning
    assert one.broken >= 9  # seven samples and two shards, in the first round
    assert "0002.tar breaks off" in capfd.readouterr().out


def test_the_count_is_exact_where_nothing_is_read_twice(stream, shards):
    good = break_shards(shards)
    one = stream([shards[0], shards[3]], per_epoch=2, steps=17, batch=1)
    assert set(numbers(one)) == good and one.broken == 7
    one.steps = 18
    numbers(one)
    assert one.broken == 7 + 7 + (7 if one.shards[0] == shards[0] else 0)


def test_shards_that_hold_too_little_are_an_error(stream, shards, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        numbers(stream([str(tmp_path / "nowhere.tar")], per_epoch=1))
    with pytest.raises(ValueError, match="too few"):
        numbers(stream([]))
    numbers(stream(shards[:1], per_epoch=1, steps=9 * 3))
    with pytest.raises(ValueError, match="too few"):
        numbers(stream(shards[:1], per_epoch=1, steps=9 * 3 + 1))


def test_a_shard_comes_from_the_network(nb, shards):
    pictures, captions, broken = nb.read_shard(Path(shards[0]).as_uri(), 16)
    assert pictures.shape == (12, 3, 16, 16) and broken == 0
    assert captions == [f"{n} {n}" for n in range(12)]
    _, captions, broken = nb.read_shard("http://127.0.0.1:9/0000.tar", 16)  # nobody is there
    assert captions == [] and broken == 1


def test_other_names_and_layouts(nb, tmp_path):
    """Capitals, PNG, a folder's own entry, dots in a name; of two pictures none is taken."""
    (tmp_path / "part").mkdir()
    files = {"a.JPG": jpeg(10), "a.txt": b"one\n\ttwo", "b.1.jpg": jpeg(20), "b.1.txt": b"three"}
    Image.new("L", (9, 9), 30).save(png := io.BytesIO(), "PNG")
    files |= {"c.png": png.getvalue(), "c.txt": b"four"}
    files |= {"d.png": png.getvalue(), "d.jpg": jpeg(40), "d.txt": b"five"}
    for name, data in files.items():
        (tmp_path / "part" / name).write_bytes(data)
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "part", "part")  # the folder, then its files by name
    pictures, captions, broken = nb.read_shard(tmp_path / "some.tar.gz", 16)
    assert captions == ["one two", "three", "four"] and broken == 1
    assert pictures.float().mean((1, 2, 3)).round().tolist() == [10, 20, 30]


def test_each_picture_may_be_mirrored(nb, stream, monkeypatch):
    asked = []

    def mirror(share):
        return lambda picture: asked.append(share) or 255 - picture

    def brightness():
        return torch.cat([batch.images for batch in stream()]).float().mean().item()

    plain = brightness()
    monkeypatch.setattr(nb.v2, "RandomHorizontalFlip", mirror)
    assert brightness() == pytest.approx(255 - plain)  # all pictures of the shards, once
    assert asked == [BATCH["flip"]] * 48


def test_the_training_loop_takes_them(nb, stream):
    torch.manual_seed(0)
    one = stream(per_epoch=2, steps=6)
    loss_of = nb.CaptionLoss(nb.MiniVLM(one.cfg))
    told, recipe = [], nb.Recipe(**BATCH)
    _, history = nb.train(
        loss_of, one, recipe, lambda model: told.append(one.epoch) or 0.0, torch.float32
    )
    assert told == [0, 1, 2] and history[-1]["train"] < history[0]["train"] - 0.3


# When it goes wrong


def test_the_first_bad_layer_is_found(nb, make, img):
    model, ids = make(), torch.tensor([[1, 5, 6]] * len(img))
    batch = ((img * 20 + 100).clamp(0, 255).byte(), ids, torch.arange(len(img)))
    loss_of = nb.CaptionLoss(model)
    assert nb.first_nonfinite(loss_of, *batch) is None
    model.blocks[1].attn.proj.weight.data[0, 0] = torch.inf
    assert nb.first_nonfinite(loss_of, *batch) == "model.blocks.1.attn.proj"
    assert not any(module._forward_hooks for module in loss_of.modules())
    assert not torch.nn.modules.module._global_forward_hooks


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
