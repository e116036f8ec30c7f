"""The tokenizer: the one by hand equals the library's, and any text comes back whole."""

import json
import random

import pytest

CAPTIONS = [
    "A dog runs along the beach .",
    "Two dogs run after a red ball .",
    "A man in a red shirt climbs a wall .",
    "A girl and a boy play in the snow .",
] * 5


@pytest.fixture(scope="module")
def cfg(nb):
    return nb.Config(VOCAB_SIZE=300, MAX_SEQ=12)


@pytest.fixture(scope="module")
def tokenizer(nb, cfg):
    return nb.train_tokenizer(CAPTIONS, cfg)


# By hand


def random_corpus(seed):
    """Sentences of random words over a few letters, so that ties and overlaps abound."""
    rng = random.Random(seed)
    letters = "abcdefgh"[: rng.choice([1, 2, 3, 8])]

    def word():
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 12)))

    return [" ".join(word() for _ in range(rng.randint(1, 8))) for _ in range(rng.randint(1, 10))]


@pytest.mark.parametrize("seed", range(40))
def test_bpe_by_hand_equals_the_library(nb, seed):
    corpus = random_corpus(seed)
    vocab, merges = nb.learn_bpe(corpus, n_merges=5 + seed)
    library = nb.Tokenizer(nb.models.BPE())
    library.pre_tokenizer = nb.pre_tokenizers.WhitespaceSplit()
    trainer = nb.trainers.BpeTrainer(vocab_size=len(vocab), show_progress=False)
    library.train_from_iterator(corpus, trainer)
    learned = json.loads(library.to_str())["model"]
    assert [tuple(merge) for merge in learned["merges"]] == merges
    assert sorted(learned["vocab"], key=learned["vocab"].get) == vocab


def test_bpe_by_hand_stops_when_every_word_is_one_piece(nb):
    vocab, merges = nb.learn_bpe(["ab abc"], n_merges=100)
    assert merges == [("a", "b"), ("ab", "c")]
    assert vocab == ["a", "b", "c", "ab", "abc"]
    assert nb.learn_bpe([], n_merges=3) == ([], [])


@pytest.mark.parametrize(
    "word, pair, merged",
    [
        ("aaa", ("a", "a"), ["aa", "a"]),
        ("aaaa", ("a", "a"), ["aa", "aa"]),
        ("abcab", ("a", "b"), ["ab", "c", "ab"]),
        ("abc", ("a", "c"), ["a", "b", "c"]),
        ("", ("a", "b"), []),
    ],
)
def test_merge_pair(nb, word, pair, merged):
    assert nb.merge_pair(list(word), pair) == merged


# The real one


def test_special_tokens_and_size(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 300


def test_frequent_words_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("a dog runs").ids) < len("a dog runs") / 2


HOSTILE = {
    "empty": "",
    "spaces": "   a  b   ",
    "control characters": "a\x00b\x01c\x1b[31m\x7f\x85",
    "line ends": "a\r\nb\rc\nd\u2028e\u2029f\x0b\x0c",
    "special tokens": "<eos> a <bos><pad> <EOS><Pad>",
    "almost special tokens": "<eos <<eos>> < eos >",
    "byte-level's own letters": "Ġdog Ċ âĢĻ",
    "combining": "e\u0301 a\u0308\u0323 n\u0303",
    "many combining": "z" + "\u0300\u0320\u0489" * 40,
    "precomposed and not": "é e\u0301 ﬁ Å Å",
    "family emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷",
    "right to left": "\u202eabc\u202c שלום مرحبا \u200f",
    "invisible": "\u200b\u200c\u200d\ufeff\u00ad\u2060",
    "Chinese": "狗在雪地里跑",
    "Greek sigmas": "ΟΔΥΣΣΕΥΣ ΣΑΣ",
    "Turkish I": "İSTANBUL ISPARTA ıİ",
    "German": "STRASSE ẞ ß",
    "titlecase": "ǅ ǈ ǋ ŉ",
    "beyond the basic plane": "𝕳𝖊𝖑𝖑𝖔 𐐀𐐁 🜁",
    "not characters": "\ufffe\uffff\U0010ffff\ue000",
    "replacement": "\ufffd\ufffd",
    "long": "A dog's 3 balls, ünïcödé! " * 4000,
    "long word": "abc" * 20_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_any_text_comes_back_lower_cased(tokenizer, text):
    ids = tokenizer.encode(text).ids
    lower = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids) == lower
    assert tokenizer.decode(ids, skip_special_tokens=False) == lower
    assert all(2 < i < 300 for i in ids)  # text never becomes a special token


@pytest.mark.parametrize("text", ["A DOG", "Ünïcödé", "ПРИВЕТ", "<EOS>"])
def test_the_normalizer_is_lower_casing_and_no_more(tokenizer, text):
    assert tokenizer.normalizer.normalize_str(text) == text.lower()


def test_random_text_comes_back(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        points = [
            rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in "x" * 30
        ]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text).ids) == tokenizer.normalizer.normalize_str(
            text
        )


