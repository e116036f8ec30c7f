"""How fast the notebook is, against the straightforward way of doing the same.

    python tests/bench.py [--flickr8k DIR] [--model DIR] [--json FILE] [--target-loss 3.94]

The straightforward way is written out below: a DataLoader that opens, decodes and resizes every
picture every time, captions padded to 48, float32, attention by masked_fill and softmax, each
caption with its own picture through the whole model, logits at every position; and for captions
each picture and each beam alone, from the first token again at every step. Both sides have the same
weights and pictures and take turns on the same machine; each ratio is the median of the rounds'
ratios, with the smallest and the largest behind it.

"Ours" is what the notebook's own component cells define. Not collected by pytest.
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
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
ROUNDS = 3
PUBLISHED_EPOCHS = 15
DOWNLOADED = (500, 375)  # pixels of a usual picture of Flickr8k

MEASURES = {  # what: (unit, at least or at most)
    "training": ("pairs/s", "4x"),
    "to the published loss": ("s", "30x"),
    "beam-3 captions": ("captions/s", "20x"),
    "greedy captions": ("captions/s", "12x"),
    "second start": ("s", "at most 1 s"),
    "peak memory of training": ("MB", "at most 1500 MB on a CPU, 1000 MB on a GPU"),
}


# Ours: the notebook's cells -----------------------------------------------------------------


def load_components(**replaced):
    """A module of everything that the notebook's component cells define."""
    notebook = json.loads((ROOT / "SupraVL_Nano.ipynb").read_text(encoding="utf-8"))
    module = types.ModuleType("components")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "component" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), module.__dict__)
    module.__dict__.update(replaced)
    return module


def read_data(nb, flickr8k, cache):
    """As sections 2 and 3 of the notebook: (name, splits, tokenizer, token ids of each split)."""
    if flickr8k:
        os.environ["FLICKR8K_DIR"] = str(flickr8k)
    else:
        os.environ["SUPRAVL_DATA"] = "toy"
    cfg = nb.Config()
    name, pictures = nb.get_dataset(scenes=ROOT / "assets" / "scenes")
    splits = {
        split: nb.load_split(items, cfg.IMG_SIZE, cache, f"{name}-{split}")
        for split, items in pictures.items()
    }
    tokenizer, ids = nb.load_tokens(splits, cfg, cache)
    return name, pictures, splits, tokenizer, ids


class Stopwatch:
    """Batches that stop after some seconds and remember how fast they were used."""

    def __init__(self, batches, seconds, skip=3):
        self.batches, self.seconds, self.skip = batches, seconds, skip
        self.pairs, self.elapsed = 0, 0.0

    def __len__(self):
        return len(self.batches)

    def epoch(self, number):
        stream = itertools.chain.from_iterable(self.batches.epoch(i) for i in itertools.count())
        for step, batch in enumerate(stream):
            if step == self.skip:  # the first steps warm up
                start = now()
            yield batch  # the training step happens here
            if step >= self.skip:
                self.pairs += int((batch[1].caption.amax(1) + 1).sum())
                if step % 4 == 0:
                    self.elapsed = now() - start
                    if self.elapsed > self.seconds:
                        return


def now():
    """The time, when all that was asked of the device is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def our_training(nb, cfg, splits, ids, device, precision, seconds):
    """Pairs a second of `train_model` itself: augmentation, averaged weights and all."""
    batches = nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device)
    watch = Stopwatch(batches, seconds)
    one_epoch = nb.replace(cfg, epochs=1)
    nb.train_model(one_epoch, watch, lambda model: 0.0, device, precision)
    return watch.pairs / watch.elapsed


# The straightforward way --------------------------------------------------------------------


def masked_attention(q, k, v, mask):
    """Attention with the whole table of scores: masked_fill and softmax."""
    scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def make_dataset(pairs, size):
    """A Dataset of (picture, ids padded to 48), read from the picture's file each time."""
    import torch
    from PIL import Image
    from torchvision import transforms

    prepare = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, i):
            path, ids = pairs[i]
            padded = torch.zeros(48, dtype=torch.long)
            padded[: len(ids)] = torch.tensor(ids)
            return prepare(Image.open(path).convert("RGB")), padded

    return Pairs()


def straightforward_training(nb, cfg, weights, pairs, device, seconds, workers):
    """Pairs a second, the plain way, at the published recipe's batch size and learning rate."""
    import torch

    model = nb.MiniVLM(cfg).to(device).train()
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.01)
    loader = torch.utils.data.DataLoader(
        make_dataset(pairs, cfg.IMG_SIZE), batch_size=64, shuffle=True, num_workers=workers,
        drop_last=True, persistent_workers=workers > 0,
    )  # fmt: skip
    done, start = 0, None
    for step, (images, ids) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        if step == 3:
            start = now()
        images, ids = images.to(device), ids.to(device)
        logits = model(model.vis_enc(images), ids)[:, cfg.N_VIS : -1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, cfg.VOCAB_SIZE), ids[:, 1:].reshape(-1), ignore_index=nb.PAD
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if start is not None:
            done += len(images)
            if now() - start > seconds:
                return done / (now() - start)


