"""The notebook as a whole: every cell re-run with nbval, and what is stored in it checked.

The re-run works in an empty folder with a link to `assets/`, on the drawn scenes. Cells with the
tag `nbval-check-output` must print what is stored, all others must run without error, and nothing
may appear on standard error, where warnings go.
"""

import ast
import contextlib
import json
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import nbformat
import nbval.kernel
import pytest
from nbval.plugin import IPyNbFile, NbCellError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "SupraVL_Nano.ipynb"
TAGS = {"component", "nbval-check-output", "flickr8k-photos"}
ALLOWED = {"SupraVL_Nano.ipynb", "README.md", "requirements.txt", "LICENSE", "assets", "tests"}

BOOK = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in BOOK.cells if cell.cell_type == "markdown"]


def tags(cell):
    return cell.metadata.get("tags", [])


def titles():
    """A name for each code cell: its number and the heading that it stands under."""
    heading, names = "", []
    for cell in BOOK.cells:
        if cell.cell_type == "markdown":
            heading = re.findall(r"^#+ (.*)$", cell.source, re.M)[-1:] or [heading]
            heading = heading[0]
        else:
            names.append(f"{len(names) + 1}-{re.sub(r'[^A-Za-z0-9]+', '-', heading).strip('-')}")
    return names


each_code_cell = pytest.mark.parametrize("number", range(len(CODE)), ids=titles())


# Running it


class Rerun:
    """Runs the code cells of a notebook in order, in one kernel, each once and when asked for."""

    def __init__(self, session, notebook, log):
        self.file = IPyNbFile.from_parent(session, path=notebook)
        self.file.compare_outputs = False  # but where a cell's tag asks for it
        self.cells, self.log = list(self.file.collect()), log
        self.problems, self.broken = [], None  # of each cell so far; the first that raised
        with pytest.MonkeyPatch.context() as patch:
            # nbval throws away what the kernel's process writes to its standard error.
            start = nbval.kernel.start_new_kernel
            patch.setattr(
                nbval.kernel, "start_new_kernel", lambda stderr, **how: start(stderr=log, **how)
            )
            patch.setattr(session.config.option, "nbval_current_env", True)
            self.file.setup()

    def run_to(self, number):
        """What is wrong with cell `number`, as a list of strings, after running up to it."""
        while len(self.problems) <= number:
            self.problems.append(self.run(self.cells[len(self.problems)]))
        return self.problems[number]

    def run(self, cell):
        if self.broken is not None:
            return [f"not run, because code cell {self.broken + 1} failed"]
        problems, start = [], self.log.seek(0, 2)
        try:
            cell.runtest()
        except NbCellError as error:
            trace = re.sub(r"\x1b\[[0-9;]*m", "", error.inner_traceback or "")
            problems.append(f"{error}\n{trace}")
            if "outputs differ" not in str(error):
                self.broken = len(self.problems)
        for output in cell.test_outputs or []:
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"on standard error: {output.text}")
        self.log.seek(start)
        problems += [f"on the process's standard error: {text}" for text in self.log.readlines()]
        return problems


@contextlib.contextmanager
def rerun(session, notebook, folder):
    """A kernel for `notebook`, which is linked into `folder` and run there."""
    import matplotlib.font_manager  # noqa: F401  builds its cache, and says so, if there is none

    copy = folder / notebook.name
    if copy != notebook:
        copy.write_bytes(notebook.read_bytes())
        (folder / "assets").symlink_to(notebook.parent / "assets", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch, open(folder / "stderr.log", "w+") as log:
        steering = ("RECIPE", "PRECISION", "RESULTS", "SHARDS")
        for name in (
            *(f"SUPRAVL_{word}" for word in steering),
            *("FLICKR8K_DIR", "PYTHONWARNINGS", "MPLBACKEND"),
        ):
            patch.delenv(name, raising=False)  # as a reader's notebook, whatever is set here
        patch.setenv("SUPRAVL_DATA", "toy")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # nobody's start-up files
        patch.setenv("PYTEST_CURRENT_TEST", "notebook")  # leaves the process's standard error alone
        run = Rerun(session, copy, log)
        try:
            yield run
        finally:
            run.file.teardown()


@pytest.fixture(scope="module")
def notebook_run(request, tmp_path_factory):
    with rerun(request.session, NOTEBOOK, tmp_path_factory.mktemp("notebook")) as run:
        yield run


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
    return any(isinstance(f, ast.Name) and f.id.startswith("show") for f in calls)


@each_code_cell
def test_cell_runs(notebook_run, number):
    problems = notebook_run.run_to(number)
    if problems and problems[0].startswith("not run"):
        pytest.skip(problems[0])
    assert not problems, "\n".join(problems)
    if draws(CODE[number].source):
        kinds = {
            kind for o in notebook_run.cells[number].test_outputs for kind in o.get("data", ())
        }
        assert "image/png" in kinds, "the cell shows a figure, but no picture came out"


def test_the_rerun_names_what_was_drawn(notebook_run, nb):
    """The model that the rerun trained and saved, on scenes with combinations it never saw."""
    notebook_run.run_to(len(CODE) - 1)
    if notebook_run.broken is not None:
        pytest.skip(f"code cell {notebook_run.broken + 1} failed")
    vlm = nb.SupraVLNano.from_pretrained(notebook_run.file.path.parent / "supravl-nano")
    scenes = ROOT / "assets" / "scenes"
    truth = json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))
    names = (scenes / "Flickr_8k.testImages.txt").read_text().split()
    captions = vlm.generate_beam([scenes / "Flicker8k_Dataset" / name for name in names])
    drawn = [truth["scenes"][name] for name in names]
    for kind, key in (("objects", "o"), ("colours", "c")):
        right = [
            nb.things_named(caption, truth[kind]) == {scene[key]}
            for caption, scene in zip(captions, drawn)
        ]
        assert sum(right) >= 0.9 * len(right), f"{kind} right in {sum(right)} of {len(right)}"


