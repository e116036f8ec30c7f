"""Where readers are: the notebook alone in an empty folder, on a machine with float16 only.

The data comes from a server on this machine, in the layout of the real archives. Everything up to
section 10 runs: the way from a download to a saved model. And all of it, with somebody's own
pictures. (`test_data.py` has Kaggle's folder.)
"""

import re
import zipfile

import nbformat
import pytest
import walk
from conftest import NOTEBOOK
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SHORT = "recipe = replace(recipe, epochs=2, warmup=5)"


def main_path(whole=False):
    """The notebook's cells up to section 10, with two epochs, and nothing learned by heart."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    ends = [i for i, cell in enumerate(book.cells) if re.match("## 11 ", cell.source)]
    end = None if whole else ends[0]
    book.cells = [cell for cell in book.cells[:end] if "handful" not in cell.source]
    changed = "# recipe = replace(recipe, epochs=3)"
    assert sum(changed in cell.source for cell in book.cells) == 1
    for cell in book.cells:
        cell.source = cell.source.replace(changed, SHORT + changed)
        if cell.cell_type == "code":
            cell.outputs = []
    return book


def run(folder, whole=False, **settings):
    """Run the main path in `folder`, with nothing in it but the notebook. Returns its outputs."""
    book = main_path(whole)
    nbformat.write(book, folder / "SupraVL_Nano.ipynb")
    client = NotebookClient(
        book, resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"]
    )
    with open(folder / "stderr.log", "w") as log:
        client.execute(env=walk.environment(folder, **settings), stderr=log)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not walk.alarming("".join(o.text for o in outputs if o.get("name") == "stderr"))
    assert not (folder / "stderr.log").read_text()
    return outputs


def said(outputs):
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The notebook alone in an empty folder, run once with a server: (folder, outputs)."""
    folder = tmp_path_factory.mktemp("alone")
    archives = walk.some_scenes(tmp_path_factory.mktemp("server") / "archives", 60, 20)
    with walk.serve(archives) as (url, asked):
        outputs = run(folder, FLICKR8K_URL=url, SUPRAVL_PRECISION="float16")
    assert sorted(asked) == ["/Flickr8k_Dataset.zip", "/Flickr8k_text.zip"]
    return folder, outputs


def test_the_notebook_alone(alone):
    """It downloads, unpacks, trains with the scaler in float16, captions and saves."""
    folder, outputs = alone
    text = said(outputs)
    assert "data: own" in text, "a part of the scenes is not Flickr8k's standard split"
    assert "torch.float16" in text and "same captions: True" in text
    assert "train (60, 3, 112, 112)" in text and "test  (20, 3, 112, 112)" in text
    assert {file.name for file in (folder / "supravl-nano").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    pictures = [o for o in outputs if any(k.startswith("image/") for k in o.get("data", {}))]
    assert len(pictures) >= 3
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.zip"))


def test_run_again_with_the_server_gone(alone):
    """What was downloaded is there, and training goes on after its last epoch."""
    folder, _ = alone
    outputs = run(folder, FLICKR8K_URL="http://127.0.0.1:9/", SUPRAVL_PRECISION="float16")
    assert "2 epochs are done" in said(outputs) and "data: own" in said(outputs)


def test_a_server_that_goes_away_half_way(tmp_path):
    """Half of an archive is never data: the cell says what to do, and the next run does it."""
    archives = walk.some_scenes(tmp_path / "archives", 30, 10)
    pictures = archives / "Flickr8k_Dataset.zip"
    whole = pictures.read_bytes()
    pictures.write_bytes(whole[: len(whole) // 2])
    reader = tmp_path / "reader"
    reader.mkdir()
    with walk.serve(archives) as (url, _):
        with pytest.raises(CellExecutionError, match="is broken.*run this cell again"):
            run(reader, FLICKR8K_URL=url, SUPRAVL_PRECISION="float32")
        assert not (reader / "data" / "flickr8k" / "Flickr8k_Dataset").exists()


def test_no_network_at_all(tmp_path):
    """A plain sentence that says what to do."""
    with pytest.raises(CellExecutionError) as error:
        run(tmp_path, FLICKR8K_URL="http://127.0.0.1:9/", SUPRAVL_PRECISION="float32")
    last = re.sub(r"\x1b\[[\d;]*m", "", str(error.value)).strip().splitlines()[-1]
    assert re.search("FileNotFoundError: .*network.*FLICKR8K_DIR", last)


@pytest.mark.parametrize("layout", ["comma", "tab"])
def test_own_pictures(tmp_path, layout):
    """A folder of pictures with one caption each, in both layouts: all sections run."""
    own, reader = tmp_path / "own", tmp_path / "reader"
    own.mkdir(), reader.mkdir()
    lines = ["image,caption"] if layout == "comma" else []
    for name, caption in walk.first_scenes(60):
        with zipfile.ZipFile(walk.SCENES / "Flickr8k_Dataset.zip") as archive:
            (own / name).write_bytes(archive.read(f"Flicker8k_Dataset/{name}"))
        lines.append(f'{name},"{caption}"' if layout == "comma" else f"{name}\t{caption}")
    (own / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    settings = {"FLICKR8K_DIR": str(own), "SUPRAVL_PRECISION": "float32"}
    outputs = run(reader, layout == "comma", SUPRAVL_RECIPE="few", **settings)
    text = said(outputs)
    assert "data: own" in text and "batch_size=20" in text and "train (44, 3, 112, 112)" in text
    assert "same captions: True" in text
    assert ("wrong tokenizer" in text) == (layout == "comma"), "the last section's last output"