def straightforward_captions(nb, model, images, device, width, seconds):
    """Ids of the first pictures, as many as fit in `seconds`, each beam alone. `width` 1 is greedy.

    Returns (a list of id lists, captions a second).
    """
    import torch

    written, start = [], now()
    for image in images:
        with torch.no_grad():
            picture = nb.normalise(torch.from_numpy(image)[None].to(device)).contiguous()
            img_tokens = model.vis_enc(picture)
            beams = [(0.0, [nb.BOS])]
            for _ in range(48):
                candidates = [beam for beam in beams if beam[1][-1] == nb.EOS]
                for score, ids in beams:
                    if ids[-1] != nb.EOS:
                        logits = model(img_tokens, torch.tensor([ids], device=device))[0, -1]
                        top = logits.log_softmax(-1).topk(width)
                        for gain, token in zip(top.values.tolist(), top.indices.tolist()):
                            candidates.append((score + gain, [*ids, token]))
                beams = sorted(candidates, key=lambda beam: -beam[0])[:width]
                if all(ids[-1] == nb.EOS for _, ids in beams):
                    break
        written.append(beams[0][1][1:])
        if now() - start > seconds:
            break
    return written, len(written) / (now() - start)


def as_downloaded(pictures, folder):
    """Paths of these pictures at the size in which Flickr8k is downloaded.

    A picture that is that large already is used as it is; a smaller one is enlarged and written to
    `folder`. Such a copy has less detail than a photograph and so decodes a little faster: the
    straightforward side is not put at a disadvantage.
    """
    from PIL import Image

    paths = []
    for picture in pictures:
        with Image.open(picture.path) as image:
            if max(image.size) >= 400:
                paths.append(picture.path)
                continue
            paths.append(folder / picture.path.name)
            image.convert("RGB").resize(DOWNLOADED, Image.BICUBIC).save(paths[-1], quality=95)
    return paths


# Measures that need a process of their own --------------------------------------------------


def child(args, task):
    """Run this file again for one task; returns what it printed as JSON in its last line."""
    command = [sys.executable, __file__, "--child", task, "--cache", str(args.cache)]
    command += ["--seconds", str(args.seconds), "--threads", str(args.threads)]
    command += ["--recipe", args.recipe]
    command += ["--flickr8k", str(args.flickr8k)] if args.flickr8k else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(kind="VmRSS"):
    """Bytes of memory in use now (VmRSS) or at the peak (VmHWM); None where Linux is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


def touched(folder):
    """(bytes in memory, bytes in all) of the files of `folder` that this process has mapped."""
    inside = total = 0
    current = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            current = len(fields) > 5 and fields[5].startswith(str(Path(folder).resolve()))
        elif current and fields[0] == "Rss:":
            inside += 1024 * int(fields[1])
        elif current and fields[0] == "Size:":
            total += 1024 * int(fields[1])
    return inside, total


def child_start(args, nb):
    """Seconds from imports done to the first training batch, everything cached."""
    import torch

    def bytes_read():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(lines[0].split()[1])  # rchar: by read(), from disk or from the page cache

    linux = sys.platform == "linux"
    before = bytes_read() if linux else 0
    start = time.perf_counter()
    _, _, splits, _, ids = read_data(nb, args.flickr8k, args.cache)
    read = time.perf_counter()
    device = nb.pick_device()
    cfg = nb.PRESETS[args.recipe]
    next(nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device).epoch(0))
    end = now()
    result = {"seconds": end - start, "data_and_tokenizer": read - start, "device": str(device)}
    if linux:
        result["bytes_read"] = bytes_read() - before
        result["cache_touched"], result["cache_size"] = touched(args.cache)
    return result | {"torch": torch.__version__}


def child_memory(args, nb, base):
    """Peak memory of training above `import torch`, and how it grew from the middle to the end."""
    import torch

    _, _, splits, _, ids = read_data(nb, args.flickr8k, args.cache)
    device = nb.pick_device()
    precision = nb.pick_precision(device)
    cfg = nb.replace(nb.PRESETS[args.recipe], epochs=1)
    batches = nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device)
    watch, marks = Stopwatch(batches, 2 * args.seconds), []

    class Marks(Stopwatch):
        def epoch(self, number):
            for batch in watch.epoch(number):
                yield batch
                marks.append(resident())

    nb.train_model(
        cfg, Marks(batches, 0),
        lambda m: nb.evaluate_loss(m, splits["dev"].images, ids["dev"], device, precision),
        device, precision,
    )  # fmt: skip
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_reserved(), "steps": len(marks)}
    growth = marks[-1] - marks[len(marks) // 2]
    return {"bytes": resident("VmHWM") - base, "steps": len(marks), "growth": growth}


# The measures -------------------------------------------------------------------------------


def summary(name, ours, theirs, **more):
    """A row of the table from the rounds' figures; higher is better in both."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    row = {"measure": name, "ours": ours, "straightforward": theirs, "ratios": ratios} | more
    show(name, statistics.median(ours), statistics.median(theirs), ratios, more.get("note", ""))
    return row


