"""The notebook as a whole: run by the first command, and what is stored in it checked.

The run is a reader's: the README's first command in a folder like a clone, on a part of the drawn
scenes and with the quick recipe. Nothing may appear on standard error, where warnings go.
"""

import ast
import json
import re
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import nbformat
import pytest
import walk
from conftest import NOTEBOOK, ROOT

TAGS = {"component", "flickr8k-photos"}
ALLOWED = {"SupraVL_Nano.ipynb", "README.md", "requirements.txt", "LICENSE", "assets", "tests"}

BOOK = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in BOOK.cells if cell.cell_type == "markdown"]


def tags(cell):
    return cell.metadata.get("tags", [])


def syntax(source):
    """The syntax tree of a cell, in which a magic command is a `pass`."""
    return ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M))


def draws(source):
    """Whether a cell certainly shows a figure: a call of `show...` at its top level."""
    calls = [
        statement.value.func
        for statement in syntax(source).body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    ]
    return any(getattr(f, "id", getattr(f, "attr", "")).startswith("show") for f in calls)


# Running it


def test_the_first_command_runs_the_notebook():
    run = walk.whole_run()
    assert run.code == 0, run.err[-3000:]
    assert not run.err.strip(), "warnings, or worse"
    red = run.page.select("[data-mime-type='application/vnd.jupyter.stderr']")
    assert not walk.alarming("\n".join(output.get_text() for output in red))
    assert len(list((run.folder / "checkpoints").glob("*.pt"))) >= 1
    names = {file.name for file in (run.folder / "supravl-nano").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_first_command_says_what_it_does_and_where_the_result_is():
    run = walk.whole_run()
    sections = re.findall(r"^## (.*)$", "\n".join(PROSE), re.M)
    began = [re.search(rf"^\d+:\d\d  {re.escape(title[:60])}", run.out, re.M) for title in sections]
    assert all(began), "a line for each section, when it begins"
    last = run.out.strip().splitlines()[-12:]
    assert last[-1].endswith(str(run.file)) and last[-2].endswith(str(run.folder / "supravl-nano"))
    assert sum(line.strip().startswith("beam ") for line in last) >= 3


def test_every_picture_is_in_the_page():
    page = walk.whole_run().page
    assert all(image["src"].startswith("data:image/") for image in page.select("img"))
    assert not page.select("script[src]:not([async])"), "without a network it would wait"
    assert not re.search(r"<Figure size|\r", page.select_one("main").get_text())
    for cell in CODE:
        if draws(cell.source):
            shown = page.find(id=f"cell-id={cell.id}")
            assert shown.select("img"), (
                f"the cell shows a figure, but none came out:\n{cell.source}"
            )


def test_a_run_that_fails_says_so(tmp_path):
    """The tests above can fail: on a warning, on the process's standard error, on an error."""
    sources = ["import warnings\nwarnings.warn('look out')", "import os\n_ = os.write(2, b'deep')"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(book, tmp_path / "SupraVL_Nano.ipynb")
    run = walk.run_page(tmp_path)
    assert run.code == 0
    assert run.page.select("[data-mime-type='application/vnd.jupyter.stderr']")
    assert "deep" in run.err + run.page.get_text()
    run.file.unlink()
    book.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(book, tmp_path / "SupraVL_Nano.ipynb")
    run = walk.run_page(tmp_path)
    assert run.code and "ZeroDivisionError" in run.err and not run.page


# What is stored


def test_notebook_is_valid():
    nbformat.validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert BOOK.metadata.kernelspec.name == "python3"
    assert "widgets" not in BOOK.metadata, "GitHub shows no notebook that stores widgets' state"
    identities = [cell.id for cell in BOOK.cells]
    assert len(set(identities)) == len(identities)


def test_tags_are_known():
    for cell in BOOK.cells:
        assert set(tags(cell)) <= TAGS, f"unknown tag in {tags(cell)}"
        assert cell.cell_type == "code" or not tags(cell), "tags are for code cells"
    for cell in CODE:
        needs = cell.source.startswith("# needs: ")
        assert needs == ("component" in tags(cell)), f"tag or first line?\n{cell.source[:200]}"


def test_prose_stands_above_code():
    """A definition has prose right above it, or continues one; what shows it at work may follow."""
    row = []
    for cell in BOOK.cells:
        row = [*row, cell] if cell.cell_type == "code" else []
        if not row:
            continue
        about = f"\n{cell.source[:200]}"
        if "component" in tags(cell) and len(row) > 1:
            assert "component" in tags(row[-2]), f"no prose above this definition:{about}"
        assert len(row) <= 3, f"more than three code cells without a word between them:{about}"


def test_execution_counts():
    """The stored outputs are those of one run, from top to bottom, of the whole notebook."""
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))


