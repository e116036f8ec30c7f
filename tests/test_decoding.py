"""The decoders: against plain versions of themselves, and against exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from conftest import plain_greedy
from PIL import Image

SEEDS = (0, 1, 3, 7)


def sentences(rows, eos=2):
    """Rows of ids up to and with the first `<eos>`: what follows is padding."""
    rows = rows.tolist()
    for row in rows:
        assert not any(row[row.index(eos) + 1 :] if eos in row else ())
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def score(model, x, ids):
    """The sum of the logarithms of the probabilities of a sentence's tokens."""
    with torch.no_grad():
        logits = model(x, torch.tensor([[1, *ids[:-1]]]))[0, 4:]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


@pytest.fixture(scope="module")
def eyes(make, img):
    """{seed: (model, the visual tokens of six pictures)}."""
    with torch.no_grad():
        return {seed: (make(seed), make(seed).vis_enc(img)) for seed in SEEDS}


def test_the_sentences_of_these_tests_are_not_all_alike(nb, eyes):
    every = [tuple(ids) for model, x in eyes.values() for ids in sentences(nb.sample(model, x))]
    assert len(set(every)) >= 8
    assert sum(ids[-1] == 2 for ids in every) >= 4 and sum(len(ids) == 8 for ids in every) >= 4


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_is_the_likeliest_token_at_each_step(nb, eyes, img, seed):
    model, x = eyes[seed]
    fast = sentences(nb.sample(model, x))
    assert fast == [plain_greedy(model, img[n : n + 1]) for n in range(6)]
    assert fast == sentences(nb.beam_search(model, x, beam_width=1))
    with torch.no_grad():  # by one pass over the whole sentence
        for n, ids in enumerate(fast):
            logits = model(x[n : n + 1], torch.tensor([[1, *ids[:-1]]]))[0, 4:]
            assert logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [2, 3, 7])
def test_batched_beams_equal_plain_beams(nb, eyes, img, seed, width):
    model, x = eyes[seed]
    fast = sentences(nb.beam_search(model, x, beam_width=width))
    for n in range(6):
        beams = nb.plain_beam(model, x[n : n + 1], beam_width=width)
        assert fast[n] == beams[0][1]
        assert len(beams) == width and beams == sorted(beams, key=lambda beam: -beam[0])
        for total, ids in beams:
            assert total == pytest.approx(score(model, x[n : n + 1], ids), rel=1e-4, abs=1e-4)


def test_one_by_one_and_batched_beams_are_the_same_method(nb, captioner, img, monkeypatch):
    assert nb.MiniVLM.search is nb.beam_search
    hows = ({}, {"beam_width": 9, "max_new": 5}, {"beam_width": 5, "length_penalty": 1.5})
    fast = [captioner.generate_beam(img, **how) for how in hows]
    monkeypatch.setattr(nb.MiniVLM, "search", nb.one_by_one)
    calls, search = [], nb.plain_beam
    monkeypatch.setattr(nb, "plain_beam", lambda *args: calls.append(args) or search(*args))
    assert [captioner.generate_beam(img, **how) for how in hows] == fast
    assert len(calls) == 18 and captioner.generate_beam(img[:0]) == []


def test_beams_keep_their_pictures(nb, tiny, img):
    """A model that reads the picture at every step, as with cross-attention, gets the right one."""

    class Reads(nb.MiniVLM):
        def hidden_states(self, img_tokens, tok_ids, caches=None):
            x = super().hidden_states(img_tokens, tok_ids, caches)
            return x + img_tokens.mean(1, keepdim=True)

    class Pixels(torch.nn.Module):  # pictures that differ give tokens that differ
        def forward(self, x):
            return 5 * x.flatten(1)[:, : tiny.N_VIS * tiny.D_MODEL].view(
                -1, tiny.N_VIS, tiny.D_MODEL
            )

    torch.manual_seed(0)
    model = Reads(tiny, Pixels()).eval()
    with torch.no_grad():
        model.tok_emb.weight.normal_()
        x = model.vis_enc(img)
    fast = sentences(nb.beam_search(model, x, beam_width=3))
    assert fast == [nb.plain_beam(model, x[n : n + 1], 48, 3)[0][1] for n in range(6)]
    assert len(set(map(tuple, fast))) > 2


