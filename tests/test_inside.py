"""Section 13: what it shows is what the model did, and what it measures is true."""

import contextlib
import importlib
import io
import sys

import nbformat
import numpy as np
import pytest
import torch
from conftest import NOTEBOOK

IDS = [1, 7, 3, 11, 5, 2]  # <bos> ... <eos>
WORDS = [("a", slice(0, 1)), ("dog", slice(1, 3)), (".", slice(3, 4)), ("<eos>", slice(4, 5))]


@pytest.fixture
def model(make):
    return make()


@pytest.fixture
def picture():
    """A picture of noise, so that its cells differ."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tokenizer(nb):
    """Knows "the" and "dog" as one token; what it has not met it spells in pieces."""
    return nb.train_tokenizer(["the dog , the dog .", "the dogs"] * 9, 275)


# Attention


def test_shares_are_the_models_own(nb, model, picture, tiny, monkeypatch):
    shares, used, real = nb.attention_shares(model, picture, IDS), [], nb.attention

    def spy(q, k, v, mask=None):
        used.append(real(q, k, torch.eye(k.shape[2]).expand(1, tiny.N_HEADS, -1, -1), mask)[0])
        return real(q, k, v, mask)

    monkeypatch.setattr(nb, "attention", spy)
    with torch.no_grad():
        model(model.vis_enc(nb.normalise(picture[None])), torch.tensor([IDS[:-1]]))
    torch.testing.assert_close(shares, torch.stack(used))
    S = tiny.N_VIS + len(IDS) - 1
    assert shares.shape == (tiny.N_LAYERS, tiny.N_HEADS, S, S)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:3]))
    assert (shares.triu(1) == 0).all()
    assert shares[:, :, -1].max() > 2 / S  # else all of this would hold for even shares too
    assert no_hooks(model)


def no_hooks(model):
    """No layer of the model calls anything of ours any more, nor does any layer at all."""
    every = torch.nn.modules.module._global_forward_hooks
    return not every and not any(layer._forward_hooks for layer in model.modules())


def test_shares_that_the_model_did_not_use_are_an_error(nb, model, picture, monkeypatch):
    real = nb.CausalSelfAttention.forward
    monkeypatch.setattr(
        nb.CausalSelfAttention, "forward", lambda layer, x, *more: real(layer, 2 * x, *more)
    )
    with pytest.raises(RuntimeError, match="something else"):
        nb.attention_shares(model, picture, IDS)
    assert no_hooks(model)


def test_a_subclass_is_followed(nb, make, picture, tiny):
    """Its own hidden_states: the picture's tokens see one another, and are doubled."""

    class Variant(nb.MiniVLM):
        def hidden_states(self, img_tokens, tok_ids, caches=None):
            x = torch.cat([2 * img_tokens, self.tok_emb(tok_ids)], 1)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask[: tiny.N_VIS, : tiny.N_VIS] = True
            for block in self.blocks:
                x = block(x, mask=mask)
            return self.ln_f(x)

    plain, variant = make(), Variant(tiny).eval()
    variant.load_state_dict(plain.state_dict())
    shares = nb.attention_shares(variant, picture, IDS)
    assert (shares[:, :, 0, tiny.N_VIS - 1] > 0).all() and (
        shares[:, :, 0, tiny.N_VIS :] == 0
    ).all()
    assert not torch.allclose(shares, nb.attention_shares(plain, picture, IDS), atol=0.01)
    drops, _ = nb.hiding_maps(variant, picture, IDS, WORDS)
    assert not torch.allclose(drops, nb.hiding_maps(plain, picture, IDS, WORDS)[0], atol=0.01)


def test_training_mode_is_an_error(nb, model, picture):
    with pytest.raises(ValueError, match="training mode"):
        nb.hiding_maps(model.train(), picture, IDS, WORDS)


def test_words_are_whole_and_use_each_token_once(nb, tokenizer):
    text = "the zebra , the dog ."
    [ids] = nb.encode_captions(tokenizer, [text])
    words = nb.split_words(tokenizer, ids)
    assert [word for word, _ in words] == [*text.split(), "<eos>"]
    places = [i for _, at in words for i in range(len(ids) - 1)[at]]
    assert places == list(range(len(ids) - 1))
    sizes = {word: at.stop - at.start for word, at in words}
    assert sizes["zebra"] > 1 and sizes["dog"] == 1
    assert [word for word, _ in nb.split_words(tokenizer, [1, 2])] == ["<eos>"]


