"""How fast the notebook is, beside a straightforward way of doing the same, or another notebook.

    python tests/bench.py --flickr8k DIR [--other OLD.ipynb] [--json FILE] [--quick]

The straightforward way is written out below: a DataLoader that opens, decodes and resizes every
picture every time, captions padded to 48, float32, each caption with its own picture through the
whole model, logits at every position; and for captions each picture and each beam alone, from the
first token again at every step. --other names the file of another version of the notebook, the
first edition (class CaptionBatches) or a later one. All sides have the same pictures and, for
captions, the same weights; in each of five rounds all take their turn, and a ratio is the median of
the rounds' ratios, with the smallest and the largest behind it. Measure on an idle machine: the
table says how busy it was. Each notebook's sides run in processes of their own, one at a time. Not
run by pytest.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURES = {  # what: (unit, whether it is the better the higher it is)
    "training": ("pairs/s", True),
    "beam-3 captions": ("captions/s", True),
    "second start": ("s", False),
    "peak memory of training": ("MB", False),
}


def now():
    """The time, when all that was asked of the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# The notebooks ---------------------------------------------------------------------------------


def load(path):
    """A module of everything that a notebook's component cells define."""
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ["SUPRAVL_NOTEBOOK"] = str(path)
    import conftest

    return conftest.load_components()


class Stopwatch:
    """Passes batches on, for some seconds, and counts the captions in them."""

    def __init__(self, batches, seconds, count, skip=3):
        self.batches, self.seconds, self.count, self.skip = batches, seconds, count, skip
        self.sampler, self.pairs = getattr(batches, "sampler", None), 0

    def __len__(self):
        return len(self.batches)

    def epoch(self, number):
        passes = (self.batches.epoch(n) if self.first else self.batches for n in itertools.count())
        for step, batch in enumerate(itertools.chain.from_iterable(passes)):
            if step == self.skip:  # the first steps warm up
                self.start = now()
            yield batch  # the training step happens here
            if step >= self.skip:
                self.pairs += self.count(batch)
                self.elapsed = now() - self.start
                if self.elapsed > self.seconds:
                    return

    first = False  # whether the batches are of the first edition

    def __iter__(self):
        return self.epoch(0)


class Notebook:
    """What is measured, with the present notebook's cells."""

    def __init__(self, nb, args):
        self.nb, self.args = nb, args
        self.device = nb.torch.device("cuda" if nb.torch.cuda.is_available() else "cpu")
        name = args.precision
        self.precision = getattr(nb.torch, name) if name else nb.pick_precision(self.device)

    def read(self):
        nb, cfg = self.nb, self.nb.Config()
        self.splits = nb.load_splits(self.args.data, cfg.IMG_SIZE, self.args.cache)
        train = self.splits["train"]
        self.tokenizer = nb.train_tokenizer([c for own in train.captions for c in own])
        self.recipe, self.cfg = nb.replace(nb.RECIPES["nano"], epochs=1), cfg

    def batches(self):
        return self.nb.make_loader(self.splits["train"], self.tokenizer, self.recipe)

    def first_batch(self):
        next(iter(self.batches()))

    def train(self, seconds):
        """Pairs a second of `train` itself: augmentation and all."""
        nb, recipe = self.nb, self.recipe
        watch = Stopwatch(self.batches(), seconds, lambda batch: len(batch.ids))
        loss_of = nb.CaptionLoss(nb.MiniVLM(self.cfg))
        loss_of = loss_of.to(self.device, memory_format=nb.torch.channels_last)
        nb.train(loss_of, watch, recipe, lambda model: 0.0, self.precision)
        return watch.pairs / watch.elapsed

    def load_model(self, folder):
        self.model = self.nb.MiniVLM.from_pretrained(folder, device=self.device)

    def images(self, numbers):
        return self.nb.normalise(self.splits["test"].images[numbers])

    def write(self, numbers):
        """Beam-3 captions of test pictures."""
        return self.model.generate_beam(self.images(numbers), beam_width=3)


class FirstEdition(Notebook):
    """The same with the cells of the notebook's first edition."""

    def read(self):
        nb = self.nb
        os.environ["FLICKR8K_DIR"] = str(self.args.data)
        self.cfg = nb.replace(nb.PRESETS["nano"], epochs=1, practice=0)
        name, pictures = nb.get_dataset()
        cache = Path(self.args.cache) / "first edition"
        self.splits = {
            s: nb.load_split(items, self.cfg.IMG_SIZE, cache, f"{name}-{s}")
            for s, items in pictures.items()
        }
        self.tokenizer, self.ids = nb.load_tokens(self.splits, self.cfg, cache)

    def batches(self):
        train = self.splits["train"]
        return self.nb.CaptionBatches(train.images, self.ids["train"], self.cfg, self.device)

    def first_batch(self):
        next(self.batches().epoch(0))

    def train(self, seconds):
        watch = Stopwatch(
            self.batches(), seconds, lambda batch: int((batch[1].caption.amax(1) + 1).sum())
        )
        watch.first = True
        self.nb.train_model(self.cfg, watch, lambda model: 0.0, self.device, self.precision)
        return watch.pairs / watch.elapsed

    def load_model(self, folder):
        self.model = self.nb.SupraVLNano.from_pretrained(folder, device=self.device)

    def write(self, numbers):
        return self.model.generate_beam(self.splits["test"].images[numbers], beam_width=3)