def test_size():
    """GitHub often refuses to draw a notebook of more."""
    assert NOTEBOOK.stat().st_size <= 2e6
    assert not any("lines_to_next_cell" in cell.metadata for cell in BOOK.cells)
    for cell in CODE:
        if "component" in tags(cell):
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= 45, f"too long to be read at once:\n{cell.source[:200]}"


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell.id)
def test_stored_outputs(cell):
    for output in cell.outputs:
        assert output.output_type != "error", f"a stored error: {output.get('evalue')}"
        assert output.get("name") != "stderr", f"stored standard error: {output.text}"
        kinds = set(output.get("data", {}))
        assert kinds != {"application/vnd.jupyter.widget-view+json"}, "a widget and nothing else"
        assert "application/vnd.jupyter.widget-view+json" not in kinds or kinds & {
            "image/png", "text/html",
        }, "where widgets do not work this output is empty"  # fmt: skip
        if "flickr8k-photos" in tags(cell):
            text = json.dumps(output.get("data", {}))
            assert not any(kind.startswith("image/") for kind in kinds), "a stored photograph"
            assert "<img" not in text and "data:image" not in text, "a stored photograph"
        for text in texts(output):
            found = PATHS.search(text)
            assert not found, f"a path of the machine it ran on: {found.group()}"
            assert "\r" not in text, "every step of a progress bar is stored: GitHub shows them all"
    if draws(cell.source) and "flickr8k-photos" not in tags(cell):
        stored = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert stored & {"image/png", "image/jpeg"}, "the figure is not stored"


PATHS = re.compile(
    r"(?<![\w.:/<~-])/(?:[\w.+@ -]+/)+[\w.+@-]+|(?<![\w/])/(?:home|root|tmp|content|Users|mnt)\b"
    r"|\b[A-Za-z]:\\\w|file://"
)


def texts(output):
    """All texts of an output, but for pictures."""
    yield output.get("text", "")
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/"):
            text = data if isinstance(data, str) else json.dumps(data)
            yield re.sub(r"data:image/[\w+.-]+;base64,[\w+/=\s]+", "", text)


def test_paths_are_recognised():
    for text in (
        "/home/me/x.py:3",
        "in /tmp",
        "C:\\Users\\me",
        "at /opt/venv/lib/x.py",
        "'/root/x'",
    ):
        assert PATHS.search(text), text
    for text in ("and/or a/b/c", "https://arxiv.org/abs/1/2", "</b></td>", "data/x.npy", "3 / 4 /"):
        assert not PATHS.search(text), text


def test_cells_that_draw_the_dataset_say_so():
    """Who draws pictures of a split draws photographs when the data is Flickr8k."""
    for cell in CODE:
        if "component" in tags(cell) or "flickr8k-photos" in tags(cell):
            continue
        for call in ast.walk(syntax(cell.source)):
            if isinstance(call, ast.Call):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                inside = [n for argument in call.args for n in ast.walk(argument)]
                pictures = any(
                    isinstance(n, ast.Attribute)
                    and n.attr == "images"
                    and not ast.unparse(n).startswith("scenes[")  # drawn, whatever the data is
                    for n in inside
                )
                drawn = re.match(r"show|imshow|draw", name) and pictures
                assert not drawn, f"draws pictures of a split without the tag:\n{cell.source}"


# Links, pictures, files


def without_code(text):
    """Markdown without its code blocks and code spans, where a bracket is only a bracket."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M))


def links(text):
    """The targets of all links and pictures in a Markdown text."""
    text = without_code(text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    return found + re.findall(r"(?:href|src)=[\"']([^\"']+)[\"']", text)


def headings(text):
    """The headings of a Markdown text as a reader sees them."""
    lines = re.findall(
        r"^#{1,6} +(.*?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M
    )
    return [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", line) for line in lines]


def anchors(text, notebook):
    """What `#...` can point to, by the rule of Jupyter and GitHub: in a notebook the heading with
    dashes for spaces, in a Markdown file also lower-cased and without punctuation.
    """
    found = set(re.findall(r"<\w+[^>]*\b(?:id|name)=[\"']([^\"']+)", text))
    for heading in headings(text):
        slug = heading if notebook else re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(slug.replace(" ", "-"))
    return found


def repository_files():
    """Every file that is, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout: nobody knows which files belong to it")
    files = [Path(name) for name in done.stdout.decode().split("\0") if name]
    return [file for file in files if (ROOT / file).exists()]


DOCUMENTS = {
    "SupraVL_Nano.ipynb": "\n\n".join(PROSE),
    **{
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in [ROOT / "README.md", *sorted(ROOT.glob("assets/**/*.md"))]
        if path.is_file()
    },
}
each_document = pytest.mark.parametrize("name", DOCUMENTS)


