"""The three decoders: against plain versions of themselves, and against exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def make(nb, tiny):
    """A random model with opinions: `make(seed, VOCAB_SIZE=...)`."""

    def build(seed=0, **how):
        torch.manual_seed(seed)
        model = nb.MiniVLM(nb.replace(tiny, **how)).eval()
        with torch.no_grad():  # let pictures differ, blocks matter, and some sentences end
            model.vis_enc.proj.weight.mul_(10)
            model.tok_emb.weight.mul_(0.5)[nb.EOS].mul_(1.5)
            for block in model.blocks:
                block.attn.qkv.weight.mul_(3)
                block.attn.proj.weight.mul_(5)
                block.mlp.fc2.weight.mul_(5)
        return model

    return build


@pytest.fixture(scope="module")
def images():
    """Six pictures that a random encoder can tell apart."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (6, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)


def sentences(rows, eos=2):
    """Rows of ids up to and with the first `<eos>`: what follows is padding."""
    rows = rows.tolist()
    for row in rows:
        end = row.index(eos) + 1 if eos in row else len(row)
        assert not any(row[end:])
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def without(model, *ids):
    """The model, made never to write these tokens."""

    def forbid(layer, inputs, logits):
        logits = logits.clone()
        logits[..., list(ids)] = -1e4
        return logits

    model.lm_head.register_forward_hook(forbid)
    return model


SEEDS = (0, 1, 5, 7)


def test_the_sentences_of_these_tests_are_not_all_alike(nb, make, images):
    """The tests below compare sentences: they need different ones, short and long."""
    every = [ids for seed in SEEDS for ids in sentences(nb.sample_ids(make(seed), images, top_k=1))]
    assert len({tuple(ids) for ids in every}) >= 8
    assert any(ids[-1] == 2 for ids in every)
    assert any(len(ids) == 8 for ids in every)


# Greedy


@pytest.mark.parametrize("seed", SEEDS)
def test_cached_greedy_equals_plain_greedy(nb, make, images, seed):
    model = make(seed)
    fast = sentences(nb.sample_ids(model, images, top_k=1))
    assert fast == [nb.plain_greedy(model, image) for image in images]


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_is_the_likeliest_token_at_each_step(nb, make, images, seed):
    """By the model's plain forward pass over the whole sentence at once."""
    model = make(seed)
    with torch.no_grad():
        for image, ids in zip(images, sentences(nb.sample_ids(model, images, top_k=1))):
            img_tokens = model.vis_enc(nb.normalise(image[None]))
            logits = model(img_tokens, torch.tensor([[1, *ids[:-1]]]))[0, 4:]
            assert logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_equals_a_beam_of_width_one(nb, make, images, seed):
    model = make(seed)
    greedy = sentences(nb.sample_ids(model, images, top_k=1))
    assert sentences(nb.beam_ids(model, images, beam_width=1)) == greedy
    assert [nb.plain_beam(model, image, beam_width=1) for image in images] == greedy


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_a_batch_equals_its_pictures_alone(nb, make, images, decoder):
    model = make()
    if decoder == "greedy":
        write = lambda x: sentences(nb.sample_ids(model, x, top_k=1))  # noqa: E731
    else:
        write = lambda x: sentences(nb.beam_ids(model, x))  # noqa: E731
    assert write(images) == [write(image[None])[0] for image in images]


