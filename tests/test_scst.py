"""Self-critical training: it learns from the scores of its own captions, and can be interrupted."""

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
COMMON, RARE = "a dog runs .", "the cat sleeps ."


@pytest.fixture(scope="module")
def world(nb):
    """Pictures that four of five people describe alike, and a model that has learned just that."""
    cfg = nb.Config(
        D_MODEL=32, N_HEADS=2, N_LAYERS=1, D_FF=64, VIS_CH=16, N_VIS=4, VOCAB_SIZE=275, MAX_SEQ=16,
        IMG_SIZE=16,
    )  # fmt: skip
    recipe = nb.Recipe(
        epochs=50, batch_size=40, lr=5e-3, warmup=5, flip=0,
        scst_epochs=3, scst_lr=1e-3,
    )  # fmt: skip
    captions = [[COMMON] * 4 + [RARE]] * 40
    # Pictures of another kind, so that the words of the first are not in every picture.
    captions += [["snow falls ."] * 5] * 40
    images = torch.zeros(80, 3, 16, 16, dtype=torch.uint8)
    images[:40, :, :, :8], images[40:, :, :, 8:] = 255, 255
    tokenizer = nb.train_tokenizer([c for own in captions for c in own], 275)
    split = nb.Split([f"{i}.jpg" for i in range(80)], images, captions)
    torch.manual_seed(0)
    loss_of = nb.CaptionLoss(nb.MiniVLM(cfg, tokenizer=tokenizer))
    loader = nb.make_loader(split, tokenizer, recipe)
    model, _ = nb.train(loss_of, loader, recipe, None, torch.float32)
    return model, recipe, split


def go(nb, world, checkpoint=None, split=None, **change):
    model, recipe, everything = world
    more = nb.replace(recipe, **change), lambda model: 0.0, torch.float32, checkpoint
    return nb.train_self_critical(model, split or everything, *more)


