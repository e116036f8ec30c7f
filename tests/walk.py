"""What the walks of the tests share: a reader's folder, and the first command run in it."""

import contextlib
import functools
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from pathlib import Path

from bs4 import BeautifulSoup
from conftest import NOTEBOOK, ROOT

SCENES = ROOT / "assets" / "scenes"
STEERING = ("FLICKR8K_DIR", "FLICKR8K_URL", "KAGGLE_INPUT", "PYTHONWARNINGS", "MPLBACKEND")
LISTS = [f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test")]


def some_scenes(folder, train, others):
    """The two archives, cut down to the first pictures of each split, with a Mac's shadow files."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(SCENES / "Flickr8k_text.zip") as text:
        texts = {name: text.read(name).decode().splitlines() for name in text.namelist()}
    for name, n in zip(LISTS, (train, others, others)):
        texts[name] = texts[name][:n]
    names = {name for file in LISTS for name in texts[file]}
    texts["Flickr8k.token.txt"] = [
        line for line in texts["Flickr8k.token.txt"] if line.partition("#")[0] in names
    ]
    with (
        zipfile.ZipFile(SCENES / "Flickr8k_Dataset.zip") as source,
        zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w") as pictures,
        zipfile.ZipFile(folder / "Flickr8k_text.zip", "w") as text,
    ):
        for name in (f"Flicker8k_Dataset/{name}" for name in sorted(names)):
            pictures.writestr(name, source.read(name))
            pictures.writestr(f"__MACOSX/{name.replace('/', '/._')}", b"\0\5\26\7")
        for name, lines in texts.items():
            text.writestr(name, "\n".join(lines) + "\n")
            text.writestr(f"__MACOSX/._{name}", b"\0\5\26\7")
    return folder


def first_scenes(n):
    """[(file name, its first caption), ...] of the first `n` training scenes."""
    with zipfile.ZipFile(SCENES / "Flickr8k_text.zip") as text:
        names = text.read(LISTS[0]).decode().split()[:n]
        lines = text.read("Flickr8k.token.txt").decode().splitlines()
    captions = dict(line.split("#0\t") for line in lines if "#0\t" in line)
    return [(name, captions[name]) for name in names]


def readers_folder(folder, train=240, others=60):
    """A copy of the repository as a reader has it, with fewer scenes."""
    (folder / "assets").mkdir(parents=True)
    (folder / "SupraVL_Nano.ipynb").write_bytes(NOTEBOOK.read_bytes())
    for entry in (ROOT / "assets").iterdir():
        if entry.name != "scenes":
            (folder / "assets" / entry.name).symlink_to(entry)
    some_scenes(folder / "assets" / "scenes", train, others)
    (folder / "assets" / "scenes" / "scenes.json").symlink_to(SCENES / "scenes.json")
    return folder


def environment(folder, **settings):
    """This process's environment without what steers the notebook, and with `settings`."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in STEERING and not key.startswith(("SUPRAVL_", "TQDM"))
    }
    env["IPYTHONDIR"] = str(folder / ".ipython")  # nobody's start-up files
    env["KAGGLE_INPUT"] = str(folder / "no kaggle")
    return env | settings


def alarming(text):
    """The lines of what stands on standard error that are no progress bar's."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]


def run_page(folder, **settings):
    """The README's first command, in `folder`: return code, stdout, stderr, page (or None)."""
    command = [sys.executable, "-m", "nbconvert", "--config", str(ROOT / "assets/page/config.py")]
    done = subprocess.run(
        [*command, "SupraVL_Nano.ipynb"],
        cwd=folder, env=environment(folder, **settings), capture_output=True, text=True,
    )  # fmt: skip
    file = folder / "SupraVL_Nano.html"
    page = BeautifulSoup(file.read_text("utf-8"), "html.parser") if file.is_file() else None
    return types.SimpleNamespace(
        folder=folder, code=done.returncode, out=done.stdout, err=done.stderr, file=file, page=page
    )


@functools.cache
def whole_run():
    """The whole notebook, as the first command runs it, with few scenes and the quick recipe."""
    import matplotlib.font_manager  # noqa: F401  builds its cache, and says so, if there is none

    folder = tempfile.TemporaryDirectory()
    run = run_page(
        readers_folder(Path(folder.name) / "reader"), SUPRAVL_DATA="toy", SUPRAVL_RECIPE="quick"
    )
    run.keep = folder  # deleted with the process
    return run


@contextlib.contextmanager
def serve(folder):
    """An HTTP server of `folder` on this machine: yields (address, list of what was asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *how):
            super().__init__(*how, directory=str(folder))

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
