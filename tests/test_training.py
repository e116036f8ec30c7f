"""Training: the loss, the batches, the schedule, and that an interruption changes nothing."""

import json
import math
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import NOTEBOOK

CPU = torch.device("cpu")
PLAIN = {
    "epochs": 3, "batch_size": 4, "lr": 1e-2, "warmup": 2, "flip": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(nb, numbers):
    """Nine small pictures, each with four captions of one to six numbers from 3 to 19; tokenizer"""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    lengths = torch.randint(1, 7, (9, 4)).tolist()
    captions = [
        [" ".join(map(str, torch.randint(3, 20, (n,)).tolist())) for n in own] for own in lengths
    ]
    return nb.Split([f"{n}.jpg" for n in range(9)], images, captions), numbers


def ids_of(caption):
    """What the test's tokenizer makes of a caption, its ends included."""
    return [1, *map(int, caption.split()), 2]


@pytest.fixture
def recipe(nb):
    return nb.Recipe(**PLAIN)


@pytest.fixture
def model(nb, tiny, numbers):
    torch.manual_seed(0)
    return nb.MiniVLM(tiny, tokenizer=numbers)


@pytest.fixture
def train(nb, tiny, data):
    """train(recipe, checkpoint=..., change=...) from the same start: (model, history)."""

    def start(recipe, checkpoint=None, precision=torch.float32, validate=None):
        torch.manual_seed(5)
        loss_of = nb.CaptionLoss(nb.MiniVLM(tiny, tokenizer=data[1]))
        loader = nb.make_loader(*data, recipe)
        check = validate or (lambda model: nb.validate(model, data[0]))
        return nb.train(loss_of, loader, recipe, check, precision, checkpoint)

    return start


def is_noise(key):
    """Biases before a batch normalisation do nothing: AdamW follows their rounding errors."""
    return re.fullmatch(r"vis_enc.conv\d.(0.bias|1.running_mean)", key)


def distance(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return math.sqrt(sum((a[k] - b[k]).pow(2).sum().item() for k in a if not is_noise(k)))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The loss


def plain_losses(nb, model, image, ids):
    """Loss of each token of one caption by the plain forward pass."""
    x = model.vis_enc(nb.normalise(image[None]))
    ids = torch.tensor(ids)
    return F.cross_entropy(model(x, ids[None, :-1])[0, 4:], ids[1:], reduction="none")


def test_loss_and_validation_are_means_over_tokens(nb, make, data):
    model, (split, tokenizer) = make(), data
    model.tokenizer = tokenizer
    with torch.no_grad():
        losses = [
            plain_losses(nb, model, image, ids_of(caption))
            for image, own in zip(split.images, split.captions) for caption in own
        ]  # fmt: skip
        expected = torch.cat(losses).mean()
        pairs = [(n, caption) for n, own in enumerate(split.captions) for caption in own]
        batch = nb.make_batch(split.images, tokenizer, nb.nn.Identity(), pairs)
        torch.testing.assert_close(nb.CaptionLoss(model)(*batch), expected)
    for size in (2, 9):
        model.train()
        loss = nb.validate(model, nb.Split(*(part[:size] for part in split)))
        part = torch.cat(losses[: 4 * size]).mean().item()
        assert loss == pytest.approx(part, rel=1e-5) and not model.training


def test_make_batch(nb, data):
    split, tokenizer = data
    pairs = [(n, split.captions[n][k]) for n, k in ((3, 0), (5, 1), (3, 2), (0, 3))]
    batch = nb.make_batch(split.images, tokenizer, lambda x: 255 - x, pairs)
    assert batch.numbers.tolist() == [3, 5, 3, 0]
    assert torch.equal(batch.images, 255 - split.images[batch.numbers])
    assert len(batch.ids) == 4 and (batch.ids.shape[1] - 1) % 8 == 0
    for row, (_, caption) in zip(batch.ids, pairs):
        ids = ids_of(caption)
        assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()


def test_padding_changes_neither_loss_nor_gradients(nb, make, data):
    split, tokenizer = data
    pairs = [(n, split.captions[n][0]) for n in range(3)]
    batch = nb.make_batch(split.images, tokenizer, nb.nn.Identity(), pairs)
    wider = batch._replace(ids=F.pad(batch.ids, (0, 1)))
    results = []
    for part in (batch, wider._replace(ids=wider.ids[:, :9])):
        model = make()
        loss = nb.CaptionLoss(model)(*part)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# Batches


def order_of(loader):
    """An epoch's captions, a list a batch: [[(number of its picture, its ids), ...], ...]."""
    return [
        [(n, row[row != 0].tolist()) for n, row in zip(batch.numbers.tolist(), batch.ids)]
        for batch in loader
    ]


def test_each_caption_once_an_epoch_with_its_own_picture(nb, data, recipe):
    split, _ = data
    loader, orders = nb.make_loader(*data, recipe), []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch.images, split.images[batch.numbers])
        orders.append(order_of(loader))
        assert [len(part) for part in orders[-1]] == [4] * 9 and len(loader) == 9
        everything = [(n, ids_of(c)) for n, own in enumerate(split.captions) for c in own]
        assert sorted(sum(orders[-1], [])) == sorted(everything)
    assert orders[0] == orders[2] != orders[1], "an epoch comes back alike, others differ"
    assert order_of(nb.make_loader(*data, nb.replace(recipe, seed=7))) not in orders


def test_processes_share_each_batch(nb, data, recipe):
    whole = order_of(nb.make_loader(*data, recipe))
    first, second = (order_of(nb.make_loader(*data, recipe, r, 2)) for r in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second)] == [sorted(part) for part in whole]