def drawn(nb, world, model):
    """The share of the common caption among those drawn for the first kind of pictures."""
    _, _, split = world
    torch.manual_seed(0)
    with torch.no_grad():
        x = model.vis_enc(nb.normalise(split.images[:4]))
    cider = nb.CiderD(split.captions)
    ids, scores = nb.write_and_score(model, x, torch.arange(4), cider, 50, 1.0)
    texts = model.tokenizer.decode_batch(ids.tolist())
    return sum(text.strip() == COMMON for text in texts) / len(texts), scores.mean().item()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_drawn_and_its_score(nb, world):
    model, _, (_, images, captions) = world
    x, cider = model.vis_enc(nb.normalise(images[[0, 50, 1]])), nb.CiderD(captions)
    torch.manual_seed(0)
    ids, scores = nb.write_and_score(model, x, torch.tensor([0, 50, 1]), cider, 40, 2.0)
    assert ids.shape[0] == 120 and (ids[:, 0] == nb.BOS).all() and scores.shape == (3, 40)
    texts = model.tokenizer.decode_batch(ids.tolist())
    for row, text in enumerate(texts):
        picture = (0, 50, 1)[row // 40]
        assert scores.flatten()[row].item() == pytest.approx(cider(text, picture), rel=1e-5)
    assert len(set(texts)) > 3
    colder = nb.write_and_score(model, x, torch.tensor([0, 50, 1]), cider, 40, 0.1)[0]
    assert len(set(model.tokenizer.decode_batch(colder.tolist()))) == 2, "one for each kind"


def test_advantages_leave_one_out(nb):
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert nb.advantages(scores).tolist() == [[-3, -1.5, 4.5], [-1.5, -1.5, 3]]


def batch_of(nb, world, numbers):
    model, _, split = world
    pairs = [(n, split.captions[n][n % 5]) for n in numbers]
    return nb.make_batch(split.images, model.tokenizer, nb.nn.Identity(), pairs)


def test_the_loss_by_hand(nb, world, monkeypatch):
    """Own captions at their temperature, weighed by advantage; people's, of the same picture."""
    model, _, (_, images, captions) = world
    own = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0], [1, 5, 5, 2], [1, 6, 2, 0]])
    scores, asked = torch.tensor([[3.0, 1.0], [0.0, 2.0]]), []

    def write_and_score(model, img_tokens, numbers, cider, per_image, temperature):
        asked.append((numbers, temperature))
        return own, scores

    monkeypatch.setattr(nb, "write_and_score", write_and_score)
    batch = batch_of(nb, world, (0, 60))
    with torch.no_grad():
        loss = nb.SelfCriticalLoss(model, captions, 0.7, 0.9)(*batch)
        x = model.vis_enc(nb.normalise(images[[0, 60]]))
        gains = torch.tensor([2.0, -2.0, -2.0, 2.0])
        gains = gains / gains.std()
        rows = [(row, n // 2, 0.7, gains[n]) for n, row in enumerate(own)]
        rows += [(row, n, 1.0, 0.9) for n, row in enumerate(batch.ids)]
        total = tokens = 0
        for row, picture, temperature, weight in rows:
            row = row[row != 0]
            logits = model.text_logits(x[picture : picture + 1], row[None, :-1])[0] / temperature
            total += weight * F.cross_entropy(logits, row[1:], reduction="sum")
            tokens += len(row) - 1
    assert loss.item() == pytest.approx((total / tokens).item(), rel=1e-4)
    assert asked[0][1] == 0.7 and asked[0][0].tolist() == [0, 60]


def test_captions_that_all_score_alike_teach_nothing(nb, world, monkeypatch):
    """What rounding leaves of their advantages must not be scaled up to the size of real ones."""
    model, _, (_, _, captions) = world
    own = torch.tensor([[1, 7, 8, 2], [1, 9, 9, 2]]).repeat(2, 1)
    loss_of, losses = nb.SelfCriticalLoss(model, captions), []
    for scores in (torch.full((2, 2), 0.1), 0.1 + 1e-7 * torch.tensor([[0.0, 1], [0, 1]])):
        monkeypatch.setattr(nb, "write_and_score", lambda *a, s=scores, **k: (own, s))
        losses.append(loss_of(*batch_of(nb, world, (0, 1))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_it_learns_to_write_what_scores_well(nb, world):
    before = nb.copy.deepcopy(world[0])
    share, score = drawn(nb, world, world[0])
    assert 0.6 < share < 0.95, "the model should have learned four to one"
    model, history = go(nb, world, scst_epochs=12)
    better, higher = drawn(nb, world, model)
    assert better > share + 0.05 and higher > score and not model.training
    assert [h["epoch"] for h in history] == list(range(1, 13))
    assert same(before, world[0]), "the model that was given stays as it was"
    for name, value in model.state_dict().items():  # what is learned from is what was written
        if "running" in name:
            assert torch.equal(value, before.state_dict()[name]), name


def test_it_trains_as_section_7_does_with_its_own_numbers(nb, world, monkeypatch):
    """`train` clips, mirrors, lowers the learning rate: all that is tested elsewhere."""
    model, recipe, split = world
    calls = []
    monkeypatch.setattr(nb, "train", lambda *args: calls.append(args))
    go(nb, world, "file", flip=1.0, scst_lr=0.02, scst_epochs=5)
    loss_of, loader, used, validate, precision, *rest = calls[0]
    assert rest == ["file"] and precision == torch.float32 and validate(None) == 0
    assert (used.epochs, used.lr, used.seed) == (5, 0.02, recipe.seed)
    assert used.warmup == 20
    assert same(loss_of.model, model) and loss_of.model is not model
    assert not loss_of.train().training and not loss_of.model.training
    batches, orders = list(loader), []
    assert len(batches) == 2, "400 captions: an epoch is a fifth of them"
    assert all(len(batch.images) == 40 for batch in batches)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([batch.numbers for batch in loader]).tolist())
    assert orders[0] != orders[1]
    for batch in batches:
        for image, number in zip(batch.images, batch.numbers.tolist()):
            assert image[0, 9, -1] == (255 if number < 40 else 0), "mirrored"
        for row, number in zip(batch.ids, batch.numbers):
            text = model.tokenizer.decode(row.tolist())
            assert text in split.captions[number] and row[row != 0][-1] == nb.EOS


def test_interrupted_it_goes_on_as_if_nothing_had_been(nb, world, tmp_path, monkeypatch):
    whole, history = go(nb, world)
    file, save = tmp_path / "scst.pt", nb.save_checkpoint

    def pull_the_plug(path, parts, history):
        save(path, parts, history)
        if 0 < len(history) < 3:
            raise ConnectionError

    monkeypatch.setattr(nb, "save_checkpoint", pull_the_plug)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            go(nb, world, file)
    resumed, again = go(nb, world, file)
    assert same(whole, resumed) and [h["train"] for h in again] == [h["train"] for h in history]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="scst.pt"):
        go(nb, world, file)


def test_a_picture_with_one_caption_and_no_epochs_at_all(nb, world):
    few = world[2]._replace(captions=[own[:1] for own in world[2].captions])
    _, history = go(nb, world, scst_epochs=1, split=few)
    assert len(history) == 1 and abs(history[0]["train"]) < 100
    model, history = go(nb, world, scst_epochs=0)
    assert history == [] and same(model, world[0])


def test_the_checkpoint_is_tied_to_what_it_starts_from(nb):
    """In the notebook's own cell its path is made from recipe, captions and starting weights."""
    import json

    from conftest import NOTEBOOK

    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    cell = next(c for c in map("".join, (c["source"] for c in cells)) if "start_weights = " in c)
    path = cell[cell.index("made_from = ") :].split("place")[0]
    assert {"recipe", "train_split.captions", "start_weights"} <= set(path.replace(",", "").split())
    weights = cell[cell.index("start_weights = ") :].split("\n")[0]
    model = nb.MiniVLM(nb.Config(N_LAYERS=1))
    names = {"model": model}
    exec(weights.strip(), names)
    first = names["start_weights"]
    with torch.no_grad():
        model.pos_emb.weight[3, 5] += 1e-3
    exec(weights.strip(), names)
    assert first != names["start_weights"]
