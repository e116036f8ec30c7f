"""Odd and hostile input to the data: each gives a clear error, or is left out by name."""

import contextlib
import errno
import http.server
import io
import os
import random
import re
import signal
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import component_cells
from PIL import EpsImagePlugin, Image

SIZE = 32
ORANGE = (200, 120, 40)
RGBW = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
GREYS = [(76,) * 3, (150,) * 3, (29,) * 3, (255,) * 3]  # of these four, by ITU-R 601


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a folder of its own, whatever data this machine has or asks for."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("FLICKR8K_DIR", "SUPRAVL_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "no kaggle"))
    monkeypatch.setenv("FLICKR8K_URL", "http://127.0.0.1:9/")  # nobody answers there
    monkeypatch.setenv("no_proxy", "*")


class WaitsForEver(BaseException):
    """Not caught by what catches any error."""


@contextlib.contextmanager
def no_longer_than(seconds):
    def stop(*_):
        raise WaitsForEver

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def save_jpeg(path, colour=ORANGE, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "JPEG", quality=95)


def kaggle_layout(folder, n=40):
    """`Images/0.jpg` ... and `captions.txt`, in CSV; every picture has a red of its own."""
    for i in range(n):
        save_jpeg(folder / "Images" / f"{i}.jpg", (6 * i % 256, 90, 120))
    lines = ["image,caption"] + [f"{i}.jpg,The red is {6 * i} ." for i in range(n)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


COUNTS = {"train": 6, "dev": 2, "test": 2}
TEST_LIST = "test0.jpg\ntest1.jpg"


def standard_layout(folder):
    """What Flickr8k's two archives hold, with two captions a picture."""
    text, tokens = folder / "Flickr8k_text", []
    text.mkdir(parents=True)
    for split, n in COUNTS.items():
        names = [f"{split}{i}.jpg" for i in range(n)]
        for name in names:
            save_jpeg(folder / "Flickr8k_Dataset" / "Flicker8k_Dataset" / name)
            tokens += [f"{name}#0\tA plain square .", f"{name}#1\tNothing but orange ."]
        (text / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    (text / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    return folder


@pytest.fixture
def real(nb, monkeypatch):
    """Take the ten pictures of `standard_layout` for the real Flickr8k."""
    key = nb.hashlib.sha256(TEST_LIST.encode()).hexdigest()[:16]
    monkeypatch.setattr(nb, "TEST_SPLITS", {key: "flickr8k"})


@pytest.fixture
def drawn(nb, monkeypatch):
    """Take the same ten pictures for the drawn scenes."""
    key = nb.hashlib.sha256(TEST_LIST.encode()).hexdigest()[:16]
    monkeypatch.setattr(nb, "TEST_SPLITS", {key: "scenes"})


def count(splits):
    return {split: len(part.images) for split, part in splits.items()}


# One picture


def quarters():
    """Red upper left quarter, green upper right, blue lower left, white lower right."""
    array = np.array(RGBW, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(array.repeat(24, 0).repeat(32, 1))


def assert_colours(image, expected, off=4):
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    x, y = image.width // 4, image.height // 4
    found = [image.getpixel(at) for at in ((x, y), (3 * x, y), (x, 3 * y), (3 * x, 3 * y))]
    assert np.abs(np.array(found) - np.array(expected)).max() <= off, found


@pytest.mark.parametrize(
    "mode, file, expected",
    [
        ("RGB", "x.jpg", RGBW), ("L", "x.jpg", GREYS), ("P", "x.gif", RGBW), ("LA", "x.png", GREYS),
        ("CMYK", "x.jpg", RGBW), ("RGB", "x.webp", RGBW), ("RGB", "x.bmp", RGBW),
        ("1", "x.png", [(0,) * 3] * 3 + [(255,) * 3]),
    ],
)  # fmt: skip
def test_modes_in_files(nb, tmp_path, mode, file, expected):
    image = quarters()
    image = image.convert("L").point(lambda v: 255 * (v > 200)) if mode == "1" else image
    image.convert(mode).save(tmp_path / file, quality=98)
    assert_colours(nb.open_picture(tmp_path / file), expected, 12 if file == "x.webp" else 4)
    with open(tmp_path / file, "rb") as f:
        assert nb.open_picture(f).size == (64, 48)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_16_bits_and_floats_are_refused_and_not_blackened(nb, tmp_path, kind):
    Image.fromarray(np.asarray(quarters().convert("L")).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="x.tif.*in mode [IF]"):
        nb.open_picture(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(nb, tmp_path, mode):
    """What lies under full transparency is not part of the picture, whatever colour is stored."""
    image, how = quarters(), {}
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        how["transparency"] = image.getpixel((0, 0))
    else:
        alpha = np.full((48, 64), 255, np.uint8)
        alpha[:24, :32] = 0  # the red quarter
        image.putalpha(Image.fromarray(alpha))
        image = image.convert(mode)
    image.save(tmp_path / "x.png", **how)
    expected = [(255,) * 3, *(GREYS if mode == "LA" else RGBW)[1:]]
    assert_colours(nb.open_picture(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(nb, tmp_path, orientation):
    """A camera's note on how it was held is obeyed: all eight come out upright."""
    turn = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Pillow's number of the one to store by
    stored, exif = quarters() if turn is None else quarters().transpose(turn), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=98)
    assert_colours(nb.open_picture(tmp_path / "x.jpg"), RGBW)


def test_broken_exif_is_no_reason_to_lose_a_picture(nb, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters().save(tmp_path / "x.jpg", exif=exif, quality=98)
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    at = data.index(b"Exif\0\0") + 6
    data[at + 8 : at + 12] = b"\xff\xff\xff\xff"  # far more entries than there are bytes
    (tmp_path / "x.jpg").write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        [line] = re.findall("^warnings.filter.*", "\n".join(component_cells()), re.MULTILINE)
        exec(line)  # pytest has undone what the notebook set
        assert nb.open_picture(tmp_path / "x.jpg").mode == "RGB"
    assert not said


def huge_png(path, side):
    """A tiny PNG file that says it has `side` x `side` pixels, and has none."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"


def break_picture(path, how):
    """Turn a good JPEG file into something else."""
    data = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif isinstance(how, int):
        huge_png(path, how)
    else:
        path.write_bytes(how)


# 10,000 squared is where Pillow warns, 20,000 squared where it refuses.
BROKEN = ["truncated", b"", b"<html>404</html>", "folder", "pipe", POSTSCRIPT, 10_000, 20_000]


@pytest.mark.parametrize("how", BROKEN, ids=str)
def test_what_is_no_picture_is_named(nb, tmp_path, monkeypatch, how):
    ran = []  # PostScript is a program: nobody may run it
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(a))
    file = tmp_path / "mine.jpg"
    save_jpeg(file)
    break_picture(file, how)
    with no_longer_than(10), pytest.raises((ValueError, OSError), match="mine.jpg") as caught:
        nb.open_picture(str(file))
    if isinstance(how, int):
        assert "exceeds" in str(caught.value), "too many pixels, not merely broken"
    if isinstance(how, bytes):
        with pytest.raises(ValueError, match="can't be read as a picture"):
            nb.open_picture(io.BytesIO(how))
    assert not ran


def test_a_missing_picture_is_named(nb, tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.jpg"):
        nb.open_picture(tmp_path / "mine.jpg")


@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])
def test_random_damage_gives_a_picture_or_a_value_error(nb, tmp_path, extension):
    file = tmp_path / f"x.{extension}"
    Image.effect_noise((60, 40), 80).convert("RGB").save(file)
    whole, dice = file.read_bytes(), random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(dice.choice([1, 3, 10])):
            data[dice.randrange(min(len(data), 300))] = dice.randrange(256)
        file.write_bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
        with contextlib.suppress(ValueError):
            assert nb.open_picture(file).mode == "RGB"


# Captions and splits


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "tokens"])
def test_captions_by_hand(nb, tmp_path, kind, newline):
    if kind == "csv":
        lines = ["image,caption", "a b.jpg,A dog, running .", 'a b.jpg,"He says ""go"" ."']
        lines += ["c.jpg,a", "ü.jpg,Two \U0001f436 .", ""]
    else:
        lines = ["a b.jpg#0\tA dog, running .", 'a b.jpg#1\tHe says "go" .', "c.jpg#0\ta"]
        lines += ["ü.jpg#4\tTwo \U0001f436 .", "e.jpg#0\t ", ""]
    (tmp_path / "x").write_bytes(newline.join(lines).encode("utf-8-sig"))
    assert nb.read_captions(tmp_path / "x") == {
        "a b.jpg": ["A dog, running .", 'He says "go" .'],
        "ü.jpg": ["Two \U0001f436 ."],
    }


@pytest.mark.parametrize(
    "data", [b"", b"no tab, no header", b"image,caption\n", b"image,caption\nx.jpg,caf\xe9\n",
             b'image,caption\nx.jpg,"A dog\ny.jpg,A cat\n',
             b"image,caption\nx.jpg," + b"w " * 99_999],
)  # fmt: skip
def test_captions_that_cant_be_read_are_named(nb, tmp_path, data):
    (tmp_path / "mine.txt").write_bytes(data)
    with pytest.raises(ValueError, match="mine.txt"):
        nb.read_captions(tmp_path / "mine.txt")


def test_split_by_hash(nb, tmp_path):
    names = [f"{i}.jpg" for i in range(100)]
    splits = nb.read_splits(tmp_path, names)
    assert splits == nb.read_splits(tmp_path, names[::-1])
    assert sorted(sum(splits.values(), [])) == sorted(names)
    assert [len(splits[s]) for s in ("train", "dev", "test")] == [74, 13, 13]
    assert sorted(splits["test"]) != sorted(names)[:13]


def test_split_by_lists(nb, tmp_path):
    folder = standard_layout(tmp_path) / "Flickr8k_text"
    train = folder / "Flickr_8k.trainImages.txt"
    splits = nb.read_splits(folder, ["anything.jpg"])
    assert {split: len(names) for split, names in splits.items()} == COUNTS
    lists = train.read_text()
    for twice in ("train0.jpg", "test1.jpg"):  # in one list, or in two
        train.write_text(f"{lists}{twice}\n")
        with pytest.raises(ValueError, match=f"{twice} more than once"):
            nb.read_splits(folder, ["anything.jpg"])


# Reading a folder


def test_every_picture_keeps_its_captions_and_the_unreadable_are_named(nb, tmp_path, capsys):
    folder = kaggle_layout(tmp_path)
    splits = nb.read_splits(folder, [f"{i}.jpg" for i in range(40)])
    bad = splits["train"][3:5]
    for name, how in zip(bad, (10_000, POSTSCRIPT)):
        break_picture(folder / "Images" / name, how)
    for time in ("first", "from the cache"):
        capsys.readouterr()
        loaded = nb.load_splits(folder, SIZE, tmp_path / "cache")
        out, err = capsys.readouterr()
        assert re.search(f"train.*left out: 2 .*{min(bad)}", out) and not err, time
        assert count(loaded) == {"train": 28, "dev": 5, "test": 5}
        for split, part in loaded.items():
            assert part.images.shape[1:] == (3, SIZE, SIZE) and part.images.dtype == torch.uint8
            assert part.names == [name for name in splits[split] if name not in bad]
            for name, image, captions in zip(part.names, part.images, part.captions):
                assert captions == [f"The red is {6 * int(name[:-4])} ."]
                assert abs(image[0, 9, 9] - 6 * int(name[:-4])) <= 3


@pytest.mark.parametrize("loss", ["unreadable", "no file", "no caption"])
def test_more_than_a_tenth_lost_is_an_error(nb, tmp_path, loss):
    folder = kaggle_layout(tmp_path / "mine")
    names = nb.read_splits(folder, [f"{i}.jpg" for i in range(40)])["train"]
    if loss == "no caption":  # a list of the split that names what nobody describes
        lists = standard_layout(tmp_path / "lists") / "Flickr8k_text"
        with pytest.raises(ValueError, match=r"train: \d+ of \d+ lost"):
            nb.load_splits(folder, SIZE, tmp_path / "cache", lists)
        return
    for name in names[:4]:
        if loss == "no file":
            (folder / "Images" / name).unlink()
        else:
            break_picture(folder / "Images" / name, "truncated")
    with pytest.raises(ValueError, match=r"train: 4 of 30 lost in .*mine: .*\.jpg"):
        nb.load_splits(folder, SIZE, tmp_path / "cache")


def test_half_unpacked_folders_and_a_macs_shadows_are_no_data(nb, tmp_path):
    kaggle_layout(tmp_path / "Flickr8k.part", 9)
    kaggle_layout(tmp_path / "__MACOSX", 9)
    with pytest.raises(FileNotFoundError, match="lacks captions.txt"):
        nb.load_splits(tmp_path, SIZE, tmp_path / "cache")
    kaggle_layout(tmp_path / "whole")
    assert sum(count(nb.load_splits(tmp_path, SIZE, tmp_path / "cache")).values()) == 40


def test_many_bombs_among_many_pictures(nb, tmp_path, capsys):
    """Not one warning may get out."""
    for i in range(60):
        huge_png(tmp_path / f"{i}.jpg", 10_000) if i % 2 else save_jpeg(tmp_path / f"{i}.jpg")
    filters = list(warnings.filters)
    files = [tmp_path / f"{i}.jpg" for i in range(60)]
    images, names = nb.decode_pictures(files, SIZE, tmp_path / "cache")
    assert names == [f"{i}.jpg" for i in range(0, 60, 2)] and len(images) == 30
    assert warnings.filters == filters and not capsys.readouterr().err


def test_standard_means_the_standard_test_pictures_all_of_them(nb, tmp_path, real, monkeypatch):
    folder = standard_layout(tmp_path / "mine")
    monkeypatch.setenv("FLICKR8K_DIR", str(folder))
    assert nb.get_data(SIZE)[0] == "flickr8k"
    test = folder / "Flickr8k_text" / "Flickr_8k.testImages.txt"
    test.write_text("test1.jpg\n")
    assert nb.get_data(SIZE)[0] == "own"


def test_with_a_test_picture_lost_it_is_another_test(nb, tmp_path, monkeypatch):
    folder = kaggle_layout(tmp_path / "mine", 100)
    monkeypatch.setenv("FLICKR8K_DIR", str(folder))
    names = nb.read_splits(folder, [f"{i}.jpg" for i in range(100)])["test"]
    monkeypatch.setattr(nb, "TEST_SPLITS", {nb.fingerprint("\n".join(names)): "flickr8k"})
    assert nb.get_data(SIZE)[0] == "flickr8k"
    (folder / "Images" / names[3]).unlink()
    assert nb.get_data(SIZE)[0] == "own"


# Files that are whole, and the cache


def test_write_whole_leaves_the_old_file_or_the_new_one(nb, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    nb.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        nb.write_whole(path, fail)
    assert path.read_bytes() == b"old"
    events = []  # safe on the disk first, under its name then
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: events.append("replace") or replace(*a))
    nb.write_whole(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"newer" and events == ["fsync", "replace"]
    assert list(path.parent.iterdir()) == [path], "nothing is left lying about"


class Explosive:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


def test_a_broken_cache_is_made_anew(nb, tmp_path):
    save_jpeg(tmp_path / "0.jpg")
    files, cache = [tmp_path / "missing.jpg", tmp_path / "0.jpg"], tmp_path / "c" / "x.pt"
    images, names = nb.decode_pictures(files, SIZE, cache)
    assert images.shape == (1, 3, SIZE, SIZE) and names == ["0.jpg"]
    whole = cache.read_bytes()
    for spoil in (b"", b"junk", whole[: len(whole) // 2], Explosive()):
        cache.unlink()
        cache.write_bytes(spoil) if isinstance(spoil, bytes) else torch.save(spoil, cache)
        again, names = nb.decode_pictures(files, SIZE, cache)
        assert torch.equal(again, images) and names == ["0.jpg"]
    assert not Path("exploded").exists(), "a cache runs no code"


def test_the_cache_knows_what_it_holds(nb, tmp_path, monkeypatch):
    folder, decoded, read = kaggle_layout(tmp_path), [], nb.open_picture

    def load(size=SIZE):
        decoded.clear()
        monkeypatch.setattr(nb, "open_picture", lambda file: decoded.append(file) or read(file))
        return nb.load_splits(folder, size, tmp_path / "cache"), len(decoded)

    splits, n = load()
    assert n == 40
    assert load()[1] == 0, "the second time nothing is decoded"
    assert load(16)[1] == 40
    name = splits["train"].names[5]
    save_jpeg(folder / "Images" / name, (255, 255, 255))
    os.utime(folder / "Images" / name, ns=(0, 12345))
    splits, n = load()
    assert n == 30 and splits["train"].images[5].min() > 240, "read anew"


# Archives and the download


def zip_of(folder, archive):
    """As the two archives really are: with a Mac's shadows."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, path.relative_to(folder))
            file.writestr(f"__MACOSX/{path.relative_to(folder).parent}/._{path.name}", b"\0")
    return archive


@pytest.fixture
def archives(tmp_path):
    source = standard_layout(tmp_path / "source")
    for name in ("Flickr8k_Dataset", "Flickr8k_text"):
        zip_of(source / name, tmp_path / "archives" / f"{name}.zip")
    return tmp_path / "archives"


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "no zip":
        data = b"<html>503 Service Unavailable</html>"
    elif how == "wrong byte":  # in the middle of a stored file: its checksum no longer fits
        data[len(data) // 3] ^= 1
    elif how == "encrypted":
        data[6] |= 1
        data[data.index(b"PK\1\2") + 8] |= 1
    else:
        data = b"PK\5\6" + bytes(18)  # a whole archive of nothing
    path.write_bytes(data)


TEXT = ["Flickr8k_text"]


@pytest.mark.parametrize("how", ["cut", "no zip", "wrong byte", "encrypted", "empty"])
def test_a_broken_archive_is_named_and_leaves_no_data(nb, tmp_path, archives, how):
    damage(archives / "Flickr8k_text.zip", how)
    with pytest.raises(ValueError, match="Flickr8k_text.zip is broken.*run this cell again"):
        nb.fetch(tmp_path / "out", TEXT, archives)
    assert not (tmp_path / "out" / "Flickr8k_text").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(nb, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("x", b"small")
    infolist = zipfile.ZipFile.infolist

    def grown(self):  # as an archive of zeros would have it
        for member in infolist(self):
            member.file_size = 2**31
        return infolist(self)

    monkeypatch.setattr(zipfile.ZipFile, "infolist", grown)
    with pytest.raises(ValueError, match="x.zip.*disk"):
        nb.fetch(tmp_path / "out", ["x"], tmp_path)
    assert not (tmp_path / "out" / "x").exists()
    assert [file.name for file in (tmp_path / "out" / "x.part").iterdir()] == ["x.zip"]


def test_unpacking_goes_on_after_a_kill_and_a_full_disk(nb, tmp_path, archives, monkeypatch):
    part = tmp_path / "out" / "Flickr8k_text.part"
    part.mkdir(parents=True)
    (part / "half.txt").write_text("of a killed run")

    def full(archive, folder):
        (folder / "quarter.txt").write_text("of a full disk")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", full)
        with pytest.raises(OSError, match="No space left"):
            nb.fetch(tmp_path / "out", TEXT, archives)
    assert not (tmp_path / "out" / "Flickr8k_text").exists()
    nb.fetch(tmp_path / "out", TEXT, archives)
    found = (tmp_path / "out" / "Flickr8k_text").iterdir()
    assert sorted(file.name for file in found if file.is_file()) == [
        "Flickr8k.token.txt", *(f"Flickr_8k.{s}Images.txt" for s in ("dev", "test", "train"))
    ]  # fmt: skip
    assert not part.exists()


def test_an_archive_cant_write_outside_its_folder(nb, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("../../escaped.txt", "no")
        file.writestr("/tmp/escaped.txt", "no")
        file.writestr("good.txt", "yes")
    inside = nb.fetch(tmp_path / "a" / "b", ["x"], tmp_path) / "x"
    assert all(inside in file.parents for file in tmp_path.rglob("escaped.txt"))
    assert (inside / "good.txt").is_file() and not Path("/tmp/escaped.txt").exists()


@contextlib.contextmanager
def serve(data, announced):
    """A server that promises `announced` bytes and hangs up after `data`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_download_is_whole_or_no_data(nb, tmp_path, archives, monkeypatch):
    data, folder = (archives / "Flickr8k_text.zip").read_bytes(), tmp_path / "out"
    folder.mkdir()
    (folder / "Flickr8k_text.part").mkdir()
    (folder / "Flickr8k_text.part" / "x.zip.1234.partial").write_bytes(b"left by a killed run")
    with serve(data[:-100], len(data)) as url:
        monkeypatch.setenv("FLICKR8K_URL", url)
        with pytest.raises((OSError, ValueError), match="Flickr8k_text|broke|IncompleteRead"):
            nb.fetch(folder, TEXT)
    assert not (folder / "Flickr8k_text").exists()
    with serve(data, len(data)) as url:
        monkeypatch.setenv("FLICKR8K_URL", url)
        nb.fetch(folder, TEXT)
    assert [path.name for path in folder.iterdir()] == TEXT, "nothing is left lying about"


# Which data


def test_download_then_offline(nb, tmp_path, archives, real, monkeypatch):
    monkeypatch.setenv("FLICKR8K_URL", archives.as_uri() + "/")
    name, splits = nb.get_data(SIZE, tmp_path / "data", tmp_path / "no scenes")
    assert name == "flickr8k" and count(splits) == COUNTS
    left = sorted(path.name for path in (tmp_path / "data" / "flickr8k").iterdir())
    assert left == ["Flickr8k_Dataset", "Flickr8k_text"], "the archives are gone"
    monkeypatch.setenv("FLICKR8K_URL", "http://127.0.0.1:9/")
    assert nb.get_data(SIZE, tmp_path / "data", tmp_path / "no scenes")[0] == "flickr8k"


def test_without_a_network_the_scenes(nb, tmp_path, archives, capsys, drawn):
    name, splits = nb.get_data(SIZE, tmp_path / "data", archives)
    assert name == "scenes" and count(splits) == COUNTS
    assert "can't be fetched" in capsys.readouterr().out
    assert len(list(archives.iterdir())) == 2, "these archives are the project's own"
    with pytest.raises(FileNotFoundError, match="network.*FLICKR8K_DIR"):
        nb.get_data(SIZE, tmp_path / "elsewhere", tmp_path / "no scenes")


def test_the_scenes_may_be_asked_for(nb, tmp_path, archives, monkeypatch, drawn):
    monkeypatch.setenv("SUPRAVL_DATA", "toy")
    monkeypatch.setenv("FLICKR8K_DIR", str(kaggle_layout(tmp_path / "mine")))
    assert nb.get_data(SIZE, tmp_path / "data", archives)[0] == "scenes"


def test_ones_own_folder(nb, tmp_path, monkeypatch, real):
    monkeypatch.setenv("FLICKR8K_DIR", str(kaggle_layout(tmp_path / "mine")))
    name, splits = nb.get_data(SIZE, tmp_path / "data", tmp_path / "no scenes")
    assert name == "own" and count(splits) == {"train": 30, "dev": 5, "test": 5}
    monkeypatch.setenv("FLICKR8K_DIR", str(tmp_path / "wrong"))
    with pytest.raises(FileNotFoundError, match="wrong"):
        nb.get_data(SIZE, tmp_path / "data", tmp_path / "no scenes")


@pytest.mark.parametrize("network", [True, False])
def test_kaggles_copy_without_lists_has_the_standard_split_or_another_name(
    nb, tmp_path, archives, monkeypatch, real, network, capsys
):
    source, copy = tmp_path / "source", tmp_path / "kaggle" / "flickr8k"
    copy.mkdir(parents=True)
    (source / "Flickr8k_Dataset" / "Flicker8k_Dataset").rename(copy / "Images")
    lines = (source / "Flickr8k_text" / "Flickr8k.token.txt").read_text().splitlines()
    rows = [line.replace("#0\t", ",").replace("#1\t", ",") for line in lines]
    (copy / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "kaggle"))
    if network:
        monkeypatch.setenv("FLICKR8K_URL", archives.as_uri() + "/")
    name, splits = nb.get_data(SIZE, tmp_path / "data", tmp_path / "no scenes")
    if network:
        assert name == "flickr8k" and splits["test"].names == TEST_LIST.split("\n")
        assert count(splits) == COUNTS
    else:
        assert name == "own" and "can't be fetched" in capsys.readouterr().out


def test_dollar_signs_in_a_title(nb, monkeypatch, pictures):
    shown = []
    monkeypatch.setattr(nb.plt, "show", lambda: shown.append(nb.plt.gcf()))
    nb.show_pictures([pictures[0], Image.new("RGB", (9, 9))], ["costs $5_{$", "$\\alpha$"], 2)
    shown[0].canvas.draw()  # a broken formula would be an error here
    assert [axis.get_title() for axis in shown[0].axes] == ["costs $5_{$", "$\\alpha$"]
    assert not shown[0].axes[1].title.get_parse_math()
    nb.plt.close(shown[0])