def test_the_rerun_notices_what_it_must(request, tmp_path):
    """The test above can fail: on a warning, on standard error, on another output, on an error."""
    sources = [
        "print('fine')",
        "import warnings\nwarnings.warn('look out')",
        "import os\n_ = os.write(2, b'from deep below')",
        "import sys\nprint('an aside', file=sys.stderr)",
        "print('new')",
        "print('not compared')",
        "import json, os\nos.environ['SUPRAVL_DATA'] + os.getcwd()",
        "1 / 0",
        "print('after the error')",
    ]
    book = nbformat.v4.new_notebook()
    for count, source in enumerate(sources, 1):
        stored = nbformat.v4.new_output("stream", text="old\n")
        cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=[stored])
        cell.metadata.tags = ["nbval-check-output"] if "new" in source else []
        book.cells.append(cell)
    nbformat.write(book, tmp_path / "bad.ipynb")
    with rerun(request.session, tmp_path / "bad.ipynb", tmp_path) as run:
        found = ["\n".join(run.run_to(number)) for number in range(len(sources))]
        place = run.cells[6].test_outputs[0]["data"]["text/plain"]
    assert found[0] == found[5] == found[6] == ""
    assert "UserWarning: look out" in found[1]
    assert "from deep below" in found[2]
    assert "an aside" in found[3]
    assert "outputs differ" in found[4]
    assert "ZeroDivisionError" in found[7]
    assert found[8].startswith("not run, because code cell 8 failed")
    assert place == f"'toy{tmp_path}'"


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
        assert not {"component", "nbval-check-output"} <= set(tags(cell)), (
            "components print nothing"
        )


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


@each_code_cell
def test_stored_outputs(number):
    cell = CODE[number]
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
    if "nbval-check-output" in tags(cell):
        assert cell.outputs, "its output is compared, but none is stored"
    if draws(cell.source) and "flickr8k-photos" not in tags(cell):
        stored = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert "image/png" in stored, "the figure is not stored"


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
    contents = [urllib.parse.unquote(link[1:]) for link in links(PROSE[0]) if link[0] == "#"]
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
    """Photographs by name in their README, drawn scenes by name in their split files (whose truth
    is in scenes.json), scripts that make something, and what these, the notebook or a README name.
    """
    files = [file for file in repository_files() if file.parts[0] == "assets"]
    assert files
    photos = (ROOT / "assets/photos/README.md").read_text(encoding="utf-8")
    scenes = ROOT / "assets/scenes"
    splits = {split: scenes / f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test")}
    drawn = {name for file in splits.values() for name in file.read_text().split()}
    assert len(drawn) == 1600
    truth = (scenes / "scenes.json").read_text()
    scripts = [file for file in files if re.fullmatch(r"make_\w+\.py", file.name)]
    texts = [*DOCUMENTS.values(), *((ROOT / script).read_text() for script in scripts)]
    text = "\n".join([*texts, *(cell.source for cell in CODE)])
    for file in files:
        if file.parent.name == "photos" and file.suffix != ".md":
            assert f"`{file.name}`" in photos, f"{file} has no source and no licence"
        elif file.parent.name == "Flicker8k_Dataset":
            assert file.name in drawn, f"{file} is in no split"
            assert file.name in truth, f"{file} is no drawn scene"
        elif file not in scripts and ROOT / file not in splits.values():
            assert file.name in text, f"nothing names {file}"
            assert file.suffix not in (".jpg", ".jpeg", ".webp"), f"{file}: a photograph?"


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