def test_cached_logits_equal_plain_logits(nb, make, images):
    model = make()
    ids = torch.randint(3, 20, (6, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bos = torch.full((6, 1), nb.BOS)
        plain = model(model.vis_enc(nb.normalise(images)), torch.cat([bos, ids], 1))[:, 4:]
        caches, logits = nb.read_pictures(model, images)
        torch.testing.assert_close(logits, plain[:, 0], rtol=1e-4, atol=1e-4)
        for t in range(7):
            logits = nb.read_token(model, caches, ids[:, t])
            torch.testing.assert_close(logits, plain[:, t + 1], rtol=1e-4, atol=1e-4)


# Beam search


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [2, 3, 7])
def test_batched_beams_equal_plain_beams(nb, make, images, seed, width):
    model = make(seed)
    fast = sentences(nb.beam_ids(model, images, beam_width=width))
    assert fast == [nb.plain_beam(model, image, beam_width=width) for image in images]


def exhaustive(nb, model, image, length):
    """The likeliest of all sentences of at most `length` tokens, by scoring every one."""
    V = model.cfg.VOCAB_SIZE
    every = torch.tensor(list(itertools.product(range(V), repeat=length)))
    with torch.no_grad():
        img_tokens = model.vis_enc(nb.normalise(image[None])).expand(len(every), -1, -1)
        bos = torch.full((len(every), 1), nb.BOS)
        logits = model(img_tokens, torch.cat([bos, every[:, :-1]], 1))[:, model.cfg.N_VIS :]
    gains = logits.log_softmax(-1).gather(2, every[:, :, None])[:, :, 0]
    ended = (every == nb.EOS).int().cumsum(1)
    after_the_end = (ended - (every == nb.EOS).int()) > 0
    scores = gains.masked_fill(after_the_end, 0).sum(1)
    return sentences(every.masked_fill(after_the_end, nb.PAD)[scores.argmax()][None])[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_full_width_equals_exhaustive_search(nb, make, images, seed):
    model = make(seed, VOCAB_SIZE=5, MAX_SEQ=4)
    best = [exhaustive(nb, model, image, 4) for image in images]
    assert sentences(nb.beam_ids(model, images, beam_width=5**4)) == best
    assert [nb.plain_beam(model, image, beam_width=5**4) for image in images] == best


def test_exhaustive_search_is_no_mere_greedy(nb, make, images):
    """Else the test above would show nothing."""
    models = [make(seed, VOCAB_SIZE=5, MAX_SEQ=4) for seed in range(6)]
    best = [exhaustive(nb, model, image, 4) for model in models for image in images]
    greedy = [ids for m in models for ids in sentences(nb.sample_ids(m, images, top_k=1))]
    assert sum(a != b for a, b in zip(best, greedy)) >= 3


def score(nb, model, image, ids):
    """The sum of the logarithms of the probabilities of a sentence's tokens."""
    with torch.no_grad():
        img_tokens = model.vis_enc(nb.normalise(image[None]))
        logits = model(img_tokens, torch.tensor([[1, *ids[:-1]]]))[0, 4:]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


def test_plain_beams_carry_their_scores(nb, make, images):
    model, steps = make(1), []
    best = nb.plain_beam(model, images[0], beam_width=4, trace=steps.append)
    assert 1 < len(steps) <= 8
    for beams in steps:
        assert len(beams) == 4
        assert [s for s, _ in beams] == sorted((s for s, _ in beams), reverse=True)
        for beam_score, ids in beams:
            expected = score(nb, model, images[0], ids[1:])
            assert beam_score == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert steps[-1][0][1] == [1, *best]


def test_length_penalty_favours_longer_sentences(nb, make, images):
    """By the formula: of the final beams, the one with the best score / length ** penalty."""
    longer = 0
    for seed in SEEDS:
        model = without(make(seed), nb.PAD)  # padding does not count as length
        plain = sentences(nb.beam_ids(model, images, beam_width=5))
        penalised = sentences(nb.beam_ids(model, images, beam_width=5, length_penalty=1.0))
        for image, ids, other in zip(images, plain, penalised):
            mean = [score(nb, model, image, x) / len(x) for x in (ids, other)]
            assert mean[1] >= mean[0] - 1e-4
            assert len(other) >= len(ids)
            longer += len(other) > len(ids)
    assert longer > 0


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_stays_within_k_and_follows_the_temperature(nb, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator)
    draws, k = 50_000, 6
    tokens = nb.pick_token(logits.expand(draws, -1), temperature, k, generator)
    best = logits.topk(k)
    counts = torch.stack([(tokens == token).sum() for token in best.indices])
    assert counts.sum() == draws  # none outside
    expected = (best.values / temperature).softmax(0) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one honest seed in a thousand is above


def test_a_high_temperature_evens_out_and_a_low_one_sharpens(nb):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(5000, -1)
    shares = []
    for temperature in (0.01, 0.5, 1, 2, 1e6):
        generator = torch.Generator().manual_seed(0)
        shares.append((nb.pick_token(logits, temperature, 4, generator) == 0).float().mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0.25, abs=0.03)


def test_top_k_of_one_and_of_everything(nb):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 4, generator=generator)
    assert torch.equal(nb.pick_token(logits, 5.0, 1), logits.argmax(-1))
    for everything in (None, 4, 100):
        seen = nb.pick_token(torch.zeros(3000, 4), 1.0, everything, generator)
        assert seen.unique().tolist() == [0, 1, 2, 3]


def test_sampled_sentences_stay_within_the_k_best_of_each_step(nb, make, images):
    model = make()
    generator = torch.Generator().manual_seed(0)
    how = {"top_k": 3, "temperature": 3.0, "generator": generator}
    rows = sentences(nb.sample_ids(model, images, per_image=20, **how))
    ranks = set()
    with torch.no_grad():
        for row, ids in enumerate(rows):
            img_tokens = model.vis_enc(nb.normalise(images[row // 20][None]))
            logits = model(img_tokens, torch.tensor([[1, *ids[:-1]]]))[0, 4:]
            for step, token in zip(logits, ids):
                ranks.add((step > step[token]).sum().item())
    assert ranks == {0, 1, 2}


def test_samples_repeat_with_a_generator_and_leave_other_randomness_alone(nb, make, images):
    model = make()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        rows = nb.sample_ids(model, images, top_k=10, temperature=2.0, generator=generator)
        return sentences(rows)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_several_captions_a_picture_stay_with_their_picture(nb, make, images):
    model = make()
    one = sentences(nb.sample_ids(model, images, top_k=1))
    three = sentences(nb.sample_ids(model, images, top_k=1, per_image=3))
    assert three == [ids for ids in one for _ in range(3)]


# The end of a sentence, and of the positions


@pytest.mark.parametrize("max_new", [1, 5, 8, 10_000])
def test_never_more_positions_than_there_are(nb, make, images, max_new):
    model, positions = without(make(), nb.EOS), []
    model.pos_emb.register_forward_hook(lambda layer, inputs, y: positions.append(inputs[0].max()))
    expected = min(max_new, 8)
    assert nb.sample_ids(model, images, max_new, top_k=1).shape == (6, expected)
    assert nb.beam_ids(model, images, 3, max_new).shape == (6, expected)
    assert len(nb.plain_greedy(model, images[0], max_new)) == expected
    assert len(nb.plain_beam(model, images[0], 3, max_new)) == expected
    assert max(positions) == 4 + expected - 1  # the last token that is read comes before the last


def test_the_published_shape_stops_at_64_positions(nb):
    model, positions = without(nb.MiniVLM(nb.Config()).eval(), nb.EOS), []
    model.pos_emb.register_forward_hook(lambda layer, inputs, y: positions.append(inputs[0].max()))
    image = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    assert nb.sample_ids(model, image, 1000, top_k=1).shape == (1, 48)
    assert nb.beam_ids(model, image, 2, 1000).shape == (1, 48)
    assert max(positions) == 63


def test_a_finished_sentence_stays_finished_beside_unfinished_ones(nb, make, images):
    """`sentences` fails for anything but padding after `<eos>`."""
    mixed = 0
    for seed in SEEDS:
        rows = nb.sample_ids(make(seed), images, top_k=1)
        beams = nb.beam_ids(make(seed), images)
        assert len({len(ids) for ids in sentences(rows)}) > 1
        mixed += len({len(ids) for ids in sentences(beams)}) > 1
    assert mixed >= 2


def test_a_sentence_may_end_at_once(nb, make, images):
    model = without(make(), *(i for i in range(20) if i != nb.EOS))  # nothing but <eos>
    assert nb.sample_ids(model, images, top_k=1).tolist() == [[2]] * 6
    assert sentences(nb.beam_ids(model, images)) == [[2]] * 6
    assert nb.plain_greedy(model, images[0]) == [2]
    assert nb.plain_beam(model, images[0]) == [2]


# Captioner: pictures in, strings out


@pytest.fixture(scope="module")
def captioner(nb, make):
    captions = ["a dog runs on the beach .", "two children play with a red ball ."] * 20
    model = make(3, VOCAB_SIZE=300)
    return nb.Captioner(model, nb.train_tokenizer(captions, model.cfg))


def test_every_form_of_pictures_gives_the_same_captions(captioner, images, tmp_path):
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for image, path in zip(pil, paths):
        image.save(path)
    expected = captioner.generate_greedy(images)
    assert len(set(expected)) > 1
    for form in (images.numpy(), pil, paths, [str(path) for path in paths], tuple(pil)):
        assert captioner.generate_greedy(form) == expected
    for single in (pil[2], paths[2], str(paths[2]), images[2:3]):
        assert captioner.generate_greedy(single) == expected[2:3]


@pytest.mark.parametrize("decoder", ["generate_greedy", "generate_topk", "generate_beam"])
def test_decoders_give_a_string_for_each_picture(captioner, images, decoder):
    texts = getattr(captioner, decoder)(images)
    assert len(texts) == 6
    assert all(type(text) is str and "<" not in text for text in texts)
    assert getattr(captioner, decoder)([]) == []
    assert getattr(captioner, decoder)(images[:0]) == []


def test_decoders_decode_what_the_functions_write(nb, captioner, images):
    def texts(rows):
        return [captioner.tokenizer.decode(row).strip() for row in rows.tolist()]

    model = captioner.model
    assert captioner.generate_greedy(images) == texts(nb.sample_ids(model, images, top_k=1))
    assert captioner.generate_greedy(images, max_new=2) == texts(
        nb.sample_ids(model, images, 2, top_k=1)
    )
    assert captioner.generate_beam(images) == texts(nb.beam_ids(model, images, 3))
    assert captioner.generate_beam(images, 5, 4, 0.7) == texts(
        nb.beam_ids(model, images, 5, 4, 0.7)
    )
    how = {"temperature": 0.8, "top_k": 50}
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    drawn = captioner.generate_topk(images, generator=generators[0])
    assert drawn == texts(nb.sample_ids(model, images, generator=generators[1], **how))


def test_topk_repeats_with_a_generator(captioner, images):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return captioner.generate_topk(images, generator=generator)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_large_batches_are_cut(captioner, images):
    sizes = []

    def write(pictures):
        sizes.append(len(pictures))
        return torch.full((len(pictures), 1), 100)

    assert len(captioner.captions(images.repeat(50, 1, 1, 1), 8, write)) == 300
    assert sum(sizes) == 300
    assert max(sizes) <= 128


@pytest.mark.parametrize(
    "decoder, how, named",
    [
        ("generate_topk", {"temperature": 0}, "temperature 0"),
        ("generate_topk", {"temperature": -1}, "temperature -1"),
        ("generate_topk", {"top_k": 0}, "top_k 0"),
        ("generate_beam", {"beam_width": 0}, "beam_width is 0"),
        ("generate_greedy", {"max_new": 0}, "max_new is 0"),
        ("generate_topk", {"max_new": 0}, "max_new is 0"),
        ("generate_beam", {"max_new": -3}, "max_new is -3"),
    ],
)
def test_senseless_numbers_are_refused(captioner, images, decoder, how, named):
    with pytest.raises(ValueError, match=named):
        getattr(captioner, decoder)(images, **how)


@pytest.mark.parametrize(
    "pictures, named",
    [
        (np.zeros((3, 16, 16), np.uint8), r"\(3, 16, 16\)"),
        (np.zeros((2, 16, 16, 3), np.uint8), r"\(2, 16, 16, 3\)"),
        (np.zeros((2, 3, 16, 16), np.float32), "float32"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), r"\(2, 1, 16, 16\)"),
    ],
    ids=["no_batch", "channels_last", "floats", "grey"],
)
def test_arrays_of_another_form_are_refused(captioner, pictures, named):
    with pytest.raises(ValueError, match=named):
        captioner.generate_greedy(pictures)


def test_a_file_that_is_no_picture_is_named(captioner, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        captioner.generate_greedy([tmp_path / "broken.jpg"])
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        captioner.generate_greedy([tmp_path / "absent.jpg"])


def test_a_tokenizer_larger_than_the_model_is_refused(nb, make, captioner):
    size = captioner.tokenizer.get_vocab_size()
    with pytest.raises(ValueError, match=rf"{size} tokens.* {size - 1}"):
        nb.Captioner(make(0, VOCAB_SIZE=size - 1), captioner.tokenizer)
    nb.Captioner(make(0, VOCAB_SIZE=size), captioner.tokenizer)
    nb.Captioner(make(0, VOCAB_SIZE=size + 1), captioner.tokenizer)  # a smaller one fits


def test_a_tokenizer_with_other_special_tokens_is_refused(nb, make):
    tokenizer = nb.Tokenizer(nb.models.BPE({"<bos>": 0, "<eos>": 1, "<pad>": 2}, []))
    with pytest.raises(ValueError, match="<pad>"):
        nb.Captioner(make(), tokenizer)


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_must_be_above_zero(nb, temperature):
    with pytest.raises(ValueError, match="temperature"):
        nb.pick_token(torch.zeros(1, 5), temperature)
