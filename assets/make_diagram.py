"""Draw the diagram of the model, `model.svg`, with the shapes on the arrows.

    python assets/make_diagram.py            # write assets/model.svg
    python assets/make_diagram.py --check    # compare what would be drawn with what is there

The picture has a white ground of its own, so that it reads the same on a light and a dark page. It
uses the fonts that a system has, and no scripts.
"""

import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1180, 630
INK, SOFT, LINE = "#1f2937", "#4b5563", "#6b7280"
FILL = {"picture": "#fde8d3", "text": "#dbe7fb", "block": "#e9e5f5", "plain": "#f3f4f6"}
EDGE = {"picture": "#c2620a", "text": "#2b5fb8", "block": "#6a4fa3", "plain": "#6b7280"}

parts = []


def text(x, y, words, size=14, colour=INK, anchor="middle", weight="normal", mono=False):
    family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, sans-serif"
    parts.append(
        f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
    )


def box(x, y, width, height, kind, lines=(), radius=8):
    """A rounded box; the first line is bold, the others small."""
    parts.append(
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
        f'fill="{FILL[kind]}" stroke="{EDGE[kind]}" stroke-width="1.5"/>'
    )
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        size, weight = (15, "600") if i == 0 else (12, "normal")
        text(x + width / 2, top + 18 * i, line, size, INK if i == 0 else SOFT, weight=weight)


def arrow(points, label="", at=None, anchor="middle"):
    """A line through `points` with a head at the end, and a shape written at `at`."""
    path = " L".join(f"{x:g},{y:g}" for x, y in points)
    parts.append(
        f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )
    if label:
        text(*at, label, 12, INK, anchor, mono=True)


def photograph(x, y, size):
    """A little landscape with a brown dog."""
    shapes = (
        f'<rect width="{size}" height="{size}" fill="#bcd9f2"/>'
        f'<rect y="{0.55 * size:g}" width="{size}" height="{0.45 * size:g}" fill="#9cc284"/>'
        f'<circle cx="{0.82 * size:g}" cy="{0.17 * size:g}" r="{0.08 * size:g}" fill="#f7d46b"/>'
        f'<ellipse cx="{0.45 * size:g}" cy="{0.6 * size:g}" rx="{0.24 * size:g}" '
        f'ry="{0.11 * size:g}" fill="#8a5a33"/>'
        f'<circle cx="{0.7 * size:g}" cy="{0.48 * size:g}" r="{0.1 * size:g}" fill="#8a5a33"/>'
        f'<circle cx="{0.73 * size:g}" cy="{0.46 * size:g}" r="{0.016 * size:g}" fill="#222"/>'
        f'<path d="M{0.22 * size:g},{0.56 * size:g} l{-0.1 * size:g},{-0.12 * size:g}" '
        f'stroke="#8a5a33" stroke-width="{0.04 * size:g}" stroke-linecap="round"/>'
    )
    for share in (0.28, 0.38, 0.54, 0.62):
        shapes += (
            f'<rect x="{share * size - 0.02 * size:g}" y="{0.64 * size:g}" '
            f'width="{0.045 * size:g}" height="{0.2 * size:g}" fill="#8a5a33"/>'
        )
    parts.append(f'<g transform="translate({x},{y})">{shapes}</g>')
    parts.append(
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none" stroke="{LINE}"/>'
    )


def feature_maps(x, y, size, count, colour):
    """A stack of squares for a layer's channels."""
    for i in reversed(range(count)):
        parts.append(
            f'<rect x="{x + 5 * i:g}" y="{y - 5 * i:g}" width="{size:g}" height="{size:g}" '
            f'fill="{colour}" stroke="{EDGE["picture"]}" stroke-width="1.2"/>'
        )


def grid(x, y, size):
    """The 4 x 4 grid, its cells numbered as the tokens are."""
    step = size / 4
    for i in range(16):
        left, top = x + i % 4 * step, y + i // 4 * step
        parts.append(
            f'<rect x="{left:g}" y="{top:g}" width="{step:g}" height="{step:g}" '
            f'fill="{FILL["picture"]}" stroke="{EDGE["picture"]}" stroke-width="1.2"/>'
        )
        text(left + step / 2, top + step / 2 + 4, str(i), 11, SOFT)


def tokens(y):
    """The sequence: 16 visual tokens, then the words. Gives back where its two halves lie."""
    labels = ["0", "1", "2", "…", "14", "15", "<bos>", "a", "dog", "runs"]
    wide = [34, 34, 34, 34, 34, 34, 62, 50, 58, 62]
    x, places = 300, []
    for i, (label, width) in enumerate(zip(labels, wide)):
        x += 26 if i == 6 else 0
        kind = "picture" if i < 6 else "text"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="34" rx="5" fill="{FILL[kind]}" '
            f'stroke="{EDGE[kind]}" stroke-width="1.5"/>'
        )
        text(x + width / 2, y + 22, label, 13, mono=i >= 6)
        places.append((x, width))
        x += width + 6
    return places


