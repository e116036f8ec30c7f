"""Run the notebook from top to bottom and store its outputs in it, fit to be committed.

    FLICKR8K_DIR=/path/to/flickr8k .venv/bin/python tests/store_outputs.py

Progress bars are reduced to their last line, and the images of the cells that show photographs of
Flickr8k, which may not be passed on, are left out.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, TagRemovePreprocessor

ROOT = Path(__file__).resolve().parents[1]


def clean(notebook):
    """Remove what is not to be stored, in place."""
    counts = [cell.get("execution_count") for cell in notebook.cells]
    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    TagRemovePreprocessor(remove_all_outputs_tags={"flickr8k-photos"}).preprocess(notebook, {})
    notebook.metadata.pop("widgets", None)  # GitHub draws no notebook that holds their state
    for cell, count in zip(notebook.cells, counts):
        for key in ("execution", "lines_to_next_cell"):  # times of day; of no use to anybody
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.execution_count = count  # a cell without its photographs was run all the same
            cell.outputs = [o for o in cell.outputs if o.get("text", "-").strip()]
            for output in cell.outputs:
                if "text" in output:  # a program run by ! ends its lines in another way
                    output["text"] = output["text"].replace("\r\n", "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--notebook", type=Path, default=ROOT / "SupraVL_Nano.ipynb")
    path = parser.parse_args().notebook
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": ROOT}}).execute()
    clean(notebook)
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
