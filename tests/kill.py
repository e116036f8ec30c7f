"""Kill -9 at random moments; what comes of it afterwards must be what comes without.

    python tests/kill.py [KILLS IN TRAINING] [IN SELF-CRITICAL TRAINING] [IN EACH WRITING OF A FILE]

Not run by pytest. Everything runs in forks of this process, on a few tiny pictures.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from conftest import load_components  # noqa: E402

nb, CPU, dice = load_components(), torch.device("cpu"), random.Random(0)
WORDS = "a dog cat boat runs sits sails on the grass lake".split()


def world():
    """(config, recipe, split, tokenizer)"""
    cfg = nb.Config(
        D_MODEL=16, N_HEADS=2, N_LAYERS=1, D_FF=32, VIS_CH=8, N_VIS=4, VOCAB_SIZE=270, MAX_SEQ=16,
        IMG_SIZE=16,
    )  # fmt: skip
    recipe = nb.Recipe(epochs=6, batch_size=20, warmup=3, scst_epochs=5, scst_lr=1e-3)
    words = random.Random(1)
    captions = [[" ".join(words.choices(WORDS, k=5)) for _ in range(3)] for _ in range(60)]
    tokenizer = nb.train_tokenizer([c for own in captions for c in own], 270)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    return cfg, recipe, nb.Split(list(range(60)), images, captions), tokenizer


def fingerprint(model):
    parts = [value.numpy().tobytes() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train(folder):
    cfg, recipe, split, tokenizer = world()
    loss_of = nb.CaptionLoss(nb.MiniVLM(cfg, tokenizer=tokenizer))
    loader = nb.make_loader(split, tokenizer, recipe)
    check = lambda model: nb.validate(model, split)  # noqa: E731
    model, history = nb.train(loss_of, loader, recipe, check, torch.float32, folder / "x.pt")
    return fingerprint(model) + str([(h["epoch"], h["train"], h["val"]) for h in history])


def self_critical(folder):
    cfg, recipe, split, tokenizer = world()
    model, how = nb.MiniVLM(cfg, tokenizer=tokenizer), (torch.float32, folder / "x.pt")
    model, history = nb.train_self_critical(model, split, recipe, lambda model: 0.0, *how)
    return fingerprint(model) + str([(h["epoch"], h["train"]) for h in history])


def write_whole(folder):
    """Files of one letter, over and over: the one that is there has only one letter."""
    for letter in b"abcdefgh" * 2:
        nb.write_whole(
            folder / "x", lambda file, a=letter: [file.write(bytes([a]) * 2**20) for _ in "1234"]
        )
        data = (folder / "x").read_bytes()
        assert len(data) == 2**22 and len(set(data)) == 1
    return sorted(file.name for file in folder.iterdir())


def after_write_whole(folder):
    if (folder / "x").is_file():
        data = (folder / "x").read_bytes()
        assert len(data) == 2**22 and len(set(data)) == 1, "half a file"


def save_pretrained(folder):
    cfg, *_, tokenizer = world()
    for n in (1, 2) * 5:
        model = nb.MiniVLM(nb.replace(cfg, D_FF=16 * n))
        torch.nn.init.constant_(model.tok_emb.weight, n)
        model.tokenizer = tokenizer
        model.save_pretrained(folder)
    return sorted(file.name for file in folder.iterdir())


def after_save_pretrained(folder):
    try:
        model = nb.MiniVLM.from_pretrained(folder)
    except ValueError as error:
        assert "FileNotFoundError" in str(error)
        return  # says so
    assert (model.tok_emb.weight == model.cfg.D_FF / 16).all(), "old weights with a new config"


def read_pictures(folder):
    """Unpack an archive, decode its pictures, keep them in a file."""
    with zipfile.ZipFile(folder.parent / "x.zip", "w") as file:
        for n in range(200):
            image = nb.Image.new("RGB", (60, 40), (n, 255 - n, 9))
            data = nb.io.BytesIO()
            image.save(data, "PNG")
            file.writestr(f"Images/{n}.png", data.getvalue())
        file.writestr(
            "captions.txt", "image,caption\n" + "".join(f"{n}.png,it is {n}\n" for n in range(200))
        )
    nb.fetch(folder, ["x"], folder.parent)
    splits = nb.load_splits(folder, 32, folder / "cache")
    whole = [tuple(len(x) for x in split[:3]) for split in splits.values()]
    for split in splits.values():
        reds = [int(name.split(".")[0]) for name in split.names]
        assert split.images[:, 0, 9, 9].tolist() == reds
    return whole


def fork(job, folder):
    """A child that writes what the job returns beside the folder."""
    child = os.fork()
    if not child:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        code = 1
        try:
            result = repr(job(folder))
            (folder.parent / "result").write_text(result)
            code = 0
        finally:
            os._exit(code)
    return child


def kill_often(name, job, kills, after=None):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "x"
        folder.mkdir()
        start = time.monotonic()
        assert os.waitpid(fork(job, folder), 0)[1] == 0, f"{name} fails even without a kill"
        seconds = time.monotonic() - start
        expected = (folder.parent / "result").read_text()
        shutil.rmtree(folder)
        folder.mkdir()
        done = runs = since = 0
        while done < kills or since:
            child, runs = fork(job, folder), runs + 1
            if done < kills and since < 3:  # at most three kills a run, then it may finish
                start = time.monotonic()
                end, status = start + dice.uniform(0.02, 1.0) * seconds, (0, 0)
                while not status[0] and time.monotonic() < end:
                    time.sleep(0.01)
                    status = os.waitpid(child, os.WNOHANG)
                if not status[0]:
                    os.kill(child, signal.SIGKILL)
                    status = os.waitpid(child, 0)
                killed = os.WIFSIGNALED(status[1])
                done, since = done + killed, since + killed
                if killed:
                    if after:
                        after(folder)
                    continue
                seconds = time.monotonic() - start  # what is left of it after the kills before
            else:
                assert os.waitpid(child, 0)[1] == 0, f"{name} fails after a kill"
            assert (folder.parent / "result").read_text() == expected, f"{name}: another result"
            shutil.rmtree(folder)
            folder.mkdir()
            since = 0
        print(
            f"{name}: {done} kills, {runs - done} finished runs, all as without a kill", flush=True
        )


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:]] + [20, 8, 10][len(sys.argv) - 1 :]
    kill_often("train", train, counts[0])
    kill_often("train_self_critical", self_critical, counts[1])
    kill_often("write_whole", write_whole, counts[2], after_write_whole)
    kill_often("save_pretrained", save_pretrained, counts[2], after_save_pretrained)
    kill_often("fetch and load_splits", read_pictures, counts[2])
