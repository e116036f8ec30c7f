"""Training data from WebDataset shards that are written here."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("webdataset", reason="the optional library webdataset is not installed")

PER_SHARD = 12


def jpeg(value, size=24):
    """A picture of one grey value, which it can be recognised by."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value,) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shard(path, samples):
    """`samples`: {file name: bytes}, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Four shards of twelve pictures; picture n has the grey value 5 n and the caption 'n n n'."""
    paths = []
    for s in range(4):
        samples = {}
        for n in range(s * PER_SHARD, (s + 1) * PER_SHARD):
            samples |= {f"{n:04}.jpg": jpeg(5 * n), f"{n:04}.txt": f"{n} {n} {n}".encode()}
        paths.append(tmp_path / f"part-{s:04}.tar")
        write_shard(paths[-1], samples)
    return paths


@pytest.fixture(scope="module")
def tokenizer(nb):
    return nb.train_tokenizer([f"{n} {n}" for n in range(60)], nb.Config(VOCAB_SIZE=300))


@pytest.fixture
def make(nb, shards, tokenizer):
    """ShardBatches over the four shards, 4 pictures a batch unless told otherwise."""

    def make(paths=shards, batch_size=4, cfg=None, **how):
        cfg = cfg or nb.Config(VOCAB_SIZE=300, IMG_SIZE=16, batch_size=batch_size)
        return nb.ShardBatches(paths, tokenizer, cfg, torch.device("cpu"), **how)

    return make


def numbers(batches, number, tokenizer):
    """The numbers of an epoch's pictures in order, having checked each against its caption."""
    seen = []
    for images, packed, total in batches.epoch(number):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
        assert total == batches.world * (packed.targets != 0).sum()
        for image, ids in zip(images, packed.inputs.tolist()):
            words = tokenizer.decode(ids).split()
            assert len(words) == 3 and len(set(words)) == 1
            assert abs(image.float().mean().item() - 5 * int(words[0])) < 2
            seen.append(int(words[0]))
    return seen