def draw():
    parts.clear()
    # Upper row: from the picture to the grid.
    text(40, 34, "The eye: VisualEncoder", 16, anchor="start", weight="600")
    photograph(40, 66, 132)
    text(106, 220, "picture", 13, SOFT)
    stages = [(300, 92, 3, "conv1"), (524, 70, 4, "conv2"), (726, 52, 5, "conv3")]
    shapes = ["3 × 112 × 112", "16 × 56 × 56", "32 × 28 × 28", "64 × 14 × 14"]
    start = 172
    for (x, size, count, name), shape in zip(stages, shapes):
        arrow([(start + 8, 132), (x - 8, 132)], shape, ((start + x) / 2, 122))
        feature_maps(x, 132 - size / 2 + 5, size, count, FILL["picture"])
        text(x + size / 2 + 5, 205, name, 13, SOFT)
        start = x + size + 5 * count - 3
    arrow([(start + 8, 132), (902, 132)], shapes[3], ((start + 910) / 2, 122))
    text((start + 910) / 2, 152, "average", 12, SOFT)
    grid(910, 66, 132)
    text(976, 220, "4 × 4 grid, 64 numbers a cell", 13, SOFT)

    # Lower part: the sequence, the blocks, the answer.
    y = 318
    text(40, y - 32, "The language model: a small GPT-2", 16, anchor="start", weight="600")
    places = tokens(y)
    left, right = places[0][0], places[5][0] + places[5][1]
    first, last = places[6][0], places[9][0] + places[9][1]
    arrow(
        [(976, 230), (976, 262), ((left + right) / 2, 262), ((left + right) / 2, y - 6)],
        "proj: 16 × 64 → 16 × 128",
        (968, 254),
        "end",
    )
    text((left + right) / 2, y + 52, "16 visual tokens", 12, SOFT)
    text((first + last) / 2, y + 52, "T word tokens", 12, SOFT)
    text(last + 28, y + 17, "each token: 128 numbers (for a word, its row of", 12, SOFT, "start")
    text(last + 28, y + 34, "the embedding matrix), + its position embedding", 12, SOFT, "start")

    blocks = y + 104
    middle = (left + last) / 2
    arrow(
        [(middle, y + 60), (middle, blocks - 4)], "(16 + T) × 128", (middle + 12, y + 86), "start"
    )
    for offset in (12, 6, 0):
        box(left + offset, blocks + 12 - offset, last - left - 12, 44, "block")
    centre = (left + last - 12) / 2
    text(centre, blocks + 39, "3 blocks: causal attention, 4 heads; then MLP", 15, weight="600")
    text(last + 28, blocks + 26, "a token sees itself and those to its left:", 12, SOFT, "start")
    text(last + 28, blocks + 43, "every word sees the whole picture", 12, SOFT, "start")

    head = blocks + 106
    arrow([(middle, blocks + 62), (middle, head - 6)])
    text(middle + 12, blocks + 90, "(16 + T) × 128", 12, INK, "start", mono=True)
    box(left, head, last - left, 34, "text", ["lm_head: (16 + T) × 2,048 logits"])
    text(last + 28, head + 13, "the embedding matrix, the other way round:", 12, SOFT, "start")
    text(last + 28, head + 30, "at each position a score for every token", 12, SOFT, "start")
    guesses = head + 74
    words = [x + width / 2 for x, width in places[6:]]
    for x, word in zip(words, ("a", "dog", "runs", "<eos>")):
        arrow([(x, head + 38), (x, guesses - 16)])
        text(x, guesses, word, 13, EDGE["text"], weight="600", mono=True)
    text((left + right) / 2, guesses, "(not used)", 12, SOFT)
    text(last + 28, guesses, "at each word, the likeliest next one", 12, SOFT, "start")

    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker>'
    )
    title = (
        "The model: a picture of 112 by 112 pixels goes through three convolutions to a 4 by 4 "
        "grid of visual tokens, which stand before the words; three transformer blocks read both "
        "and score the next token at every word"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">\n<title>{escape(title)}</title>\n<defs>{marker}</defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / "model.svg"
    if "--check" in sys.argv[1:]:
        same = target.is_file() and target.read_text(encoding="utf-8") == draw()
        print(f"{target.name} is {'as it would be drawn' if same else 'not what would be drawn'}")
        sys.exit(0 if same else 1)
    target.write_text(draw(), encoding="utf-8")
    print(f"wrote {target.name}")
