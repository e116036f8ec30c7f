"""What each idea of the recipe brings: short runs that differ in that idea alone, scored on dev.

    python tests/ablation.py --flickr8k DIR [--epochs 4] [--seeds 0 1] [--only "no dropout" ...]

Each run is the preset "nano" with fewer epochs and one change, made by the notebook's own component
cells. The results go into assets/results.json as entries of the split "dev", where section 11 of
the notebook shows them. Runs keep checkpoints, and go on where they stopped. Not run by pytest.
"""

import argparse
import os
import types

import torch
from conftest import ROOT, component_cells

CHANGES = {
    "nothing (nano itself)": {},
    "no crop, mirror or colours": {"crop": 1.0, "flip": False, "jitter": 0.0},
    "no dropout": {"dropout": 0.0},
    "no label smoothing": {"label_smoothing": 0.0},
    "one caption in a row": {"captions_per_image": 1},
    "five captions in a row": {"captions_per_image": 5},
    "the published learning rate": {"lr": 3e-4, "min_lr": 3e-5, "warmup": 0},
    "the published start": {"init": "pytorch"},
}


def main(args):
    nb = types.ModuleType("notebook_components")
    for source in component_cells():
        exec(source, nb.__dict__)
    if args.flickr8k:
        os.environ["FLICKR8K_DIR"] = args.flickr8k
    device = nb.pick_device()
    precision = nb.pick_precision(device)
    data, pictures = nb.get_dataset()
    base = nb.replace(nb.PRESETS["nano"], epochs=args.epochs, practice=0)
    splits = {
        split: nb.load_split(items, base.IMG_SIZE, args.cache, f"{data}-{split}")
        for split, items in pictures.items()
    }
    tokenizer, ids = nb.load_tokens(splits, base, args.cache)
    dev, seen = splits["dev"], splits["train"].captions

    def loss_on_dev(model):
        return nb.evaluate_loss(model, dev.images, ids["dev"], device, precision)

    def keep(change, cfg, model, history):
        scores, _ = nb.evaluate_captioner(nb.Captioner(model, tokenizer), dev, seen)
        entry = nb.make_result(
            cfg, model, history, loss_on_dev(model), scores, data=data, split="dev",
            recipe=f"nano, {cfg.epochs} epochs: {change}", change=change, device=device.type,
        )  # fmt: skip
        nb.write_result(args.results, entry)
        short = {name: row["CIDEr"] for name, row in scores.items()}
        print(
            f"{change}, seed {cfg.seed}: loss {entry['validation_loss']}, CIDEr {short}", flush=True
        )

    for seed in args.seeds:
        for change in args.only or CHANGES:
            cfg = nb.replace(base, seed=seed, **CHANGES[change])
            batches = nb.CaptionBatches(splits["train"].images, ids["train"], cfg, device)
            path = nb.checkpoint_path(args.checkpoints, cfg, data, ids["train"])
            model, history = nb.train_model(cfg, batches, loss_on_dev, device, precision, path)
            keep(change, cfg, model, history)
            if not CHANGES[change]:  # the weights as they are: averaging changes nothing else
                model.load_state_dict(torch.load(path, weights_only=True)["model"])
                keep("no averaged weights", nb.replace(cfg, ema=0.0), model, history)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flickr8k", help="its folder; else as the notebook finds its data")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", choices=CHANGES, help="changes to run")
    parser.add_argument("--cache", default="cache")
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--results", default=str(ROOT / "assets" / "results.json"))
    main(parser.parse_args())