def test_every_sample_once(make, tokenizer):
    batches = make()
    assert len(batches) == 12
    seen = numbers(batches, 0, tokenizer)
    assert sorted(seen) == list(range(48)) and batches.skipped == 0
    shuffled = [n // PER_SHARD for n in seen[:12]]
    assert len(set(shuffled)) > 1  # the buffer mixes shards
    assert seen != sorted(seen)


def test_a_pattern_names_the_same_shards(make, shards, tokenizer):
    pattern = str(shards[0]).replace("0000.tar", "{0000..0003}.tar")
    assert numbers(make(paths=pattern), 0, tokenizer) == numbers(make(), 0, tokenizer)


def test_passes_differ_and_repeat(make, tokenizer):
    batches = make()
    first, second = numbers(batches, 0, tokenizer), numbers(batches, 1, tokenizer)
    assert first != second and sorted(first) == sorted(second)
    assert numbers(make(), 1, tokenizer) == second  # it depends on the number of the epoch alone


def test_parts_of_a_pass_and_resuming_at_one(make, tokenizer):
    """Four parts of one shard each; a fresh start at part 2 reads what would have come."""
    batches = make(parts=4)
    assert len(batches) == 3
    parts = [numbers(batches, number, tokenizer) for number in range(4)]
    assert all(len({n // PER_SHARD for n in part}) == 1 for part in parts)
    assert sorted(n for part in parts for n in part) == list(range(48))
    assert numbers(make(parts=4), 2, tokenizer) == parts[2]


def test_shared_by_ranks_and_workers(make, tokenizer):
    """Two ranks with two workers each: no sample twice, none left out, as many steps in both."""
    batches = [make(rank=rank, world=2, workers=2) for rank in (0, 1)]
    assert len(batches[0]) == len(batches[1]) == 12
    seen = [numbers(batch, 0, tokenizer) for batch in batches]
    assert len(seen[0]) == len(seen[1]) == 24
    assert sorted(seen[0] + seen[1]) == list(range(48))


def test_a_rank_that_runs_out_starts_over(make, shards, tokenizer):
    """Fewer samples in one rank's shards must not leave the others waiting for it."""
    for path in shards[1:]:  # the number of samples is judged by the first shard
        write_shard(path, {"0050.jpg": jpeg(250), "0050.txt": b"50 50 50"} | {
            f"{n:04}.{end}": jpeg(5 * n) if end == "jpg" else f"{n} {n} {n}".encode()
            for n in range(5)
            for end in ("jpg", "txt")
        })  # fmt: skip
    for rank in (0, 1):
        batches = make(rank=rank, world=2)
        assert len(numbers(batches, 0, tokenizer)) == 2 * len(batches) == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_skipped_and_counted(make, shards, tokenizer, capfd, workers):
    def name(n, ending):
        return f"{n:04}.{ending}"

    samples = {}
    for n in range(12):
        samples |= {name(n, "jpg"): jpeg(5 * n), name(n, "txt"): f"{n} {n} {n}".encode()}
    samples[name(3, "jpg")] = b"not a picture"
    samples[name(4, "jpg")] = samples[name(4, "jpg")][:100]
    samples[name(5, "txt")] = b"  "
    del samples[name(6, "txt")]
    write_shard(shards[0], samples)
    cut_short = shards[1].read_bytes()[: 5 * 512 * 4 + 700]
    shards[1].write_bytes(cut_short)
    batches = make(paths=shards[:3], batch_size=1, workers=workers)
    seen = set(numbers(batches, 0, tokenizer))
    whole = {n for n in range(12)} - {3, 4, 5, 6} | set(range(24, 36))
    assert whole <= seen and not seen & {3, 4, 5, 6}
    assert 12 in seen and 23 not in seen  # of the shard that is cut short, the beginning
    # The stream starts over to make up for what was lost, and so meets some of it twice.
    assert batches.skipped >= 5
    told = capfd.readouterr().out
    assert told.count("skipped:") == 3 and "part-000" in told


def test_shards_that_are_not_there(make, tmp_path):
    with pytest.raises(ValueError, match=r"no whole batch of readable samples in .*nowhere"):
        list(make(paths=[tmp_path / "nowhere.tar"]).epoch(0))


def test_a_batch_must_be_divisible(make):
    with pytest.raises(ValueError, match="batch_size 4 can't be shared by 3 processes"):
        make(world=3)


def test_the_training_loop_takes_them(nb, make):
    cfg = nb.Config(
        D_MODEL=16, N_HEADS=2, N_LAYERS=1, D_FF=16, VIS_CH=8, N_VIS=4, VOCAB_SIZE=300, IMG_SIZE=16,
        batch_size=4, epochs=4, lr=1e-2, warmup=2, ema=0, dropout=0, crop=1, flip=False, jitter=0,
    )  # fmt: skip
    _, history = nb.train_model(
        cfg, make(cfg=cfg, parts=2), lambda model: 0.0, torch.device("cpu"), torch.float32
    )
    assert len(history) == 4 and history[-1]["train"] < history[0]["train"] - 0.5


CHILD = """
import json, resource, sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
from conftest import component_cells
nb = {{}}
for cell in component_cells():
    exec(cell, nb)
tokenizer = nb["train_tokenizer"](["a grey picture"] * 3, nb["Config"](VOCAB_SIZE=300))
cfg = nb["Config"](VOCAB_SIZE=300, batch_size=16)
batches = nb["ShardBatches"]({shards!r}, tokenizer, cfg, torch.device("cpu"), buffer=100)
next(batches.epoch(0))  # whatever is loaded once is there now
status = open("/proc/self/status").read().split()
used = 1024 * int(status[status.index("VmData:") + 1])
resource.setrlimit(resource.RLIMIT_DATA, (used + {allowed}, used + {allowed}))
kept, pictures = [], 0
for images, packed, total in batches.epoch(0):
    pictures += len(images)
    if {keep}:
        kept.append(images)
print(json.dumps(pictures))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory, which is Linux's way")
def test_a_set_larger_than_memory(tmp_path):
    """70 MB of files, 83 MB of pictures once decoded, with 32 MB to work in."""
    rng = np.random.default_rng(0)
    noise = []
    for _ in range(8):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (184, 184, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        noise.append(file.getvalue())
    for s in range(4):
        samples = {}
        for i in range(550):
            samples |= {f"{s}-{i:04}.jpg": noise[i % 8], f"{s}-{i:04}.txt": b"a grey picture"}
        write_shard(tmp_path / f"{s}.tar", samples)
    shards = [str(tmp_path / f"{s}.tar") for s in range(4)]
    allowed = 32 * 2**20
    assert sum((tmp_path / f"{s}.tar").stat().st_size for s in range(4)) > 2 * allowed
    assert 4 * 550 * 3 * 112 * 112 > 2 * allowed

    def run(keep):
        code = CHILD.format(
            tests=str(Path(__file__).parent), shards=shards, allowed=allowed, keep=keep
        )  # fmt: skip
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    streamed = run(keep=False)
    assert streamed.returncode == 0, streamed.stderr
    assert json.loads(streamed.stdout.splitlines()[-1]) == 4 * 550 // 16 * 16
    hoarded = run(keep=True)  # the limit is real: whoever keeps the pictures runs into it
    assert hoarded.returncode != 0 and "memory" in hoarded.stderr.lower()