class Straightforward(Notebook):
    """The plain way, with the present notebook's model."""

    def files(self):
        """{name: path} of the pictures."""
        folders = ("Flicker8k_Dataset", "Images")
        folder = next(p for name in folders for p in sorted(Path(self.args.data).rglob(name)))
        return {path.name: path for path in folder.iterdir()}

    def plain_loader(self, workers):
        import torch
        from PIL import Image
        from torchvision import transforms

        prepare = transforms.Compose([
            transforms.Resize((112, 112)), transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip
        files, encode = self.files(), self.nb.encode_captions
        names, _, captions = self.splits["train"]
        pairs = [
            (files[name], ids)
            for name, own in zip(names, captions) for ids in encode(self.tokenizer, own)
        ]  # fmt: skip

        class Pairs(torch.utils.data.Dataset):
            def __len__(self):
                return len(pairs)

            def __getitem__(self, i):
                path, ids = pairs[i]
                padded = torch.zeros(48, dtype=torch.long)
                padded[: len(ids)] = torch.tensor(ids)
                return prepare(Image.open(path).convert("RGB")), padded

        how = {"num_workers": workers, "persistent_workers": workers > 0}
        return torch.utils.data.DataLoader(Pairs(), 64, shuffle=True, drop_last=True, **how)

    def train(self, seconds):
        """Pairs a second, with the better of two settings for the DataLoader's processes."""
        if not hasattr(self, "workers"):
            trial = {n: self.train_with(n, seconds / 2) for n in (0, self.args.threads)}
            self.workers = max(trial, key=trial.get)
        return self.train_with(self.workers, seconds)

    def train_with(self, workers, seconds):
        import torch

        model = self.nb.MiniVLM(self.cfg).to(self.device).train()
        how = {"betas": (0.9, 0.95), "weight_decay": 0.01}
        optimizer = torch.optim.AdamW(model.parameters(), 3e-4, **how)
        watch = Stopwatch(self.plain_loader(workers), seconds, lambda batch: len(batch[0]))
        for images, ids in watch:
            images, ids = images.to(self.device), ids.to(self.device)
            logits = model(model.vis_enc(images), ids)[:, self.cfg.N_VIS : -1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=self.nb.PAD
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return watch.pairs / watch.elapsed

    def write(self, numbers):
        """Beam-3 captions of as many of these pictures as fit in `args.seconds`."""
        import torch

        nb, model, said, start = self.nb, self.model, [], now()
        for image in self.images(numbers):
            with torch.no_grad():
                img_tokens = model.vis_enc(image[None].to(self.device))
                beams = [(0.0, [nb.BOS])]
                for _ in range(48):
                    candidates = [beam for beam in beams if beam[1][-1] == nb.EOS]
                    for score, ids in beams:
                        if ids[-1] != nb.EOS:
                            logits = model(img_tokens, torch.tensor([ids], device=self.device))
                            top = logits[0, -1].log_softmax(-1).topk(3)
                            for gain, token in zip(top.values.tolist(), top.indices.tolist()):
                                candidates.append((score + gain, [*ids, token]))
                    beams = sorted(candidates, key=lambda beam: -beam[0])[:3]
                    if all(ids[-1] == nb.EOS for _, ids in beams):
                        break
            said.append(self.tokenizer.decode(beams[0][1]).strip())
            if now() - start > self.args.seconds:
                break
        return said


# A side is a process that is asked one thing after the other -----------------------------------


def resident(kind):
    """Bytes of memory in use now (VmRSS) or at the peak (VmHWM); None where Linux is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


def serve(args):
    """Read questions from stdin, one JSON a line, and answer likewise."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # what the cells print is no answer
    import torch

    torch.set_num_threads(args.threads)
    nb = load(args.notebook)
    first = hasattr(nb, "CaptionBatches")
    side = (Straightforward if args.plain else FirstEdition if first else Notebook)(nb, args)
    base = resident("VmRSS")
    for line in sys.stdin:
        task, value = json.loads(line)
        if task == "start":  # everything that is read or computed before the first step
            start = now()
            side.read()
            side.first_batch()
            answer = now() - start
        elif task == "train":
            answer = side.train(value)
        elif task == "load":
            side.load_model(value)
            answer = None
        elif task == "write":
            start = now()
            said = side.write(value)
            answer = [len(said) / (now() - start), said]
        elif task == "memory":
            cuda = torch.cuda.is_available()
            answer = torch.cuda.max_memory_reserved() if cuda else resident("VmHWM")
            answer = answer and (answer if cuda else answer - base) / 1e6
        else:
            answer = {"device": str(side.device), "precision": str(side.precision)}
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """A process that serves; `ask` waits for its answer."""

    def __init__(self, args, notebook, plain=False):
        command = [sys.executable, __file__, "--serve", "--notebook", str(notebook)]
        command += ["--flickr8k", str(args.data), "--cache", str(args.cache)]
        command += ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        command += ["--precision", args.precision] if args.precision else []
        command += ["--plain"] if plain else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def ask(self, task, value=None):
        self.process.stdin.write(json.dumps([task, value]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side died at {task!r}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def once(args, sides, name, *tasks):
    """The last answer of a fresh process of this side."""
    side = Side(args, *sides[name])
    answers = [side.ask(*task) for task in tasks]
    side.end()
    return answers[-1]


# The measures ----------------------------------------------------------------------------------


def show(measure, rounds):
    """Print one row: medians of each side, and how many times better the notebook is."""
    unit, higher = MEASURES[measure]
    cells = [measure]
    for name, values in rounds.items():
        cell = f"{statistics.median(values):,.4g} {unit}"
        if name != "notebook":
            ratios = [a / b if higher else b / a for a, b in zip(rounds["notebook"], values)]
            cell += f", {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        cells.append(cell)
    print("| " + " | ".join(cells) + " |", flush=True)


def main(args):
    sides = {"notebook": (args.notebook, False), "straightforward": (args.notebook, True)}
    if args.other:
        sides["other"] = (args.other, False)
    found = {}

    def measure(name, sides_of, ask):
        """One number from each side in each round; the side that begins changes."""
        rounds = {side: [] for side in sides_of}
        for n in range(args.rounds):
            for side in sides_of[n % len(sides_of) :] + sides_of[: n % len(sides_of)]:
                rounds[side].append(ask(side, n))
        found[name] = rounds
        show(name, rounds)

    others = [name for name in sides if name != "straightforward"]
    for name in others:  # the first start fills the caches
        once(args, sides, name, ("start",))
    running = {name: Side(args, *of) for name, of in sides.items()}
    about = running["notebook"].ask("about") | {"processor": processor(), "threads": args.threads}
    about |= {"load before": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print("| measure | " + " | ".join(sides) + " |\n" + "|---" * (len(sides) + 1) + "|")
    for side in running.values():
        side.ask("start")
        side.ask("load", str(args.model))
    measure("training", list(sides), lambda side, n: running[side].ask("train", args.seconds))

    texts = {name: {} for name in sides}

    def write(side, n):
        numbers = list(range(n, args.pictures, args.rounds))
        rate, said = running[side].ask("write", numbers)
        texts[side] |= dict(zip(numbers, said))
        return rate

    measure("beam-3 captions", list(sides), write)
    for side in running.values():
        side.ask("train", 0)  # nothing may be left that slows what follows
        side.end()
    measure("second start", others, lambda side, n: once(args, sides, side, ("start",)))
    memory = lambda side, n: once(  # noqa: E731
        args, sides, side, ("start",), ("train", args.seconds), ("memory",)
    )
    if sys.platform == "linux":
        args.rounds = min(2, args.rounds)  # it hardly varies
        measure("peak memory of training", others, memory)
    for name in list(sides)[1:]:
        both = [n for n in texts[name] if n in texts["notebook"]]
        same = sum(texts[name][n] == texts["notebook"][n] for n in both)
        print(f"\nthe same captions as {name}: {same} of {len(both)}", end="")
    print(f"\nload after: {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "")
    if args.json:
        report = {"about": about, "rounds": found}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def processor():
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--flickr8k", dest="data", default=os.environ.get("FLICKR8K_DIR"), help="its folder")
    add("--other", type=Path, help="another version's notebook, to be timed beside this one")
    add("--model", type=Path, default=ROOT / "assets" / "supravl-nano", help="weights that write")
    add("--json", help="file for the raw figures")
    add("--seconds", type=float, default=15, help="of training for each side in a round")
    add("--pictures", type=int, default=1000, help="to caption")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=min(2, os.cpu_count()))
    add("--precision", choices=["float32", "bfloat16", "float16"], help="else the fastest here")
    add("--quick", action="store_true", help="two rounds of a second: does it run at all?")
    add("--cache", type=Path, help="where the decoded pictures are kept; else a temporary folder")
    add("--notebook", type=Path, default=ROOT / "SupraVL_Nano.ipynb", help=argparse.SUPPRESS)
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
    elif not args.data:
        parser.error("--flickr8k is needed")
    else:
        if args.quick:
            args.seconds, args.rounds, args.pictures = 1, 2, 8
        with tempfile.TemporaryDirectory() as folder:
            args.cache = args.cache or Path(folder)
            main(args)
