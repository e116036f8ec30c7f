"""Training: the loss, the batches, the schedule, and that an interruption changes nothing."""

import collections
import errno
import functools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    """Nine small pictures, each with four captions of one to six tokens of the ids 3 to 19."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 3, 16, 16), dtype=np.uint8)
    token_ids = [
        [[1, *rng.integers(3, 20, rng.integers(1, 7)).tolist(), 2] for _ in range(4)]
        for _ in images
    ]
    return images, token_ids


@pytest.fixture
def model(nb, tiny):
    torch.manual_seed(0)
    return nb.MiniVLM(tiny)


def plain_loss(nb, model, image, ids):
    """Loss of each token of one caption by the plain forward pass, which knows no packing."""
    img_tokens = model.vis_enc(nb.normalise(image[None]))
    logits = model(img_tokens, torch.tensor([ids[:-1]]))[0, model.cfg.N_VIS :]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)
    assert all(grad.abs().max() > 0.1 for name, grad in a.items() if not name.startswith("vis"))


# The loss


def test_packed_loss_equals_one_caption_at_a_time(nb, model, data):
    images, token_ids = data
    model.eval()
    packed = nb.pack_captions(token_ids, model.cfg.N_VIS)
    with torch.no_grad():
        losses = nb.CaptionLoss(model)(torch.from_numpy(images), packed)
        for row, captions in enumerate(token_ids):
            for k, ids in enumerate(captions):
                alone = plain_loss(nb, model, torch.from_numpy(images[row]), ids)
                torch.testing.assert_close(losses[row][packed.caption[row] == k], alone)


def test_packed_training_step_equals_one_caption_a_row(nb, model, data):
    """In training mode too: batch statistics are the same if each picture occurs equally often."""
    images, token_ids = torch.from_numpy(data[0]), data[1]
    loss_of = nb.CaptionLoss(model).train()
    losses = loss_of(images, nb.pack_captions(token_ids, 4))
    losses.sum().backward()
    packed = gradients(model)
    model.zero_grad()
    rows = [[ids] for captions in token_ids for ids in captions]
    alone = loss_of(images.repeat_interleave(4, 0), nb.pack_captions(rows, 4))
    alone.sum().backward()
    torch.testing.assert_close(losses.sum(), alone.sum())
    assert_same_gradients(packed, gradients(model))


def test_padding_changes_neither_loss_nor_gradients(nb, model, data):
    images, token_ids = torch.from_numpy(data[0]), data[1]
    loss_of = nb.CaptionLoss(model)
    packed = nb.pack_captions(token_ids, 4)
    losses = loss_of(images, packed)
    losses.sum().backward()
    without = gradients(model)
    model.zero_grad()
    padded = nb.Packed(
        F.pad(packed.inputs, (0, 11), value=nb.PAD),
        F.pad(packed.targets, (0, 11), value=nb.PAD),
        F.pad(packed.positions, (0, 11), value=0),
        F.pad(packed.caption, (0, 11), value=-1),
        torch.from_numpy(np.flatnonzero(F.pad(packed.caption, (0, 11), value=-1) >= 0)),
    )
    more = loss_of(images, padded)
    more.sum().backward()
    torch.testing.assert_close(more[:, :-11], losses)
    assert not more[padded.targets == nb.PAD].any()
    assert_same_gradients(without, gradients(model))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_never_counts(nb, model, data, smoothing):
    images, token_ids = torch.from_numpy(data[0]), data[1]
    packed = nb.pack_captions(token_ids, 4)
    losses = nb.CaptionLoss(model)(images, packed, smoothing)
    real = packed.caption >= 0
    assert (losses[real] > 0).all()
    assert not losses[~real].any()
    assert real.sum() == sum(len(ids) - 1 for captions in token_ids for ids in captions)


def test_the_last_visual_position_is_not_used(nb, model, data):
    """The first of the losses is that of the first word, predicted at <bos>."""
    images, token_ids = torch.from_numpy(data[0]), data[1]
    model.eval()
    with torch.no_grad():
        packed = nb.pack_captions([[token_ids[0][0]]], 4)
        losses = nb.CaptionLoss(model)(images[:1], packed)
        logits = model(model.vis_enc(nb.normalise(images[:1])), torch.tensor([token_ids[0][0]]))
    first_word = token_ids[0][0][1]
    torch.testing.assert_close(losses[0, 0], -logits[0, 4].log_softmax(0)[first_word])
    assert packed.targets[0, 0] == first_word


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_evaluate_loss_equals_a_plain_computation(nb, model, data, batch):
    images, token_ids = data
    got = nb.evaluate_loss(model.train(), images, token_ids, CPU, torch.float32, batch)
    model.eval()
    with torch.no_grad():
        every = [
            plain_loss(nb, model, torch.from_numpy(image), ids)
            for image, captions in zip(images, token_ids)
            for ids in captions
        ]
    assert got == pytest.approx(torch.cat(every).mean().item(), rel=1e-5)


def test_evaluate_loss_uses_no_dropout_and_moves_nothing(nb, tiny, data):
    model = nb.MiniVLM(nb.replace(tiny, dropout=0.5)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (nb.evaluate_loss(model, *data, CPU, torch.float32) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Batches


def numbered(n_pictures, n_captions):
    """Pictures whose every pixel is their number, and captions that begin with that number."""
    rng = np.random.default_rng(1)
    images = np.empty((n_pictures, 3, 2, 2), np.uint8)
    images[:] = np.arange(n_pictures)[:, None, None, None]
    return images, [
        [[1, 100 + i, 200 + k, *[9] * rng.integers(0, 5), 2] for k in range(n_captions)]
        for i in range(n_pictures)
    ]


def unpack_batch(packed):
    """The target ids of each caption in each row."""
    for row, which in enumerate(packed.caption):
        yield [packed.targets[row][which == k].tolist() for k in range(which.max() + 1)]


@pytest.mark.parametrize("captions_per_image", [1, 2, 5, 7])
def test_each_caption_once_an_epoch_with_its_own_picture(nb, tiny, captions_per_image):
    images, token_ids = numbered(23, 5)
    cfg = nb.replace(tiny, batch_size=8, captions_per_image=captions_per_image)
    batches = nb.CaptionBatches(images, token_ids, cfg, CPU)
    seen, n_batches = collections.Counter(), 0
    for pictures, packed, total in batches.epoch(0):
        n_batches += 1
        assert total == (packed.targets != nb.PAD).sum()
        assert pictures.dtype == torch.uint8
        assert len(pictures) <= max(1, 8 // captions_per_image)
        for picture, captions in zip(pictures, unpack_batch(packed)):
            assert len(captions) <= captions_per_image
            for targets in captions:
                assert targets[0] == 100 + picture[0, 0, 0]
                seen[tuple(targets)] += 1
    assert seen == collections.Counter(tuple(ids[1:]) for c in token_ids for ids in c)
    assert n_batches == len(batches)


def as_lists(batches, epoch):
    return [
        (images.tolist(), [vars(packed)[name].tolist() for name in vars(packed)], total)
        for images, packed, total in batches.epoch(epoch)
    ]


def test_the_order_depends_on_seed_and_epoch_alone(nb, tiny):
    images, token_ids = numbered(23, 5)
    batches = nb.CaptionBatches(images, token_ids, tiny, CPU)
    third = as_lists(batches, 3)
    torch.manual_seed(99)  # neither does other randomness matter
    np.random.seed(99)  # noqa: NPY002
    assert as_lists(nb.CaptionBatches(images, token_ids, tiny, CPU), 3) == third
    assert as_lists(batches, 4) != third
    other_seed = nb.CaptionBatches(images, token_ids, nb.replace(tiny, seed=1), CPU)
    assert as_lists(other_seed, 3) != third


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_all_ranks_add_up_to_the_batch(nb, tiny, model, world):
    """Also where the last batch has fewer pictures than there are processes."""
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16), dtype=np.uint8)
    token_ids = [[[1, 3 + i, 12, 2], [1, 3 + i, 13, 14, 2]] for i in range(9)]
    loss_of = nb.CaptionLoss(model).eval()
    whole = nb.CaptionBatches(images, token_ids, tiny, CPU).epoch(0)
    shares = [
        nb.CaptionBatches(images, token_ids, tiny, CPU, rank, world).epoch(0)
        for rank in range(world)
    ]
    sizes = []
    for (pictures, packed, total), *parts in zip(whole, *shares, strict=True):
        sizes.append(len(pictures))
        assert all(part_total == total for _, _, part_total in parts)
        rows = sorted(ids for row in unpack_batch(packed) for ids in row)
        part_rows = [ids for _, part, _ in parts for row in unpack_batch(part) for ids in row]
        assert sorted(ids for ids in part_rows if any(ids)) == rows
        with torch.no_grad():
            expected = loss_of(pictures, packed).sum()
            got = sum(loss_of(part_pictures, part).sum() for part_pictures, part, _ in parts)
        torch.testing.assert_close(got, expected)
    assert min(sizes) < world


# Augmentation


def random_pictures(n, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_augment_with_everything_off_is_the_identity(nb, tiny):
    images = random_pictures(5)
    torch.testing.assert_close(nb.augment(images, tiny), images.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "how",
    [{"crop": 0.5}, {"flip": True}, {"jitter": 1}, {"crop": 0.1, "flip": True, "jitter": 1}],
    ids=str,
)
def test_augment_keeps_shape_and_range(nb, tiny, how):
    torch.manual_seed(0)
    extreme = [torch.full((2, 3, 16, 16), 255), torch.zeros(2, 3, 16, 16)]
    images = torch.cat([random_pictures(60), *extreme])
    out = nb.augment(images, nb.replace(tiny, **how))
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 255 + 1e-3
    changed = (out - images).abs().amax((1, 2, 3))[:60] > 1
    assert changed.float().mean() > 0.3


def test_flip_mirrors_half_of_the_pictures(nb, tiny):
    torch.manual_seed(0)
    images = random_pictures(200).float()
    out = nb.augment(images, nb.replace(tiny, flip=True))
    kept = (out - images).abs().amax((1, 2, 3)) < 0.01
    mirrored = (out - images.flip(3)).abs().amax((1, 2, 3)) < 0.01
    assert (kept ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_crop_keeps_a_part_of_at_least_that_size_inside_the_picture(nb, tiny):
    """On a ramp from left to right, what a crop shows can be read off its first and last column."""
    torch.manual_seed(0)
    ramp = torch.linspace(0, 255, 16).expand(100, 3, 16, 16)
    for images, (first, last) in (
        (ramp, (lambda x: x[:, 0, 5, 0], lambda x: x[:, 0, 5, -1])),
        (ramp.transpose(2, 3), (lambda x: x[:, 0, 0, 5], lambda x: x[:, 0, -1, 5])),
    ):
        out = nb.augment(images.contiguous(), nb.replace(tiny, crop=0.6))
        share = (last(out) - first(out)) / 255
        assert (share > 0.55).all()  # never mirrored, never less than crop
        assert share.min() < 0.7
        assert share.max() > 0.9
        assert first(out).std() > 5  # not always the same place


def test_jitter_changes_each_picture_as_a_whole(nb, tiny):
    torch.manual_seed(0)
    grey = torch.full((50, 3, 4, 4), 100)
    out = nb.augment(grey, nb.replace(tiny, jitter=0.3))
    assert (out.amax((1, 2, 3)) - out.amin((1, 2, 3))).max() < 1e-3
    assert 70 - 1e-3 <= out.min() < 75
    assert 125 < out.max() <= 130 + 1e-3


# Schedule and optimiser


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine(nb, tiny):
    cfg = nb.replace(tiny, lr=1.0, min_lr=0.1, warmup=10)
    rates = [nb.learning_rate(step, 110, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert nb.learning_rate(1000, 110, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup, total", [(0, 1), (0, 0), (5, 5), (5, 3), (5, 6)])
def test_learning_rate_of_very_short_runs(nb, tiny, warmup, total):
    cfg = nb.replace(tiny, lr=1.0, min_lr=0.1, warmup=warmup)
    assert all(0.1 <= nb.learning_rate(step, total, cfg) <= 1 for step in range(total + 1))


def test_a_short_run_gets_beyond_the_warm_up(nb, tiny):
    cfg = nb.replace(tiny, lr=1.0, min_lr=0.1, warmup=300)
    rates = [nb.learning_rate(step, 40, cfg) for step in range(40)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[-1] < 0.11


@pytest.mark.parametrize("decay_all", [False, True])
def test_optimizer_has_every_parameter_once(nb, model, decay_all):
    cfg = nb.replace(model.cfg, decay_all=decay_all, weight_decay=0.01)
    optimizer = nb.make_optimizer(model, cfg)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for p in group["params"]:
            assert group["weight_decay"] == (0.01 if decay_all or p.ndim > 1 else 0)


def test_the_published_recipe(nb):
    cfg = nb.PRESETS["published"]
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.min_lr) == (15, 64, 3e-4, 3e-5)
    assert (cfg.init, cfg.captions_per_image, cfg.weight_decay) == ("pytorch", 1, 0.01)
    assert (cfg.dropout, cfg.label_smoothing, cfg.ema) == (0, 0, 0)
    assert (cfg.crop, cfg.flip, cfg.jitter) == (1, False, 0)


def test_presets_share_the_published_format(nb):
    assert {"published", "nano", "scenes"} <= nb.PRESETS.keys()
    for cfg in nb.PRESETS.values():
        assert cfg.model_dict() == nb.Config().model_dict()


@pytest.mark.parametrize(
    "capability, expected",
    [("native", torch.bfloat16), ("emulated", torch.float16)],
)
def test_bfloat16_only_where_a_gpu_has_it(nb, monkeypatch, capability, expected):
    """A T4 says that it supports bfloat16 unless it is asked without emulation."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or capability == "native"

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.delenv("SUPRAVL_PRECISION", raising=False)
    assert nb.pick_precision(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("where", ["cpu", "mps", "cuda"])
def test_the_environment_may_fix_the_precision(nb, monkeypatch, where):
    for name in ("float32", "bfloat16", "float16"):
        monkeypatch.setenv("SUPRAVL_PRECISION", name)
        assert nb.pick_precision(torch.device(where)) == getattr(torch, name)
    for name in ("fp16", "float64", "nn"):
        monkeypatch.setenv("SUPRAVL_PRECISION", name)
        message = f"SUPRAVL_PRECISION is '{name}'.*float32 or bfloat16 or float16"
        with pytest.raises(ValueError, match=message):
            nb.pick_precision(torch.device(where))


def test_precision_elsewhere(nb, monkeypatch):
    monkeypatch.delenv("SUPRAVL_PRECISION", raising=False)
    assert nb.pick_precision(torch.device("mps")) == torch.float32
    assert nb.pick_precision(CPU) in (torch.float32, torch.bfloat16)


# The loop


@pytest.fixture(scope="module")
def train(nb, tiny, data):
    """Train on `data`: `train(cfg=tiny, checkpoint=None, report=None, ...)`."""
    images, token_ids = data

    def run(cfg=tiny, batches=None, validate=None, precision=torch.float32, **how):
        batches = batches or nb.CaptionBatches(images, token_ids, cfg, CPU)

        def loss(model):
            return nb.evaluate_loss(model, images, token_ids, CPU, precision)

        return nb.train_model(cfg, batches, validate or loss, CPU, precision, **how)

    return run


def without_seconds(history):
    return [{key: h[key] for key in ("epoch", "train", "val")} for h in history]


def assert_same_run(one, other):
    """Bit for bit."""
    assert without_seconds(one[1]) == without_seconds(other[1])
    weights = other[0].state_dict()
    for key, value in one[0].state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_few_pictures_are_learned_by_heart(nb, tiny, data):
    """Near zero loss, and greedy decoding then writes the very captions."""
    images = data[0][:4]
    captions = [[[1, 5, 6, 7, 2]], [[1, 8, 2]], [[1, 5, 9, 9, 9, 10, 2]], [[1, 8, 11, 2]]]
    cfg = nb.replace(tiny, epochs=80, batch_size=4, captions_per_image=1, warmup=5)
    batches = nb.CaptionBatches(images, captions, cfg, CPU)

    def validate(model):
        return nb.evaluate_loss(model, images, captions, CPU, torch.float32)

    model, history = nb.train_model(cfg, batches, validate, CPU, torch.float32)
    assert history[0]["train"] > 2
    assert history[-1]["train"] < 0.05
    assert history[-1]["val"] < 0.05
    written = nb.sample_ids(model, torch.from_numpy(images), top_k=1).tolist()
    assert [[i for i in row if i] for row in written] == [ids[1:] for (ids,) in captions]


def test_history_and_returned_model(train):
    reports = []
    model, history = train(report=lambda history: reports.append(len(history)))
    assert [h["epoch"] for h in history] == [1, 2, 3]
    assert reports == [1, 2, 3]
    assert not model.training
    assert history[-1]["train"] < history[0]["train"]


def test_the_loss_of_an_epoch_is_the_mean_over_tokens(nb, tiny, train, data):
    """With a learning rate of nothing the weights stay: each epoch's loss is that of the start."""
    cfg = nb.replace(tiny, lr=0, min_lr=0, weight_decay=0, batch_size=100, epochs=1)
    batches = nb.CaptionBatches(*data, cfg, CPU)
    _, history = train(cfg, batches)
    torch.manual_seed(cfg.seed)
    start = nb.CaptionLoss(nb.init_weights(nb.MiniVLM(cfg), cfg))
    pictures, packed, total = next(batches.epoch(0))
    assert history[0]["train"] == pytest.approx(start(pictures, packed).sum().item() / total)


def test_tied_weights_stay_tied_in_training(nb, tiny, train):
    for ema in (0, 0.9):
        model, _ = train(nb.replace(tiny, ema=ema))
        assert model.lm_head.weight is model.tok_emb.weight
        assert torch.equal(model.lm_head.weight, model.tok_emb.weight)


def test_averaged_weights_follow_slowly_and_are_what_comes_back(nb, tiny, train):
    seen = []

    def validate(model):
        seen.append(model)
        return 0.0

    averaged, _ = train(nb.replace(tiny, ema=0.9), validate=validate)
    last, _ = train(tiny)
    assert seen[-1] is averaged
    gap = (averaged.tok_emb.weight - last.tok_emb.weight).abs().max()
    assert gap > 1e-4
    torch.manual_seed(tiny.seed)
    start = nb.init_weights(nb.MiniVLM(tiny), tiny).tok_emb.weight
    assert (averaged.tok_emb.weight - start).norm() < (last.tok_emb.weight - start).norm()


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_trains_like_float32(train, precision):
    exact, mixed = train()[1], train(precision=precision)[1]
    assert mixed[-1]["train"] == pytest.approx(exact[-1]["train"], rel=0.05)
    assert mixed[-1]["train"] != exact[-1]["train"]


def test_lower_precision_ends_within_the_noise_of_the_seeds(nb, tmp_path, monkeypatch):
    """The whole model on drawn scenes: bfloat16 changes the final loss less than a seed does."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SUPRAVL_DATA", "toy")
    _, pictures = nb.get_dataset()
    recipe = nb.replace(nb.PRESETS["scenes"], epochs=2, warmup=5)
    train = nb.load_split(pictures["train"][:160], recipe.IMG_SIZE, tmp_path, "train")
    dev = nb.load_split(pictures["dev"][:100], recipe.IMG_SIZE, tmp_path, "dev")
    tokenizer, ids = nb.load_tokens({"train": train, "dev": dev}, recipe, tmp_path)
    ends = {torch.float32: [], torch.bfloat16: []}
    for seed in range(4):
        cfg = nb.replace(recipe, seed=seed)
        for precision, losses in ends.items():
            batches = nb.CaptionBatches(train.images, ids["train"], cfg, CPU)
            _, history = nb.train_model(
                cfg,
                batches,
                lambda model: nb.evaluate_loss(model, dev.images, ids["dev"], CPU, torch.float32),
                CPU,
                precision,
            )
            losses.append(history[-1]["val"])
    exact, lower = (np.array(losses) for losses in ends.values())
    assert exact.max() < 5, "it must have learned something: ln 2048 is 7.6"
    assert not np.array_equal(exact, lower)
    assert abs(lower.mean() - exact.mean()) < exact.std(ddof=1)


def test_gradients_are_clipped(nb, tiny, train, monkeypatch):
    lengths = []

    def clip(parameters, longest):
        parameters = list(parameters)
        clip_grad_norm_(parameters, longest)
        lengths.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train(nb.replace(tiny, grad_clip=0.01, epochs=1))
    assert lengths == pytest.approx([0.01] * len(lengths), rel=1e-3)
    assert lengths


@pytest.mark.parametrize("where", ["loss", "validation"])
def test_a_loss_that_is_no_number_stops_the_run(nb, tiny, train, tmp_path, monkeypatch, where):
    """And the checkpoint of the last good epoch stays."""
    path = tmp_path / "run.pt"
    train(nb.replace(tiny, epochs=1), checkpoint=path)
    good = path.read_bytes()
    how = {}
    if where == "loss":
        monkeypatch.setattr(nb, "augment", lambda images, cfg: images * math.nan)
    else:
        how = {"validate": lambda model: math.nan}
    with pytest.raises(RuntimeError, match=r"nan.* epoch 2|epoch 2.* nan"):
        train(checkpoint=path, **how)
    assert path.read_bytes() == good


# Interruptions


class Interrupted:
    """Batches that raise KeyboardInterrupt at one step of one epoch, as the stop button does."""

    def __init__(self, batches, epoch, step):
        self.batches, self.at = batches, (epoch, step)
        self.epochs = []

    def __len__(self):
        return len(self.batches)

    def epoch(self, number):
        self.epochs.append(number)
        for step, batch in enumerate(self.batches.epoch(number)):
            if (number, step) == self.at:
                raise KeyboardInterrupt
            yield batch


@pytest.fixture(scope="module")
def noisy(nb, tiny):
    """All randomness on: dropout, augmentation, averaging."""
    how = {"dropout": 0.2, "crop": 0.7, "flip": True, "jitter": 0.3, "ema": 0.9}
    return nb.replace(tiny, batch_size=8, **how)


@pytest.fixture(scope="module")
def uninterrupted(train):
    """The run of a Config without a break, made once."""
    return functools.cache(lambda cfg: train(cfg))


@pytest.mark.parametrize("ema, step", [(0.9, 0), (0.9, 2), (0.9, 4), (0, 2)])
def test_resumed_in_the_middle_of_an_epoch(
    nb, noisy, uninterrupted, train, data, tmp_path, ema, step
):
    cfg = nb.replace(noisy, ema=ema)
    path = tmp_path / "deep" / "run.pt"
    batches = nb.CaptionBatches(*data, cfg, CPU)
    assert len(batches) == 5
    with pytest.raises(KeyboardInterrupt):
        train(cfg, Interrupted(batches, 1, step), checkpoint=path)
    torch.manual_seed(123)  # another session starts with other random numbers
    rest = Interrupted(batches, None, None)
    assert_same_run(uninterrupted(cfg), train(cfg, rest, checkpoint=path))
    assert rest.epochs == [1, 2]


@pytest.mark.parametrize("where, epoch", [("validate", 2), ("report", 1), ("report", 3)])
def test_resumed_between_epochs(nb, noisy, uninterrupted, train, data, tmp_path, where, epoch):
    calls = []

    def interrupt(_):
        calls.append(1)
        if len(calls) == epoch:
            raise KeyboardInterrupt

    def validate(model):
        interrupt(model)
        return nb.evaluate_loss(model, *data, CPU, torch.float32)

    how = {"validate": validate} if where == "validate" else {"report": interrupt}
    with pytest.raises(KeyboardInterrupt):
        train(noisy, checkpoint=tmp_path / "run.pt", **how)
    torch.manual_seed(123)
    assert_same_run(uninterrupted(noisy), train(noisy, checkpoint=tmp_path / "run.pt"))


def stop(history):
    """A report that ends the run after its first epoch."""
    raise KeyboardInterrupt


def test_interrupted_in_every_epoch(nb, noisy, uninterrupted, train, data, tmp_path):
    """And when it goes on, it reports at once what it had reached."""
    reports = []

    def report(history):
        reports.append(len(history))

    for epoch in range(noisy.epochs):
        batches = Interrupted(nb.CaptionBatches(*data, noisy, CPU), epoch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(noisy, batches, checkpoint=tmp_path / "run.pt", report=report)
    whole = train(noisy, checkpoint=tmp_path / "run.pt", report=report)
    assert_same_run(uninterrupted(noisy), whole)
    assert reports == [1, 1, 2, 2, 3]


def test_a_finished_run_comes_back_at_once(noisy, train, tmp_path):
    whole = train(noisy, checkpoint=tmp_path / "run.pt")
    again = train(noisy, Interrupted([], 0, 0), checkpoint=tmp_path / "run.pt")
    assert_same_run(whole, again)
    assert again[1] == whole[1]  # the seconds too: nothing was run again


@pytest.mark.parametrize("first, then", [("bfloat16", "float16"), ("float16", "float32")])
def test_resumed_on_a_machine_of_another_precision(nb, tiny, train, tmp_path, first, then):
    """A run that began on one kind of GPU may go on on another."""
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, report=stop, precision=getattr(torch, first))
    _, history = train(checkpoint=path, precision=getattr(torch, then))
    assert [h["epoch"] for h in history] == [1, 2, 3]


# Checkpoints


def crash_while_saving(nb, monkeypatch, where):
    """Make the next checkpoint fail at some point on its way to the disk."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **how):
        raise full

    class FullDisk:
        """A file on a disk that has room for 100 more bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(bytes(data)[:100])
            raise full

    if where == "full disk":
        monkeypatch.setattr(nb, "open", lambda *a: FullDisk(open(*a)), raising=False)
    elif where == "read-only":
        monkeypatch.setattr(nb, "open", fail, raising=False)
    elif where == "stopped":

        class Stopped(FullDisk):
            def write(self, data):
                self.file.write(bytes(data)[:100])
                raise KeyboardInterrupt

        monkeypatch.setattr(nb, "open", lambda *a: Stopped(open(*a)), raising=False)
    else:
        monkeypatch.setattr(nb.os, where, fail)


@pytest.mark.parametrize("where", ["full disk", "read-only", "fsync", "replace", "stopped"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(nb, train, tiny, tmp_path, where):
    path = tmp_path / "run.pt"
    train(nb.replace(tiny, epochs=1), checkpoint=path)
    old = path.read_bytes()
    expected = KeyboardInterrupt if where == "stopped" else OSError
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(expected) as caught:
        crash_while_saving(nb, monkeypatch, where)
        train(checkpoint=path)
    if expected is OSError:
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "free some space" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert path.read_bytes() == old
    _, history = train(checkpoint=path)  # and once there is room, it goes on
    assert [h["epoch"] for h in history] == [1, 2, 3]


def test_a_folder_that_cant_be_made(nb, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not be written"):
        nb.save_checkpoint(tmp_path / "file" / "run.pt", model={})


@pytest.mark.parametrize("where", ["full disk", "read-only", "fsync", "replace", "stopped"])
def test_write_whole_is_all_or_nothing(nb, tmp_path, monkeypatch, where):
    path = tmp_path / "file.bin"
    nb.write_whole(path, lambda file: file.write(b"old"))
    crash_while_saving(nb, monkeypatch, where)
    with pytest.raises((OSError, KeyboardInterrupt)):
        nb.write_whole(path, lambda file: file.write(b"new" * 1000))
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    nb.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_checkpoint_round_trip(nb, model, tmp_path):
    path = tmp_path / "run.pt"
    assert nb.load_checkpoint(path, CPU) is None
    history = [{"epoch": 1, "train": 2.5, "val": 0.1 + 0.2, "seconds": 3.0}]
    nb.save_checkpoint(path, model=model.state_dict(), history=history)
    state = nb.load_checkpoint(path, CPU)
    assert state["history"] == history
    assert state["model"].keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state["model"][key], value)


class Explosive:
    """An object whose pickle runs code when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_runs_no_code(nb, tmp_path):
    torch.save({"model": Explosive(tmp_path / "ran")}, tmp_path / "run.pt")
    with pytest.raises(pickle.UnpicklingError):
        nb.load_checkpoint(tmp_path / "run.pt", CPU)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_belongs_to_its_recipe_and_data(nb, tiny, tmp_path):
    ids = [[[1, 5, 2]], [[1, 6, 2]]]
    path = nb.checkpoint_path(tmp_path, tiny, "scenes", ids)
    assert path == nb.checkpoint_path(tmp_path, nb.replace(tiny), "scenes", list(ids))
    assert path.parent == tmp_path
    assert path != nb.checkpoint_path(tmp_path, nb.replace(tiny, lr=0.5), "scenes", ids)
    assert path != nb.checkpoint_path(tmp_path, tiny, "flickr8k", ids)
    assert path != nb.checkpoint_path(tmp_path, tiny, "scenes", ids[::-1])


def test_batches_of_another_recipe_are_refused(nb, tiny, data):
    images, ids = data[:2]
    batches = nb.CaptionBatches(images, ids, nb.replace(tiny, batch_size=7), torch.device("cpu"))
    with pytest.raises(ValueError, match="batches"):
        nb.train_model(tiny, batches, lambda model: 0.0, torch.device("cpu"), torch.float32)
