"""In a real browser: the page that the first command leaves, and the notebook in JupyterLab."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
import walk
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if BROWSER is None:
    pytest.skip("no Chromium here: .ci/run installs one", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
SHOTS = os.environ.get("SUPRAVL_SCREENSHOTS")  # a folder, for somebody who wants to look


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def shoot(tab, name):
    if SHOTS:
        tab.screenshot(path=f"{SHOTS}/{name}.png")


# The page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page(browser, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab.route(re.compile("^https?:"), lambda route: route.abort())  # no network
    errors = []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.goto(walk.whole_run().file.as_uri())
    assert not errors
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert tab.evaluate(broken) == 0 and tab.evaluate("document.images.length") >= 9
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    beyond = """[...document.querySelectorAll('h1, h2, h3, p, li, img')]
        .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
        .filter(e => !e.closest('table, pre, .jp-OutputArea-output')).map(e => e.outerHTML)"""
    assert tab.evaluate(beyond) == []
    paper, ink = (
        sum(map(int, re.findall(r"\d+", tab.evaluate(f"getComputedStyle({what}).{key}"))[:3]))
        for what, key in (
            ("document.body", "backgroundColor"),
            ("document.querySelector('.jp-RenderedMarkdown p')", "color"),
        )
    )
    assert (paper < ink) == (scheme == "dark") and abs(paper - ink) > 300
    shoot(tab, f"page-{width}-{scheme}")
    tab.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    contents = tab.locator("#contents")
    assert contents.bounding_box()["y"] == 0, "it stays in reach"
    contents.locator("summary").click()
    links = contents.locator("a")
    assert links.count() == len(re.findall(r"^## ", nbformat_prose(), re.M))
    shoot(tab, f"contents-{width}-{scheme}")
    links.nth(9).click()
    heading = tab.locator("h2").nth(9)
    assert 0 <= heading.bounding_box()["y"] < 844
    assert not contents.evaluate("e => e.open")
    shoot(tab, f"section-{width}-{scheme}")
    tab.close()


def nbformat_prose():
    book = nbformat.read(walk.NOTEBOOK, as_version=4)
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


# JupyterLab

SLOW = """import time
at_once = plt.show
plt.show = lambda: (time.sleep(1), at_once())
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab in a reader's folder, with few scenes: the address of the notebook."""
    folder = walk.readers_folder(tmp_path_factory.mktemp("lab") / "reader")
    book = nbformat.read(folder / "SupraVL_Nano.ipynb", as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "def explore" in cell.source:  # time for messages that another thread handles, which
            cell.source = SLOW + cell.source  # show and close all of pyplot's open figures
    nbformat.write(book, folder / "SupraVL_Nano.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.port": port, "ServerApp.ip": "127.0.0.1", "ServerApp.open_browser": False,
        "ServerApp.allow_root": True, "IdentityProvider.token": "", "ServerApp.root_dir": folder,
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())]
    settings = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    }
    settings |= {"SUPRAVL_DATA": "toy", "SUPRAVL_RECIPE": "quick", "SUPRAVL_PRECISION": "float32"}
    # All cells stay in the page: one that JupyterLab takes out while it lays out anew loses clicks.
    own = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    own.parent.mkdir(parents=True)
    own.write_text('{"windowingMode": "none"}')
    env = walk.environment(folder, JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"), **settings)
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api").close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/lab/tree/SupraVL_Nano.ipynb?reset", folder
    finally:
        server.terminate()
        server.wait(30)


def test_jupyterlab(browser, lab, tmp_path):
    """Run all; then choose and upload photographs, and change the decoder, by mouse.

    ipykernel (7.4) handles messages of widgets in two threads at once, and shows pyplot's figures
    after each: one that is just being drawn would be shown there, and be gone from its place.
    """
    url, folder = lab
    tab, said = browser.new_page(viewport={"width": 1280, "height": 900}), []
    tab.on("console", lambda message: said.append(message.text))
    tab.set_default_timeout(60_000)
    tab.goto(url)
    tab.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").first.wait_for()
    idle = tab.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    tab.get_by_text("| Idle").wait_for()
    for _ in range(10):  # what is clicked before the kernel is connected is forgotten
        tab.wait_for_timeout(2000)
        if (select := tab.locator(".jp-Dialog button.jp-mod-accept")).count():
            select.click()
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        tab.wait_for_timeout(3000)
        if not idle.count():
            break
    shoot(tab, "lab-begin")
    quiet, end = 0, time.monotonic() + 900
    while quiet < 10 and time.monotonic() < end:  # between two cells it is idle for a moment
        tab.wait_for_timeout(500)
        quiet = quiet + 1 if idle.count() else 0
    shoot(tab, "lab-end")
    tab.keyboard.press("Control+s")
    tab.wait_for_timeout(3000)
    book = nbformat.read(folder / "SupraVL_Nano.ipynb", as_version=4)
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    assert not [o.evalue for o in outputs if o.output_type == "error"]
    assert not walk.alarming("\n".join(o.text for o in outputs if o.get("name") == "stderr"))
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum(any(k.startswith("image/") for k in o.get("data", {})) for o in outputs) >= 9

    # the interactive cell, by mouse
    place = next(i for i, cell in enumerate(book.cells) if "def explore" in cell.source)
    cell = tab.locator(".jp-NotebookPanel .jp-Cell").nth(place)
    cell.scroll_into_view_if_needed()
    pictures = cell.locator(".jp-OutputArea-output img")
    pictures.nth(1).wait_for()

    def look():
        return [pictures.nth(i).get_attribute("src") for i in range(pictures.count())]

    def upload(file):
        with tab.expect_file_chooser() as asked:
            cell.locator(".widget-upload").click()
        asked.value.set_files(file)

    def changed(before):
        end = time.monotonic() + 180  # a busy machine takes its time
        while time.monotonic() < end:
            tab.wait_for_timeout(250)
            now = look()
            if len(now) >= 2 and now != before:
                return now
        chosen = [choose.nth(i).input_value() for i in range(choose.count())]
        kernel = "idle" if idle.count() else "busy"
        raise AssertionError(f"{len(now)} pictures as before, {chosen}, {kernel}, {said[-9:]}")

    choose = cell.locator(".widget-dropdown select")
    first = look()
    shoot(tab, "lab-interactive")
    choose.nth(0).select_option(index=3)
    second = changed(first)
    assert second[0] != first[0]
    choose.nth(1).select_option(label="top-k")
    changed(second)
    mine = tmp_path / "mine.png"
    Image.new("RGB", (60, 40), "green").save(mine)
    before = look()
    upload(mine)
    after = changed(before)
    assert after[0] not in (first[0], second[0])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    upload(broken)
    cell.get_by_text("can't be read as a picture").wait_for()
    shoot(tab, "lab-broken")
    tab.close()