def test_a_beam_of_full_width_equals_exhaustive_search(nb, make, img):
    surprises = 0
    for seed in range(4):
        model = make(seed, MAX_SEQ=2)
        every = torch.tensor(list(itertools.product(range(20), repeat=2)))
        bos = torch.full((len(every), 1), nb.BOS)
        ended = (every == nb.EOS).int()
        after = ended.cumsum(1) - ended > 0
        with torch.no_grad():
            x = model.vis_enc(img)
        full, greedy = (
            sentences(nb.beam_search(model, x, beam_width=20)),
            sentences(nb.sample(model, x)),
        )
        for n in range(6):
            with torch.no_grad():
                eye = x[n : n + 1].expand(len(every), -1, -1)
                logits = model.text_logits(eye, torch.cat([bos, every[:, :-1]], 1))
            gains = logits.log_softmax(-1).gather(2, every[:, :, None])[:, :, 0]
            best = every.masked_fill(after, 0)[gains.masked_fill(after, 0).sum(1).argmax()]
            assert full[n] == sentences(best[None])[0]
            surprises += full[n] != greedy[n]
    assert surprises >= 3, "greedy would pass as well"


def test_length_penalty_by_the_formula(nb, eyes, img):
    changed = 0
    for model, x in eyes.values():
        for penalty in (0.7, 1.5):
            fast = sentences(nb.beam_search(model, x, 48, 5, length_penalty=penalty))
            for n in range(6):
                beams = nb.plain_beam(model, x[n : n + 1], 48, 5)
                if any(nb.PAD in ids for _, ids in beams):
                    continue  # a <pad> that the model itself writes does not count as length
                best = max(beams, key=lambda beam: beam[0] / len(beam[1]) ** penalty)
                assert fast[n] == best[1]
                changed += best != beams[0]
    assert changed > 0


@pytest.mark.parametrize("decode", ["sample", "beam_search"])
def test_a_batch_equals_its_pictures_alone_and_stops_in_time(nb, eyes, decode):
    for model, x in eyes.values():
        together = sentences(getattr(nb, decode)(model, x))
        alone = [sentences(getattr(nb, decode)(model, x[n : n + 1]))[0] for n in range(6)]
        assert together == alone
        for max_new in (1, 3, 8, 1000):
            rows = getattr(nb, decode)(model, x, max_new=max_new)
            longest = min(max_new, max(map(len, sentences(rows))), 8)
            assert rows.shape[1] in (longest, 8 if decode == "beam_search" else longest)
            assert rows.shape[1] <= max_new
        if decode == "sample":
            short = sentences(nb.sample(model, x, max_new=3))
            assert short == [ids[:3] for ids in together]


