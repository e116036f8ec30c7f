"""The scores: what they count, what they are compared with, and the file that keeps them."""

import importlib.util
import json
import math
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import NOTEBOOK, ROOT

RESULTS = ROOT / "assets" / "results.json"
PEOPLE = [
    ["A black dog runs on the grass .", "The dog is running !", "A dog on grass"],
    ["Two men in red shirts play soccer .", "Men play with a ball on a field ."],
    ["A girl eats ice cream .", "A small girl with an ice cream cone", "a girl, eating"],
    ["A boy jumps into the blue water .", "The boy jumps", "a child is jumping into a pool"],
]


@pytest.fixture(scope="module")
def scenes(nb):
    """The captions of the drawn scenes by split, without their pictures."""
    captions, _ = nb.read_captions(ROOT / "assets" / "scenes" / "Flickr8k.token.txt")
    splits, _ = nb.read_splits(ROOT / "assets" / "scenes", captions)
    return {split: [captions[name] for name in names] for split, names in splits.items()}


@pytest.fixture
def no_scorer(monkeypatch):
    """pycocoevalcap as good as not installed."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]
    for name in {"pycocoevalcap", *loaded}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A dog's ball .", ["a", "dogs", "ball"]),
        ("Run , RUN! run?", ["run", "run", "run"]),
        ("a t-shirt (red)", ["a", "tshirt", "red"]),
        ("un café\tnoir\n", ["un", "café", "noir"]),
        (" . ", []),
    ],
)
def test_words_lose_case_and_punctuation(nb, text, words):
    assert nb.caption_words(text) == words


def test_scores_by_hand(nb):
    scores = nb.score_captions(["a b c d"], [["a b x d"]])
    assert scores["BLEU-1"] == 75  # 3 of 4 words
    assert scores["BLEU-2"] == 50  # sqrt(3/4 * 1/3)
    assert scores["ROUGE-L"] == 75  # "a b d" of 4 words, both ways
    short = nb.score_captions(["a b"], [["a b c d"]])
    assert short["BLEU-1"] == round(100 * math.exp(1 - 4 / 2), 1)  # the brevity penalty


def test_perfect_captions_get_full_marks(nb):
    ones = [[people[0] + " again"] for people in PEOPLE]
    scores = nb.score_captions([people[0] for people in ones], ones)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [100] * 4
    assert scores["ROUGE-L"] == 100
    assert scores["CIDEr"] == 1000


def test_case_and_punctuation_change_no_score(nb):
    captions = ["a dog runs", "men play soccer", "a girl", "the boy jumps"]
    shouted = [caption.upper() + " !!" for caption in captions]
    assert nb.score_captions(captions, PEOPLE) == nb.score_captions(shouted, PEOPLE)


def test_an_empty_caption_scores_and_lowers_the_score(nb):
    full = nb.score_captions([people[0] for people in PEOPLE], PEOPLE)
    less = nb.score_captions([people[0] for people in PEOPLE[:3]] + [""], PEOPLE)
    assert all(less[name] < full[name] for name in full)


@pytest.mark.parametrize("captions, references", [(["a"], []), ([], []), (["a", "b"], [["a"], []])])
def test_what_can_not_be_scored_is_refused(nb, captions, references):
    with pytest.raises(ValueError, match="captions for|picture 1 has no references"):
        nb.score_captions(captions, references)


def test_without_the_scorer_the_error_names_it(nb, no_scorer):
    with pytest.raises(ModuleNotFoundError, match="pycocoevalcap"):
        nb.score_captions(["a"], [["a"]])
    assert importlib.util.find_spec("pycocoevalcap") is None  # what the notebook asks


def test_meteor_is_left_out_without_java(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "METEOR" not in nb.score_captions(["a dog"], [["a dog"]], meteor=True)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Java")
def test_meteor_is_left_out_with_a_broken_java(nb, monkeypatch, tmp_path, capsys):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "METEOR" not in nb.score_captions(["a dog"], [["a dog"]], meteor=True)
    assert "METEOR left out" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_pairs_stems_and_punishes_what_is_missing(nb):
    people = [["a dog runs over the grass"]] * 3
    captions = ["a dog runs over the grass", "a dog running over the grass", "a dog"]
    theirs = {i: references for i, references in enumerate(people)}
    same, stem, part = (nb.meteor_score({0: theirs[0]}, {0: [caption]}) for caption in captions)
    assert 1 == pytest.approx(same)
    assert same > stem > part > 0


# CIDEr-D in plain Python


def test_cider_by_hand(nb):
    cider = nb.CiderD([["cat"], ["dog"]])
    assert cider("cat", 0) == pytest.approx(10 / 4)  # cosine 1 for one word, 0 for runs of 2 to 4
    assert cider("dog", 0) == 0
    # Repeated: the product is clipped, the norm is not; one word too long.
    assert cider("cat cat", 0) == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / (2 * 6**2)))
    assert cider("", 0) == cider("zebra", 0) == 0


def pycocoevalcap_cider(nb, captions, references):
    from pycocoevalcap.cider.cider import Cider

    theirs = {i: [" ".join(nb.caption_words(c)) for c in r] for i, r in enumerate(references)}
    ours = {i: [" ".join(nb.caption_words(c))] for i, c in enumerate(captions)}
    return Cider().compute_score(theirs, ours)[1]


def test_cider_equals_pycocoevalcap(nb, scenes):
    references = scenes["test"] + PEOPLE  # five a picture, and two or three
    rng = np.random.default_rng(0)
    captions = []
    for i, own in enumerate(references):
        words = nb.caption_words(own[0]) + nb.caption_words(references[i - 1][-1])
        captions.append(" ".join(rng.choice(words, rng.integers(1, 16))))
    captions[:6] = [
        references[0][1],
        "",
        "dog",
        "a a a a a a a a",
        "zebra ukulele",
        references[9][0],
    ]
    cider = nb.CiderD(references)
    scores = [cider(caption, i) for i, caption in enumerate(captions)]
    assert scores == pytest.approx(pycocoevalcap_cider(nb, captions, references), abs=1e-9)
    assert max(scores) > 1
    overall = nb.score_captions(captions, references)["CIDEr"]
    assert overall == pytest.approx(100 * np.mean(scores), abs=0.051)  # rounded to one digit


@pytest.mark.parametrize("references", [[], [["a dog"], []]])
def test_cider_wants_references(nb, references):
    with pytest.raises(ValueError, match="at least one reference"):
        nb.CiderD(references)


# What the model is compared with


def test_description_of_captions(nb):
    row = nb.describe_captions(
        ["A black dog runs on the grass !", "a cat", "a cat .", "A girl eats ice cream"], PEOPLE
    )
    assert row == {"distinct": 3, "copied %": 50.0, "words": 4.0}


def test_a_constant_caption_is_one_caption(nb):
    row = nb.describe_captions([PEOPLE[0][0]] * 4, PEOPLE)
    assert row["distinct"] == 1
    assert row["copied %"] == 100


def test_best_constant_caption_is_the_best(nb, scenes):
    references = scenes["dev"][:60]
    candidates = [caption for group in scenes["train"][:80] for caption in group]
    cider = nb.CiderD(references)
    means = [np.mean([cider(text, i) for i in range(len(references))]) for text in candidates]
    chosen = nb.best_constant_caption(candidates, references)
    assert means[candidates.index(chosen)] == max(means)


def test_best_constant_caption_of_one_picture(nb):
    assert nb.best_constant_caption(["a", "b"], [["a"]]) in "ab"  # all weights are 0: no crash


def test_nearest_picture(nb):
    rng = np.random.default_rng(0)
    others = rng.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    order = rng.permutation(30)[:20]
    noise = rng.integers(-5, 6, (20, 3, 32, 32))
    images = np.clip(others[order].astype(int) + noise, 0, 255).astype(np.uint8)
    assert nb.nearest_pictures(images, others) == order.tolist()
    assert nb.nearest_pictures(images, others, batch=7) == order.tolist()


def test_nearest_picture_is_least_squares(nb):
    rng = np.random.default_rng(1)
    images, others = (rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8) for n in (9, 25))
    difference = images[:, None].astype(float) - others[None]
    assert nb.nearest_pictures(images, others) == (difference**2).sum((2, 3, 4)).argmin(1).tolist()


def test_hold_one_out(nb):
    ones, others = nb.hold_one_out(PEOPLE)
    assert ones == [PEOPLE[0][0], PEOPLE[1][1], PEOPLE[2][2], PEOPLE[3][0]]
    for one, rest, group in zip(ones, others, PEOPLE):
        assert sorted([one, *rest]) == sorted(group)
    with pytest.raises(ValueError, match="two captions"):
        nb.hold_one_out([["alone"]])


def test_table(nb):
    lines = nb.format_table({"first": {"a": 1.5}, "the second": {"a": 2, "b": "x"}}).split("\n")
    assert [line.split() for line in lines] == [["a", "b"], ["first", "1.5", "-"],
                                                ["the", "second", "2", "x"]]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


# The cells that score, with a captioner that knows a few sentences


def cells_that_score():
    """The sources of all cells between the heading of section 11 and that of the next one."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    found, inside = [], False
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## "):
            inside = source.startswith("## 11 ")
        elif inside and cell["cell_type"] == "code":
            if "component" not in cell["metadata"].get("tags", []):
                found.append(source)
    return found


