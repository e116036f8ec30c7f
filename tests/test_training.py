"""Training: the loss, the batches, the schedule, and that an interruption changes nothing."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.data
from PIL import Image

CPU = torch.device("cpu")
PLAIN = {
    "epochs": 3, "batch_size": 4, "captions_per_view": 2, "lr": 1e-2, "warmup": 2, "ema": 0,
    "label_smoothing": 0, "flip": 0, "naming": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """Nine small pictures, each with four captions of one to six tokens of the ids 3 to 19."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    lengths = torch.randint(1, 7, (9, 4)).tolist()
    token_ids = [[[1, *torch.randint(3, 20, (n,)).tolist(), 2] for n in own] for own in lengths]
    return images, token_ids


@pytest.fixture
def recipe(nb):
    return nb.Recipe(**PLAIN)


@pytest.fixture
def model(nb, tiny):
    torch.manual_seed(0)
    return nb.MiniVLM(tiny)


@pytest.fixture
def train(nb, tiny, data):
    """train(recipe, checkpoint=..., change=...) from the same start: (model, history)."""

    def start(recipe, checkpoint=None, report=None, precision=torch.float32, validate=None):
        torch.manual_seed(5)
        words = 3 if recipe.naming else 0
        loss_of = nb.CaptionLoss(nb.MiniVLM(tiny), recipe.label_smoothing, recipe.naming, words)
        named = torch.rand(9, 3) if words else None
        loader = nb.make_loader(*data, recipe, CPU, named)
        check = validate or (lambda model: nb.validate(model, *data))
        return nb.train(loss_of, loader, recipe, check, precision, checkpoint, report)

    return start


def is_noise(key):
    """Biases before a batch normalisation do nothing: AdamW follows their rounding errors."""
    return re.fullmatch(r"vis_enc.conv\d.0.bias", key)


