"""The component cells can be lifted out: each stands on what its first line names."""

import ast
import builtins
import re
import symtable
import sys
import time

import pytest
from conftest import component_cells

CELLS = component_cells()
TITLES = [
    re.findall(r"^(?:class|def) (\w+)|\Z", cell, re.MULTILINE)[0] or "imports" for cell in CELLS
]
each_cell = pytest.mark.parametrize("number", range(len(CELLS)), ids=TITLES)


def names_defined(source):
    """What a cell adds to the namespace: imports, assignments, functions, classes."""
    table = symtable.symtable(source, "cell", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def globals_read(source):
    """The global names that a cell reads, at its top level or anywhere inside."""

    def walk(table):
        for symbol in table.get_symbols():
            at_top = table.get_type() == "module"
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from walk(child)

    return set(walk(symtable.symtable(source, "cell", "exec")))


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
    namespace = {}
    for i in numbers:
        exec(compile(CELLS[i], f"component {TITLES[i]}", "exec"), namespace)
    return namespace


def test_there_are_components():
    defined = set().union(*DEFINED)
    assert {"Config", "MiniVLM", "train_model", "Captioner", "SupraVLNano"} <= defined


def test_the_first_cell_holds_the_imports_and_nothing_else():
    assert needs(CELLS[0]) == []
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(CELLS[0]).body)


@each_cell
def test_a_cell_names_what_it_reads(number):
    allowed = set(dir(builtins)) | DEFINED[number]
    allowed |= set().union(*(DEFINED[i] for i in providers(number)))
    unnamed = globals_read(CELLS[number]) - allowed
    assert not unnamed


@each_cell
def test_a_cell_names_nothing_that_it_does_not_use(number):
    read = globals_read(CELLS[number])
    if re.search(r"\bcfg\b", CELLS[number]):
        read.add("Config")  # whoever passes a `cfg` has to make one
    assert not [TITLES[i] for i in providers(number) if not DEFINED[i] & read]


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


def test_the_hook_hears_an_open_file(tmp_path):
    global recorded
    recorded = []
    try:
        open(tmp_path / "x", "w").close()
        assert recorded[0][0] == "open"
    finally:
        recorded = None


def test_all_run_in_seconds_and_touch_nothing(nb, capfd):
    """`nb` has run before, so the imports (which do read files) are in memory by now."""
    global recorded
    capfd.readouterr()
    recorded, start = [], time.process_time()
    try:
        run(range(len(CELLS)))
        assert recorded == []
    finally:
        recorded = None
    assert time.process_time() - start < 5
    assert capfd.readouterr() == ("", "")
