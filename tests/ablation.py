"""What each part of the recipe brings: train one row, score it, keep the numbers.

    python tests/ablation.py nano --flickr8k DIR
    python tests/ablation.py "half the batch" --flickr8k DIR --seed 1 --threads 1
    python tests/ablation.py nano --flickr8k DIR --scst 12 --test
    python tests/ablation.py baselines --flickr8k DIR --test

A row is a named recipe of the notebook, or "nano" with one change; all is done by the notebook's
own component cells. Rows with a change leave out the self-critical part unless --scst asks for it.
Runs keep checkpoints and go on where they stopped; rows that differ in the self-critical part alone
share the training before it. The numbers go into assets/results.json, one entry a run, and the
weights into RUNS/ROW-EPOCHS-SEED, ready to be shipped. Not run by pytest.

assets/results.json: "runs" and "baselines" hold what was measured; "dev" and "test" are tables made
from them, for section 11 of the notebook; "peers" are others' numbers, copied from their
publications.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, load_components

RESULTS = ROOT / "assets" / "results.json"
PUBLISHED = {  # the recipe as it was published; see BESIDES
    "epochs": 15, "batch_size": 64, "lr": 3e-4, "warmup": 0, "flip": 0, "scst_epochs": 0,
}  # fmt: skip
CHANGES = {  # and BESIDES
    "a longer schedule": {"epochs": 20},
    "no mirror images": {"flip": 0},
    "crops, other colours": {},
    "label smoothing": {},
    "averaged weights": {},
    "half the batch": {"batch_size": 40},
    "double the batch": {"batch_size": 160},
    "dropout 0.1": {},
    "naming loss": {},
    "PyTorch's start": {},
    "no warm-up": {"warmup": 0},
    "half the learning rate": {"lr": 7.5e-4},
    "half the self-critical epochs": {"scst_epochs": 5},
    "twice the self-critical learning rate": {"scst_epochs": 10, "scst_lr": 2e-4},
    "the published learning rate": {"lr": 3e-4, "warmup": 0},
}
NAMED = ("published", "nano")
FEWER = {  # training pictures, with one caption each: what your own pictures would bring
    f"{n:,} pictures, a caption each": n for n in (300, 1000, 3000, 6000)
}
BESIDES = {  # what is no part of a Recipe
    "published": {"init": "pytorch", "min_lr": 3e-5},
    "the published learning rate": {"min_lr": 3e-5},
    "PyTorch's start": {"init": "pytorch"},
    "dropout 0.1": {"dropout": 0.1},
    "crops, other colours": {"crop": 0.85, "jitter": 0.2},  # crop ** 2: least share of the area
    "label smoothing": {"label_smoothing": 0.05},
    "naming loss": {"naming": 0.05},
    "averaged weights": {"ema": 0.999},
}


# The file of results ---------------------------------------------------------------------------


def read_results(path=RESULTS):
    """The file's content; without a file the same with nothing in it."""
    empty = {"runs": {}, "baselines": {}, "dev": {}, "test": {}, "peers": {}}
    try:
        return empty | json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def mean_and_spread(values, digits):
    """As text: the mean, and behind ± half the distance from the lowest to the highest."""
    spread = f" ± {np.ptp(values) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def dev_table(runs):
    """Means over the seeds of each row, by CIDEr: what section 11 prints about the recipe."""
    groups = {}
    for run in runs.values():
        changed = CHANGES.get(run["row"])
        later = changed and all(key.startswith("scst") for key in changed)  # as "nano" before it
        for stage, found in run.get("dev", {}).items():
            if not (later and stage == "CE"):
                groups.setdefault((run["row"], run["epochs"], stage), []).append(found)
    table = {}
    for (row, epochs, stage), found in groups.items():
        columns = {
            "loss": ([f["loss"] for f in found], 3),
            "CIDEr greedy": ([f["greedy"]["CIDEr"] for f in found], 1),
            "CIDEr beam-3": ([f["beam-3"]["CIDEr"] for f in found], 1),
            "distinct": ([f["beam-3"]["distinct"] for f in found], 0),
        }
        table[f"{row}, {epochs} epochs, {stage}"] = {"trainings": len(found)} | {
            name: mean_and_spread(*column) for name, column in columns.items()
        }
    return dict(sorted(table.items(), key=lambda item: -float(item[1]["CIDEr beam-3"].split()[0])))