def distance(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return math.sqrt(sum((a[k] - b[k]).pow(2).sum().item() for k in a if not is_noise(k)))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The loss


def plain_losses(nb, model, image, ids, **how):
    """Loss of each token of one caption by the plain forward pass."""
    x = model.vis_enc(nb.normalise(image[None]))
    ids = torch.tensor(ids)
    return F.cross_entropy(model(x, ids[None, :-1])[0, 4:], ids[1:], reduction="none", **how)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_validation_are_means_over_tokens(nb, make, data, smoothing):
    model, (images, token_ids) = make(), data
    with torch.no_grad():
        losses = [
            plain_losses(nb, model, image, ids, label_smoothing=smoothing)
            for image, own in zip(images, token_ids) for ids in own
        ]  # fmt: skip
        expected = torch.cat(losses).mean()
        batch = nb.collate(list(zip(images, token_ids, torch.zeros(9, 0))))
        torch.testing.assert_close(nb.CaptionLoss(model, smoothing)(*batch), expected)
    if not smoothing:
        for size in (2, 50):
            model.train()
            assert nb.validate(model, images, token_ids, batch=size) == pytest.approx(
                expected.item(), rel=1e-5
            )
            assert not model.training


def test_collate(nb, data):
    images, token_ids = data
    views = [(images[n], [token_ids[n][k] for k in which], torch.rand(2)) for n, which in
             ((3, [0, 2]), (5, [1]), (0, [3, 0, 1]))]  # fmt: skip
    batch = nb.collate(views)
    assert batch.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.equal(batch.images, images[[3, 5, 0]])
    flat = [row for _, own, _ in views for row in own]
    assert len(batch.ids) == 6 and (batch.ids.shape[1] - 1) % 8 == 0
    for row, ids in zip(batch.ids, flat):
        assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()
    assert torch.equal(batch.labels, torch.stack([view[2] for view in views]))


def test_padding_changes_neither_loss_nor_gradients(nb, make, data):
    images, token_ids = data
    batch = nb.collate([(images[n], token_ids[n], torch.zeros(0)) for n in range(3)])
    wider = batch._replace(ids=F.pad(batch.ids, (0, 1)))
    results = []
    for part in (batch, wider._replace(ids=wider.ids[:, :9])):
        model = make()
        loss = nb.CaptionLoss(model)(*part)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_the_eye_is_asked_what_it_sees(nb, make, data):
    images, token_ids = data
    model, named = make(), torch.tensor([[0.0, 1.0, 0.4]]).expand(9, -1)
    batch = nb.collate(list(zip(images, token_ids, named)))
    torch.manual_seed(0)
    loss_of = nb.CaptionLoss(model, naming=0.25, words=3)
    with torch.no_grad():
        x = model.vis_enc(nb.normalise(images))
        extra = 0
        for seen in (x.mean(1), x.amax(1)):
            p = loss_of.namer(seen).sigmoid()
            extra -= (named * p.log() + (1 - named) * (1 - p).log()).sum(1).mean() / 2
        expected = nb.CaptionLoss(model)(*batch) + 0.25 * extra
        torch.testing.assert_close(loss_of(*batch), expected)
    assert nb.CaptionLoss(model, naming=0.25).namer is None
    assert not [key for key in model.state_dict() if "namer" in key]


def test_content_words(nb):
    captions = [["A dog runs .", "the dog sits"], ["A boy, two DOGS"], ["a cat", "a cat on it"]]
    captions += [["a b"]]
    words, shares = nb.content_words(captions)
    assert words[0] in ("dog", "cat", "runs", "the", "sits", "boy", "two", "dogs")
    assert set(words) == {"dog", "runs", "the", "sits", "boy", "two", "dogs", "cat"}
    share = dict(zip(words, shares.T.tolist()))
    assert share["dog"] == [1, 0, 0, 0] and share["runs"] == [0.5, 0, 0, 0]
    assert share["cat"] == [0, 0, 1, 0]
    captions += [["a dog"]] * 9
    assert "dog" not in nb.content_words(captions)[0], "on every second picture"
    words, shares = nb.content_words([["cat"], ["cat two"], *[["x"]] * 9], 1)
    assert words == ["cat"] and shares.shape == (11, 1)
    assert nb.content_words([["one picture"]])[1].shape == (1, 0)


# Batches


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_each_caption_once_an_epoch_with_its_own_picture(nb, data, recipe, together):
    images, token_ids = data
    recipe = nb.replace(recipe, captions_per_view=together)
    loader, seen, orders = nb.make_loader(*data, recipe, CPU), Counter(), set()
    buckets = nb.LengthBuckets(token_ids, recipe)
    for epoch in (0, 1, 0):
        seen.clear()
        buckets.epoch = loader.batch_sampler.epoch = epoch
        batches = list(loader)
        assert len(batches) == len(loader) == len(list(buckets)) == len(buckets)
        for batch in batches:
            assert len(batch.ids) <= recipe.batch_size
            for row, owner in zip(batch.ids, batch.owner):
                number = [torch.equal(batch.images[owner], image) for image in images].index(True)
                text = row[row != 0].tolist()
                seen[number, tuple(text)] += 1
        expected = Counter((n, tuple(ids)) for n, own in enumerate(token_ids) for ids in own)
        assert seen == expected
        orders.add(str(list(buckets)))
    assert len(orders) == 2, "epochs differ, and the same epoch comes back alike"
    buckets = nb.LengthBuckets(token_ids, nb.replace(recipe, seed=1))
    assert str(list(buckets)) not in orders


def test_batches_have_captions_of_like_lengths_in_random_order(nb, recipe):
    token_ids = [[torch.zeros(2 + (7 * n + 3 * k) % 40) for k in range(4)] for n in range(50)]
    batches = list(nb.LengthBuckets(token_ids, nb.replace(recipe, captions_per_view=1)))
    lengths = [[len(token_ids[i][k]) for i, (k,) in batch] for batch in batches]
    assert sum(max(own) - min(own) for own in lengths) / len(lengths) < 5
    firsts = [own[0] for own in lengths]
    assert firsts[:30] not in (sorted(firsts[:30]), sorted(firsts[:30], reverse=True))


def test_pictures_and_captions_must_fit(nb, data):
    images, token_ids = data
    with pytest.raises(ValueError, match="9 .*5"):
        nb.CaptionDataset(images, token_ids[:5])
    named = torch.rand(9, 2)
    item = nb.CaptionDataset(images, token_ids, lambda x: 255 - x, named)[4, [1, 3]]
    assert torch.equal(item[0], 255 - images[4]) and torch.equal(item[2], named[4])
    assert item[1][1] is token_ids[4][3] and len(item[1]) == 2


def test_mirror_images(nb, recipe, data):
    """Off, a view is the picture; on, each picture alone is mirrored, as often as was asked."""
    torch.manual_seed(0)
    images, token_ids = data
    views = [(i % 4, [0]) for i in range(400)]
    for flip in (0, 0.3):
        loader = nb.make_loader(images, token_ids, nb.replace(recipe, flip=flip), CPU)
        seen = [loader.dataset[view][0] for view in views]
        mirrored = [not torch.equal(x, images[i]) for x, (i, _) in zip(seen, views)]
        assert abs(sum(mirrored) / 400 - flip) < 0.1 and (flip or not any(mirrored))
        for x, (i, _), turned in zip(seen, views, mirrored):
            assert torch.equal(x, images[i].flip(-1) if turned else images[i])


# The schedule and the average


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine(nb):
    recipe = nb.Recipe(lr=1.0, min_lr=0.2, warmup=10)
    rates = [nb.learning_rate(step, 110, recipe) for step in range(110)]
    assert rates[:11] == pytest.approx([0.1 * n for n in range(1, 11)] + [1.0])
    assert rates[60] == pytest.approx(0.6)
    for n in range(10, 110):
        cosine = 0.2 + 0.8 * (1 + math.cos(math.pi * (n - 10) / 100)) / 2
        assert rates[n] == pytest.approx(cosine)
    for total in (1, 2, 3, 8, 20):  # a short run gets beyond the warm-up
        rates = [nb.learning_rate(step, total, recipe) for step in range(total)]
        assert max(rates) == pytest.approx(1.0) and 0 < min(rates)
        assert total < 8 or rates[-1] < 0.4


def test_moving_average_follows_fast_at_first(nb):
    mean, weight = torch.zeros(1), torch.ones(1)
    nb.moving_average(0.999)([mean], [weight], torch.tensor(0))
    assert mean.item() == pytest.approx(0.9)  # 1 - 1 / 10
    mean = torch.zeros(1)
    nb.moving_average(0.999)([mean], [weight], torch.tensor(10**6))
    assert mean.item() == pytest.approx(0.001, rel=1e-3)
    count = torch.zeros(1, dtype=torch.int64)
    nb.moving_average(0.9)([count], [torch.tensor([7])], torch.tensor(10**6))
    assert count.item() == 7


# The loop


def by_hand(nb, tiny, data, recipe, steps):
    """The first steps of training, one at a time: (model, averaged state, rates)."""
    torch.manual_seed(5)
    model = nb.MiniVLM(tiny)
    loss_of = nb.CaptionLoss(model, recipe.label_smoothing)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    loader, average = nb.make_loader(*data, recipe, CPU), None
    for step, batch in enumerate(loader):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = nb.learning_rate(step, recipe.epochs * len(loader), recipe)
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, recipe.grad_clip / (norm.item() + 1e-6))
        optimizer.step()
        state = model.state_dict()
        if average is None:
            average = {key: value.clone() for key, value in state.items()}
        else:
            decay = min(recipe.ema, (1 + step) / (10 + step))
            for key, value in state.items():
                if value.is_floating_point():
                    average[key] = decay * average[key] + (1 - decay) * value
                else:
                    average[key] = value.clone()
        if step + 1 == steps:
            break
    return model, average