def test_long_captions_are_cut_alike_in_training_and_validation(nb, make, data):
    """At as many tokens as the model has positions: the last one's guess still counts."""
    split, tokenizer = data
    model, long = make(MAX_SEQ=6), " ".join(map(str, range(3, 16)))  # 13 words and both ends
    model.tokenizer = tokenizer
    with torch.no_grad():
        losses = plain_losses(nb, model, split.images[0], ids_of(long)[:7])
        batch = nb.make_batch(split.images, tokenizer, nb.nn.Identity(), [(0, long)])
        torch.testing.assert_close(nb.CaptionLoss(model)(*batch), losses.mean())
        short = plain_losses(nb, model, split.images[0], ids_of("4"))
    captions = [[long] * 9 + ["4"] * 45]  # more than a batch, so that their tokens are counted
    loss = nb.validate(model, nb.Split(["0.jpg"], split.images[:1], captions))
    expected = (9 * losses.sum() + 45 * short.sum()) / (9 * 6 + 45 * 2)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_what_does_not_fit_is_refused(nb, data):
    with pytest.raises(ValueError, match="batch_size"):
        nb.make_loader(*data, nb.Recipe(batch_size=0))
    with pytest.raises(ValueError, match=r"\[0\.?0?, 1\.?0?\]"):
        nb.make_loader(*data, nb.Recipe(flip=1.5))
    split, tokenizer = data
    for images, captions in (
        (split.images, split.captions[:5]),
        (split.images[:5], split.captions),
    ):
        with pytest.raises(ValueError, match="zip.*(shorter|longer)"):
            nb.make_loader(nb.Split(split.names, images, captions), tokenizer, nb.Recipe())


