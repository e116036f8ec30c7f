"""Section 12: what it shows is what the model did, and what it measures is true."""

import importlib.util
import json
import re
import symtable
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import NOTEBOOK, ROOT

SCENES = ROOT / "assets" / "scenes"
IDS = [1, 7, 3, 11, 5, 2]  # <bos> ... <eos>


@pytest.fixture
def model(nb, tiny):
    """A tiny model whose attention is far from even."""
    torch.manual_seed(0)
    model = nb.MiniVLM(tiny).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 6
    return model


@pytest.fixture
def picture(tiny):
    generator = torch.Generator().manual_seed(1)
    shape = (3, tiny.IMG_SIZE, tiny.IMG_SIZE)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="session")
def truth():
    return json.loads((SCENES / "scenes.json").read_text(encoding="utf-8"))


# Attention


def test_shares_are_those_of_the_forward_pass(nb, model, picture, monkeypatch):
    shares = nb.attention_shares(model, picture, IDS)
    used, plain = [], nb.plain_attention

    def spy(q, k, v, mask):
        unit = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)  # shares @ unit = the shares
        used.append(plain(q, k, unit, mask)[0])
        return plain(q, k, v, mask)

    monkeypatch.setattr(nb, "plain_attention", spy)
    with torch.no_grad():
        model(model.vis_enc(nb.normalise(picture[None])), torch.tensor([IDS]))
    torch.testing.assert_close(shares, torch.stack(used))


def test_shares_of_values_through_proj_are_the_layers_output(nb, model, picture):
    shares, calls = nb.attention_shares(model, picture, IDS), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda layer, args, out: calls.append((args[0], out)))
    with torch.no_grad():
        model(model.vis_enc(nb.normalise(picture[None])), torch.tensor([IDS]))
        for table, block, (x, out) in zip(shares, model.blocks, calls, strict=True):
            values = block.attn.split_heads(x)[2][0]
            mixed = (table @ values).transpose(0, 1).flatten(1)
            torch.testing.assert_close(block.attn.proj(mixed), out[0])


def test_shares_add_up_to_one_and_are_causal(nb, model, tiny, picture):
    shares = nb.attention_shares(model, picture, IDS)
    T = tiny.N_VIS + len(IDS)
    assert shares.shape == (tiny.N_LAYERS, tiny.N_HEADS, T, T)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:3]))
    assert (shares.triu(1) == 0).all()
    assert shares[:, :, -1].max() > 2 / T  # else all of the above would hold for even shares too


@pytest.mark.parametrize("ids", [[], [1] * 9], ids=["none", "too many"])
def test_a_number_of_ids_that_does_not_fit_is_an_error(nb, model, picture, ids):
    with pytest.raises(ValueError, match=f"{len(ids)} ids: expected 1 to 8"):
        nb.attention_shares(model, picture, ids)


def test_a_model_in_training_mode_is_an_error(nb, model, picture):
    with pytest.raises(ValueError, match="training mode"):
        nb.occlusion_effect(model.train(), picture, IDS)


# Words


@pytest.fixture(scope="session")
def tokenizer(nb):
    """Knows "the" and "dog" as one token; what it has not met it spells in pieces."""
    return nb.train_tokenizer(["the dog , the dog .", "the dogs"] * 9, nb.Config(VOCAB_SIZE=275))


def test_words_are_whole_and_use_each_token_once(nb, tokenizer):
    text = "the zebra , the dog ."
    ids = nb.encode_captions(tokenizer, [text], nb.Config())[0]
    words = nb.group_words(tokenizer, ids)
    assert [word for word, _ in words] == [*text.split(), "<eos>"]
    assert [i for _, at in words for i in at] == list(range(1, len(ids)))
    assert len(dict(words)["zebra"]) > 1
    assert len(dict(words)["dog"]) == 1


