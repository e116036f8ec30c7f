"""Bad input and the path of the data: each gives a clear error, or a skip with name and number."""

import contextlib
import errno
import functools
import http.server
import os
import random
import re
import struct
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = 32
ORANGE = (200, 120, 40)


# Making datasets


def save_jpeg(path, colour=ORANGE, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "JPEG", quality=95)


def kaggle_layout(folder, n=8, captions="A plain square ."):
    """`Images/0.jpg` ... and `captions.txt`, in CSV, with one caption a picture."""
    for i in range(n):
        save_jpeg(folder / "Images" / f"{i}.jpg", (20 * i, 90, 120))
    lines = ["image,caption"] + [f"{i}.jpg,{captions}" for i in range(n)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def standard_layout(images, text, splits=(("train", 6), ("dev", 2), ("test", 2))):
    """The files of Flickr8k's two archives, with two captions a picture."""
    text.mkdir(parents=True, exist_ok=True)
    tokens = []
    for split, n in splits:
        names = [f"{split}{i}.jpg" for i in range(n)]
        for name in names:
            save_jpeg(images / name)
            tokens += [f"{name}#0\tA plain square .", f"{name}#1\tNothing but orange ."]
        (text / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    (text / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")


def add_line(file, line):
    with open(file, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def names_of(data):
    return sorted(picture.path.name for pictures in data.values() for picture in pictures)


def captions_of(data):
    return {p.path.name: list(p.captions) for pictures in data.values() for p in pictures}


def split_of(nb, folder, **how):
    """All pictures of a folder, decoded, with the cache in the same folder."""
    pictures = [p for pictures in nb.read_dataset(folder).values() for p in pictures]
    return nb.load_split(pictures, SIZE, cache_dir=folder / "cache", **how)


@pytest.fixture
def change(nb, monkeypatch):
    """Replace a global of the notebook's cells for the time of a test: change("name", value)."""
    return lambda name, value: monkeypatch.setitem(nb.load_split.__globals__, name, value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a folder of its own, whatever data this machine has or asks for."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("FLICKR8K_DIR", "SUPRAVL_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning that reaches the reader is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Finding the data


def test_kaggle_layout(nb, tmp_path, capsys):
    data = nb.read_dataset(kaggle_layout(tmp_path, 16))
    assert {split: len(pictures) for split, pictures in data.items()} == {
        "train": 12, "dev": 2, "test": 2,
    }  # fmt: skip
    assert names_of(data) == sorted(f"{i}.jpg" for i in range(16))
    out = capsys.readouterr().out
    assert "split by a hash" in out and "do not compare" in out and "skipped" not in out


@pytest.mark.parametrize(
    "images, text",
    [
        ("Flicker8k_Dataset", "."),  # both archives unpacked into one folder
        ("Flickr8k_Dataset", "Flickr8k_text"),
        ("Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_text"),  # each into a folder of its own
        ("Flickr_Data/Flickr_Data/Images", "Flickr_Data/Flickr_Data/Flickr_TextData"),
        ("a folder/Images/Images", "a folder"),
    ],
)
def test_standard_layouts(nb, tmp_path, capsys, images, text):
    standard_layout(tmp_path / images, tmp_path / text)
    data = nb.read_dataset(tmp_path)
    assert {split: len(pictures) for split, pictures in data.items()} == {
        "train": 6, "dev": 2, "test": 2,
    }  # fmt: skip
    assert all(p.path.is_file() and len(p.captions) == 2 for ps in data.values() for p in ps)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("inside", ["flickr8k", "datasets/someone/flickr8k"])
def test_kaggle_input(nb, tmp_path, inside):
    """Kaggle puts each attached dataset into a folder of its own, among others."""
    (tmp_path / "another" / "Images").mkdir(parents=True)
    save_jpeg(tmp_path / "another" / "Images" / "not_ours.jpg")
    (tmp_path / "a-third").mkdir()
    (tmp_path / "a-third" / "captions.txt").write_text("image,caption\nnot_ours.jpg,A text .\n")
    kaggle_layout(tmp_path / inside)
    assert names_of(nb.read_dataset(tmp_path)) == [f"{i}.jpg" for i in range(8)]


def test_kaggle_input_is_found_by_get_dataset(nb, tmp_path, monkeypatch, change):
    kaggle_layout(tmp_path / "input" / "flickr8k")
    read = nb.read_dataset
    change(
        "read_dataset",
        lambda folder: read(tmp_path / "input" if folder == "/kaggle/input" else folder),
    )
    name, data = nb.get_dataset(tmp_path / "download", tmp_path / "scenes")
    assert name == "own" and len(names_of(data)) == 8


def test_empty_folder(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions\.txt.*work.*expected a folder of pict"):
        nb.read_dataset(Path.cwd())


def test_folder_without_pictures(nb, tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n0.jpg,A square .\n")
    with pytest.raises(FileNotFoundError, match=r"no .*Images in .*expected"):
        nb.read_dataset(tmp_path)


def test_empty_picture_folder(nb, tmp_path, capsys):
    (tmp_path / "Images").mkdir()
    (tmp_path / "captions.txt").write_text("image,caption\n0.jpg,A square .\n")
    with pytest.raises(ValueError, match=r"no picture with a caption for .*train"):
        nb.read_dataset(tmp_path)
    assert "skipped 1 x captions without a picture: 0.jpg" in capsys.readouterr().out


def test_folder_that_is_not_there(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        nb.read_dataset(tmp_path / "nowhere")


def test_wrong_folder_in_the_environment_is_an_error(nb, tmp_path, monkeypatch, change):
    """Who names a folder wants that one: no download, no drawn scenes instead."""
    change("download_flickr8k", lambda *_: pytest.fail("tried to download"))
    kaggle_layout(tmp_path / "scenes")
    monkeypatch.setenv("FLICKR8K_DIR", str(tmp_path / "wrong"))
    with pytest.raises(FileNotFoundError, match="wrong is not a folder"):
        nb.get_dataset(tmp_path / "download", tmp_path / "scenes")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(FileNotFoundError, match=r"captions\.txt.*wrong"):
        nb.get_dataset(tmp_path / "download", tmp_path / "scenes")


def test_folder_in_the_environment(nb, tmp_path, monkeypatch):
    kaggle_layout(tmp_path / "home" / "my data")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLICKR8K_DIR", "~/my data")
    name, data = nb.get_dataset(tmp_path / "download", tmp_path / "scenes")
    assert name == "own" and len(names_of(data)) == 8  # its scores stand beside nobody's


@pytest.mark.parametrize("n, expected", [(8, "own"), (6999, "own"), (7000, "flickr8k")])
def test_only_the_whole_of_flickr8k_is_called_so(nb, tmp_path, monkeypatch, n, expected):
    """Scores on a part of it compare with nobody's. (The files are empty: none is opened.)"""
    (tmp_path / "Images").mkdir()
    names = [f"1000268201_693b{i:06x}.jpg" for i in range(n)] + ["no_name_of_flickr.jpg"]
    for name in names:
        (tmp_path / "Images" / name).touch()
    lines = ["image,caption", *(f"{name},A plain square ." for name in names)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    monkeypatch.setenv("FLICKR8K_DIR", str(tmp_path))
    name, data = nb.get_dataset(tmp_path / "download", tmp_path / "scenes")
    assert name == expected and len(names_of(data)) == n + 1


def test_a_part_of_flickr8k_with_split_files_is_ones_own(nb, tmp_path, monkeypatch):
    standard_layout(tmp_path / "Flicker8k_Dataset", tmp_path)
    names = {}
    for i, path in enumerate(sorted((tmp_path / "Flicker8k_Dataset").iterdir())):
        names[path.name] = f"1000268201_693b08cb{i:02x}.jpg"
        path.rename(path.with_name(names[path.name]))
    for file in tmp_path.glob("*.txt"):
        file.write_text(re.sub(r"\w+\.jpg", lambda match: names[match[0]], file.read_text()))
    monkeypatch.setenv("FLICKR8K_DIR", str(tmp_path))
    name, data = nb.get_dataset(tmp_path / "download", tmp_path / "scenes")
    assert name == "own" and names_of(data) == sorted(names.values())


def test_asking_for_the_drawn_scenes(nb, tmp_path, monkeypatch):
    kaggle_layout(tmp_path / "scenes")
    monkeypatch.setenv("FLICKR8K_DIR", str(tmp_path / "unused"))
    monkeypatch.setenv("SUPRAVL_DATA", "toy")
    assert nb.get_dataset(tmp_path / "download", tmp_path / "scenes")[0] == "scenes"
    monkeypatch.setenv("SUPRAVL_DATA", "scenes")
    with pytest.raises(ValueError, match=r"SUPRAVL_DATA is 'scenes'.*'toy'"):
        nb.get_dataset(tmp_path / "download", tmp_path / "scenes")


def test_the_embedded_scenes(nb, capsys):
    """The repository's own data is whole: nothing in it is skipped."""
    data = nb.read_dataset(Path(__file__).parents[1] / "assets" / "scenes")
    assert {split: len(pictures) for split, pictures in data.items()} == {
        "train": 1200, "dev": 200, "test": 200,
    }  # fmt: skip
    assert all(len(picture.captions) == 5 for pictures in data.values() for picture in pictures)
    assert capsys.readouterr().out == ""


# Half of it is there


def test_half_of_the_pictures(nb, tmp_path, capsys):
    standard_layout(tmp_path / "Flicker8k_Dataset", tmp_path)
    for i in range(3):
        (tmp_path / "Flicker8k_Dataset" / f"train{i}.jpg").unlink()
    with pytest.raises(ValueError, match=r"Flicker8k_Dataset has only 7 of the 10 .*unpack it"):
        nb.read_dataset(tmp_path)
    out = capsys.readouterr().out
    assert "skipped 3 x captions without a picture: train0.jpg, train1.jpg, train2.jpg" in out


def test_half_of_the_split_files(nb, tmp_path):
    standard_layout(tmp_path / "Flicker8k_Dataset", tmp_path)
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks Flickr_8k\.devImages\.txt"):
        nb.read_dataset(tmp_path)


def test_pictures_in_no_split_and_names_without_pictures(nb, tmp_path, capsys):
    images = tmp_path / "Flicker8k_Dataset"
    standard_layout(images, tmp_path, splits=(("train", 20), ("dev", 2), ("test", 2)))
    save_jpeg(images / "extra.jpg")
    add_line(tmp_path / "Flickr8k.token.txt", "extra.jpg#0\tA square too many .")
    add_line(tmp_path / "Flickr_8k.trainImages.txt", "ghost.jpg")
    assert len(names_of(nb.read_dataset(tmp_path))) == 24
    out = capsys.readouterr().out
    assert "skipped 1 x picture that is in no split: extra.jpg" in out
    assert "skipped 1 x name in a split without picture and captions: ghost.jpg" in out


# Captions


def test_picture_without_captions_and_captions_without_a_picture(nb, tmp_path, capsys):
    kaggle_layout(tmp_path)
    for i in range(5):
        save_jpeg(tmp_path / "Images" / f"silent{i}.jpg")
    add_line(tmp_path / "captions.txt", "ghost.jpg,A ghost .")
    assert names_of(nb.read_dataset(tmp_path)) == [f"{i}.jpg" for i in range(8)]
    out = capsys.readouterr().out
    assert "skipped 1 x captions without a picture: ghost.jpg\n" in out
    assert (
        "skipped 5 x picture without captions: silent0.jpg, silent1.jpg, silent2.jpg, ...\n" in out
    )


def test_odd_keys(nb, tmp_path, capsys):
    standard_layout(tmp_path / "Flicker8k_Dataset", tmp_path)
    file = tmp_path / "Flickr8k.token.txt"
    add_line(file, "train0.jpg.1#0\tA key of the real file .")
    add_line(file, "train1.jpg#12\tA thirteenth caption .")
    add_line(file, "train2.jpg")  # no tab, no caption
    add_line(file, "")
    captions = captions_of(nb.read_dataset(tmp_path))
    assert captions["train0.jpg"] == ["A plain square .", "Nothing but orange ."]
    assert captions["train1.jpg"][2:] == ["A thirteenth caption ."]
    assert len(captions["train2.jpg"]) == 2
    out = capsys.readouterr().out
    assert "skipped 1 x captions without a picture: train0.jpg.1\n" in out
    assert "skipped 1 x caption of one letter or none: train2.jpg\n" in out


def test_caption_of_one_letter(nb, tmp_path, capsys):
    kaggle_layout(tmp_path)
    for line in ("0.jpg,a", "0.jpg, ", "1.jpg,a"):
        add_line(tmp_path / "captions.txt", line)
    captions = captions_of(nb.read_dataset(tmp_path))
    assert captions["0.jpg"] == ["A plain square ."]
    out = capsys.readouterr().out
    assert "skipped 3 x caption of one letter or none: 0.jpg, 0.jpg, 1.jpg\n" in out


def test_commas_and_quotation_marks(nb, tmp_path):
    kaggle_layout(tmp_path)
    lines = [
        '0.jpg,"A man , a dog , and a ball ."',
        '0.jpg,"A sign says ""stop"" , twice ."',
        "0.jpg,A man , a dog and no quotation marks .",
        '0.jpg,A sign says "go" .',
    ]
    add_line(tmp_path / "captions.txt", "\n".join(lines))
    assert captions_of(nb.read_dataset(tmp_path))["0.jpg"][1:] == [
        "A man , a dog , and a ball .",
        'A sign says "stop" , twice .',
        "A man , a dog and no quotation marks .",
        'A sign says "go" .',
    ]


@pytest.mark.parametrize(
    "lines",
    [
        ['0.jpg,"A man', "1.jpg,A dog .", "2.jpg,A cat ."],  # to the end of the file
        ['0.jpg,"A man', '1.jpg,A dog says "woof"', "2.jpg,A cat ."],  # to the next mark
        ['0.jpg,"A man', '1.jpg,A dog "', "2.jpg,A cat ."],  # looks like one long caption
        ['0.jpg,"Stop" says the man .'],
    ],
)
def test_quotation_mark_that_is_not_closed(nb, tmp_path, lines):
    """It would swallow the captions behind it."""
    kaggle_layout(tmp_path)
    add_line(tmp_path / "captions.txt", "\n".join(lines))
    with pytest.raises(ValueError, match=r"captions\.txt, line 10: .*quotation mark"):
        nb.read_dataset(tmp_path)


@pytest.mark.parametrize("header", ["", "0.jpg,A square .", "image;caption", "image,caption,split"])
def test_wrong_header(nb, tmp_path, header):
    kaggle_layout(tmp_path)
    (tmp_path / "captions.txt").write_text(header)
    with pytest.raises(ValueError, match=r"captions\.txt: its first line must be 'image,caption'"):
        nb.read_dataset(tmp_path)


@pytest.mark.parametrize("layout", ["kaggle", "standard"])
def test_windows_line_ends_and_byte_order_mark(nb, tmp_path, capsys, layout):
    if layout == "kaggle":
        kaggle_layout(tmp_path, captions="A café .")
    else:
        standard_layout(tmp_path / "Images", tmp_path)
    expected = nb.read_dataset(tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    capsys.readouterr()
    assert nb.read_dataset(tmp_path) == expected
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["kaggle", "standard"])
def test_bytes_that_are_not_utf8(nb, tmp_path, layout):
    if layout == "kaggle":
        file = kaggle_layout(tmp_path) / "captions.txt"
    else:
        standard_layout(tmp_path / "Images", tmp_path)
        file = tmp_path / "Flickr8k.token.txt"
    lines = file.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b"square", "café".encode("latin-1"))
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"{file.name}, line 5 is not UTF-8: save the file as"):
        nb.read_dataset(tmp_path)


def test_a_token_file_without_tabs_is_named(nb, tmp_path):
    standard_layout(tmp_path / "Images", tmp_path)
    file = tmp_path / "Flickr8k.token.txt"
    file.write_text(file.read_text().replace("\t", " "))
    with pytest.raises(ValueError, match="Flickr8k.token.txt must hold lines of .* a tab"):
        nb.read_dataset(tmp_path)


def test_hostile_unicode_in_captions(nb, tmp_path):
    """Characters that Python's own `splitlines` takes for line ends are none in these files."""
    hostile = "狗 🐕\u200d🦺 \u2028 and \x0b and \x1c and \x85 ."
    kaggle_layout(tmp_path / "a", captions=hostile)
    assert captions_of(nb.read_dataset(tmp_path / "a"))["3.jpg"] == [hostile]
    standard_layout(tmp_path / "b" / "Images", tmp_path / "b")
    add_line(tmp_path / "b" / "Flickr8k.token.txt", f"train0.jpg#2\t{hostile}")
    assert captions_of(nb.read_dataset(tmp_path / "b"))["train0.jpg"][2] == hostile


@pytest.mark.parametrize("layout", ["kaggle", "standard"])
def test_names_with_spaces_and_other_characters(nb, tmp_path, capsys, layout):
    odd = ["a dog.jpg", "dog (1).jpg", "a#1.jpg", "狗.jpg", "it's.jpg"]
    if layout == "kaggle":
        kaggle_layout(tmp_path)
    else:
        standard_layout(tmp_path / "Images", tmp_path)
    for name in odd:
        save_jpeg(tmp_path / "Images" / name)
        if layout == "kaggle":
            add_line(tmp_path / "captions.txt", f"{name},A square of its own .")
        else:
            add_line(tmp_path / "Flickr8k.token.txt", f"{name}#0\tA square of its own .")
            add_line(tmp_path / "Flickr_8k.testImages.txt", name)
    assert set(odd) <= set(names_of(nb.read_dataset(tmp_path)))
    assert "skipped" not in capsys.readouterr().out
    assert set(odd) <= set(split_of(nb, tmp_path).names)


def test_names_on_disk_that_are_no_text(nb, tmp_path, capsys):
    kaggle_layout(tmp_path)
    try:
        save_jpeg(tmp_path / "Images" / os.fsdecode(b"caf\xe9.jpg"))
    except OSError:
        pytest.skip("this file system takes only names that are text")
    nb.read_dataset(tmp_path)
    assert "skipped 1 x picture without captions: caf\\udce9.jpg" in capsys.readouterr().out


def test_a_macs_shadows_in_the_folder(nb, tmp_path, capsys):
    kaggle_layout(tmp_path)
    save_jpeg(tmp_path / "__MACOSX" / "Images" / "._0.jpg")
    (tmp_path / "__MACOSX" / "captions.txt").write_text("image,caption\n._0.jpg,A shadow .\n")
    (tmp_path / "._captions.txt").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "Images" / "._0.jpg").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "Images" / ".DS_Store").write_bytes(b"\x00")
    (tmp_path / "Images" / "__MACOSX").mkdir()
    assert names_of(nb.read_dataset(tmp_path)) == [f"{i}.jpg" for i in range(8)]
    out = capsys.readouterr().out
    assert "skipped 2 x a Mac's shadow of a file: ._0.jpg, __MACOSX\n" in out
    assert "without" not in out


# The split by a hash


def test_hash_split(nb, tmp_path):
    names = [f"{i}.jpg" for i in range(200)]
    splits, standard = nb.read_splits(tmp_path, names)
    assert not standard
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 150, "dev": 25, "test": 25,
    }  # fmt: skip
    everything = [name for part in splits.values() for name in part]
    assert sorted(everything) == sorted(names), "each picture is in one split, and only one"
    shuffled = random.Random(0).sample(names, len(names))
    assert nb.read_splits(tmp_path, shuffled)[0] == splits, "the order on disk must not matter"
    # The same on every machine and in every run, so the answer is known.
    assert splits["test"][:4] == ["195.jpg", "138.jpg", "115.jpg", "26.jpg"]


# Pictures


def checkerboard(mode_size=(64, 48)):
    """Red upper left quarter, green upper right, blue lower left, white lower right."""
    width, height = mode_size
    array = np.zeros((height, width, 3), np.uint8)
    array[: height // 2, : width // 2] = (255, 0, 0)
    array[: height // 2, width // 2 :] = (0, 255, 0)
    array[height // 2 :, : width // 2] = (0, 0, 255)
    array[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(array)


def quarters(array):
    """The colours in the middle of the four quarters of (3, size, size), row by row."""
    at = (SIZE // 4, 3 * SIZE // 4)
    return [tuple(array[:, y, x].tolist()) for y in at for x in at]


def assert_colours(array, expected, off=3):
    assert array.shape == (3, SIZE, SIZE) and array.dtype == np.uint8
    assert array.flags["C_CONTIGUOUS"]
    assert np.abs(np.array(quarters(array)) - np.array(expected)).max() <= off, quarters(array)


RGBW = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
GREYS = [(76,) * 3, (150,) * 3, (29,) * 3, (255,) * 3]  # of these four, by ITU-R 601


@pytest.mark.parametrize(
    "mode, extension, expected, off",
    [
        ("RGB", "png", RGBW, 0),
        ("RGB", "jpg", RGBW, 4),
        ("L", "jpg", GREYS, 3),
        ("P", "png", RGBW, 0),
        ("P", "gif", RGBW, 0),
        ("RGBA", "png", RGBW, 0),
        ("LA", "png", GREYS, 1),
        ("CMYK", "jpg", RGBW, 4),
        ("CMYK", "tif", RGBW, 0),
        ("1", "png", [(0,) * 3] * 3 + [(255,) * 3], 0),
    ],
)
def test_modes_in_files(nb, tmp_path, mode, extension, expected, off):
    image = checkerboard()
    image = image.convert("L").point(lambda v: 255 * (v > 200)) if mode == "1" else image
    file = tmp_path / f"x.{extension}"
    image.convert(mode).save(file, **({"quality": 98} if extension == "jpg" else {}))
    with Image.open(file) as again:
        assert again.mode == mode
    assert_colours(nb.load_picture(file, SIZE), expected, off)


@pytest.mark.parametrize("dark", [False, True])
def test_16_bits(nb, tmp_path, dark):
    """A dark 16-bit picture is dark: its values must not be taken for 8-bit ones."""
    grey = np.asarray(checkerboard().convert("L"), np.uint16)
    Image.fromarray(grey if dark else grey * 257).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as again:
        mode = again.mode
    assert mode.startswith("I")
    if dark and mode == "I":
        pytest.skip("this Pillow does not say that the file has 16 bits")
    expected = [(0,) * 3] * 4 if dark else GREYS
    assert_colours(nb.load_picture(tmp_path / "x.png", SIZE), expected, 1)


def test_values_beyond_16_bits_do_not_wrap_around(nb):
    image = Image.fromarray(np.full((9, 9), 70_000, np.int32))
    assert nb.load_picture(image, SIZE).min() == 255
    image = Image.fromarray(np.full((9, 9), -5, np.int32))
    assert nb.load_picture(image, SIZE).max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(nb, tmp_path, mode):
    """What lies under full transparency is not part of the picture, whatever colour is stored."""
    image = checkerboard().convert("RGBA")
    alpha = np.full((48, 64), 255, np.uint8)
    alpha[:24, :32] = 0  # the red quarter
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        image = checkerboard().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        red = image.getpixel((0, 0))
        image.save(tmp_path / "x.png", transparency=red)
    else:
        image.convert(mode).save(tmp_path / "x.png")
    colours = GREYS if mode == "LA" else RGBW
    expected = [(255,) * 3, *colours[1:]]
    assert_colours(nb.load_picture(tmp_path / "x.png", SIZE), expected, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_exif_rotation(nb, tmp_path, orientation, extension):
    """A camera's note on how it was held is obeyed: all eight come out upright."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    stored = checkerboard() if turn is None else checkerboard().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{extension}"
    stored.save(file, exif=exif, **({"quality": 98} if extension == "jpg" else {}))
    assert_colours(nb.load_picture(file, SIZE), RGBW, 4)


def test_broken_exif_is_no_reason_to_lose_a_picture(nb, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "x.jpg"
    checkerboard().save(file, exif=exif, quality=98)
    data = bytearray(file.read_bytes())
    at = data.index(b"Exif\0\0") + 6
    data[at + 8 : at + 12] = b"\xff\xff\xff\xff"  # far more entries than there are bytes
    file.write_bytes(data)
    assert nb.load_picture(file, SIZE).shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3000, 2000)])
def test_any_shape_is_squashed(nb, tmp_path, size):
    save_jpeg(tmp_path / "x.jpg", size=size)
    array = nb.load_picture(tmp_path / "x.jpg", SIZE)
    assert_colours(array, [ORANGE] * 4, 3)


def huge_png(path, side):
    """A tiny PNG file that says it has `side` x `side` pixels, and has none."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# 10,000 squared is where Pillow warns, 20,000 squared where it refuses.
BOMBS = [10_000, 20_000]


@pytest.mark.parametrize("side", BOMBS)
def test_huge_picture(nb, tmp_path, side):
    huge_png(tmp_path / "huge.png", side)
    with pytest.raises(ValueError, match=r"huge\.png can't be read as a picture: .*exceeds limit"):
        nb.load_picture(tmp_path / "huge.png", SIZE)


def break_picture(path, how):
    """Turn a good JPEG file into a bad one."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "corrupt":
        path.write_bytes(data[:20] + bytes(len(data) - 20))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404 Not Found</html>")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "link to nowhere":
        path.unlink()
        path.symlink_to("nowhere.jpg")
    else:
        huge_png(path, how)


BROKEN = ["truncated", "corrupt", "empty", "text", "folder", "link to nowhere", *BOMBS]


@pytest.mark.parametrize("how", BROKEN)
def test_broken_picture_is_skipped_by_name(nb, tmp_path, capsys, how):
    folder = kaggle_layout(tmp_path)
    break_picture(folder / "Images" / "3.jpg", how)
    loaded = split_of(nb, folder)
    captured = capsys.readouterr()
    assert "skipped 1 x unreadable picture: 3.jpg\n" in captured.out
    assert captured.err == ""
    assert sorted(loaded.names) == [f"{i}.jpg" for i in range(8) if i != 3]
    assert loaded.images.shape == (7, 3, SIZE, SIZE) and len(loaded.captions) == len(loaded) == 7
    for name, image in zip(loaded.names, loaded.images):
        red = 20 * int(name[0])  # each picture has a red of its own: none has changed places
        assert abs(int(image[0, 9, 9]) - red) <= 3
    split_of(nb, folder)
    assert "unreadable picture: 3.jpg" in capsys.readouterr().out, "told again from the cache"


@pytest.mark.parametrize("how", [how for how in BROKEN if how != "link to nowhere"])
def test_broken_picture_alone_is_an_error_that_names_it(nb, tmp_path, how):
    save_jpeg(tmp_path / "mine.jpg")
    break_picture(tmp_path / "mine.jpg", how)
    with pytest.raises(ValueError, match=r"mine\.jpg can't be read as a picture: "):
        nb.load_picture(tmp_path / "mine.jpg", SIZE)


def test_missing_picture_alone(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mine\.jpg"):
        nb.load_picture(tmp_path / "mine.jpg", SIZE)


def test_many_bad_pictures_among_many_threads(nb, tmp_path, capsys):
    """Python's warning filters are shared by threads: not one warning may get out."""
    folder = kaggle_layout(tmp_path, 60)
    for i in range(0, 60, 2):
        huge_png(folder / "Images" / f"{i}.jpg", 10_000)
    filters = list(warnings.filters)
    loaded = split_of(nb, folder)
    assert len(loaded) == 30
    captured = capsys.readouterr()
    assert "skipped 30 x unreadable picture: 0.jpg" in captured.out and captured.err == ""
    assert warnings.filters == filters


def test_no_readable_picture_at_all(nb, tmp_path, capsys):
    folder = kaggle_layout(tmp_path)
    for i in range(8):
        break_picture(folder / "Images" / f"{i}.jpg", "empty")
    with pytest.raises(ValueError, match="none of the 8 picture files of mine can be read"):
        split_of(nb, folder, name="mine")
    assert "skipped 8 x unreadable picture" in capsys.readouterr().out


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "tif", "webp"])
def test_random_damage_gives_a_picture_or_a_value_error(nb, tmp_path, extension):
    file = tmp_path / f"x.{extension}"
    Image.effect_noise((60, 40), 80).convert("RGB").save(file)
    whole, dice = file.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(dice.choice([1, 3, 10])):
            data[dice.randrange(min(len(data), 300))] = dice.randrange(256)
        file.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        with contextlib.suppress(ValueError):
            assert nb.load_picture(file, SIZE).shape == (3, SIZE, SIZE)


# The cache


def test_second_load_decodes_nothing(nb, tmp_path, change):
    folder = kaggle_layout(tmp_path)
    first = split_of(nb, folder)
    change("load_picture", lambda *_: pytest.fail("decoded again"))
    second = split_of(nb, folder)
    assert np.array_equal(first.images, second.images)
    assert (first.names, first.captions) == (second.names, second.captions)


@pytest.mark.parametrize("what", ["content", "name", "date", "another picture", "order", "size"])
def test_cache_key_changes_with(nb, tmp_path, what):
    folder = kaggle_layout(tmp_path)
    pictures = sorted((p for ps in nb.read_dataset(folder).values() for p in ps), key=str)
    before = nb.fingerprint(pictures, SIZE)
    assert nb.fingerprint(pictures, SIZE) == before
    size, file = SIZE, pictures[0].path
    if what == "content":
        file.write_bytes(file.read_bytes() + b"\0")
    elif what == "name":
        pictures[0] = nb.Picture(file.rename(file.with_name("other.jpg")), pictures[0].captions)
    elif what == "date":  # as an editor that writes as many bytes as before
        os.utime(file, ns=(0, 12345))
    elif what == "another picture":
        save_jpeg(file.with_name("8.jpg"))
        pictures.append(nb.Picture(file.with_name("8.jpg"), ("A square .",)))
    elif what == "order":
        pictures.reverse()
    else:
        size += 1
    assert nb.fingerprint(pictures, size) != before


def test_cache_does_not_depend_on_the_place(nb, tmp_path):
    """A folder that was moved needs no second decoding."""
    folder = kaggle_layout(tmp_path / "a")
    before = split_of(nb, folder).images
    folder = folder.rename(tmp_path / "b")
    assert len(list((folder / "cache").glob("*.npy"))) == 1
    assert np.array_equal(split_of(nb, folder).images, before)
    assert len(list((folder / "cache").glob("*.npy"))) == 1


def test_changed_picture_is_decoded_anew(nb, tmp_path):
    folder = kaggle_layout(tmp_path)
    split_of(nb, folder)
    save_jpeg(folder / "Images" / "5.jpg", (250, 250, 250), size=(50, 50))
    loaded = split_of(nb, folder)
    assert loaded.images[loaded.names.index("5.jpg")].min() > 240


@pytest.mark.parametrize("file", ["npy", "json"])
@pytest.mark.parametrize("damage", ["half", "empty", "absent", "garbage"])
def test_half_a_cache_is_never_taken_for_whole(nb, tmp_path, file, damage):
    folder = kaggle_layout(tmp_path)
    whole = split_of(nb, folder)
    expected, names = np.array(whole.images), whole.names
    (path,) = (folder / "cache").glob(f"*.{file}")
    data = path.read_bytes()
    path.unlink()
    if damage != "absent":
        content = {"half": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * 99}
        path.write_bytes(content[damage])
    again = split_of(nb, folder)
    assert np.array_equal(again.images, expected) and again.names == names
    assert path.read_bytes() == data, "and the cache is mended"


def test_interrupted_while_writing_the_cache(nb, tmp_path, change):
    folder = kaggle_layout(tmp_path)

    def interrupted(file, array):
        file.write(b"\x93NUMPY half of it")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            split_of(nb, folder)
    assert list((folder / "cache").iterdir()) == []
    assert len(split_of(nb, folder)) == 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_full_or_read_only_disk(nb, tmp_path, monkeypatch, capsys, number):
    folder = kaggle_layout(tmp_path)

    def refuse(file, array):
        file.write(b"the first bytes still fit")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "save", refuse)
    loaded = split_of(nb, folder)
    assert len(loaded) == 8 and loaded.images[0].any()
    out = capsys.readouterr().out
    assert f"could not be cached ([Errno {number}]" in out and "in memory" in out
    assert list((folder / "cache").iterdir()) == []


def test_cache_folder_that_can_not_be_made(nb, tmp_path, capsys):
    """True for root too: a file is in the way."""
    folder = kaggle_layout(tmp_path)
    (folder / "cache").write_text("in the way")
    assert len(split_of(nb, folder)) == 8
    assert "could not be cached" in capsys.readouterr().out


def test_read_only_cache_folder(nb, tmp_path, capsys):
    folder = kaggle_layout(tmp_path)
    (folder / "cache").mkdir(mode=0o555)
    if os.access(folder / "cache", os.W_OK):
        pytest.skip("this user may write anywhere (root); the same error is raised by hand above")
    assert len(split_of(nb, folder)) == 8
    assert "could not be cached" in capsys.readouterr().out


def test_write_whole_leaves_the_old_file_or_the_new_one(nb, tmp_path):
    path = tmp_path / "file"
    nb.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        nb.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.glob("file*")) == [path]


# Archives and the download


def make_archives(folder):
    """The two archives as they really are: with a Mac's shadows, one with a folder inside."""
    source = folder / "source"
    standard_layout(source / "Flicker8k_Dataset", source / "text")
    folder.joinpath("archives").mkdir()
    with zipfile.ZipFile(folder / "archives" / "Flickr8k_Dataset.zip", "w") as file:
        for path in sorted((source / "Flicker8k_Dataset").iterdir()):
            file.write(path, f"Flicker8k_Dataset/{path.name}")
            file.writestr(f"__MACOSX/Flicker8k_Dataset/._{path.name}", b"\x00\x05\x16\x07")
        file.writestr("Flicker8k_Dataset/._loose.jpg", b"\x00\x05\x16\x07")
    with zipfile.ZipFile(folder / "archives" / "Flickr8k_text.zip", "w") as file:
        for path in sorted((source / "text").iterdir()):
            file.write(path, path.name)
        file.writestr("__MACOSX/._Flickr8k.token.txt", b"\x00\x05\x16\x07")
    return folder / "archives"


@contextlib.contextmanager
def serve(folder, cut=None, size=True, status=200, announce=None):
    """A server of the files in `folder`, as a URL; `cut` bytes into a file it hangs up."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = (folder / Path(self.path).name).read_bytes()
            self.send_response(status)
            if size:
                self.send_header("Content-Length", str(len(data)))
            if announce:
                self.send_header(*announce)
            self.end_headers()
            self.wfile.write(data if cut is None else data[:cut])
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def download_from(nb, change):
    """Let `get_dataset` download from another address."""

    def set_address(url):
        original = nb.download_flickr8k
        change("download_flickr8k", lambda folder: original(folder, url))

    return set_address


def test_download(nb, tmp_path, capsys, download_from, change):
    with serve(make_archives(tmp_path)) as (url, requests):
        download_from(url)
        name, data = nb.get_dataset(tmp_path / "data" / "flickr8k", tmp_path / "no scenes")
        assert name == "flickr8k"
        assert {split: len(part) for split, part in data.items()} == {
            "train": 6, "dev": 2, "test": 2,
        }  # fmt: skip
        assert len(requests) == 2
        left = sorted(path.name for path in (tmp_path / "data" / "flickr8k").iterdir())
        assert left == ["Flickr8k_Dataset", "Flickr8k_text"], "the archives are gone"
        assert not list((tmp_path / "data").rglob("*MACOSX*"))
        assert not list((tmp_path / "data").rglob("._*"))
        captured = capsys.readouterr()
        assert "skipped 11 x a Mac's shadow of a file: " in captured.out
        assert captured.err == ""
        nb.get_dataset(tmp_path / "data" / "flickr8k", tmp_path / "no scenes")
        assert len(requests) == 2, "the second time it is there already"


def test_download_without_progress_bars(nb, tmp_path, download_from, change):
    """As with TQDM_DISABLE=1 in the environment: a bar that is off counts nothing."""
    change("tqdm", functools.partial(nb.tqdm, disable=True))
    with serve(make_archives(tmp_path)) as (url, _):
        download_from(url)
        name, data = nb.get_dataset(tmp_path / "flickr8k", tmp_path / "no scenes")
    assert name == "flickr8k" and len(names_of(data)) == 10


def test_archives_put_there_by_hand_are_unpacked(nb, tmp_path):
    make_archives(tmp_path).rename(tmp_path / "flickr8k")
    nb.download_flickr8k(tmp_path / "flickr8k", "http://127.0.0.1:9/")
    assert len(names_of(nb.read_dataset(tmp_path / "flickr8k"))) == 10


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("cut", [0, 700])
def test_download_that_breaks_off(nb, tmp_path, capsys, download_from, cut, size):
    """Nothing under a final name, the reader is told, and the drawn scenes take over."""
    kaggle_layout(tmp_path / "scenes")
    how = {} if size else {"size": False, "announce": ("Transfer-Encoding", "chunked")}
    with serve(make_archives(tmp_path), cut=cut, **how) as (url, _):
        download_from(url)
        name, data = nb.get_dataset(tmp_path / "flickr8k", tmp_path / "scenes")
    assert name == "scenes" and len(names_of(data)) == 8
    assert list((tmp_path / "flickr8k").iterdir()) == []
    captured = capsys.readouterr()
    assert "Flickr8k could not be downloaded: " in captured.out
    assert "Flickr8k_Dataset.zip broke off" in captured.out
    if size:
        assert f"after {cut:,} of " in captured.out
    assert "Going on with the drawn scenes" in captured.out and captured.err == ""


def test_full_disk_while_downloading(nb, tmp_path, monkeypatch, capsys, download_from):
    kaggle_layout(tmp_path / "scenes")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with serve(make_archives(tmp_path)) as (url, _):
        download_from(url)
        monkeypatch.setattr(os, "fsync", full)
        assert nb.get_dataset(tmp_path / "flickr8k", tmp_path / "scenes")[0] == "scenes"
    assert list((tmp_path / "flickr8k").iterdir()) == []
    assert "could not be downloaded: [Errno 28] No space left" in capsys.readouterr().out


def test_download_goes_on_after_a_break(nb, tmp_path):
    archives = make_archives(tmp_path)
    with serve(archives) as (url, requests):
        (archives / "Flickr8k_text.zip").rename(tmp_path / "later.zip")
        with pytest.raises(OSError, match=r".+"):
            nb.download_flickr8k(tmp_path / "flickr8k", url)
        (tmp_path / "later.zip").rename(archives / "Flickr8k_text.zip")
        nb.download_flickr8k(tmp_path / "flickr8k", url)
    assert Counter(requests)["/Flickr8k_Dataset.zip"] == 1, "what was whole is not fetched again"
    assert len(names_of(nb.read_dataset(tmp_path / "flickr8k"))) == 10


def test_server_says_no(nb, tmp_path, capsys, download_from):
    kaggle_layout(tmp_path / "scenes")
    with serve(make_archives(tmp_path), status=404) as (url, _):
        download_from(url)
        assert nb.get_dataset(tmp_path / "flickr8k", tmp_path / "scenes")[0] == "scenes"
    assert "HTTP Error 404" in capsys.readouterr().out


def test_no_network(nb, tmp_path, capsys, download_from):
    kaggle_layout(tmp_path / "scenes")
    download_from("http://127.0.0.1:9/")
    assert nb.get_dataset(tmp_path / "flickr8k", tmp_path / "scenes")[0] == "scenes"
    captured = capsys.readouterr()
    assert "Flickr8k could not be downloaded: " in captured.out
    assert "Going on with the drawn scenes" in captured.out and captured.err == ""


def test_no_network_and_no_scenes(nb, tmp_path, download_from):
    download_from("http://127.0.0.1:9/")
    with pytest.raises(FileNotFoundError, match=r"no network.*Connect.*FLICKR8K_DIR"):
        nb.get_dataset(tmp_path / "flickr8k", tmp_path / "scenes")


def test_download_folder_that_can_not_be_made(nb, tmp_path, capsys, download_from):
    kaggle_layout(tmp_path / "scenes")
    (tmp_path / "data").write_text("in the way")
    with serve(make_archives(tmp_path)) as (url, requests):
        download_from(url)
        name, _ = nb.get_dataset(tmp_path / "data" / "flickr8k", tmp_path / "scenes")
    assert name == "scenes" and requests == []
    assert "Flickr8k could not be downloaded: " in capsys.readouterr().out


def test_half_unpacked_by_hand(nb, tmp_path, download_from):
    """An error that says so; no quiet training on half of the pictures, no scenes instead."""
    download_from("http://127.0.0.1:9/")
    folder = tmp_path / "flickr8k"
    standard_layout(folder / "Flickr8k_Dataset" / "Flicker8k_Dataset", folder / "Flickr8k_text")
    for file in list((folder / "Flickr8k_Dataset" / "Flicker8k_Dataset").iterdir())[:5]:
        file.unlink()
    with pytest.raises(ValueError, match=r"has only 5 of the 10 pictures.*unpack it again"):
        nb.get_dataset(folder, tmp_path / "scenes")


def damage_archive(path, how):
    data = path.read_bytes()
    if how == "cut off half way":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no zip":
        path.write_text("<html>503 Service Unavailable</html>")
    elif how == "wrong byte":  # in the middle of a stored file: its check sum no longer fits
        at = len(data) // 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:  # broken deflate
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.txt", "many words " * 999)
        data = bytearray(path.read_bytes())
        data[40:50] = b"\xff" * 10
        path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut off half way", "empty", "no zip", "wrong byte", "broken deflate"]
)
def test_broken_archive(nb, tmp_path, how):
    folder = make_archives(tmp_path)
    archive = folder / "Flickr8k_Dataset.zip"
    damage_archive(archive, how)
    with pytest.raises(ValueError, match=r"Flickr8k_Dataset\.zip is broken .*run again to fetch"):
        nb.download_flickr8k(folder, "http://127.0.0.1:9/")
    assert sorted(path.name for path in folder.iterdir()) == ["Flickr8k_text.zip"]


def test_full_disk_while_unpacking(nb, tmp_path, monkeypatch):
    """The archive stays, the half-unpacked folder goes; with room it works."""
    folder = make_archives(tmp_path)
    extract, left = zipfile.ZipFile.extract, [4]

    def until_full(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return extract(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", until_full)
        with pytest.raises(OSError, match="No space left"):
            nb.download_flickr8k(folder, "http://127.0.0.1:9/")
    names = ["Flickr8k_Dataset.zip", "Flickr8k_text.zip"]
    assert sorted(path.name for path in folder.iterdir()) == names
    nb.download_flickr8k(folder, "http://127.0.0.1:9/")
    assert len(names_of(nb.read_dataset(folder))) == 10


def test_archive_can_not_write_outside_its_folder(nb, tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w") as file:
        file.writestr("../../escaped.txt", "no")
    nb.unpack(tmp_path / "in" / "x.zip", tmp_path / "in" / "x")
    assert not list(tmp_path.glob("escaped.txt"))
