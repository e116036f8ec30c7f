"""What is shipped: the weights in assets/, their card, and the numbers that README and card claim.

`python tests/test_shipped.py` prints the table and the known captions as they must stand in
README.md and in KNOWN below, from assets/results.json and the weights.
"""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
WEIGHTS = ASSETS / "supravl-nano"
RESULTS = json.loads((ASSETS / "results.json").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (WEIGHTS / "README.md").read_text(encoding="utf-8")

SCORES = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr")
RECIPES = {"published": "as published", "nano": "nano, the default", "best": "best, these weights"}
OTHERS = {
    "constant caption": "one sentence for all",
    "nearest training picture": "caption of the most similar training picture",
    "a person, against the other four": "a person, against the other four",
}

# What the shipped weights write for photographs in assets/photos, with beam search of width 3.
KNOWN = {
    "astronaut.jpg": "a man and a woman are smiling for the camera .",
    "ball_grass.jpg": "a boy in a red shirt is playing soccer .",
    "cat_face.jpg": "a brown and white dog is running on the sand .",
    "coffee_cup.jpg": "a man and a woman are standing in front of a building .",
    "dog_face.jpg": "a little girl in a pink shirt is sitting on a swing .",
    "dog_grass.jpg": "a brown dog is running in the grass .",
    "handwriting.jpg": "a white dog is running through the snow .",
    "horses_field.jpg": "a black and white dog is running on the grass .",
    "igloo_snow.jpg": "a skier is skiing down a snowy mountain .",
    "man_camera.jpg": "a man is standing on a snowy mountain .",
    "musicians.jpg": "a group of people are standing in front of a crowd .",
    "people_square.jpg": "a group of people are standing in the street .",
    "people_stage.jpg": "a group of people are standing in front of a building .",
    "rocket.jpg": "a group of people are standing on a mountain .",
}


def entry(recipe):
    return RESULTS[f"flickr8k/{recipe}/test/0"]


def readme_table():
    """The table in README.md, as its lines."""
    lines = [
        "| | epochs | minutes | val. loss | " + " | ".join(SCORES) + " |",
        "|---" * (4 + len(SCORES)) + "|",
    ]
    for row, label in OTHERS.items():
        found = entry("nano")["table"][row]
        lines.append(f"| {label} | | | | " + " | ".join(f"{found[s]}" for s in SCORES) + " |")
    for recipe, label in RECIPES.items():
        found = entry(recipe)
        minutes = (found["epochs"] * found["epoch_seconds"] + found["practice_seconds"]) / 60
        practice = found["config"]["practice"]
        epochs = f"{found['epochs']} + {practice}" if practice else found["epochs"]
        cells = [epochs, f"{minutes:.0f}", f"{found['validation_loss']:.2f}"]
        cells += [found["scores"]["beam-3"][s] for s in SCORES]
        lines.append(f"| {label} | " + " | ".join(map(str, cells)) + " |")
    return lines


def card_table():
    """The table in the model card, as its lines."""
    lines = ["| decoder | " + " | ".join(SCORES) + " |", "|---" * (1 + len(SCORES)) + "|"]
    for decoder, found in entry("best")["scores"].items():
        lines.append(f"| {decoder} | " + " | ".join(str(found[s]) for s in SCORES) + " |")
    return lines


@pytest.fixture(scope="module")
def vlm(nb):
    return nb.SupraVLNano.from_pretrained(WEIGHTS)


def test_the_readme_says_what_was_measured():
    assert "\n".join(readme_table()) in README


def test_the_card_says_what_was_measured(nb):
    best = entry("best")
    assert "\n".join(card_table()) in CARD
    assert f"Validation loss {best['validation_loss']:.2f}" in CARD
    assert f"{best['epochs']} epochs" in CARD
    assert f"seed {best['seed']}" in CARD


def test_results_are_of_the_presets(nb):
    """A preset that changes needs a new run."""
    for recipe in RECIPES:
        assert entry(recipe)["config"] == nb.asdict(nb.PRESETS[recipe]), recipe
        assert entry(recipe)["parameters"] == 698_624


def test_the_shipped_weights_are_of_the_published_shape(vlm, nb):
    assert vlm.model.cfg.model_dict() == nb.Config().model_dict()
    assert sum(p.numel() for p in vlm.model.parameters()) == 698_624
    assert vlm.tokenizer.get_vocab_size() == 2048
    assert {file.name for file in WEIGHTS.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_captions(vlm, name):
    assert vlm.generate_beam([ASSETS / "photos" / name]) == [KNOWN[name]]


def test_the_readmes_program_runs(tmp_path, capsys, monkeypatch):
    program = README.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    exec(compile(program, "README.md", "exec"), {"__name__": "program"})
    name = program.split("assets/photos/")[1].split('"')[0]
    assert capsys.readouterr().out == f"{[KNOWN[name]]}\n"


if __name__ == "__main__":
    import conftest

    components = {}
    for source in conftest.component_cells():
        exec(source, components)
    shipped = components["SupraVLNano"].from_pretrained(WEIGHTS)
    files = sorted((ASSETS / "photos").glob("*.jpg"))
    print(*readme_table(), "", *card_table(), "", sep="\n")
    for file, caption in zip(files, shipped.generate_beam(files)):
        print(f'    "{file.name}": "{caption}",')