def show(name, ours, theirs=None, ratios=None, note=""):
    """Print one row."""
    unit, wanted = MEASURES[name]
    cells = [f"{ours:,.4g} {unit}", f"{theirs:,.4g} {unit}" if theirs is not None else "", ""]
    if ratios:
        cells[2] = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    say("| " + " | ".join([name, *cells, wanted, note]) + " |")


def say(line):
    """Print to the terminal; everything else that prints (progress bars) is silenced in `main`."""
    print(line, file=sys.__stdout__, flush=True)


def main(args, scratch):
    import torch

    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(args.threads)
    nb, plain = load_components(), load_components(attention=masked_attention)
    device = nb.pick_device()
    precision = nb.pick_precision(device)
    args.cache = args.cache or scratch / "cache"
    name, pictures, splits, tokenizer, ids = read_data(nb, args.flickr8k, args.cache)
    cfg, results = nb.PRESETS[args.recipe], []
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    machine = f"{processor()}, {args.threads} threads, {gpu}; torch {torch.__version__}"
    say(f"{machine}; {name}, {len(splits['train']):,} training pictures; ours: {precision}\n")
    say("| measure | ours | straightforward | ratio (rounds) | wanted | |")
    say("|---|---|---|---|---|---|")

    def wanted(measure):
        return not args.only or any(measure.startswith(word) for word in args.only)

    torch.manual_seed(0)
    fresh = nb.MiniVLM(nb.Config()).state_dict()
    pairs_a_second = None
    if wanted("training"):
        some = pictures["train"][:600]
        paths = as_downloaded(some, scratch)
        pairs = [(path, caption) for path, own in zip(paths, ids["train"]) for caption in own]
        # Workers take cores from the arithmetic or keep it fed: the straightforward side gets the
        # better of both.
        trial = {
            workers: straightforward_training(
                plain, plain.Config(dropout=0.0), fresh, pairs, device, args.seconds / 2, workers
            )
            for workers in (0, args.threads)
        }
        workers = max(trial, key=trial.get)
        ours, theirs = [], []
        for _ in range(ROUNDS):
            theirs.append(
                straightforward_training(
                    plain, plain.Config(dropout=0.0), fresh, pairs, device, args.seconds, workers
                )
            )
            ours.append(our_training(nb, cfg, splits, ids, device, precision, args.seconds))
        note = f"straightforward with {workers} DataLoader workers"
        results.append(summary("training", ours, theirs, note=note, workers_tried=trial))
        pairs_a_second = statistics.median(theirs)

    if args.target_loss:
        results.append(time_to_loss(nb, args, cfg, splits, ids, device, precision, pairs_a_second))

    if wanted("beam") or wanted("greedy"):
        captioner = load_model(nb, args, splits, tokenizer, ids, device, precision)
        model = plain.MiniVLM(plain.Config()).to(device).eval()
        model.load_state_dict(captioner.model.state_dict())
        for measure, width in (("beam-3 captions", 3), ("greedy captions", 1)):
            if wanted(measure):
                images = splits["test"].images
                images = images[: args.pictures]
                results.append(
                    captions(nb, plain, measure, width, captioner, model, images, device, args)
                )

    if wanted("second start"):
        starts = [child(args, "start") for _ in range(ROUNDS)]
        seconds = [start["seconds"] for start in starts]
        note = f"{min(seconds):.2f} to {max(seconds):.2f} s; imports not counted"
        if "cache_touched" in starts[0]:
            last = starts[-1]
            note += (
                f"; {last['bytes_read'] / MB:.1f} MB read, {last['cache_touched'] / MB:.1f} of "
                f"{last['cache_size'] / MB:.0f} MB of cached pictures touched"
            )
        show("second start", statistics.median(seconds), note=note)
        results.append({"measure": "second start", "rounds": starts, "note": note})

    if wanted("peak memory"):
        memory = child(args, "memory")
        note = f"above import torch, in {memory['steps']} steps"
        if "growth" in memory:
            note += f"; {memory['growth'] / MB:+.0f} MB in the second half of them"
        show("peak memory of training", memory["bytes"] / MB, note=note)
        results.append({"measure": "peak memory of training", "note": note} | memory)

    if args.json:
        report = {"machine": machine, "data": name, "precision": str(precision)}
        report |= {"recipe": args.recipe, "results": results}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def captions(nb, plain, measure, width, captioner, model, images, device, args):
    """Captions a second of both sides, and the share of the pictures with the same tokens."""
    import torch

    write = captioner.generate_beam if width > 1 else captioner.generate_greedy
    write(images[:8])  # warm up
    ours, theirs, same = [], [], []
    for part in range(ROUNDS):
        few = images[part::ROUNDS]
        ids, rate = straightforward_captions(plain, model, few, device, width, args.seconds)
        theirs.append(rate)
        start = now()
        write(few)
        ours.append(len(few) / (now() - start))
        with torch.no_grad():
            batch = torch.from_numpy(few[: len(ids)]).to(device)
            fast = (
                nb.beam_ids(captioner.model, batch, width)
                if width > 1
                else nb.sample_ids(captioner.model, batch, top_k=1)
            )
        same += [[i for i in row if i != nb.PAD] == slow for row, slow in zip(fast.tolist(), ids)]
    note = f"{len(images):,} pictures in {sum(len(images) / ROUNDS / r for r in ours):.1f} s; "
    note += f"straightforward {len(same)}, hence {len(images) / statistics.median(theirs):.0f} s; "
    note += f"same tokens {sum(same)} of {len(same)}; both float32"
    return summary(measure, ours, theirs, note=note, compared=len(same), equal=sum(same))


