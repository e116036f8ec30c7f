"""The tokenizer: any text comes back, special tokens stay special, captions keep their picture."""

import random

import pytest
from tokenizers import Tokenizer

CAPTIONS = ["A dog runs on the grass .", "Two dogs run .", "The boat sails on the lake ."] * 4
CAPTIONS += ["Children play in the snow .", "A child climbs a high wall ."] * 2


@pytest.fixture(scope="module")
def tokenizer(nb):
    return nb.train_tokenizer(CAPTIONS, 300)


@pytest.mark.parametrize("seed", range(3))
def test_bpe_by_hand_equals_the_library(nb, seed):
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcd", k=dice.randint(1, 6))) for _ in range(30)]
    text = dice.choices(words, k=5000)
    merges = nb.learn_bpe([" ".join(text)], 25)
    cut = {word: list(word) for word in words}
    for number, best in enumerate(merges):  # noqa: B007 (each is the commonest pair)
        counts = nb.Counter(pair for w in text for pair in zip(cut[w], cut[w][1:]))
        (_, most), (_, second) = counts.most_common(2)
        assert counts[best] == most
        if most == second:  # from here on the library may go another way
            break
        cut = {word: nb.merge_pair(pieces, best) for word, pieces in cut.items()}
    assert number > 4
    merges = merges[:number]
    library = Tokenizer(nb.models.BPE())
    library.pre_tokenizer = nb.pre_tokenizers.WhitespaceSplit()
    library.train_from_iterator(text, nb.trainers.BpeTrainer(vocab_size=29, show_progress=False))
    new = sorted(library.get_vocab().items(), key=lambda item: item[1])[-25:][:number]
    assert ["".join(pair) for pair in merges] == [token for token, _ in new]
    assert nb.learn_bpe(["ab ab"], 9) == [("a", "b")]  # every word is one piece


def test_merge_pair(nb):
    assert nb.merge_pair(list("aaab"), ("a", "a")) == ["aa", "a", "b"]
    assert nb.merge_pair(list("xaby"), ("a", "b")) == ["x", "ab", "y"]


def test_special_tokens_and_size(nb, tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    assert (nb.PAD, nb.BOS, nb.EOS) == (0, 1, 2)
    assert tokenizer.get_vocab_size() == 300
    assert len(tokenizer.encode(" dog").ids) == 1, "frequent words are single tokens"
    assert nb.train_tokenizer(CAPTIONS, 300).to_str() == tokenizer.to_str(), "repeatable"


TEXTS = [
    "a dog", "Ünïcödé ß", "\U0001f436 runs", "", " ", "a\tb\nc\0d", "e\u0301 \u202e", "<eos> <pad>",
    "日本語", "it's $5 . . .", "  two  spaces ",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_comes_back_lower_cased(nb, tokenizer, text):
    [[bos, *ids, eos]] = nb.encode_captions(tokenizer, [text])
    assert tokenizer.decode(ids) == text.lower() and (bos, eos) == (1, 2)
    assert all(2 < i < 300 for i in ids), "a caption can't write special tokens"
    for again in (Tokenizer.from_str(tokenizer.to_str()), nb.copy.deepcopy(tokenizer)):
        assert nb.encode_captions(again, [text]) == [[bos, *ids, eos]]


def test_random_text_comes_back(tokenizer):
    dice = random.Random(0)
    for _ in range(100):
        text = "".join(chr(dice.randrange(1, 0xD800)) for _ in range(dice.randrange(20)))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()


def test_captions_keep_their_begin_and_their_end(nb, tokenizer):
    captions = ["a dog", "two dogs run .", "", "the <eos> boat"]
    rows = nb.encode_captions(tokenizer, captions)
    assert len(rows) == 4 and nb.encode_captions(tokenizer, []) == []
    for row, text in zip(rows, captions):
        assert row[0] == nb.BOS and row[-1] == nb.EOS and row.count(nb.EOS) == 1
        assert tokenizer.decode(row) == text


def test_a_vocabulary_without_room_for_all_bytes(nb):
    with pytest.raises(ValueError, match="VOCAB_SIZE is 258"):
        nb.train_tokenizer(CAPTIONS, 258)
    assert nb.train_tokenizer(CAPTIONS, 259).get_vocab_size() == 259
