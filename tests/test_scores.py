"""The scores: what they count, what they are compared with, and the cells that print them."""

import importlib.util
import json
import math
import sys
import types
import zipfile
from collections import Counter

import ablation
import numpy as np
import pytest
import torch
from conftest import NOTEBOOK, ROOT

PEOPLE = [
    ["A black dog runs on the grass .", "The dog is running !", "A dog on grass"],
    ["Two men in red shirts play soccer .", "Men play with a ball on a field ."],
    ["A girl eats ice cream .", "A small girl with an ice cream cone", "a girl, eating"],
    ["A boy jumps into the blue water .", "The boy jumps", "a child is jumping into a pool"],
]


@pytest.fixture(scope="module")
def references():
    """Captions of 200 drawn scenes, five each, and a few that people might write."""
    with zipfile.ZipFile(ROOT / "assets" / "scenes" / "Flickr8k_text.zip") as file:
        lines = file.read("Flickr8k.token.txt").decode().splitlines()[:1000]
    scenes = [[line.partition("\t")[2] for line in lines[i : i + 5]] for i in range(0, 1000, 5)]
    return scenes + PEOPLE


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


def test_ngrams_by_hand(nb):
    assert nb.count_ngrams([]) == {}
    assert nb.count_ngrams(["a"]) == {("a",): 1}
    counts = nb.count_ngrams("a b a b c".split())
    assert counts["a", "b"] == 2 and counts["b", "a", "b"] == 1 and counts["a", "b", "a", "b"] == 1
    lengths = Counter(len(ngram) for ngram in counts.elements())
    assert lengths == {1: 5, 2: 4, 3: 3, 4: 2}


# CIDEr-D in plain Python


def test_cider_by_hand(nb):
    cider = nb.CiderD([["cat"], ["dog"]])
    assert cider("cat", 0) == pytest.approx(10 / 4)  # cosine 1 for one word, 0 for runs of 2 to 4
    assert cider("dog", 0) == 0
    # Repeated: the product is clipped, the norm is not; one word too long.
    assert cider("cat cat", 0) == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / (2 * 6**2)))
    assert cider("", 0) == cider("zebra", 0) == 0


def test_cider_equals_pycocoevalcap(nb, references):
    from pycocoevalcap.cider.cider import Cider

    rng, captions = np.random.default_rng(0), []
    for i, own in enumerate(references):
        words = nb.caption_words(own[0]) + nb.caption_words(references[i - 1][-1])
        captions.append(" ".join(rng.choice(words, rng.integers(1, 16))))
    captions[:6] = [
        references[0][1], "", "dog", "a a a a a a a a", "zebra ukulele", references[9][0],
    ]  # fmt: skip
    theirs = {i: [" ".join(nb.caption_words(c)) for c in r] for i, r in enumerate(references)}
    ours = {i: [" ".join(nb.caption_words(c))] for i, c in enumerate(captions)}
    mean, each = Cider().compute_score(theirs, ours)
    scores = list(map(nb.CiderD(references), captions, range(len(captions))))
    assert scores == pytest.approx(each, abs=1e-9)
    assert max(scores) > 1
    overall = nb.score_captions(captions, references, [])["CIDEr"]
    assert overall == pytest.approx(100 * mean, abs=0.051)  # rounded to one digit


@pytest.mark.parametrize("captions", [[], [["a dog"], []]])
def test_cider_wants_references(nb, captions):
    with pytest.raises(ValueError, match="at least one reference"):
        nb.CiderD(captions)


# All the scores


def test_scores_by_hand(nb):
    scores = nb.score_captions(["a b c d"], [["a b x d"]], [])
    assert scores["BLEU-1"] == 75  # 3 of 4 words
    assert scores["BLEU-2"] == 50  # sqrt(3/4 * 1/3)
    assert scores["ROUGE-L"] == 75  # "a b d" of 4 words, both ways
    short = nb.score_captions(["a b"], [["a b c d"]], [])
    assert short["BLEU-1"] == round(100 * math.exp(1 - 4 / 2), 1)  # the brevity penalty


def test_perfect_captions_get_full_marks(nb):
    ones = [[people[0] + " again"] for people in PEOPLE]
    scores = nb.score_captions([own[0].upper() + " !" for own in ones], ones, PEOPLE)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [100] * 4
    assert scores["ROUGE-L"] == 100
    assert scores["CIDEr"] == 1000
    assert scores["copied %"] == 0


def test_an_empty_caption_scores_and_lowers_the_score(nb):
    full = nb.score_captions([people[0] for people in PEOPLE], PEOPLE, [])
    less = nb.score_captions([people[0] for people in PEOPLE[:3]] + [""], PEOPLE, [])
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"):
        assert less[name] < full[name]


def test_what_the_scores_do_not_see(nb):
    captions = ["A black dog runs on the grass !", "a cat", "a cat .", "A girl eats ice cream"]
    row = nb.score_captions(captions, PEOPLE, PEOPLE)
    assert (row["distinct"], row["copied %"]) == (3, 50)


@pytest.mark.parametrize("captions, theirs", [(["a"], []), ([], []), (["a", "b"], [["a"], []])])
def test_what_can_not_be_scored_is_refused(nb, captions, theirs):
    with pytest.raises(ValueError, match=f"{len(captions)} captions"):
        nb.score_captions(captions, theirs, [])