def run_cells(nb, data_name="scenes"):
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
        return nb.Split([f"{i}.jpg" for i in range(n)], images, (PEOPLE * n)[:n])

    def captions(images, beam_width=None):
        return ["a dog runs on grass", "a man plays"] * (len(images) // 2)

    namespace = vars(nb) | {
        "importlib": importlib, "splits": {"train": split(9), "dev": split(4), "test": split(12)},
        "captioner": types.SimpleNamespace(generate_greedy=captions, generate_beam=captions),
        "data_name": data_name, "recipe": "nano", "cfg": nb.Config(),
        "model": nb.MiniVLM(nb.Config()),
        "validate": lambda model: 2.5, "history": [{"seconds": 1.5, "train": 4.0, "val": 2.5}] * 3,
        "device": torch.device("cpu"), "precision": torch.float32,
        "tokenizer": nb.train_tokenizer(sum(PEOPLE, []), nb.Config()),
        "show": lambda figure: nb.plt.close(figure),
    }  # fmt: skip
    namespace["train"] = namespace["splits"]["train"]
    sources = cells_that_score()
    assert len(sources) > 4
    for source in sources:
        exec(compile(source, "a cell of section 11", "exec"), namespace)
    return namespace


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A working directory of its own, with no results in it, and no wish to write any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUPRAVL_RESULTS", raising=False)
    return tmp_path


def test_the_cells_score(nb, elsewhere, capsys):
    namespace = run_cells(nb)
    printed = capsys.readouterr().out
    for row in ("constant caption", "nearest training picture", "this model, beam-3", "a person"):
        assert row in printed
    assert namespace["table"]["constant caption"]["distinct"] == 1
    assert "perplexity 12.2" in printed  # exp(2.5)
    ours, theirs = re.search(r"mean CIDEr ([\d.]+) \(pycocoevalcap: ([\d.]+)\)", printed).groups()
    assert float(ours) == pytest.approx(float(theirs), abs=0.11)  # both rounded to one digit
    assert list(elsewhere.iterdir()) == []  # nothing was written


def test_the_nearest_pictures_captions_take_turns(nb, elsewhere):
    namespace = run_cells(nb)
    own, train = namespace["baselines"]["nearest training picture"], namespace["train"]
    nearest = nb.nearest_pictures(namespace["judged"].images, train.images)
    places = [train.captions[k].index(caption) for k, caption in zip(nearest, own, strict=True)]
    assert places == [i % len(train.captions[k]) for i, k in enumerate(nearest)]
    assert set(places) > {0}


def test_scores_of_others_are_shown_and_not_recorded(nb, elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(elsewhere))  # no Java: it is slow, and not needed here
    namespace = run_cells(nb, data_name="flickr8k")
    assert "[1] soft attention" in capsys.readouterr().out
    assert not any(name.startswith("[") for name in namespace["table"])
    for row in namespace["OTHERS"].values():
        bleu = [row[f"BLEU-{n}"] for n in (1, 2, 3, 4)]
        assert bleu == sorted(bleu, reverse=True)
        assert all(isinstance(value, float) for value in row.values())


def test_the_cells_without_the_scorer(nb, elsewhere, capsys, no_scorer):
    run_cells(nb)
    printed = capsys.readouterr().out
    assert printed.count("pycocoevalcap is not installed") == 1
    assert "BLEU" not in printed
    assert "last" in printed  # the ranked captions need no scorer


def test_the_cells_write_results_when_asked(nb, elsewhere, monkeypatch):
    monkeypatch.setenv("SUPRAVL_RESULTS", str(elsewhere / "results.json"))
    namespace = run_cells(nb)
    entries = nb.read_results(elsewhere / "results.json")
    assert list(entries) == ["scenes/nano/test/0"]
    check_entry(*entries.popitem())
    assert namespace["entry"]["scores"] == namespace["scores"]


# The file of results


def test_results_are_kept_side_by_side(nb, tmp_path):
    path = tmp_path / "results.json"
    entry = {"data": "flickr8k", "recipe": "best", "split": "dev", "seed": 0}
    assert nb.read_results(path) == {}
    nb.write_result(path, entry | {"perplexity": 17.0})
    nb.write_result(path, entry | {"seed": 1})
    nb.write_result(path, entry | {"perplexity": 16.0})  # the same run again
    entries = nb.read_results(path)
    assert list(entries) == ["flickr8k/best/dev/0", "flickr8k/best/dev/1"]
    assert entries["flickr8k/best/dev/0"]["perplexity"] == 16


def test_a_broken_results_file_is_named(nb, tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"half":')
    with pytest.raises(ValueError, match="results.json is not valid JSON"):
        nb.write_result(path, {"data": "a", "recipe": "b", "split": "c", "seed": 0})
    assert path.read_text() == '{"half":'  # untouched


def check_entry(key, entry):
    assert key == "/".join(str(entry[k]) for k in ("data", "recipe", "split", "seed"))
    assert entry["parameters"] == 698_624
    assert entry["seed"] == entry["config"]["seed"]
    assert entry["epochs"] == len(entry["history"]) > 0 and entry["epoch_seconds"] > 0
    assert entry["perplexity"] == pytest.approx(math.exp(entry["validation_loss"]), rel=1e-3)
    assert {"python", "torch", "tokenizers", "pycocoevalcap"} <= entry["versions"].keys()
    assert {"greedy", "beam-3"} == entry["scores"].keys()
    for scores in (*entry["scores"].values(), *entry.get("table", {}).values()):
        assert all(0 <= scores[name] <= 100 for name in ("BLEU-1", "BLEU-4", "ROUGE-L"))
        assert 0 <= scores["CIDEr"] <= 1000
        assert all(round(value, 1) == value for value in scores.values())
    assert entry["scores"]["greedy"].keys() == entry["scores"]["beam-3"].keys()


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results have been recorded")
def test_the_recorded_results_are_consistent(nb):
    entries = nb.read_results(RESULTS)
    assert entries
    for key, entry in entries.items():
        check_entry(key, entry)
        for scores in (*entry["scores"].values(), *entry.get("table", {}).values()):
            bleu = [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)]
            assert bleu == sorted(bleu, reverse=True)  # no law, but so for a thousand captions
    # Runs on the same data and split were compared with the same baselines.
    for name in ("constant caption", "a person, against the other four"):
        by_split = {}
        for entry in (entry for entry in entries.values() if "table" in entry):
            scores = by_split.setdefault((entry["data"], entry["split"]), entry["table"][name])
            assert entry["table"][name]["CIDEr"] == scores["CIDEr"]