def test_a_words_map_is_the_mean_of_the_rows_that_write_it(nb, model, picture, tiny):
    rows = nb.attention_shares(model, picture, IDS).mean((0, 1))
    maps = nb.attention_maps(model, picture, IDS, WORDS)
    n = tiny.N_VIS
    torch.testing.assert_close(maps[0], rows[n, :n])  # <bos> stands at n, and writes the first
    torch.testing.assert_close(maps[1], rows[n + 1 : n + 3, :n].mean(0))


# Hiding


@pytest.mark.parametrize("height, width, side", [(112, 112, 4), (10, 13, 4), (7, 5, 1)])
def test_hiding_a_cell_changes_that_cell_and_nothing_else(nb, height, width, side):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    views = nb.hide_cells(image, side)
    assert len(views) == 1 + side * side and views.dtype == torch.uint8
    assert torch.equal(views[0], image)
    hidden = (views[1:] != image).any(1)
    assert (hidden.sum(0) == 1).all()  # every pixel is hidden exactly once ...
    for i, mask in enumerate(hidden):  # ... in a rectangle where the cell is
        y, x = (indices.unique() for indices in mask.nonzero(as_tuple=True))
        assert mask.sum() == len(y) * len(x)
        assert int(y.float().mean() * side / height) == i // side
        assert int(x.float().mean() * side / width) == i % side


def test_a_picture_of_one_colour_has_nothing_to_hide(nb, model):
    plain = torch.tensor([200, 90, 30], dtype=torch.uint8)[:, None, None].repeat(1, 16, 16)
    drops, _ = nb.hiding_maps(model, plain, IDS, WORDS)
    assert drops.shape == (len(WORDS), 16)
    assert drops.abs().max() < 1e-5


def test_the_logarithms_are_those_of_the_forward_pass(nb, model, picture, tiny):
    drops, whole = nb.hiding_maps(model, picture, IDS, WORDS)
    expected = [whole, *(whole - drop for drop in drops.T)]
    with torch.no_grad():
        for view, logs in zip(nb.hide_cells(picture), expected, strict=True):
            out = model(model.vis_enc(nb.normalise(view[None])), torch.tensor([IDS]))
            out = out[0, tiny.N_VIS :].log_softmax(-1)
            each = torch.stack([out[i, token] for i, token in enumerate(IDS[1:])])
            real = torch.stack([each[at].sum() for _, at in WORDS])
            torch.testing.assert_close(real, logs, atol=1e-4, rtol=0)
    assert drops.abs().max() > 0.01


@pytest.mark.parametrize("cell", [0, 6, 15])
def test_hiding_matters_where_the_model_looks_and_nowhere_else(nb, model, picture, tiny, cell):
    class OneEyed(torch.nn.Module):
        """Sees one cell of the picture only."""

        def forward(self, images):
            y, x = cell // 4 * 4, cell % 4 * 4
            seen = images[:, :, y : y + 4, x : x + 4].flatten(1)
            return 10 * seen[:, None, : tiny.D_MODEL].expand(-1, tiny.N_VIS, -1)

    model.vis_enc = OneEyed()
    drops, _ = nb.hiding_maps(model, picture, IDS, WORDS)
    assert (drops.abs().amax(0) > 1e-4).nonzero().flatten().tolist() == [cell]


# Pictures and controls


@pytest.fixture
def shown(nb, monkeypatch):
    """What cells display, instead of displaying it."""
    things = []
    monkeypatch.setattr(
        nb.plt, "show", lambda: (nb.plt.gcf().canvas.draw(), things.append(nb.plt.gcf()))
    )
    monkeypatch.setattr(nb, "display", lambda *what: things.extend(what), raising=False)
    yield things
    nb.plt.close("all")