def test_an_epoch_is_what_one_would_write_by_hand(nb, tiny, data, recipe, train):
    """Schedule, clipping, smoothing, average of weights and batch statistics, all in one."""
    how = {"label_smoothing": 0.3, "grad_clip": 0.05, "warmup": 1, "weight_decay": 0.5}
    recipe = nb.replace(recipe, epochs=1, ema=0.9, **how)
    ours, history = train(recipe)
    _, average = by_hand(nb, tiny, data, recipe, 10**6)
    for key, value in ours.state_dict().items():
        if not is_noise(key):
            torch.testing.assert_close(value, average[key], rtol=1e-3, atol=1e-5, msg=key)
    assert not ours.training and len(history) == 1
    assert history[0]["val"] == pytest.approx(nb.validate(ours, *data), rel=1e-5)
    assert ours.lm_head.weight is ours.tok_emb.weight


def test_a_few_pictures_are_learned_by_heart(nb, data, recipe, train):
    recipe = nb.replace(recipe, epochs=20, batch_size=12, captions_per_view=4, lr=0.03)
    losses = [h["train"] for h in train(recipe)[1]]
    assert losses[0] > 2.5 and losses[-1] < 0.8 * losses[0] and len(losses) == 20


def test_all_of_the_loss_is_trained(nb, train, recipe):
    """Without a namer its weights would stand still, and the eye would learn to please noise."""
    a, _ = train(nb.replace(recipe, naming=1.0))
    b, _ = train(recipe)
    assert not torch.equal(a.vis_enc.proj.weight, b.vis_enc.proj.weight)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains_like_float32(nb, recipe, train, precision):
    recipe = nb.replace(recipe, grad_clip=0.05, epochs=2)
    full, _ = train(recipe)
    mixed, history = train(recipe, precision=precision)
    start, _ = train(nb.replace(recipe, epochs=0))
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert distance(full, mixed) < 0.5 * distance(full, start)


