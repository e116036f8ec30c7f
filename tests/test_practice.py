"""Self-critical training: it learns from the scores of its own captions, and can be interrupted."""

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
COMMON, RARE = "a dog runs .", "the cat sleeps ."


@pytest.fixture(scope="module")
def world(nb):
    """Pictures that four of five people describe alike, and a model that has learned just that."""
    cfg = nb.Config(
        D_MODEL=32, N_HEADS=2, N_LAYERS=1, D_FF=64, VIS_CH=16, N_VIS=4, VOCAB_SIZE=275, MAX_SEQ=16,
        IMG_SIZE=16, epochs=40, batch_size=40, captions_per_image=5, lr=1e-2, warmup=5, dropout=0,
        crop=1, flip=False, jitter=0, ema=0, label_smoothing=0, practice=3, practice_lr=1e-3,
    )  # fmt: skip
    captions = [(COMMON,) * 4 + (RARE,)] * 40
    # Pictures of another kind, so that the words of the first are not in every picture.
    captions += [("snow falls .",) * 5] * 40
    images = np.zeros((80, 3, 16, 16), np.uint8)
    images[40:] = 255
    tokenizer = nb.train_tokenizer((c for own in captions for c in own), cfg)
    ids = nb.encode_pictures(tokenizer, captions, cfg)
    batches = nb.CaptionBatches(images, ids, cfg, CPU)
    model, _ = nb.train_model(cfg, batches, lambda m: 0.0, CPU, torch.float32)
    return cfg, model.state_dict(), images, captions, ids, tokenizer


def practise(nb, world, **how):
    cfg, state, images, captions, ids, tokenizer = world
    model = nb.MiniVLM(cfg)
    model.load_state_dict(state)
    cfg = nb.replace(cfg, **how.pop("change", {}))
    return nb.practise(
        model, images, captions, ids, tokenizer, cfg, CPU, torch.float32, rows=20, **how
    )


def drawn(nb, world, model, temperature=1.0):
    """The share of the common caption among those drawn for the first kind of pictures."""
    _, _, images, captions, _, tokenizer = world
    torch.manual_seed(0)
    groups, scores = nb.write_and_score(
        model, torch.from_numpy(images[:4]), torch.arange(4), nb.CiderD(captions), tokenizer,
        torch.float32, per_image=50, temperature=temperature,
    )  # fmt: skip
    texts = [tokenizer.decode(ids) for group in groups for ids in group]
    return np.mean([text == COMMON for text in texts]), scores.mean().item()


def test_what_is_drawn_and_its_score(nb, world):
    cfg, state, images, captions, _, tokenizer = world
    model = nb.MiniVLM(cfg)
    model.load_state_dict(state)
    model.eval()
    cider, numbers = nb.CiderD(captions), torch.tensor([3, 50])
    torch.manual_seed(1)
    pair = torch.from_numpy(images[numbers.numpy()])
    groups, scores = nb.write_and_score(
        model, pair, numbers, cider, tokenizer, torch.float32, per_image=7
    )
    assert [len(group) for group in groups] == [7, 7]
    assert scores.shape == (2, 7)
    for number, group, row in zip(numbers.tolist(), groups, scores.tolist()):
        for ids, score in zip(group, row):
            assert ids[0] == nb.BOS
            assert nb.EOS not in ids[:-1], "nothing may follow the end"
            assert score == pytest.approx(cider(tokenizer.decode(ids), number), abs=1e-5)


def test_a_low_temperature_draws_the_likely_caption_more_often(nb, world):
    cfg, state, *_ = world
    model = nb.MiniVLM(cfg)
    model.load_state_dict(state)
    shares = [drawn(nb, world, model.eval(), temperature)[0] for temperature in (0.2, 0.5, 1.0)]
    assert shares[0] > shares[1] > shares[2]