def test_mirror_images(nb, recipe, data):
    """Off, a picture comes as it is; on, each alone is mirrored, as often as was asked."""
    torch.manual_seed(0)
    images = data[0].images
    pairs = [4 * (i % 4) for i in range(400)]  # a caption of each of the first four
    for flip in (0, 0.3):
        loader = nb.make_loader(*data, nb.replace(recipe, flip=flip))
        seen = loader.collate_fn([loader.dataset[n] for n in pairs]).images
        mirrored = [not torch.equal(x, images[n // 4]) for x, n in zip(seen, pairs)]
        assert abs(sum(mirrored) / 400 - flip) < 0.1 and (flip or not any(mirrored))
        for x, n, turned in zip(seen, pairs, mirrored):
            assert torch.equal(x, images[n // 4].flip(-1) if turned else images[n // 4])


# The schedule and the average


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine(nb):
    recipe = nb.Recipe(lr=1.0, warmup=10)
    rates = [nb.learning_rate(step, 110, recipe) for step in range(110)]
    assert rates[:11] == pytest.approx([0.1 * n for n in range(1, 11)] + [1.0])
    assert rates[60] == pytest.approx(0.5)
    for n in range(10, 110):
        assert rates[n] == pytest.approx((1 + math.cos(math.pi * (n - 10) / 100)) / 2)
    for total in (1, 2, 3, 8, 20):  # a short run gets beyond the warm-up
        rates = [nb.learning_rate(step, total, recipe) for step in range(total)]
        assert max(rates) == pytest.approx(1.0) and 0 < min(rates)
        assert total < 8 or rates[-1] < 0.4


# The loop


def by_hand(nb, tiny, data, recipe, steps):
    """The first steps of training, one at a time: the model."""
    torch.manual_seed(5)
    model = nb.MiniVLM(tiny)
    loss_of = nb.CaptionLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    loader = nb.make_loader(*data, recipe)
    for step, batch in enumerate(loader):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = nb.learning_rate(step, recipe.epochs * len(loader), recipe)
        loss = loss_of(*batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
        if step + 1 == steps:
            break
    return model


def test_an_epoch_is_what_one_would_write_by_hand(nb, tiny, data, recipe, train):
    """Schedule, clipping and batch statistics, all in one."""
    recipe = nb.replace(recipe, epochs=1, warmup=1)
    ours, history = train(recipe)
    expected = by_hand(nb, tiny, data, recipe, 10**6).state_dict()
    for key, value in ours.state_dict().items():
        if not is_noise(key):
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    assert not ours.training and len(history) == 1
    assert history[0]["val"] == pytest.approx(nb.validate(ours, data[0]), rel=1e-5)
    assert ours.lm_head.weight is ours.tok_emb.weight


def test_a_few_pictures_are_learned_by_heart(nb, data, recipe, train):
    recipe = nb.replace(recipe, epochs=20, batch_size=12, lr=0.03)
    losses = [h["train"] for h in train(recipe)[1]]
    assert losses[0] > 2.5 and losses[-1] < 0.8 * losses[0] and len(losses) == 20


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains_like_float32(nb, recipe, train, precision):
    recipe = nb.replace(recipe, epochs=2)
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


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_memory_is_kept_where_the_c_library_can(nb, data, recipe, monkeypatch, system):
    """By glibc's mallopt: macOS has none, Windows no CDLL(None)."""
    asked = []
    library = types.SimpleNamespace(mallopt=lambda *how: asked.append(how))
    monkeypatch.setattr(nb, "ctypes", types.SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(nb, "sys", types.SimpleNamespace(platform=system))
    nb.make_loader(*data, recipe)
    assert asked == ([(-3, 16 * 1024**2), (-1, 1024**3)] if system == "linux" else [])


def test_every_epoch_has_its_own_order_and_is_in_training_mode(nb, tiny, data, recipe):
    loss_of, loader, epochs = (
        nb.CaptionLoss(nb.MiniVLM(tiny)).eval(),
        nb.make_loader(*data, recipe),
        [],
    )
    measure = lambda model: epochs.append(loader.sampler.epoch) or 0.0  # noqa: E731
    model, _ = nb.train(loss_of, loader, recipe, measure, torch.float32)
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
    noisy = nb.replace(recipe, flip=0.5, epochs=4)
    whole, history = train(noisy)
    file, steps, real = tmp_path / "new" / "x.pt", [0], nb.learning_rate
    replace, replaced = nb.os.replace, [0]

    def stop_at(counter, n):
        counter[0] += 1
        if counter[0] == n:
            raise PulledThePlug

    save = nb.save_checkpoint

    def stopping_save(path, parts, history):
        save(path, parts, history)
        if len(history) in {"after an epoch": (2,), "all of them": (1, 2, 3)}.get(where, ()):
            raise PulledThePlug

    def rate(*how):
        stop_at(steps, 30 if where in ("in an epoch", "all of them") else -1)
        return real(*how)

    def stopping_replace(*paths):
        stop_at(replaced, 3 if "saving" in where or "all" in where else -1)
        replace(*paths)

    monkeypatch.setattr(nb, "learning_rate", rate)
    monkeypatch.setattr(nb.os, "replace", stopping_replace)
    monkeypatch.setattr(nb, "save_checkpoint", stopping_save)
    for _attempt in range(9):
        try:
            resumed, again = train(noisy, file)
            break
        except PulledThePlug:
            continue
    assert _attempt == (5 if where == "all of them" else 1)
    assert same(whole, resumed)
    keys = ("epoch", "train", "val")
    assert [[h[key] for key in keys] for h in again] == [[h[key] for key in keys] for h in history]
    finished, _ = train(noisy, file, validate=lambda model: pytest.fail("trained again"))
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
        nb.save_checkpoint(file, {"loss": loss_of}, [])
    elif how == "pickle":
        torch.save({"loss": Explosive()}, file)
    elif how == "half":
        torch.save({"loss": {}, "optimizer": {}, "scaler": {}}, file)
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


def test_section_7s_checkpoint_is_tied_to_all_that_it_is_made_from():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    cell = next(c for c in map("".join, (c["source"] for c in cells)) if '{data_name}-train"' in c)
    made_from = " ".join(line for line in cell.split("\n") if line.startswith("made_from"))
    for part in ("str(loss_of)", "cfg", "recipe", "precision", "names", "captions", "tokenizer.to"):
        assert part in made_from, part