@pytest.mark.parametrize("text", ["\ud800", "a dog \udcff", "\udc00\ud800"], ids=ascii)
def test_half_a_surrogate_pair_is_refused(nb, tokenizer, cfg, text):
    """It is no text, has no UTF-8, and must not turn into something else unnoticed."""
    with pytest.raises((TypeError, UnicodeError)):
        tokenizer.encode(text)
    with pytest.raises((TypeError, UnicodeError)):
        nb.encode_captions(tokenizer, ["a dog", text], cfg)


def test_a_saved_tokenizer_is_the_same(nb, tokenizer, cfg, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = nb.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again.encode_special_tokens = True
    for text in [*HOSTILE.values(), *CAPTIONS]:
        assert again.encode(text).ids == tokenizer.encode(text).ids


def test_learning_is_repeatable(nb, tokenizer, cfg):
    assert nb.train_tokenizer(iter(CAPTIONS), cfg).to_str() == tokenizer.to_str()


def test_encode_pictures_keeps_captions_with_their_picture(nb, tokenizer, cfg):
    captions = [("a dog", "two dogs"), ("snow",), (), ("a wall", "a dog", "red")]
    expected = [nb.encode_captions(tokenizer, own, cfg) for own in captions]
    assert nb.encode_pictures(tokenizer, captions, cfg) == expected


@pytest.fixture
def splits(nb):
    parts = {"train": CAPTIONS[:12], "dev": CAPTIONS[12:16], "test": ["A dog is <eos> ."]}
    return {
        split: nb.Split([str(i) for i in range(len(own))], None, [(text,) for text in own])
        for split, own in parts.items()
    }


def test_tokens_come_from_the_training_captions_and_from_the_cache(
    nb, cfg, splits, tmp_path, monkeypatch
):
    tokenizer, ids = nb.load_tokens(splits, cfg, tmp_path)
    assert tokenizer.to_str() == nb.train_tokenizer(CAPTIONS[:12], cfg).to_str()
    for split, loaded in splits.items():
        assert ids[split] == nb.encode_pictures(tokenizer, loaded.captions, cfg)
    calls = []
    monkeypatch.setitem(nb.load_tokens.__globals__, "train_tokenizer", lambda *a: calls.append(a))
    again, same = nb.load_tokens(splits, cfg, tmp_path)
    assert not calls, "the second time everything comes from the cache"
    assert same == ids
    assert again.to_str() == tokenizer.to_str()
    assert again.encode("<eos>").ids == tokenizer.encode("<eos>").ids != [2]


def test_other_captions_or_sizes_are_not_taken_from_the_cache(nb, cfg, splits, tmp_path):
    _, ids = nb.load_tokens(splits, cfg, tmp_path)
    _, short = nb.load_tokens(splits, nb.replace(cfg, MAX_SEQ=4), tmp_path)
    assert max(len(own) for picture in short["train"] for own in picture) == 4
    splits["dev"].captions[0] = ("Snow .",)
    _, other = nb.load_tokens(splits, cfg, tmp_path)
    assert other["dev"] != ids["dev"]
    assert other["train"] == ids["train"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_broken_cache_of_tokens_is_made_anew(nb, cfg, splits, tmp_path):
    _, ids = nb.load_tokens(splits, cfg, tmp_path)
    (cache,) = tmp_path.iterdir()
    for content in (b"", cache.read_bytes()[:-9], b"\xff\xfe"):
        cache.write_bytes(content)
        assert nb.load_tokens(splits, cfg, tmp_path)[1] == ids
        assert nb.json.loads(cache.read_text())["ids"] == ids


def test_a_full_disk_costs_the_cache_of_tokens_alone(nb, cfg, splits, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    _, ids = nb.load_tokens(splits, cfg, tmp_path / "file")
    assert ids["test"]
    assert "could not be cached" in capsys.readouterr().out


def test_encode_captions(nb, tokenizer, cfg):
    short, long, empty = nb.encode_captions(tokenizer, ["A dog", "a dog " * 30, ""], cfg)
    assert short == [1, *tokenizer.encode("a dog").ids, 2]
    assert len(long) == 12
    assert long[0] == 1
    assert 2 not in long  # cut: the sentence did not end there
    assert empty == [1, 2]


def test_a_caption_that_just_fits_keeps_its_end(nb, tokenizer, cfg):
    ids = tokenizer.encode("a dog runs along the beach").ids
    for room, expected in ((2, [1, *ids, 2]), (1, [1, *ids]), (0, [1, *ids[:-1]])):
        tight = nb.replace(cfg, MAX_SEQ=len(ids) + room)
        assert nb.encode_captions(tokenizer, ["a dog runs along the beach"], tight) == [expected]


def test_a_vocabulary_without_room_for_all_bytes(nb):
    with pytest.raises(ValueError, match="VOCAB_SIZE is 258: it must be at least 259"):
        nb.train_tokenizer(["a dog ."], nb.Config(VOCAB_SIZE=258))
    assert nb.train_tokenizer(["a dog ."], nb.Config(VOCAB_SIZE=259)).get_vocab_size() == 259