def test_float16_clips_true_gradients_and_keeps_its_scale(nb, recipe, train, tmp_path, monkeypatch):
    """Scaled by 65,536, every gradient would look too long."""
    norms, clip = [], nb.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nb.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a).item()) or norms[-1]
    )
    file = tmp_path / "x.pt"
    train(nb.replace(recipe, epochs=1), file, precision=torch.float16)
    assert len(norms) == 9 and 0 < max(norms) < 50
    state = torch.load(file, weights_only=True)
    assert state["scaler"]["_growth_tracker"] == 9
    train(nb.replace(recipe, epochs=2), file, precision=torch.float16)
    assert torch.load(file, weights_only=True)["scaler"]["_growth_tracker"] == 18


def test_every_epoch_has_its_own_order_and_is_in_training_mode(nb, tiny, data, recipe):
    loss_of, loader, epochs = (
        nb.CaptionLoss(nb.MiniVLM(tiny)).eval(),
        nb.make_loader(*data, recipe, CPU),
        [],
    )
    model, _ = nb.train(
        loss_of, loader, recipe, lambda model: 0.0, torch.float32, None,
        lambda history: epochs.append(loader.batch_sampler.epoch),
    )  # fmt: skip
    assert epochs == [0, 1, 2]
    assert model.vis_enc.conv1[1].num_batches_tracked == 3 * len(loader)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(nb, recipe, train, tmp_path, value):
    file = tmp_path / "x.pt"
    with pytest.raises(RuntimeError, match="the loss is no number.*'epoch': 1"):
        train(recipe, file, validate=lambda model: value)
    assert torch.load(file, weights_only=True)["history"] == [], "nothing broken was saved"
    train(recipe, file)


# Interruptions


class PulledThePlug(Exception):
    pass