@each_document
def test_links_resolve(name):
    text, here = DOCUMENTS[name], (ROOT / name).parent
    for link in links(text):
        link = urllib.parse.unquote(link)
        if re.match(r"https?://[\w.-]+\.\w+(/|$)", link):
            continue
        path, _, anchor = link.partition("#")
        if path:
            assert not path.startswith("/") and ":" not in path, f"not a relative link: {link}"
            assert (here / path).exists(), f"{link} does not exist"
            kept = {file for f in repository_files() for file in (f, *f.parents)}
            assert (here / path).resolve().relative_to(ROOT) in kept, f"{link} is not committed"
        if anchor and (not path or path.endswith((".md", ".ipynb"))):
            target = str((here / path).resolve().relative_to(ROOT)) if path else name
            known = anchors(DOCUMENTS[target], target.endswith(".ipynb"))
            assert anchor in known, f"#{anchor} is no heading of {target}"


@each_document
def test_pictures_have_a_text(name):
    text = without_code(DOCUMENTS[name])
    for alt, target in re.findall(r"!\[([^]]*)\]\(([^)]*)\)", text):
        assert len(alt.split()) >= 3, f"the picture {target} needs a text that says what it shows"
    for tag in re.findall(r"<img\b[^>]*>", text):
        alt = re.search(r"\balt=[\"']([^\"']*)", tag)
        assert alt and len(alt[1].split()) >= 3, f"{tag} needs an alt text that says what it shows"


@each_document
def test_nothing_is_left_to_fill_in(name):
    found = re.findall(r"@@\w+@@|\bTODO\b|\bFIXME\b|\bXXX\b", DOCUMENTS[name])
    assert not found, f"{name} still holds {found}"


def test_notebook_lists_its_sections():
    """Each section of the notebook is in the table of contents, in its order."""
    sections = [h.replace(" ", "-") for text in PROSE for h in re.findall(r"^## (.*)$", text, re.M)]
    opening = "\n\n".join(PROSE).partition("\n## ")[0]
    contents = [urllib.parse.unquote(link[1:]) for link in links(opening) if link[0] == "#"]
    assert contents == sections


def test_links_and_anchors_are_recognised():
    text = "# A `b` (c), *d*\n[x](#y) ![a dog](a.png) `[no](link)`\n<a id='e'>\n"
    text += "```\n[no](link)\n# no\n```\n"
    assert links(text) == ["#y", "a.png"]
    assert anchors(text, notebook=True) == {"A-b-(c),-d", "e"}
    assert anchors(text, notebook=False) == {"a-b-c-d", "e"}


def test_top_level_of_the_repository():
    names = {file.parts[0] for file in repository_files()}
    extra = {name for name in names - ALLOWED if not name.startswith(".")}
    assert not extra, f"these do not belong at the top: {sorted(extra)}"


def test_assets_hold_nothing_that_is_not_listed():
    """Photographs by name in their README, scripts that make something, the page's three files,
    and what these, the notebook or a README name.
    """
    files = [file for file in repository_files() if file.parts[0] == "assets"]
    assert files
    photos = (ROOT / "assets/photos/README.md").read_text(encoding="utf-8")
    scripts = [file for file in files if re.fullmatch(r"make_\w+\.py", file.name)]
    texts = [*DOCUMENTS.values(), *((ROOT / script).read_text("utf-8") for script in scripts)]
    text = "\n".join([*texts, *(cell.source for cell in CODE)])
    for file in files:
        if file.parent.name == "photos" and file.suffix != ".md":
            assert f"`{file.name}`" in photos, f"{file} has no source and no licence"
        elif file not in scripts and file.parent.name != "page":
            assert file.name in text, f"nothing names {file}"
            photo = file.suffix in (".jpg", ".jpeg", ".webp") and file.stem != "hero"
            assert not photo, f"{file}: a photograph?"


def test_the_scenes_archives_hold_what_their_script_draws():
    """Their names at least: the script's --check compares bytes, where Pillow is the same."""
    truth = json.loads((walk.SCENES / "scenes.json").read_text(encoding="utf-8"))["scenes"]
    with (
        zipfile.ZipFile(walk.SCENES / "Flickr8k_Dataset.zip") as pictures,
        zipfile.ZipFile(walk.SCENES / "Flickr8k_text.zip") as text,
    ):
        assert {*pictures.namelist()} == {f"Flicker8k_Dataset/{name}" for name in truth}
        assert sorted(text.namelist()) == ["Flickr8k.token.txt", *sorted(walk.LISTS)]
        lists = [text.read(name).decode().split() for name in walk.LISTS]
        assert [len(names) for names in lists] == [1200, 200, 200]
        assert sorted(sum(lists, [])) == sorted(truth)
        every = [*pictures.infolist(), *text.infolist()]
        assert {entry.date_time for entry in every} == {(1980, 1, 1, 0, 0, 0)}
        assert not pictures.testzip() and not text.testzip()


def test_no_picture_files_elsewhere():
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".zip", ".npy", ".pt"}
    found = [
        f for f in repository_files() if f.suffix.lower() in suffixes and f.parts[0] != "assets"
    ]
    assert not found


@pytest.mark.parametrize("how", [["check"], ["format", "--check"]])
def test_ruff(how):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *how, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