def test_a_words_row_is_the_mean_of_the_rows_that_write_its_tokens(nb):
    shares = torch.arange(2 * 3 * 9 * 9.0).view(2, 3, 9, 9)
    rows = nb.word_rows(shares, [("one", [1]), ("two", [2, 3])], n_vis=4)
    assert rows.shape == (2, 3, 2, 9)
    assert torch.equal(rows[:, :, 0], shares[:, :, 4])  # <bos> is at place 4, and writes token 1
    assert torch.equal(rows[:, :, 1], (shares[:, :, 5] + shares[:, :, 6]) / 2)


# Hiding cells


@pytest.mark.parametrize("height, width, cells", [(112, 112, 4), (10, 13, 4), (7, 5, 1)])
def test_hiding_a_cell_changes_that_cell_and_nothing_else(nb, height, width, cells):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    views = nb.hide_cells(image, cells)
    assert len(views) == 1 + cells * cells
    assert torch.equal(views[0], image)
    hidden = (views[1:] != image).any(1)  # (cells * cells, H, W)
    assert (hidden.sum(0) == 1).all()  # every pixel is hidden exactly once ...
    for i, mask in enumerate(hidden):  # ... in a rectangle where the cell is
        y, x = (indices.unique() for indices in mask.nonzero(as_tuple=True))
        assert mask.sum() == len(y) * len(x)
        assert int(y.float().mean() * cells / height) == i // cells
        assert int(x.float().mean() * cells / width) == i % cells


def test_a_picture_of_one_colour_has_nothing_to_hide(nb, model, tiny):
    plain = torch.tensor([200, 90, 30], dtype=torch.uint8)[:, None, None]
    plain = plain.repeat(1, tiny.IMG_SIZE, tiny.IMG_SIZE)
    _, drops = nb.occlusion_effect(model, plain, IDS, cells=2)
    assert drops.shape == (4, len(IDS) - 1)
    assert drops.abs().max() < 1e-5