def test_a_batch_tells_its_own_captions_from_those_by_people(nb, world):
    cfg, state, images, captions, ids, tokenizer = world
    model = nb.MiniVLM(cfg)
    model.load_state_dict(state)
    numbers = torch.tensor([0, 1, 40])
    torch.manual_seed(0)
    packed, weights, temperatures, _ = nb.practice_batch(
        model.eval(), torch.from_numpy(images[numbers.numpy()]), numbers, nb.CiderD(captions), ids,
        tokenizer, cfg, torch.float32, temperature=0.25, human=0.7,
    )  # fmt: skip
    by_people = packed.caption >= 5
    assert by_people.any(1).all()
    assert (weights[by_people] == 0.7).all()
    assert (temperatures[by_people] == 1).all()
    own = (packed.caption >= 0) & ~by_people
    assert (temperatures[own] == 0.25).all()
    for row, caption in zip(weights, packed.caption):  # advantages of one picture's captions
        each = [row[caption == k][0] for k in range(5)]
        assert sum(each).item() == pytest.approx(0, abs=1e-5)


def test_captions_that_all_score_alike_teach_nothing(nb, world, monkeypatch):
    """What rounding leaves of their advantages must not be scaled up to the size of real ones."""
    cfg, state, images, captions, ids, tokenizer = world

    def alike(*_):
        groups = [[[nb.BOS, 5, nb.EOS] for _ in range(5)] for _ in range(2)]
        return groups, 0.1 + 1e-7 * torch.randn(2, 5)

    monkeypatch.setattr(nb, "write_and_score", alike)
    _, weights, _, _ = nb.practice_batch(
        None, None, torch.tensor([0, 1]), None, ids, tokenizer, cfg, torch.float32, human=0.0
    )
    assert weights.abs().max() < 1e-3


def test_the_loss_divides_each_place_by_its_own_temperature(nb, world):
    cfg, state, images, _, ids, _ = world
    model = nb.MiniVLM(cfg)
    model.load_state_dict(state)
    model.eval()
    packed = nb.pack_captions([ids[0][:2], ids[40][:1]], cfg.N_VIS)
    picked = torch.from_numpy(images[[0, 40]])
    temperature = torch.where(packed.caption == 1, 0.5, 2.0)
    with torch.no_grad():
        losses = nb.CaptionLoss(model)(picked, packed, temperature=temperature)
        tokens = model.vis_enc(nb.normalise(picked[:1]))
        for k, its in ((0, 2.0), (1, 0.5)):
            one = ids[0][k]
            logits = model(tokens, torch.tensor([one]))[0, cfg.N_VIS : -1] / its
            alone = torch.nn.functional.cross_entropy(
                logits, torch.tensor(one[1:]), reduction="none"
            )
            assert torch.allclose(losses[0][packed.caption[0] == k], alone, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_it_learns_to_write_what_scores_well(nb, world, temperature):
    cfg, state, *_ = world
    before = nb.MiniVLM(cfg)
    before.load_state_dict(state)
    share, score = drawn(nb, world, before.eval())
    assert 0.6 < share < 0.95, "the model should have learned four to one"
    how = {"human": 0.0, "temperature": temperature}
    model, history = practise(nb, world, change={"practice": 24}, **how)
    better, higher = drawn(nb, world, model)
    assert better > 0.97
    assert higher > score
    assert [h["epoch"] for h in history] == list(range(1, 25))
    assert not model.training


def test_captions_by_people_hold_it_back(nb, world):
    """With nothing but their weight it goes on learning their captions, rare ones too."""
    share, _ = drawn(nb, world, practise(nb, world, human=30.0)[0])
    alone, _ = drawn(nb, world, practise(nb, world, human=0.0)[0])
    assert share < alone


def test_batch_norm_keeps_its_statistics(nb, world):
    model, _ = practise(nb, world, change={"practice": 1})
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, world[1][name]), name


def test_interrupted_practice_goes_on_as_if_nothing_had_been(nb, world, tmp_path):
    whole, history = practise(nb, world)

    def pull_the_plug(history):
        if len(history) == 2:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        practise(nb, world, checkpoint=tmp_path / "practice.pt", report=pull_the_plug)
    resumed, again = practise(nb, world, checkpoint=tmp_path / "practice.pt")
    assert [h["score"] for h in again] == [h["score"] for h in history]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_picture_with_one_caption(nb, world):
    cfg, state, images, captions, ids, tokenizer = world
    few = (cfg, state, images, [own[:1] for own in captions], [own[:1] for own in ids], tokenizer)
    _, history = practise(nb, few, change={"practice": 1})
    assert np.isfinite(history[0]["score"])


def test_no_practice_changes_nothing(nb, world):
    model, history = practise(nb, world, change={"practice": 0})
    assert history == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, world[1][name]), name
