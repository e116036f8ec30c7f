"""What each variant of section 14 brings: train one row on Flickr8k, score it, keep the numbers.

    python tests/variants.py blueprint --flickr8k DIR --seed 0
    python tests/variants.py cross-attention --flickr8k DIR --seed 1 --epochs 4
    python tests/variants.py "frozen eye" --flickr8k DIR --test
    python tests/variants.py photos

Rows of the same number of epochs and seed see the same captions in the same order, by the same
schedule. Runs keep checkpoints and go on where they stopped; features of frozen eyes are computed
once, into the cache. "photos" has the free photos captioned by the shipped weights and by the last
"frozen eye" that was trained. The numbers go into assets/results.json: "beyond runs", one entry a
run; "beyond", a table made from these, and "beyond photos", for section 14. Not run by pytest.
"""

import argparse
import json
import os
import platform
import re
import time
from pathlib import Path

import torch
from ablation import RESULTS, fingerprint, mean_and_spread, read_results, write_results
from conftest import ROOT, load_components

# For each row: the class, the Config's changes, the eye, epochs, self-critical epochs.
ROWS = {
    "blueprint": ("MiniVLM", {}, None, 4, 0),
    "ViT": ("ViTVLM", {}, {}, 4, 0),
    "ViT, large": ("ViTVLM", {}, {"width": 128, "layers": 4}, 4, 0),
    "cross-attention": ("CrossAttentionVLM", {}, None, 4, 0),
    "two-way prefix": ("TwoWayVLM", {}, None, 4, 0),
    "3 layers of 128": ("MiniVLM", {}, None, 4, 0),
    "6 layers of 128": ("MiniVLM", {"N_LAYERS": 6}, None, 4, 0),
    "6 layers of 256": (
        "MiniVLM", {"N_LAYERS": 6, "D_MODEL": 256, "D_FF": 512, "N_HEADS": 8}, None, 4, 0,
    ),
    "8 layers of 512": (
        "MiniVLM", {"N_LAYERS": 8, "D_MODEL": 512, "D_FF": 2048, "N_HEADS": 16}, None, 4, 0,
    ),
    "frozen eye": ("FrozenVLM", {"IMG_SIZE": 224}, "lite0", 8, 5),
    "frozen eye, mirrored": ("FrozenVLM", {"IMG_SIZE": 224}, "lite0", 4, 3),
    "frozen eye, 300 pictures": ("FrozenVLM", {"IMG_SIZE": 224}, "lite0", 20, 0),
    "frozen eye, 1,000 pictures": ("FrozenVLM", {"IMG_SIZE": 224}, "lite0", 20, 0),
    "frozen eye, 6 layers": ("FrozenVLM", {"IMG_SIZE": 224, "N_LAYERS": 6}, "lite0", 8, 5),
}  # fmt: skip
FEW = {  # these learn from so many pictures, with one caption each
    row: 6000 if " layers of " in row else int(re.sub(r"\D", "", row))
    for row in ROWS
    if re.search(" layers of | pictures$", row)
}
MIRRORED = ["frozen eye, mirrored"]  # each picture's mirror image too: epochs are twice as long
PLAIN = {"flip": 0}  # features can't be mirrored


def table(runs):
    """One line a row, epochs and stage: means over the seeds, as section 14 prints them."""
    groups = {}
    for run in runs.values():
        for stage, dev in run["dev"].items():
            test = run.get("test", {}).get(stage)
            epochs = f"{run['epochs']}" + (f" + {run['scst_epochs']}" if stage == "SCST" else "")
            groups.setdefault((run["row"], epochs), []).append((run, dev, test))
    lines = {}
    for (row, epochs), found in groups.items():
        line = {"parameters": f"{found[0][0]['parameters']:,}"}
        spent = [run["minutes"] - run["minutes of"].get("SCST", 0) for run, _, _ in found]
        spent = spent if "+" not in epochs else [run["minutes"] for run, _, _ in found]
        line["minutes"] = f"{sum(spent) / len(spent):.0f}"
        line["train loss"] = mean_and_spread([run["train loss"] for run, _, _ in found], 2)
        line["dev loss"] = mean_and_spread([dev["loss"] for _, dev, _ in found], 2)
        line["dev CIDEr"] = mean_and_spread([dev["beam-3"]["CIDEr"] for _, dev, _ in found], 1)
        tests = [test["beam-3"] for _, _, test in found if test]
        for score in ("CIDEr", "BLEU-4") if tests else ():
            line[f"test {score}"] = mean_and_spread([test[score] for test in tests], 1)
        lines[f"{row}, {epochs} epochs"] = line
    return dict(
        sorted(lines.items(), key=lambda item: list(ROWS).index(item[0].rsplit(", ", 1)[0]))
    )