def test_the_logarithms_are_those_of_the_forward_pass(nb, model, picture, tiny):
    logs, drops = nb.occlusion_effect(model, picture, IDS, cells=2)
    with torch.no_grad():
        for view, expected in zip(nb.hide_cells(picture, 2), [logs, *(logs - drops)], strict=True):
            out = model(model.vis_enc(nb.normalise(view[None])), torch.tensor([IDS]))
            out = out[0, tiny.N_VIS :].log_softmax(-1)
            real = torch.stack([out[i, token] for i, token in enumerate(IDS[1:])])
            torch.testing.assert_close(real, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cell", range(4))
def test_hiding_matters_where_the_model_looks_and_nowhere_else(nb, model, picture, tiny, cell):
    class OneEyed(torch.nn.Module):
        """Sees one quarter of the picture only."""

        def forward(self, images):
            half = tiny.IMG_SIZE // 2
            y, x = cell // 2 * half, cell % 2 * half
            seen = images[:, :, y : y + half, x : x + half].flatten(1)
            return 10 * seen[:, None, : tiny.D_MODEL].expand(-1, tiny.N_VIS, -1)

    model.vis_enc = OneEyed()
    _, drops = nb.occlusion_effect(model, picture, IDS, cells=2)
    moved = drops.abs().amax(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == [cell]


# The measure


def test_pointing_game(nb):
    covered = np.eye(4, dtype=bool)
    assert nb.pointing_game(np.eye(4), covered) == (1, 0.25, 4)
    assert nb.pointing_game(np.roll(np.eye(4), 1, 1), covered) == (0, 0.25, 4)
    with pytest.raises(ValueError, match=r"\(4, 4\) and covered \(3, 4\)"):
        nb.pointing_game(np.eye(4), covered[:3])


def test_a_blind_pick_hits_as_often_as_the_measure_says(nb):
    rng = np.random.default_rng(0)
    covered = rng.random((4000, 16)) < 0.3
    hits, chance, count = nb.pointing_game(rng.random((4000, 16)), covered)
    low, high = nb.interval(hits, count)
    assert low - 0.01 < chance < high + 0.01
    assert high - low < 0.04


def test_an_interval_ends_where_the_share_is_196_standard_deviations_away(nb):
    assert nb.interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    for share, count in ((0.8, 10), (0, 7), (1, 200)):
        for p in nb.interval(share, count):
            away = 1.96 * (max(p * (1 - p), 0) / count) ** 0.5
            assert abs(share - p) == pytest.approx(away, abs=1e-6)


def test_best_fixed_cell(nb, truth):
    before = np.eye(4, dtype=bool)[[0, 2, 2, 3]]
    covered = np.eye(4, dtype=bool)[[2, 1, 1, 1, 2]]  # here cell 1 would be better: not asked
    assert nb.best_fixed_cell(before, covered) == 0.4
    cover = {
        split: np.array([
            np.array(truth["scenes"][name]["g"]) >= 0.1
            for name in (SCENES / f"Flickr_8k.{split}Images.txt").read_text().split()
        ])
        for split in ("train", "test")
    }  # fmt: skip
    hits = [nb.pointing_game(np.tile(np.eye(16)[i], (200, 1)), cover["test"]) for i in range(16)]
    best = cover["train"].sum(0).argmax()
    assert nb.best_fixed_cell(cover["train"], cover["test"]) == hits[best][0]
    assert hits[best][0] > 1.5 * hits[best][1], "the blind pick would be baseline enough"


def test_on_the_scenes_hiding_cells_finds_the_object(nb, truth):
    """A small model learns in seconds to name the object's colour; its place it is not told."""
    small = nb.Config(
        D_MODEL=32, N_HEADS=2, N_LAYERS=1, D_FF=64, VIS_CH=32, VOCAB_SIZE=16, MAX_SEQ=4,
        IMG_SIZE=64, epochs=8, batch_size=16, captions_per_image=1, lr=4e-3, warmup=20, dropout=0,
        crop=1, flip=False, jitter=0, ema=0,
    )  # fmt: skip
    colours, cpu = list(truth["colours"]), torch.device("cpu")

    def load(split, count):
        names = (SCENES / f"Flickr_8k.{split}Images.txt").read_text().split()[:count]
        files = [SCENES / "Flicker8k_Dataset" / name for name in names]
        images = np.stack([nb.load_picture(file, small.IMG_SIZE) for file in files])
        entries = [truth["scenes"][name] for name in names]
        return images, entries, [[[1, 3 + colours.index(e["c"]), 2]] for e in entries]

    images, _, ids = load("train", 800)
    batches = nb.CaptionBatches(images, ids, small, cpu)
    model, _ = nb.train_model(small, batches, lambda m: 0.0, cpu, torch.float32)

    images, entries, ids = load("test", 200)
    looked = [nb.occlusion_effect(model, image, row[0]) for image, row in zip(images, ids)]
    assert np.mean([logs[0].exp() > 0.5 for logs, _ in looked]) > 0.8, "it has not learned colours"
    covered = np.array([entry["g"] for entry in entries]) >= 0.1
    hits, chance, count = nb.pointing_game(np.stack([drops[:, 0] for _, drops in looked]), covered)
    assert nb.interval(hits, count)[0] > 1.5 * chance


def test_every_caption_of_the_scenes_is_read_right(nb, truth):
    sides = {}
    lines = (SCENES / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        name, caption = line.split("\t")
        scene = truth["scenes"][name.split("#")[0]]
        assert nb.things_named(caption, truth["objects"]) == {scene["o"]}, caption
        assert nb.things_named(caption, truth["colours"]) <= {scene["c"]}, caption
        side = nb.side_named(caption)
        assert side in (None, scene["h"]), caption
        sides.setdefault(name.split("#")[0], []).append(side)
    assert len(sides) == len(truth["scenes"])
    assert all(len(said) - said.count(None) >= 2 for said in sides.values())


# What was learned


def test_a_chain_of_merges_builds_its_token(nb, tokenizer):
    chain = nb.merge_chain(tokenizer, "Ġdog")
    pieces = list("Ġdog")
    for _, left, right in chain:
        pieces = nb.merge_pair(pieces, (left, right))
    assert pieces == ["Ġdog"]
    assert [number for number, *_ in chain] == sorted({number for number, *_ in chain})
    with pytest.raises(ValueError, match="'Ġzebra' is not a token"):
        nb.merge_chain(tokenizer, "Ġzebra")


def test_nearest_tokens(nb):
    matrix = torch.tensor([[1.0, 0.0], [3.0, 0.3], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    near = nb.nearest_tokens(matrix, 0, among=[0, 1, 3, 4], count=2)
    assert [i for i, _ in near] == [1, 3]
    assert near[1][1] == pytest.approx(2**-0.5)
    assert len(nb.nearest_tokens(matrix, 0, among=[1, 2])) == 2


def test_patches_are_what_the_channel_saw(nb):
    torch.manual_seed(0)
    encoder = nb.VisualEncoder(nb.Config(VIS_CH=12)).eval()
    images = torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8)
    patches, strength = nb.top_patches(encoder, images, count=4, batch=5)
    assert patches.shape == (12, 4, 3, 15, 15)
    assert (strength.diff(dim=1) <= 0).all()
    for layer in (encoder.conv1, encoder.conv2, encoder.conv3):
        layer[0].padding = (0, 0)  # 15 x 15 pixels then give exactly one number for each channel
    inside = 0
    for channel, rank in np.ndindex(*strength.shape):
        patch = patches[channel, rank]
        edges = (patch[:, 0], patch[:, -1], patch[:, :, 0], patch[:, :, -1])
        if any((edge == edge[:, :1]).all() for edge in edges):
            continue  # at the border the layers pad, each with zeros of its own
        with torch.no_grad():
            answer = encoder.conv3(encoder.conv2(encoder.conv1(nb.normalise(patch[None]))))
        assert answer.shape == (1, 12, 1, 1)
        assert answer[0, channel] == pytest.approx(strength[channel, rank].item(), abs=1e-4)
        inside += 1
    assert inside > 10


# Pictures


def test_every_figure_draws(nb, model, tiny, picture, monkeypatch):
    drawn = []
    monkeypatch.setattr(nb, "show", drawn.append)
    words = [("a", [1]), ("dog", [2, 3]), (".", [4]), ("<eos>", [5])]
    rows = nb.word_rows(nb.attention_shares(model, picture, IDS), words, tiny.N_VIS)
    maps, names = rows.mean((0, 1))[:, : tiny.N_VIS], [word for word, _ in words]
    nb.show_strip(picture, maps, names, "a heading", columns=3)
    nb.show_strip(picture, maps - maps.mean(), names, signed=True)
    nb.show_sources(rows, words, tiny.N_VIS)
    nb.show_patches(*nb.top_patches(model.vis_enc, picture[None]))
    drawn.append(nb.hero_figure(picture, "a dog", names, maps))
    for figure in drawn:
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 5, "nothing was drawn"
        plt.close(figure)
    assert len(drawn) == 5


def test_the_strongest_cell_is_the_reddest(nb, picture):
    figure, axis = plt.subplots()
    nb.draw_heat(axis, picture, [0.1, 0.4, 0.2, -0.3], top=0.4, signed=True)
    red, green, blue, alpha = axis.images[1].get_array().reshape(4, 4).T
    np.testing.assert_allclose(alpha / alpha.max(), [0.25, 1, 0.5, 0.75])
    assert (red > blue).tolist() == [True, True, True, False]
    nb.draw_heat(axis, picture, [0.1, 0.4, 0.2, -0.3], top=0.4, signed=True, strength=0.5)
    np.testing.assert_allclose(axis.images[3].get_array().reshape(4, 4).T[3], alpha / 2)
    plt.close(figure)


def test_the_diagram_is_what_its_script_draws_and_has_the_models_shapes(nb):
    spec = importlib.util.spec_from_file_location("diagram", ROOT / "assets" / "make_diagram.py")
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    svg = (ROOT / "assets" / "model.svg").read_text(encoding="utf-8")
    assert svg == diagram.draw(), "run python assets/make_diagram.py"
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert "title" in tags
    assert not tags & {"script", "image", "foreignObject", "style"}
    model, x = nb.MiniVLM(nb.Config()).eval(), torch.zeros(1, 3, 112, 112)
    for layer in (lambda x: x, *list(model.vis_enc.children())[:3]):
        x = layer(x)
        assert " × ".join(map(str, x.shape[1:])) in svg
    assert f"{model.cfg.N_VIS} × {model.cfg.D_MODEL}" in svg
    assert f"{model.cfg.VOCAB_SIZE:,} logits" in svg
    assert f"{model.cfg.N_LAYERS} blocks" in svg


# Cells


def code_cells():
    """(number of its section, source) of each code cell."""
    section = 0
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield section, re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M)
        else:
            section = int((re.findall(r"^## (\d+) ", source, re.M) or [section])[-1])


def names_of(source):
    """The names that a cell assigns, and those that it reads from cells before it."""
    tables = [symtable.symtable(source, "cell", "exec")]
    made = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    for table in tables:
        tables += table.get_children()
    symbols = [(t, s) for t in tables for s in t.get_symbols() if s.is_referenced()]
    used = {s.get_name() for t, s in symbols if t.get_type() == "module" or s.is_global()}
    return made, used - made


def test_later_sections_overwrite_nothing_that_earlier_ones_read():
    """What sections 12 to 14 do must not change what comes out if an earlier cell is run again."""
    cells = [(section, *names_of(source)) for section, source in code_cells()]
    for later, made, _ in cells:
        for section, _, read in cells:
            if 12 <= later > section:
                assert not made & read, f"section {later} changes what section {section} reads"


def test_the_controls(nb, model, tokenizer, tmp_path, capsys):
    """Each control draws anew, with its value; an upload joins the photos and is chosen."""
    pytest.importorskip("ipywidgets")
    source = next(source for _, source in code_cells() if "def explore" in source)
    calls, drawn, shown = [], [], []

    def beam_ids(model, x, width):
        calls.append(width)
        return nb.beam_ids(model, x, width)

    def sample_ids(model, x, **how):
        calls.append(how)
        return nb.sample_ids(model, x, **how)

    cell = vars(nb) | {
        "beam_ids": beam_ids, "sample_ids": sample_ids, "photos": [], "display": shown.append,
        "show_pictures": lambda images, titles, columns: None,
        "show_strip": lambda image, maps, titles: drawn.append(image),
    }  # fmt: skip
    exec(compile(source, "the controls", "exec"), cell)
    files = [tmp_path / f"{n}.png" for n in (1, 2)]
    for n, file in enumerate(files, 1):
        nb.Image.new("RGB", (20, 30), (80 * n, 40, 90)).save(file)
    one = nb.MiniVLM(nb.replace(model.cfg, VOCAB_SIZE=tokenizer.get_vocab_size())).eval()
    cell["explore"](one, tokenizer, files)
    (photo, upload), (decoder, beam_width, temperature, top_k) = (
        box.children for box in shown[0].children
    )
    photo.index, beam_width.value, decoder.value = 1, 5, "greedy"
    decoder.value, temperature.value, top_k.value = "top-k", 1.5, 7
    assert calls == [
        3, 3, 5, {"temperature": 0.8, "top_k": 1}, {"temperature": 0.8, "top_k": 50},
        {"temperature": 1.5, "top_k": 50}, {"temperature": 1.5, "top_k": 7},
    ]  # fmt: skip
    assert [int(image[0, 0, 0]) for image in drawn] == [80, *[160] * 6]
    for content in (files[0].read_bytes(), b"no picture"):
        files_now = ({"content": memoryview(content)},)
        upload.notify_change({"name": "value", "new": files_now, "type": "change"})
    assert len(drawn) == 8 and drawn[-1][0, 0, 0] == 80
    assert photo.label == "your photo" and len(photo.options) == 4
    assert "can't be read" in capsys.readouterr().out