def test_table(runs):
    """The beam-3 scores on test of every run that has some: section 11 prints them."""
    return {
        f"{run['row']}, seed {run['seed']}, beam-3": run["test"]["beam-3"]
        for run in runs.values()
        if "test" in run
    }


def write_results(results, path=RESULTS):
    """Write the file, with its two tables made anew from its runs."""
    results["runs"] = dict(sorted(results["runs"].items()))
    results |= {"dev": dev_table(results["runs"]), "test": test_table(results["runs"])}
    text = json.dumps(results, indent=1, ensure_ascii=False)
    # Lists of numbers on one line: a run's history would fill pages.
    text = re.sub(r"\[[-\d.,\s]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    part = Path(f"{path}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def write_run(run, path=RESULTS):
    """Put one run into the file, in place of an older one of the same row, epochs and seed."""
    results = read_results(path)
    key = f"{run['row']}/{run['epochs']}/{run['seed']}"
    results["runs"][key] = run
    write_results(results, path)
    return key


# Training and scoring --------------------------------------------------------------------------


def recipe_of(nb, row):
    """The notebook's Recipe for a row."""
    if row in FEWER:
        return nb.RECIPES["few"]
    if row in CHANGES:  # the self-critical part is left out
        return nb.replace(nb.RECIPES["nano"], **{"scst_epochs": 0} | CHANGES[row])
    return nb.replace(nb.RECIPES["nano"], **PUBLISHED) if row == "published" else nb.RECIPES[row]


def add_dropout(model, share):
    """Let a model that has no dropout drop shares of what each part adds, while it trains."""

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, share, module.training)

    parts = [model.tok_emb, model.vis_enc, *(p for b in model.blocks for p in (b.attn, b.mlp))]
    for part in parts:
        part.register_forward_hook(drop)


def make_model(nb, cfg, seed, init="gpt2", dropout=0.0):
    """A new model; init "pytorch" leaves the weights as PyTorch's layers start."""
    torch.manual_seed(seed)
    model = nb.MiniVLM(cfg)
    for module in model.modules() if init == "pytorch" else ():
        if hasattr(module, "reset_parameters") and module is not model.lm_head:  # it is tied
            module.reset_parameters()
    if dropout:
        add_dropout(model, dropout)
    return model


def other_views(nb, flip, size, crop, jitter):
    """What crops a picture by chance too, and changes its colours, beside `flip`."""
    more = nb.v2.RandomResizedCrop(size, (crop**2, 1), (crop, 1 / crop), antialias=True)
    return nb.v2.Compose([more, flip, nb.v2.ColorJitter(jitter, jitter, jitter)])


def content_words(captions, count=600):
    """The commonest words of captions (a list a picture) that fewer than half the pictures have.

    Returns (words, shares (N, words): which share of a picture's captions holds a word).
    """
    said = [[set(re.findall(r"[a-z]{3,}", text.lower())) for text in own] for own in captions]
    pictures = Counter(word for own in said for word in sorted(set().union(*own)))
    words = [word for word, n in pictures.most_common() if n < len(captions) / 2][:count]
    place, shares = {word: i for i, word in enumerate(words)}, np.zeros((len(said), len(words)))
    for row, own in zip(shares, said):
        for text in own:
            row[[place[word] for word in text & place.keys()]] += 1 / len(own)
    return words, torch.tensor(shares, dtype=torch.float32)


def moving_average(decay):
    """How AveragedModel follows the weights: by 1 - decay a step, but faster at first."""

    def update(averaged, current, steps):
        for mean, weight in zip(averaged, current):
            follow = 1 - torch.clamp((1 + steps) / (10 + steps), max=decay)
            mean.lerp_(weight, follow) if weight.is_floating_point() else mean.copy_(weight)

    return update