def test_without_the_library_there_is_cider_alone(nb, no_scorer):
    captions = ["a dog runs", "men play", "a girl", "the boy jumps"]
    alone = nb.score_captions(captions, PEOPLE, [])
    assert alone.keys() == {"CIDEr", "distinct", "copied %"}
    by_hand = np.mean(list(map(nb.CiderD(PEOPLE), captions, range(4))))
    assert alone["CIDEr"] == round(100 * by_hand, 1) > 0


def test_both_decoders_are_scored(nb):
    def write(img):
        assert img.is_floating_point() and img.abs().max() < 5  # normalised
        return ["a dog runs"] * len(img)

    model = types.SimpleNamespace(generate_greedy=write, generate_beam=write)
    split = nb.Split(list("abcd"), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), PEOPLE)
    scores, said = nb.evaluate(model, split, [["A dog runs ."]])
    assert scores.keys() == said.keys() == {"greedy", "beam-3"}
    assert said["greedy"] == ["a dog runs"] * 4
    assert scores["beam-3"] == nb.score_captions(said["beam-3"], PEOPLE, [["A dog runs ."]])
    assert scores["beam-3"]["copied %"] == 100


# METEOR, which is a Java program


def test_meteor_is_left_out_without_java(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ablation.meteor(["a dog"], [["a dog"]], nb) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Java")
def test_meteor_is_left_out_with_a_broken_java(nb, monkeypatch, tmp_path, capsys):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ablation.meteor(["a dog"], [["a dog"]], nb) == {}
    assert "METEOR left out" in capsys.readouterr().out


# What the model is compared with


def test_best_constant_caption_is_the_best(nb, references):
    some, candidates = references[:60], [text for own in references[60:140] for text in own]
    cider = nb.CiderD(some)
    means = [np.mean([cider(text, i) for i in range(len(some))]) for text in candidates]
    chosen = nb.best_constant(candidates, some)
    assert means[candidates.index(chosen)] == max(means)


def test_best_constant_caption_of_little(nb):
    assert nb.best_constant(["a", "b"], [["a"]]) in "ab"  # all weights are 0: no crash
    assert nb.best_constant([" . "], PEOPLE) == " . "


def test_print_table(nb, capsys):
    nb.print_table({"first": {"a": 1.5}, "the second": {"a": 2, "b": "x ± 1"}})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["a", "b"], ["first", "1.5", "-"],
                                                ["the", "second", "2", "x", "±", "1"]]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


# The cells that score, with a model that knows a few sentences


def cells_that_score():
    """The sources of all cells between the heading of section 11 and that of the next one."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    found, inside = [], False
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## "):
            inside = source.startswith("## 11 ")
        elif inside and cell["cell_type"] == "code":
            tags = cell["metadata"].get("tags", [])
            if "component" not in tags and "one_by_one" not in source:  # that cell needs a model
                found.append(source)
    return found


def run_cells(nb, data_name):
    generator = torch.Generator().manual_seed(0)

    def split(n):
        images = torch.randint(256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return nb.Split([f"{i}.jpg" for i in range(n)], images, (PEOPLE * n)[:n])

    def write(img):
        return ["a dog runs on grass", "a man plays"] * (len(img) // 2)

    namespace = vars(nb) | {
        "importlib": importlib,
        "train_split": split(9), "dev_split": split(4), "test_split": split(12),
        "model": types.SimpleNamespace(generate_greedy=write, generate_beam=write),
        "data_name": data_name, "show_pictures": lambda images, titles, **how: None,
    }  # fmt: skip
    sources = cells_that_score()
    assert len(sources) == 4
    for source in sources:
        exec(compile(source, "a cell of section 11", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("data_name", ["flickr8k", "scenes", "own"])
def test_the_cells_score(nb, monkeypatch, capsys, data_name):
    monkeypatch.chdir(ROOT)
    namespace = run_cells(nb, data_name)
    printed = capsys.readouterr().out
    for row in ("one sentence", "nearest training picture", "this model, beam-3", "a person"):
        assert row in printed
    assert namespace["table"]["one sentence for all"]["distinct"] == 1
    mean = float(printed.split("\nmean ")[1].split(",")[0])  # by hand; the table's, by the library
    assert mean == pytest.approx(namespace["scores"]["beam-3"]["CIDEr"], abs=0.11)
    others = "[1] soft attention" in printed
    assert others == (data_name == "flickr8k"), "other data's scores stand beside the literature's"


def test_the_nearest_pictures_captions_take_turns(nb, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = run_cells(nb, "scenes")
    train, judged = namespace["train_split"], namespace["test_split"]
    small = [x.images[:, :, 3::7, 3::7].flatten(1).float() for x in (judged, train)]
    distance = ((small[0][:, None] - small[1]) ** 2).sum(2)
    own = [train.captions[k] for k in distance.argmin(1)]
    assert namespace["nearest"] == [c[i % len(c)] for i, c in enumerate(own)]


def test_a_person_is_held_against_the_others(nb, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = run_cells(nb, "scenes")
    people, four = namespace["people"], namespace["other_four"]
    assert people[:4] == [PEOPLE[0][0], PEOPLE[1][1], PEOPLE[2][2], PEOPLE[3][0]]
    for one, others, own in zip(people, four, namespace["test_split"].captions):
        assert sorted([one, *others]) == sorted(own)


def test_the_notebook_alone(nb, monkeypatch, tmp_path, capsys, no_scorer):
    """No results file beside it, and no pycocoevalcap."""
    monkeypatch.chdir(tmp_path)
    run_cells(nb, "flickr8k")
    printed = capsys.readouterr().out
    assert "BLEU" not in printed and "[1]" not in printed
    assert "last" in printed  # the ranked captions need neither
    assert list(tmp_path.iterdir()) == []
