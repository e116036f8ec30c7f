"""README, model card and notebook say what assets/results.json says, and that file is consistent.

A markdown table with a column "CIDEr" in README.md or the notebook is compared cell by cell,
whatever the order of its rows and columns; so are sentences with numbers, see CLAIMS. Which runs
the file holds, and what made them, is up to tests/ablation.py.
"""

import json
import re

import ablation
import pytest
from conftest import NOTEBOOK, ROOT

RESULTS = ablation.read_results()
RUNS, BASELINES = RESULTS["runs"], RESULTS["baselines"]
WEIGHTS = ROOT / "assets" / "supravl-nano"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (WEIGHTS / "README.md").read_text(encoding="utf-8")
PROSE = "\n\n".join(
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)
NAMES = {  # how a table calls a row, where not by its own name
    "caption of the most similar training picture": "nearest training picture",
    "as published": "published",
}
PERSON = "a person, against the other four"
CLAIMS = [  # (text, pattern with one number, the number as it must be)
    (PROSE, r"a person's BLEU-1 stays ([\d.]+)", lambda: BASELINES[PERSON]["BLEU-1"]),
    (PROSE, r"BLEU-2 falls from ([\d.]+) to", lambda: BASELINES[PERSON]["BLEU-2"]),
    (PROSE, r"CIDEr falls from ([\d.]+) to", lambda: BASELINES[PERSON]["CIDEr"]),
    (CARD, r"[Vv]alidation loss (\d\.\d+)", lambda: value(shipped(), "val. loss")),
    (CARD, r"(\d+) epochs", lambda: shipped()["epochs"]),
    (CARD, r"seed (\d+)", lambda: shipped()["seed"]),
    (PROSE, r"test CIDEr is (\d+\.\d) \(without", lambda: borrowed()),
    (README, r"a test CIDEr of (\d+\.\d)", lambda: borrowed()),
    (CARD, r"other four reaches CIDEr ([\d.]+)", lambda: BASELINES[PERSON]["CIDEr"]),
]


def borrowed():
    """The test CIDEr of section 14's frozen eye after self-critical training: mean of two seeds."""
    runs = [RESULTS["beyond runs"][f"frozen eye, mirrored/4/{seed}"] for seed in (0, 1)]
    return sum(run["test"]["SCST"]["beam-3"]["CIDEr"] for run in runs) / 2


def few(row):
    """The dev CIDEr, beam-3, of a model trained on few pictures."""
    run = (RESULTS["runs"] | RESULTS["beyond runs"])[f"{row}/20/0"]
    return run["dev"]["CE"]["beam-3"]["CIDEr"]


def shipped():
    """The run that made the weights in assets/."""
    mark = ablation.fingerprint(WEIGHTS / "model.safetensors")
    found = [run for run in RUNS.values() if run.get("weights") == mark]
    assert len(found) == 1, f"assets/results.json has {len(found)} runs of the shipped weights"
    return found[0]


def tables(text):
    """All markdown tables with a column CIDEr: [(columns, {name of row: {column: cell}}), ...]."""
    found = []
    for block in re.findall(r"(?:^\|.*\|[ ]*$\n?)+", text, re.MULTILINE):
        rows = [
            [re.sub(r"[*`]", "", cell).strip() for cell in line.strip().strip("|").split("|")]
            for line in block.strip().split("\n")
        ]
        columns = rows[0][1:]
        if "CIDEr" in columns:
            found.append({row[0]: dict(zip(columns, row[1:])) for row in rows[2:]})
    return found


def value(run, column):
    """What a run has to show in a column: a number, or a text for epochs."""
    if column == "epochs":
        scst = len(run.get("scst_history", []))
        return f"{run['epochs']} + {scst}" if scst else str(run["epochs"])
    if column == "minutes":
        seconds = sum(h[-1] for h in run["history"] + run.get("scst_history", []))
        return seconds / 60
    last = list(run.get("dev", {}).values())[-1:]
    if column == "val. loss":
        return last[0]["loss"]
    if column in ("CIDEr on dev", "dev CIDEr"):
        return last[0]["beam-3"]["CIDEr"]
    return run["test"]["beam-3"][column]