class OtherLoss(torch.nn.Module):
    """CaptionLoss with what is no part of it any more.

    naming: asks the eye what it sees. A linear layer, thrown away after training, guesses from the
    mean and the maximum of the visual tokens which share of the captions holds each of 600 words
    ema: `averaged.module` is the model with averaged weights, a step behind; 0 leaves it out
    """

    def __init__(self, nb, model, captions, label_smoothing=0.0, naming=0.0, ema=0.0):
        super().__init__()
        self.nb, self.model, self.naming = nb, model, naming
        average = torch.optim.swa_utils.AveragedModel
        how = {"multi_avg_fn": moving_average(ema), "use_buffers": True}
        self.averaged = average(model, **how).requires_grad_(False) if ema else None
        self.label_smoothing, (words, self.shares) = label_smoothing, content_words(captions)
        self.namer = torch.nn.Linear(model.cfg.D_MODEL, len(words)) if naming else None

    def forward(self, images, ids, numbers):
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        F, img_tokens = torch.nn.functional, self.model.vis_enc(self.nb.as_input(images))
        ids = ids[:, : self.model.cfg.MAX_SEQ + 1]
        logits = self.model.text_logits(img_tokens, ids[:, :-1]).float()
        how = {"ignore_index": 0, "label_smoothing": self.label_smoothing}
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), **how)
        if not self.naming:
            return loss
        seen = self.namer(torch.stack([img_tokens.mean(1), img_tokens.amax(1)])).float()
        shares = self.shares[numbers.cpu()].to(seen.device).expand_as(seen)
        wrong = F.binary_cross_entropy_with_logits(seen, shares, reduction="none")
        return loss + self.naming * wrong.sum(-1).mean()


def train_row(nb, splits, cfg, recipe, folder, device, precision, besides=None):
    """Train by `recipe`, and describe the model on dev after each stage.

    folder: for the weights; checkpoints are kept beside it. besides: for make_model
    Returns (model, what to put into the run's entry).
    """
    besides = dict(besides or {})
    views = {k: besides.pop(k) for k in ("crop", "jitter") if k in besides}
    min_lr = besides.pop("min_lr", 0)
    losses = {k: besides.pop(k) for k in ("label_smoothing", "naming", "ema") if k in besides}
    train, dev = splits["train"], splits["dev"]
    tokenizer = nb.train_tokenizer([c for own in train.captions for c in own], cfg.VOCAB_SIZE)
    model = make_model(nb, cfg, recipe.seed, **besides)
    model.tokenizer = tokenizer
    loss_of = OtherLoss(nb, model, train.captions, **losses) if losses else nb.CaptionLoss(model)
    loss_of = loss_of.to(device, memory_format=torch.channels_last)
    loader = nb.make_loader(train, tokenizer, recipe)
    if views:
        *pair, flip = loader.collate_fn.args
        augment = other_views(nb, flip, train.images.shape[-1], **views)
        loader.collate_fn = nb.partial(nb.make_batch, *pair, augment)

    def validate(model):
        model = loss_of.averaged.module if "ema" in losses else model
        return nb.validate(model, dev, precision)

    def describe(model):
        scores, _ = nb.evaluate(model, dev, train.captions)
        return {"loss": round(validate(model), 4)} | scores

    same = {k: v for k, v in nb.asdict(recipe).items() if not k.startswith("scst")}
    captions = sum(map(len, train.captions))
    besides |= views | losses | {"min_lr": min_lr}
    made_from = repr((sorted(same.items()), cfg, besides, captions, str(precision)))
    name = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    cosine = nb.learning_rate
    nb.learning_rate = lambda *at: min_lr + (1 - min_lr / recipe.lr) * cosine(*at)  # ends there
    print(folder.name)
    file = folder.parent / f"{name}.pt"
    model, history = nb.train(loss_of, loader, recipe, validate, precision, file)
    nb.learning_rate = cosine
    model = loss_of.averaged.module.eval() if "ema" in losses else model
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": [[round(h[k], 4) for k in ("train", "val", "seconds")] for h in history],
        "dev": {"CE": describe(model)},
    }
    if recipe.scst_epochs:
        name += f"-{recipe.scst_epochs}-{recipe.scst_lr}"
        cider = nb.CiderD(dev.captions)

        def dev_score(model):
            texts = model.generate_greedy(nb.normalise(dev.images))
            return 100 * np.mean([cider(text, i) for i, text in enumerate(texts)]).item()

        file = folder.parent / f"{name}.pt"
        model, history = nb.train_self_critical(model, train, recipe, dev_score, precision, file)
        found["scst_history"] = [[round(h[k], 4) for k in ("val", "seconds")] for h in history]
        found["dev"]["SCST"] = describe(model)
    model.save_pretrained(folder)
    return model, found | {"weights": fingerprint(folder / "model.safetensors")}


def fingerprint(path):
    """What tells one file of weights from another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def meteor(captions, references, nb):
    """{"METEOR": score} times 100, by its authors' Java program; {} where that does not work."""
    if shutil.which("java") is None:
        return {}
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        ours = {i: [" ".join(nb.caption_words(text))] for i, text in enumerate(captions)}
        theirs = {
            i: [" ".join(nb.caption_words(c)) for c in own] for i, own in enumerate(references)
        }
        return {"METEOR": round(100 * scorer.compute_score(theirs, ours)[0], 1)}
    except (OSError, ValueError) as error:  # a broken pipe, or no number where one is due
        scorer.lock.release()  # still held: its destructor would wait for it for ever
        print(f"METEOR left out: its Java program failed ({error})")
        return {}