def build(nb, row, seed):
    """A row's untrained model."""
    kind, changes, eye, _, _ = ROWS[row]
    cfg = nb.replace(nb.Config(), **changes)
    torch.manual_seed(seed)
    if kind == "ViTVLM":
        eye = nb.ViTEncoder(cfg, **eye)
    elif eye == "lite0":
        eye = nb.FrozenEncoder(cfg, nb.lite0_backbone())
    torch.manual_seed(seed)  # whatever the eye has drawn, the decoder starts from the same numbers
    return getattr(nb, kind)(cfg, eye)


def keep_features(nb, eye, splits, cfg, cache, what=""):
    """{split: features}, from files in `cache` if they are there."""
    kept = {}
    for name, split in splits.items():
        file = Path(cache) / f"lite0-{cfg.IMG_SIZE}-{cfg.N_VIS}-{what}{name}-{len(split.images)}.pt"
        if not file.is_file():
            features = eye.keep(split.images)
            nb.write_whole(file, lambda opened, features=features: torch.save(features, opened))
        kept[name] = torch.load(file, mmap=True, weights_only=True)
    return kept


def describe(nb, model, split, train_captions):
    """Loss, and scores of greedy and beam-3 captions."""
    found, loss = {}, nb.validate(model, split)
    with torch.no_grad():
        for how, write in (("greedy", nb.sample), ("beam-3", nb.beam_search)):
            texts = []
            for part in split.images.split(100):
                seen = model.vis_enc(nb.as_input(part.to(model.pos_emb.weight.device)))
                texts += model.tokenizer.decode_batch(write(model, seen).tolist())
            texts = [text.strip() for text in texts]
            found[how] = nb.score_captions(texts, split.captions, train_captions)
    return {"loss": round(loss, 4)} | found


def train_row(nb, args):
    """Train and score one row: (model, its entry)."""
    started = time.perf_counter()
    _, _, eye, epochs, scst = ROWS[args.row]
    epochs = epochs if args.epochs is None else args.epochs
    scst = scst if args.scst is None else args.scst
    model = build(nb, args.row, args.seed)
    cfg = model.cfg
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, args.precision) if args.precision else nb.pick_precision(device)
    splits = nb.load_splits(args.flickr8k, cfg.IMG_SIZE, args.cache)
    train = splits["train"]
    recipe = nb.replace(nb.RECIPES["nano"], seed=args.seed, epochs=epochs, scst_epochs=scst)
    if args.row in FEW:  # small batches, or there would be few steps
        recipe = nb.replace(recipe, batch_size=20)
    model = model.to(device)
    if eye == "lite0":
        kept = keep_features(nb, model.vis_enc, splits, cfg, args.cache)
        recipe = nb.replace(recipe, **PLAIN)
    minutes = {"features and pictures": (time.perf_counter() - started) / 60}
    if args.row in MIRRORED:
        mirrored = {"train": train._replace(images=train.images.flip(-1))}
        mirrored = keep_features(nb, model.vis_enc, mirrored, cfg, args.cache, "mirrored ")["train"]
        kept = kept | {"train": torch.cat([kept["train"], mirrored])}
        splits["train"] = nb.Split(train.names * 2, kept["train"], train.captions * 2)
    if eye == "lite0":
        splits = {name: split._replace(images=kept[name]) for name, split in splits.items()}
    if args.row in FEW:
        names, images, captions = (part[: FEW[args.row]] for part in splits["train"])
        splits["train"] = nb.Split(names, images, [own[:1] for own in captions])
    train, dev = splits["train"], splits["dev"]
    tokenizer = nb.train_tokenizer([c for own in train.captions for c in own], cfg.VOCAB_SIZE)
    model.tokenizer = tokenizer
    loss_of = nb.CaptionLoss(model).to(device)
    loader = nb.make_loader(train, tokenizer, recipe)
    word = re.sub(r"[^a-z0-9]+", "-", args.row.lower())
    folder = Path(args.runs) / f"{word}-{epochs}-{args.seed}"

    def check(model):
        return nb.validate(model, dev, precision)

    def judge(stage):
        sets = ["dev", "test"] if args.test else ["dev"]
        for s in sets:
            found = describe(nb, model, splits[s], train.captions)
            entry.setdefault(s, {})[stage] = found
            print(f"{folder.name} {stage} {s}: {found}")

    print(folder.name)
    file = folder.with_suffix(".ce.pt")
    model, history = nb.train(loss_of, loader, recipe, check, precision, file)
    minutes["CE"] = sum(h["seconds"] for h in history) / 60
    entry = {
        "row": args.row, "epochs": epochs, "scst_epochs": scst, "seed": args.seed,
        "made_by": "tests/variants.py", "variant": model.variant, "config": nb.asdict(cfg),
        "recipe": nb.asdict(recipe), "parameters": sum(p.numel() for p in model.parameters()),
        "machine": {
            "device": device.type, "threads": args.threads, "precision": str(precision)[6:],
            "python": platform.python_version(), "torch": torch.__version__,
        },
        "history": [[round(h[k], 4) for k in ("train", "val", "seconds")] for h in history],
    }  # fmt: skip
    part = nb.Split(*(part[:1000] for part in train))
    entry["train loss"] = round(nb.validate(model, part, precision), 4)  # without augmentation
    judge("CE")
    if scst:
        file = folder.with_suffix(f".scst{scst}.pt")
        model, history = nb.train_self_critical(model, train, recipe, check, precision, file)
        minutes["SCST"] = sum(h["seconds"] for h in history) / 60
        entry["scst_history"] = [[round(h[k], 4) for k in ("val", "seconds")] for h in history]
        judge("SCST")
    model.save_pretrained(folder)
    entry["weights"] = fingerprint(folder / "model.safetensors")
    entry["minutes"] = round(sum(minutes.values()), 1)
    entry["minutes of"] = {name: round(value, 1) for name, value in minutes.items()}
    return model, entry


