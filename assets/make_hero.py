"""Draw hero.jpg: a photo, its caption by the weights in supravl-nano, and where each word looked.

    python assets/make_hero.py            # from assets/supravl-nano
    python assets/make_hero.py FOLDER     # from a model of your own

It takes its code from the notebook's cells.
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

HERE = Path(__file__).resolve().parent


def components():
    """What the notebook's component cells define, as a dict."""
    names = {}
    notebook = json.loads((HERE.parent / "SupraVL_Nano.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "component" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


def draw(weights=HERE / "supravl-nano", photo=HERE / "photos" / "dog_grass.jpg", columns=3):
    """The figure: the photo under its caption, and beside it a tile for each word."""
    nb = components()
    model, picture = nb["MiniVLM"].from_pretrained(weights), nb["open_picture"](photo)
    image, ids, words = nb["describe"](model, picture)
    maps = nb["attention_maps"](model, image, ids, words)
    shown = [n for n, (word, _) in enumerate(words) if word.isalnum()]
    big = nb["v2"].functional.pil_to_tensor(picture)  # tiles at the photo's own size
    figure = nb["plt"].figure(figsize=(12, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    axis = left.subplots()
    axis.imshow(picture)
    axis.axis("off")
    text = model.tokenizer.decode(ids).strip(" .")
    axis.set_title("\n".join(textwrap.wrap(f"“{text}”", 34)), fontsize=15)
    axes = right.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    tiles = nb["heat_tiles"](big, maps[shown]).permute(0, 2, 3, 1)
    for axis, tile, n in zip(axes.flat, tiles, shown):
        axis.imshow(tile)
        axis.set_title(words[n][0], fontsize=12)
    return figure


if __name__ == "__main__":
    matplotlib.use("agg")
    figure = draw(*sys.argv[1:2])
    figure.savefig(HERE / "hero.jpg", dpi=80, pil_kwargs={"quality": 85})
    print(HERE / "hero.jpg")