def score_on_test(nb, model, splits):
    """Both decoders' scores on test, METEOR included; for weights that are shipped or compared."""
    judged = splits["test"]
    scores, said = nb.evaluate(model, judged, splits["train"].captions)
    return {how: row | meteor(said[how], judged.captions, nb) for how, row in scores.items()}


def baselines(nb, splits):
    """The test scores of captions that need no model (section 11 says what they are)."""
    train, judged = splits["train"], splits["test"]
    constant = nb.best_constant([c for own in train.captions for c in own], splits["dev"].captions)
    small = [splits[s].images[:, :, 3::7, 3::7].flatten(1).float() for s in ("test", "train")]
    nearest = [train.captions[k] for k in torch.cdist(*small).argmin(1)]
    people = [own[i % len(own)] for i, own in enumerate(judged.captions)]
    four = [own[: i % len(own)] + own[i % len(own) + 1 :] for i, own in enumerate(judged.captions)]
    rows = {
        "one sentence for all": ([constant] * len(people), judged.captions),
        "nearest training picture": (
            [own[i % len(own)] for i, own in enumerate(nearest)], judged.captions,
        ),
        "a person, against the other four": (people, four),
    }  # fmt: skip
    return {"constant": constant} | {
        name: nb.score_captions(*row, train.captions) | meteor(*row, nb)
        for name, row in rows.items()
    }


def main(args):
    torch.set_num_threads(args.threads)
    nb = load_components()
    splits = nb.load_splits(args.flickr8k, cache_dir=args.cache)
    if nb.TEST_SPLITS.get(nb.fingerprint("\n".join(splits["test"].names))) != "flickr8k":
        raise SystemExit(f"{args.flickr8k} is not Flickr8k with its standard split")
    if args.row == "baselines":
        results = read_results(args.results)
        results["baselines"] = baselines(nb, splits)
        write_results(results, args.results)
        return
    if args.row in FEWER:
        names, images, captions = (part[: FEWER[args.row]] for part in splits["train"])
        splits["train"] = nb.Split(names, images, [own[:1] for own in captions])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, args.precision) if args.precision else nb.pick_precision(device)
    wanted = {"seed": args.seed, "epochs": args.epochs, "scst_epochs": args.scst}
    recipe, besides = recipe_of(nb, args.row), BESIDES.get(args.row, {})
    recipe = nb.replace(recipe, **{k: v for k, v in wanted.items() if v is not None})
    word = re.sub(r"[^a-z0-9.]+", "-", args.row.lower())
    folder = Path(args.runs) / f"{word}-{recipe.epochs}-{recipe.seed}"
    model, found = train_row(nb, splits, nb.Config(), recipe, folder, device, precision, besides)
    run = {
        "row": args.row, "epochs": recipe.epochs, "seed": recipe.seed,
        "made_by": "tests/ablation.py",
        "recipe": nb.asdict(recipe) | besides,
        "machine": {
            "device": device.type, "threads": args.threads, "precision": str(precision)[6:],
            "python": platform.python_version(), "torch": torch.__version__,
        },
    }  # fmt: skip
    run |= found
    if args.test:
        run["test"] = score_on_test(nb, model, splits)
    print(write_run(run, args.results), json.dumps(run["dev"]), json.dumps(run.get("test")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("row", choices=[*NAMED, *CHANGES, *FEWER, "baselines"])
    add("--flickr8k", default=os.environ.get("FLICKR8K_DIR"), help="its folder")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, help="instead of the recipe's")
    add("--scst", type=int, help="self-critical epochs, instead of the recipe's")
    add("--threads", type=int, default=min(2, os.cpu_count()))
    add("--precision", choices=["float32", "bfloat16", "float16"], help="else the fastest here")
    add("--test", action="store_true", help="score on test too: once, for what is shipped")
    add("--cache", default=str(ROOT / "cache"), help="where the decoded pictures are kept")
    add("--runs", default=str(ROOT / "runs"), help="where checkpoints and weights are kept")
    add("--results", default=str(RESULTS), help="the file that the numbers go into")
    main(parser.parse_args())