class Fixed(torch.nn.Module):
    """A model whose scores never change."""

    def __init__(self, nb, tiny, logits):
        super().__init__()
        self.cfg, self.blocks, self.logits = nb.replace(tiny, MAX_SEQ=1), [], logits

    def text_logits(self, img_tokens, ids, caches=None):
        return self.logits.expand(len(ids), 1, -1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_stays_within_k_and_follows_the_temperature(nb, tiny, temperature):
    generator = torch.Generator().manual_seed(0)
    logits, draws, k = torch.randn(50, generator=generator), 50_000, 6
    x = torch.zeros(draws, 4, 16)
    drawn = nb.sample(Fixed(nb, tiny, logits), x, 1, temperature, k, generator)[:, 0]
    best = logits.topk(k)
    counts = torch.stack([(drawn == token).sum() for token in best.indices])
    assert counts.sum() == draws  # none outside
    expected = (best.values / temperature).softmax(0) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one honest seed in a thousand is above


def test_top_k_of_everything(nb, tiny):
    fixed, x = Fixed(nb, tiny, torch.zeros(5)), torch.zeros(2000, 4, 16)
    for everything in (None, 5, 100):
        assert nb.sample(fixed, x, 1, 1.0, everything).unique().tolist() == [0, 1, 2, 3, 4]


def test_samples_repeat_with_a_generator_and_leave_other_randomness_alone(nb, eyes):
    model, x = eyes[0]

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return nb.sample(model, x, temperature=2.0, top_k=10, generator=generator).tolist()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


# The methods


@pytest.fixture(scope="module")
def captioner(nb, make):
    model = make(0, VOCAB_SIZE=300)
    model.tokenizer = nb.train_tokenizer(["a dog runs", "two boys play ."] * 9, 300)
    return model


METHODS = ["generate_greedy", "generate_topk", "generate_beam"]


def test_methods_decode_what_the_functions_write(nb, captioner, img):
    def text(rows):
        return [line.strip() for line in captioner.tokenizer.decode_batch(rows.tolist())]

    with torch.no_grad():
        x = captioner.vis_enc(img)
    assert captioner.generate_greedy(img) == text(nb.sample(captioner, x))
    assert captioner.generate_beam(img) == text(nb.beam_search(captioner, x, beam_width=3))
    wide = {"beam_width": 9, "max_new": 5, "length_penalty": 1.0}
    assert captioner.generate_beam(img, **wide) == text(nb.beam_search(captioner, x, **wide))
    how = {"temperature": 3.0, "top_k": 7, "max_new": 6}
    for drawn in ({}, how):
        rows = nb.sample(
            captioner, x, **{"temperature": 0.8, "top_k": 50, "max_new": 48} | drawn,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        again = torch.Generator().manual_seed(0)
        assert captioner.generate_topk(img, generator=again, **drawn) == text(rows)
    assert captioner.generate_greedy(img, max_new=2) == text(nb.sample(captioner, x, 2))


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_in_eval_mode_for_its_duration(captioner, img, method):
    before = [value.clone() for value in captioner.state_dict().values()]
    expected = getattr(captioner, method)(img[:2], generator=seeded()) if "topk" in method else None
    expected = expected or getattr(captioner, method)(img[:2])
    how = {"generator": seeded()} if "topk" in method else {}
    captioner.train()
    try:
        assert getattr(captioner, method)(img[:2], **how) == expected
        assert captioner.training
        with pytest.raises(ValueError, match="max_new"):
            getattr(captioner, method)(img, max_new=0)
        assert captioner.training
    finally:
        captioner.eval()
    assert all(map(torch.equal, before, captioner.state_dict().values()))


def seeded():
    return torch.Generator().manual_seed(0)


def test_large_batches_are_cut(captioner, img, monkeypatch):
    sizes, eye = [], captioner.vis_enc.forward
    monkeypatch.setattr(captioner.vis_enc, "forward", lambda x: sizes.append(len(x)) or eye(x))
    many = img.repeat(50, 1, 1, 1)
    assert captioner.generate_greedy(many) == captioner.generate_greedy(img) * 50
    assert max(sizes) < 300
    assert captioner.generate_beam(img[:0]) == []


def test_every_form_of_pictures_gives_the_same_captions(captioner, pictures, img, tmp_path):
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for image, path in zip(images, paths):
        image.save(path)
    expected = captioner.generate_beam(img)
    assert len(set(expected)) > 2
    for given in (images, paths, [str(p) for p in paths], tuple(paths), (p for p in paths)):
        assert captioner.caption(given) == expected
    assert captioner.caption(dict.fromkeys(paths)) == expected
    assert captioner.caption(images[0]) == captioner.caption(str(paths[0])) == expected[:1]
    assert captioner.caption(images, how="greedy", max_new=3) == captioner.generate_greedy(img, 3)
    assert captioner.caption(images[0].resize((99, 50)), "greedy") != []
    assert captioner.caption([]) == []


@pytest.mark.parametrize("name, value", [
    ("beam_width", 0), ("beam_width", 10**6), ("beam_width", "3"), ("beam_width", None),
    ("beam_width", 1.5), ("beam_width", True), ("length_penalty", -1),
    ("length_penalty", float("nan")), ("length_penalty", float("inf")), ("max_new", 0),
    ("max_new", 2.0), ("max_new", "9"), ("max_new", True), ("temperature", 0),
    ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", -1),
    ("top_k", 0), ("top_k", 2.5), ("top_k", True),
])  # fmt: skip
def test_senseless_numbers_are_named(captioner, img, name, value):
    methods = {"max_new": METHODS, "temperature": METHODS[1:2], "top_k": METHODS[1:2]}
    for method in methods.get(name, METHODS[2:]):
        with pytest.raises((ValueError, TypeError), match=rf"{name}.*{value}"):
            getattr(captioner, method)(img, **{name: value})


@pytest.mark.parametrize("change", [
    lambda x: x[0], lambda x: x[:, :, :8], lambda x: x[:, :1], lambda x: x * 200,
    lambda x: x * torch.nan, lambda x: x.long(), lambda x: x.numpy(), lambda x: x[:, None],
    lambda x: torch.nn.functional.interpolate(x, (20, 20)),
])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_another_form_are_refused(captioner, img, method, change):
    with pytest.raises((ValueError, TypeError), match="img"):
        getattr(captioner, method)(change(img))


def test_what_is_no_picture_is_refused(captioner, pictures, tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="x.jpg"):
        captioner.caption(tmp_path / "x.jpg")
    for wrong in ([np.zeros((9, 9, 3))], pictures, [None], 7):
        with pytest.raises((ValueError, TypeError)):
            captioner.caption(wrong)
    with pytest.raises(ValueError, match="how is 'best'"):
        captioner.caption([], how="best")