def expected(name, column):
    """What README or notebook must say: (mean, half the distance between extremes), or a text."""
    name = NAMES.get(name, name)
    if name in BASELINES or name in RESULTS["peers"]:
        return (BASELINES | RESULTS["peers"])[name][column], None
    if "these weights" in name:
        runs = [shipped()]
    else:
        runs = [run for run in RUNS.values() if run["row"] == name]
        assert runs, f"no row {name!r} in assets/results.json"
        if column not in ("CIDEr on dev", "dev CIDEr"):  # what was tested, if something was
            runs = [run for run in runs if "test" in run] or runs
    values = [value(run, column) for run in runs]
    if isinstance(values[0], str):
        return values[0], None
    return sum(values) / len(values), (max(values) - min(values)) / 2


def agrees(text, number):
    """Whether a text such as 31.3 is this number, rounded as it is."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - number) <= 0.5 * 10**-digits + 1e-9


def check(table):
    for name, row in table.items():
        for column, cell in row.items():
            if cell in ("", "-", "–"):
                continue
            wanted, spread = expected(name, column)
            message = f"{name}, {column}: {cell}, but assets/results.json has {wanted}"
            if isinstance(wanted, str):
                assert cell == wanted, message
                continue
            mean, _, around = cell.partition("±")
            assert agrees(mean.strip(), wanted), message
            assert not around or agrees(around.strip(), spread), f"{message} ± {spread}"


def test_the_readme_says_what_was_measured():
    found = tables(README)
    assert found, "README.md has no table with a column CIDEr"
    rows = set().union(*found)
    assert {"one sentence for all", PERSON, "as published"} <= rows
    assert any("these weights" in row for row in rows)
    for table in found:
        check(table)


def test_the_notebook_says_what_was_measured():
    for table in tables(PROSE):
        check({name: row for name, row in table.items() if not name.startswith("**")})


def test_the_card_says_what_was_measured():
    found = [table for table in tables(CARD) if {"greedy", "beam-3"} <= set(table)]
    assert len(found) == 1
    for decoder, row in found[0].items():
        for column, cell in row.items():
            assert agrees(cell, shipped()["test"][decoder][column]), f"{decoder}, {column}: {cell}"


@pytest.mark.parametrize("text, pattern, number", CLAIMS, ids=[claim[1] for claim in CLAIMS])
def test_claims(text, pattern, number):
    found = re.findall(pattern, text)
    assert found, f"nothing says {pattern}"
    assert all(agrees(said, float(number())) for said in found), (found, number())


def test_borrowed_eyes_need_fewer_pictures():
    """Sections 2 and 14 say that 300 bring more with them than 3,000 without."""
    assert few("frozen eye, 300 pictures") > few("3,000 pictures, a caption each")


def test_nothing_was_left_to_be_filled_in():
    for text in (README, CARD, PROSE):
        assert re.findall(r"\[\[.*?\]\]", text) == []


# The file itself


def check_scores(scores):
    bleu = [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)]
    assert bleu == sorted(bleu, reverse=True)  # no law, but so for a thousand captions
    assert all(0 <= scores[name] <= 100 for name in ("BLEU-1", "ROUGE-L", "METEOR"))
    assert 0 <= scores["CIDEr"] <= 1000


@pytest.mark.parametrize("key", RUNS)
def test_runs_are_consistent(key):
    run = RUNS[key]
    own, _, code = key.partition("/earlier")
    assert own == f"{run['row']}/{run['epochs']}/{run['seed']}" and bool(code) == ("code" in run)
    assert run["parameters"] == 698_624 and run["made_by"]
    assert run["seed"] == run["recipe"]["seed"]
    assert run["epochs"] == run["recipe"]["epochs"] == len(run["history"])
    for scores in run.get("test", {}).values():
        check_scores(scores)
    if "dev" in run:
        assert len(run.get("scst_history", [])) == run["recipe"]["scst_epochs"]
        assert list(run["dev"]) == ["CE", "SCST"][: 1 + bool(run["recipe"]["scst_epochs"])]
        assert run["dev"]["CE"]["loss"] == pytest.approx(run["history"][-1][1], abs=1e-3)


def test_the_baselines_are_consistent():
    for name in ("one sentence for all", "nearest training picture", PERSON):
        check_scores(BASELINES[name])
    assert BASELINES["one sentence for all"]["distinct"] == 1


def test_the_tables_for_the_notebook_are_of_these_runs():
    assert RESULTS["dev"] == ablation.dev_table(RUNS)
    assert RESULTS["test"] == ablation.test_table(RUNS)


def test_named_runs_are_of_the_notebooks_recipes(nb):
    """A recipe that changes needs a new run."""
    for run in RUNS.values():
        if run["row"] in ablation.NAMED:
            recipe = ablation.recipe_of(nb, run["row"])
            recipe = nb.asdict(nb.replace(recipe, seed=run["seed"], epochs=run["epochs"]))
            assert run["recipe"] == recipe | ablation.BESIDES.get(run["row"], {}), run["row"]


def test_peers_are_plausible():
    for row in RESULTS["peers"].values():
        bleu = [row[f"BLEU-{n}"] for n in (1, 2, 3, 4)]
        assert bleu == sorted(bleu, reverse=True)


# The checks fail when they should, and tests/ablation.py writes what they read


def test_a_wrong_number_is_found():
    row = {"one sentence for all": {"CIDEr": str(BASELINES["one sentence for all"]["CIDEr"])}}
    check(row)
    row["one sentence for all"]["CIDEr"] = "14.9"
    with pytest.raises(AssertionError, match="14.9, but"):
        check(row)
    with pytest.raises(AssertionError, match="no row"):
        check({"somebody else": {"CIDEr": "1"}})


def test_a_table_is_read_whatever_its_order():
    table = tables("text\n\n| | CIDEr | BLEU-1 |\n|---|---|---|\n| **a** | 1.5 | |\n| b | 2 | 3 |")
    assert table == [{"a": {"CIDEr": "1.5", "BLEU-1": ""}, "b": {"CIDEr": "2", "BLEU-1": "3"}}]
    assert tables("| a | b |\n|---|---|\n| 1 | 2 |\n") == []


def tiny_run(row, seed, cider, stage="CE"):
    scores = {"CIDEr": cider, "distinct": 10}
    found = {"loss": 3.0 + seed / 10, "greedy": scores, "beam-3": scores}
    return {"row": row, "epochs": 2, "seed": seed, "history": [[4, 3.5, 1], [3, 3, 1]]} | {
        "dev": {stage: found}, "recipe": {},
    }  # fmt: skip


def test_runs_are_kept_side_by_side(tmp_path):
    path = tmp_path / "results.json"
    for run in (tiny_run("nano", 0, 20), tiny_run("nano", 1, 24), tiny_run("b", 0, 23)):
        ablation.write_run(run, path)
    ablation.write_run(tiny_run("b", 0, 25.5), path)  # the same again
    results = ablation.read_results(path)
    assert list(results["runs"]) == ["b/2/0", "nano/2/0", "nano/2/1"]
    assert list(results["dev"]) == ["b, 2 epochs, CE", "nano, 2 epochs, CE"]  # the best first
    row = {"trainings": 2, "loss": "3.050 ± 0.050", "CIDEr greedy": "22.0 ± 2.0"}
    row |= {"CIDEr beam-3": "22.0 ± 2.0", "distinct": "10 ± 0"}
    assert results["dev"]["nano, 2 epochs, CE"] == row
    assert "[ 4, 3.5, 1 ]" in path.read_text(), "a run's history would fill pages"


def test_a_broken_file_is_named_and_kept(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"half":')
    with pytest.raises(ValueError, match="results.json is not valid JSON"):
        ablation.write_run(tiny_run("nano", 0, 1), path)
    assert path.read_text() == '{"half":'


@pytest.fixture(scope="module")
def world(nb):
    """A Config, a Recipe and splits that are trained in no time."""
    import torch

    sizes = {"D_MODEL": 16, "N_HEADS": 2, "N_LAYERS": 1, "D_FF": 32, "VIS_CH": 8, "N_VIS": 4}
    cfg = nb.Config(**sizes, VOCAB_SIZE=280, MAX_SEQ=12, IMG_SIZE=16)
    recipe = nb.replace(nb.RECIPES["nano"], epochs=2, batch_size=6, scst_epochs=1, lr=3e-3)
    texts = [["a dog runs", "the dog runs"], ["a red ball", "one red ball"], ["snow falls", "snow"]]
    generator = torch.Generator().manual_seed(0)
    splits = {
        name: nb.Split(
            [f"{i}.jpg" for i in range(n)],
            torch.randint(256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8),
            (texts * n)[:n],
        )
        for name, n in (("train", 9), ("dev", 4), ("test", 4))
    }  # fmt: skip
    return cfg, recipe, splits


def train_row(nb, world, folder, besides=None, **change):
    import torch

    cfg, recipe, splits = world
    how = (torch.device("cpu"), torch.float32, besides)
    return ablation.train_row(nb, splits, cfg, nb.replace(recipe, **change), folder, *how)


def test_a_row_is_trained_scored_and_saved(nb, world, tmp_path):
    model, found = train_row(nb, world, tmp_path / "a")
    assert [len(found[k]) for k in ("history", "scst_history")] == [2, 1]
    assert list(found["dev"]) == ["CE", "SCST"]
    assert found["dev"]["CE"]["loss"] == pytest.approx(found["history"][-1][1], abs=1e-3)
    assert {"CIDEr", "distinct"} <= found["dev"]["SCST"]["beam-3"].keys()
    again = nb.MiniVLM.from_pretrained(tmp_path / "a")
    assert all(map(lambda a, b: (a == b).all(), model.parameters(), again.parameters()))
    assert found["weights"] == ablation.fingerprint(tmp_path / "a" / "model.safetensors")


@pytest.fixture
def epochs(nb, monkeypatch):
    """Lengths of the histories that were saved; with `epochs.stop` set, each ends the training."""

    class Lengths(list):
        stop = False

    lengths, save = Lengths(), nb.save_checkpoint

    def save_and_tell(path, parts, history):
        save(path, parts, history)
        if history:
            lengths.append(len(history))
            if lengths.stop:
                raise ConnectionError

    monkeypatch.setattr(nb, "save_checkpoint", save_and_tell)
    return lengths


def test_an_interrupted_row_goes_on_to_the_same_weights(nb, world, tmp_path, epochs):
    _, whole = train_row(nb, world, tmp_path / "1" / "a")
    epochs.stop = True
    for _ in range(3):  # after the first epoch, the second, and the self-critical one
        with pytest.raises(ConnectionError):
            train_row(nb, world, tmp_path / "2" / "a")
    _, resumed = train_row(nb, world, tmp_path / "2" / "a")  # nothing left to train
    assert resumed["weights"] == whole["weights"]


def test_rows_share_the_training_that_they_have_in_common(nb, world, tmp_path, epochs):
    train_row(nb, world, tmp_path / "a", scst_epochs=0)
    train_row(nb, world, tmp_path / "b")
    assert epochs == [1, 2, 1]  # two epochs, and one self-critical one
    train_row(nb, world, tmp_path / "c", scst_epochs=0, lr=1e-3)
    assert epochs[3:] == [1, 2]


def test_dropout_drops_while_training_alone(nb, world, tmp_path):
    import torch

    cfg, recipe, splits = world
    model = ablation.make_model(nb, cfg, seed=0)
    img, ids = nb.normalise(splits["dev"].images), torch.tensor([[1, 5, 6]] * 4)

    def logits():
        torch.manual_seed(0)
        return model.text_logits(model.vis_enc(img), ids)

    before = logits() if model.eval() else None
    ablation.add_dropout(model, 0.5)
    assert torch.equal(logits(), before)
    model.train()
    assert not torch.allclose(logits(), before, atol=1e-2)
    _, found = train_row(nb, world, tmp_path / "a", besides={"dropout": 0.1}, scst_epochs=0)
    _, other = train_row(nb, world, tmp_path / "b", scst_epochs=0)
    assert found["history"] != other["history"]


def test_crops_and_other_colours_are_a_row(nb, world, tmp_path):
    """What the recipe had once can still be trained, and the recipe itself goes without."""
    import torch

    augment = ablation.other_views(nb, nb.nn.Identity(), 16, crop=0.5, jitter=0)
    torch.manual_seed(0)
    seen = [augment(world[2]["train"].images[0]) for _ in range(9)]
    assert all(image.shape == (3, 16, 16) for image in seen)
    assert not any(torch.equal(image, world[2]["train"].images[0]) for image in seen[1:])
    besides = ablation.BESIDES["crops, other colours"]
    _, found = train_row(nb, world, tmp_path / "a", besides=besides, scst_epochs=0)
    _, other = train_row(nb, world, tmp_path / "b", scst_epochs=0)
    assert found["history"] != other["history"]


def test_every_row_is_a_recipe(nb):
    recipes = {row: ablation.recipe_of(nb, row) for row in (*ablation.NAMED, *ablation.CHANGES)}
    base = nb.replace(recipes["nano"], scst_epochs=0)
    for row in ablation.CHANGES:
        changed = recipes[row] != base or row in ablation.BESIDES
        assert changed, f"{row} changes nothing"


def test_pytorchs_start(nb, world):
    started = ablation.make_model(nb, world[0], 0, init="pytorch")
    assert 0.9 < started.tok_emb.weight.std() < 1.1
    assert started.lm_head.weight is started.tok_emb.weight


def test_a_loss_that_was_dropped_by_hand(nb, world):
    """Label smoothing, and the eye asked which words it sees: rows show why they are gone."""
    import torch
    import torch.nn.functional as F

    cfg, recipe, splits = world
    model, train = ablation.make_model(nb, cfg, seed=0), splits["train"]
    tokenizer = nb.train_tokenizer(sum(train.captions, []), cfg.VOCAB_SIZE)
    pairs = [(4, "a red ball"), (0, "snow")]
    batch = nb.make_batch(train.images, tokenizer, nb.nn.Identity(), pairs)
    loss_of = ablation.OtherLoss(nb, model.eval(), train.captions, 0.3, 0.25)
    with torch.no_grad():
        x = model.vis_enc(nb.normalise(batch.images))
        logits = model.text_logits(x, batch.ids[:, :-1]).flatten(0, 1)
        expected = F.cross_entropy(
            logits, batch.ids[:, 1:].flatten(), ignore_index=0, label_smoothing=0.3
        )
        shares = ablation.content_words(train.captions)[1][[4, 0]]
        for seen in (x.mean(1), x.amax(1)):
            p = loss_of.namer(seen).sigmoid()
            wrong = -(shares * p.log() + (1 - shares) * (1 - p).log()).sum(1).mean()
            expected = expected + 0.25 * wrong / 2
        torch.testing.assert_close(loss_of(*batch), expected)


def test_content_words():
    captions = [["A dog runs .", "the dog sits"], ["A boy, two DOGS"], ["a cat", "a cat on it"]]
    captions += [["a b"]]
    words, shares = ablation.content_words(captions)  # in the same order each time
    assert words == ["dog", "runs", "sits", "the", "boy", "dogs", "two", "cat"]
    share = dict(zip(words, shares.T.tolist()))
    assert share["dog"] == [1, 0, 0, 0] and share["runs"] == [0.5, 0, 0, 0]
    assert share["cat"] == [0, 0, 1, 0]
    captions += [["a dog"]] * 9
    assert "dog" not in ablation.content_words(captions)[0], "on every second picture"


def test_the_published_learning_rate_ends_above_zero(nb, world, tmp_path, monkeypatch):
    rates = []

    class Watched(nb.torch.optim.AdamW):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    monkeypatch.setattr(nb.torch.optim, "AdamW", Watched)
    besides, change = ablation.BESIDES["published"], {"warmup": 0, "lr": 1e-3, "scst_epochs": 0}
    plain = nb.learning_rate
    train_row(nb, world, tmp_path / "a", besides=besides, **change)
    assert rates[0] == pytest.approx(1e-3) and 3e-5 < rates[-1] < 2e-4
    assert nb.learning_rate is plain