def load_model(nb, args, splits, tokenizer, ids, device, precision):
    """A trained Captioner: the folder `--model` if it is there, else two quick epochs."""
    if Path(args.model).is_dir():
        return nb.SupraVLNano.from_pretrained(args.model, device=device)
    print(f"(no {args.model}: training for two epochs first)", file=sys.stderr, flush=True)
    cfg = nb.replace(nb.PRESETS[args.recipe], epochs=2)
    batches = nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device)
    model, _ = nb.train_model(cfg, batches, lambda m: 0.0, device, precision)
    return nb.SupraVLNano(model, tokenizer)


def time_to_loss(nb, args, cfg, splits, ids, device, precision, pairs_a_second):
    """Wall time of our recipe, from start to the end of the first epoch at or below the loss."""

    class Reached(Exception):
        pass

    def report(history):
        print(f"  {now() - start:.0f} s: {history[-1]}", file=sys.stderr, flush=True)
        if history[-1]["val"] <= args.target_loss:
            raise Reached(history[-1]["val"])

    def validate(model):
        return nb.evaluate_loss(model, splits["dev"].images, ids["dev"], device, precision)

    start, reached = now(), None
    batches = nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device)
    try:
        nb.train_model(cfg, batches, validate, device, precision, report=report)
    except Reached as error:
        reached = error.args[0]
    seconds = now() - start
    pairs = PUBLISHED_EPOCHS * sum(len(own) for own in ids["train"])
    theirs = pairs / pairs_a_second if pairs_a_second else None
    note = f"loss {reached:.3f}" if reached else f"loss {args.target_loss} not reached"
    if theirs:
        note += f"; straightforward computed: {pairs:,} pairs at {pairs_a_second:.0f} a second"
    ratios = [theirs / seconds] if theirs and reached else None
    show("to the published loss", seconds, theirs, ratios, note)
    return {"measure": "to the published loss", "ours": seconds, "straightforward": theirs} | {
        "ratios": ratios, "note": note, "target": args.target_loss,
    }  # fmt: skip


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
    add("--flickr8k", default=os.environ.get("FLICKR8K_DIR"), help="its folder; else drawn scenes")
    shipped = str(ROOT / "assets" / "supravl-nano")
    add("--model", default=shipped, help="folder of a trained model; else trains a little")
    add("--recipe", default="nano", help="the preset that ours trains with")
    add("--json", help="file for the raw figures")
    add("--seconds", type=float, default=15, help="for each side, in each of three rounds")
    add("--pictures", type=int, default=1000, help="to caption")
    add("--threads", type=int, default=min(2, os.cpu_count()))
    add("--target-loss", type=float, help="also train until the validation loss is this (long)")
    add("--only", nargs="*", help="measures to take, by how their names begin")
    add("--cache", type=Path, help="where the decoded pictures are kept; else a temporary folder")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import torch

        base = resident()
        torch.set_num_threads(args.threads)
        components = load_components()
        if args.child == "start":
            result = child_start(args, components)
        else:
            result = child_memory(args, components, base)
        print("\n" + json.dumps(result))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(args, Path(folder))