def test_the_strongest_cell_is_the_reddest(nb, picture):
    """Cells of 8 x 8 pixels, row by row: how much of red or blue covers the grey picture."""
    tile, grey = (
        nb.heat_tiles(picture, torch.tensor([cells]))[0].float()
        for cells in ([0.1, 0.4, 0.2, -0.3], [0.0] * 4)
    )
    assert (grey == grey[:1]).all() and grey.min() > 40 and grey.max() < 256
    order = picture.float().mean(0).flatten().argsort()
    assert (grey[0].flatten()[order].diff() >= 0).all() and len(grey.unique()) > 50
    colours = torch.tensor([[255.0, 0, 0]] * 3 + [[0, 0, 255]]).T.view(3, 2, 2)
    colours = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)
    cover = torch.tensor([[0.25, 1], [0.5, 0.75]]) * 0.8
    cover = cover.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(tile, grey + cover * (colours - grey), atol=2, rtol=0)


def test_maps_share_a_scale_and_may_have_pictures_of_their_own(nb, picture):
    maps = torch.tensor([[0.2, 0, 0, 0], [0.4, 0, 0, 0]])
    tiles = nb.heat_tiles(torch.stack([picture, picture.flip(2)]), maps)
    assert tiles.shape == (2, 3, 16, 16) and tiles.dtype == torch.uint8
    assert torch.equal(tiles[0], nb.heat_tiles(picture, maps)[0])
    assert torch.equal(tiles[1], nb.heat_tiles(picture.flip(2), maps)[1])
    assert not torch.equal(tiles[0], nb.heat_tiles(picture, maps[:1])[0]), "half as red"


def test_a_strip_has_a_tile_for_each_word(nb, model, picture, shown):
    maps = nb.attention_maps(model, picture, IDS, WORDS)
    nb.show_pictures(nb.heat_tiles(picture, maps), ["a", "$dog", ".", "<eos>"], columns=3)
    nb.show_pictures(nb.heat_tiles(picture, torch.zeros(4, 4)), [""] * 4)
    assert [len(figure.axes) for figure in shown] == [4, 4]
    assert np.asarray(shown[0].canvas.buffer_rgba())[..., :3].std() > 5, "nothing was drawn"


def test_the_controls(nb, make, tokenizer, tmp_path, shown, monkeypatch):
    """Each control draws anew; an upload joins the photos and is chosen; a broken file is told."""
    pytest.importorskip("ipywidgets")
    calls, said = [], io.StringIO()

    def watch(name, real):
        def spy(*args, **how):
            calls.append((name, *args[2:], *how.values()))
            return real(*args, **how)

        monkeypatch.setattr(nb, name, spy)

    watch("beam_search", nb.beam_search)
    watch("sample", nb.sample)
    files = [tmp_path / f"{n}.png" for n in (1, 2)]
    for n, file in enumerate(files, 1):
        nb.Image.new("RGB", (20, 30), (80 * n, 40, 90)).save(file)
    model = make(VOCAB_SIZE=tokenizer.get_vocab_size())
    model.tokenizer = tokenizer
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    [source] = [cell.source for cell in cells if "def explore" in cell.source]
    monkeypatch.setitem(sys.modules, "google.colab", nb)  # or it waits for somebody to use it
    with contextlib.redirect_stdout(said):
        exec(source, vars(nb) | {"tuned": model, "photos": files, "importlib": importlib})
        upload, controls = shown[-2:]
        photo, decoder, width, temperature, top_k = controls.children[:5]
        photo.index, width.value, decoder.value = 1, 5, "top-k"
        temperature.value, top_k.value = 1.5, 7
        assert calls[-5:] == [
            ("beam_search", 3), ("beam_search", 5), ("sample", 0.8, 50), ("sample", 1.5, 50),
            ("sample", 1.5, 7),
        ]  # fmt: skip
        drawn = len(calls)
        for content in (files[0].read_bytes(), files[1].read_bytes(), b"no picture", b""):
            file = {"content": memoryview(content)}
            new = (file,) if content else {"mine.png": file}  # ipywidgets 8, and 7
            upload.notify_change({"name": "value", "new": new, "type": "change"})
            assert (photo.label, photo.index) == ("yours", 0)
    assert len(calls) == drawn + 2, "two uploads are pictures"
    with contextlib.redirect_stdout(said):  # the notebook alone, without assets/
        sample = nb.Image.open(files[0])
        none = {"tuned": model, "photos": [], "sample_photo": sample, "importlib": importlib}
        exec(source, vars(nb) | none)
    assert shown[-1].children[0].value is sample and len(calls) == drawn + 3
    assert said.getvalue().count("can't be read") == 2
