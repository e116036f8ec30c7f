"""The component cells can be lifted out: each stands on what its first line names."""

import ast
import builtins
import dis
import re
import sys
import time
import types

import pytest
from conftest import NOTEBOOK, component_cells

CELLS = component_cells()
TITLES = [
    re.findall(r"^(?:class|def) (\w+)|\Z", cell, re.MULTILINE)[0] or "imports" for cell in CELLS
]
each_cell = pytest.mark.parametrize("number", range(len(CELLS)), ids=TITLES)


def names_defined(source):
    """What a cell adds to the namespace: imports, assignments, functions, classes."""
    code = dis.get_instructions(compile(source, "cell", "exec"))
    return {i.argval for i in code if i.opname == "STORE_NAME"} - {"__annotations__"}


def globals_read(source):
    """The global names that a cell reads, at its top level or anywhere inside.

    By the compiled code and not by `symtable`, which since Python 3.12 takes the variables of
    comprehensions for the surrounding scope's.
    """
    reads = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS")

    def walk(code, top=True):
        instructions = list(dis.get_instructions(code))
        own = set() if top else {i.argval for i in instructions if i.opname == "STORE_NAME"}
        yield from {i.argval for i in instructions if i.opname in reads} - own
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from walk(constant, top=False)

    return set(walk(compile(source, "cell", "exec")))


def needs(source):
    """The names in a cell's first line; empty for `# needs: nothing`."""
    first = source.split("\n")[0]
    assert re.fullmatch(r"# needs: \w+(, \w+)*", first), f"not a needs line: {first!r}"
    names = first.removeprefix("# needs: ").split(", ")
    return [] if names == ["nothing"] else names


def providers(number):
    """The numbers of the earlier cells that cell `number` names."""
    found = set()
    for name in needs(CELLS[number]):
        earlier = [0] if name == "imports" else [i for i in range(number) if name in DEFINED[i]]
        assert earlier, f"'{name}' is named but no earlier component defines it"
        found.add(earlier[-1])
    return found


def closure(number):
    """Cell `number`, the cells that it names, the cells that those name, and so on, in order."""
    found, waiting = set(), {number}
    while waiting:
        found |= waiting
        waiting = set().union(*(providers(i) for i in waiting)) - found
    return sorted(found)


DEFINED = [names_defined(cell) for cell in CELLS]


def run(numbers):
    namespace = {"__name__": "cells"}
    for i in numbers:
        exec(compile(CELLS[i], f"component {TITLES[i]}", "exec"), namespace)
    return namespace


def test_these_tests_read_names_right_on_every_python():
    source = "X: int = [y for y in range(3)]\nclass A:\n    z = 1\n    u = z\n"
    source += "    def f(self, a):\n        return [b for b in a if outside(b)]\n"
    assert names_defined(source) == {"X", "A"}
    assert globals_read(source) - set(dir(builtins)) - {"__annotations__"} <= {"outside", "X", "A"}
    assert "outside" in globals_read(source)


def test_there_are_components():
    defined = set().union(*DEFINED)
    assert {"Config", "MiniVLM", "train", "beam_search", "from_pretrained"} <= defined


def test_the_first_cell_holds_the_imports_and_nothing_else():
    assert needs(CELLS[0]) == []
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(CELLS[0]).body)


def test_no_import_is_left_over():
    notebook = NOTEBOOK.read_text(encoding="utf-8")
    uses = {name: len(re.findall(rf"\b{name}\b", notebook)) for name in DEFINED[0]}
    assert not [name for name, n in uses.items() if n < 2]


@each_cell
def test_a_cell_names_what_it_reads_and_nothing_else(number):
    read = globals_read(CELLS[number])
    near = set().union(*(DEFINED[i] for i in providers(number)))
    assert not read - set(dir(builtins)) - {"__annotations__"} - DEFINED[number] - near
    # Whoever passes a `cfg`, a `recipe` or a `model` has to make one.
    means = {"cfg": "Config", "recipe": "Recipe", "model|self": "MiniVLM", "loss_of": "CaptionLoss"}
    read |= {name for word, name in means.items() if re.search(rf"\b({word})\b", CELLS[number])}
    read |= set(re.findall(r"\w+", CELLS[number].split("\n", 1)[-1]))  # a docstring names a Batch
    assert not [TITLES[i] for i in providers(number) if i and not DEFINED[i] & read]


@each_cell
def test_a_cell_runs_with_only_the_cells_that_it_names(number):
    assert DEFINED[number] <= run(closure(number)).keys()


@each_cell
def test_a_cell_defines_what_no_other_does(number):
    others = set().union(*(DEFINED[i] for i in range(len(CELLS)) if i != number))
    assert not DEFINED[number] & others


OUTSIDE = ("open", "os.", "shutil.", "socket.", "subprocess.", "tempfile.", "urllib.", "http.")
recorded = None  # a list while `record_events` listens


def record_events(event, args):
    if recorded is not None and event.startswith(OUTSIDE):
        recorded.append((event, args))


sys.addaudithook(record_events)  # a hook can't be removed: this one is deaf between tests


def test_all_run_in_seconds_and_touch_nothing(nb, capfd, tmp_path):
    """`nb` has run before, so the imports (which do read files) are in memory by now."""
    global recorded
    capfd.readouterr()
    recorded, start = [], time.process_time()
    try:
        run(range(len(CELLS)))
        assert recorded == []
        open(tmp_path / "x", "w").close()
        assert recorded[0][0] == "open", "the hook is deaf"
    finally:
        recorded = None
    assert time.process_time() - start < 5
    assert capfd.readouterr() == ("", "")