def photo_captions(nb, args):
    """{file: {"blueprint": caption, "borrowed eye": caption, "it shows": what its README says}}."""
    found = sorted(Path(args.runs).glob("frozen-eye-*/config.json"), key=os.path.getmtime)
    values = json.loads(found[-1].read_text(encoding="utf-8"))
    cfg = nb.Config(**{field.name: values[field.name] for field in nb.fields(nb.Config)})
    eye = nb.FrozenEncoder(cfg, nb.lite0_backbone())
    readme = (ROOT / "assets/photos/README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+\.jpg)` \| ([^|]+?) \|", readme, re.MULTILINE))
    files = [ROOT / "assets/photos" / name for name in list(shown)[:6]]
    said = {
        "blueprint": nb.MiniVLM.from_pretrained(ROOT / "assets/supravl-nano").caption(files),
        "borrowed eye": nb.FrozenVLM.from_pretrained(found[-1].parent, vis_enc=eye).caption(files),
        "it shows": [shown[file.name] for file in files],
    }
    return {f.name: {who: texts[i] for who, texts in said.items()} for i, f in enumerate(files)}


def main(args):
    torch.set_num_threads(args.threads)
    nb = load_components()
    if args.row == "photos":
        new = {"beyond photos": photo_captions(nb, args)}
    else:
        _, entry = train_row(nb, args)
        key = f"{args.row}/{entry['epochs']}/{args.seed}"
        runs = dict(read_results(args.results).get("beyond runs", {})) | {key: entry}
        new = {"beyond runs": runs, "beyond": table(runs)}
    results = read_results(args.results) | new  # read again: another run may have written meanwhile
    write_results(results, args.results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("row", choices=[*ROWS, "photos"])
    add("--flickr8k", default=os.environ.get("FLICKR8K_DIR"), help="its folder")
    add("--seed", type=int, default=0)
    add("--epochs", type=int, help="instead of the row's")
    add("--scst", type=int, help="self-critical epochs, instead of the row's")
    add("--threads", type=int, default=min(2, os.cpu_count()))
    add("--precision", choices=["float32", "bfloat16", "float16"], help="else the fastest here")
    add("--test", action="store_true", help="score on test too: once, for what is reported")
    add("--cache", default=str(ROOT / "cache"), help="where pictures and features are kept")
    add("--runs", default=str(ROOT / "runs"), help="where checkpoints and weights are kept")
    add("--results", default=str(RESULTS), help="the file that the numbers go into")
    main(parser.parse_args())