@pytest.mark.parametrize("where", ["after an epoch", "in an epoch", "while saving", "all of them"])
def test_interrupted_training_ends_at_the_same_weights(
    nb, recipe, train, tmp_path, monkeypatch, where
):
    noisy = nb.replace(recipe, ema=0.9, flip=0.5, naming=0.1, epochs=4)
    whole, history = train(noisy)
    file, steps, real = tmp_path / "new" / "x.pt", [0], nb.moving_average
    replace, replaced = nb.os.replace, [0]

    def stop_at(counter, n):
        counter[0] += 1
        if counter[0] == n:
            raise PulledThePlug

    def report(history):
        if len(history) in {"after an epoch": (2,), "all of them": (1, 2, 3)}.get(where, ()):
            raise PulledThePlug

    def average(decay):
        update = real(decay)
        n = 30 if where in ("in an epoch", "all of them") else -1
        return lambda *a: (stop_at(steps, n), update(*a))

    def stopping_replace(*paths):
        stop_at(replaced, 3 if "saving" in where or "all" in where else -1)
        replace(*paths)

    monkeypatch.setattr(nb, "moving_average", average)
    monkeypatch.setattr(nb.os, "replace", stopping_replace)
    for _attempt in range(9):
        try:
            resumed, again = train(noisy, file, report)
            break
        except PulledThePlug:
            continue
    assert _attempt == (5 if where == "all of them" else 1)
    assert same(whole, resumed)
    keys = ("epoch", "train", "val")
    assert [[h[key] for key in keys] for h in again] == [[h[key] for key in keys] for h in history]
    finished, _ = train(noisy, file, lambda history: pytest.fail("trained again"))
    assert same(whole, finished) and [f.name for f in file.parent.iterdir()] == ["x.pt"]


class Explosive:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


BROKEN = ["cut", "empty", "zeros", "text", "flipped", "config", "pickle", "half"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_named(nb, tiny, recipe, train, tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.pt"
    train(nb.replace(recipe, epochs=1), file)
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        for at in range(len(data) // 3, len(data) // 3 + 200):
            data[at] ^= 0x7F
    elif how in ("empty", "zeros", "text"):
        data = {"empty": b"", "zeros": bytes(len(data)), "text": b"no checkpoint"}[how]
    file.write_bytes(data)
    if how == "config":
        loss_of = nb.CaptionLoss(nb.MiniVLM(nb.replace(tiny, D_FF=40)))
        nb.save_checkpoint(file, {"loss": loss_of, "averaged": loss_of}, [])
    elif how == "pickle":
        torch.save({"loss": Explosive()}, file)
    elif how == "half":
        torch.save({"loss": {}, "averaged": {}, "optimizer": {}, "scaler": {}}, file)
    with pytest.raises(ValueError, match=r"(?s)mine\.pt.*delete") as caught:
        train(recipe, file)
    assert "weights_only" not in str(caught.value) and not Path("exploded").exists()
    file.unlink()
    train(recipe, file)


def test_a_checkpoint_that_cant_be_written_is_found_out_at_once(recipe, train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        late = lambda model: pytest.fail("an epoch late")  # noqa: E731
        train(recipe, tmp_path / "file" / "x.pt", validate=late)


def test_a_checkpoint_belongs_to_what_it_is_made_from(nb, recipe, tmp_path):
    paths = {
        nb.checkpoint_path(tmp_path, "x", *what)
        for what in ((recipe,), (nb.replace(recipe, lr=0.5),), (recipe, [["a dog"]]), (recipe, 1.5))
    }
    assert len(paths) == 4 and {path.parent for path in paths} == {tmp_path}
    assert nb.checkpoint_path(tmp_path, "x", recipe) in paths


def test_the_words_come_in_the_same_order_every_time(nb):
    """Which column is whose must not hang on the order of a set: training goes on in other runs."""
    said = [["kiwi apple zebra mango lemon"], ["pear olive berry dates"], ["nothing"], ["else"]]
    words, _ = nb.content_words(said)
    assert words == [*sorted(said[0][0].split()), *sorted(said[1][0].split()), "nothing", "else"]


def test_a_picture_is_no_part_of_a_batch_twice(nb, data, recipe):
    """What `captions_per_view` says: these captions share one look at their picture."""
    loader = nb.make_loader(*data, nb.replace(recipe, captions_per_view=4, batch_size=8), CPU)
    for batch in loader:
        assert Counter(batch.owner.tolist()) == dict.fromkeys(range(len(batch.images)), 4)
    assert Image.fromarray(data[0][0].permute(1, 2, 0).numpy()).size == (16, 16)
    assert isinstance(loader, torch.utils.data.DataLoader)
