"""Floors and house rules that no other test would notice. Reads the sources with `ast` and imports nothing of them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
by_path = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))

# A module imports from lower floors, or from its own folder.
FLOOR = {
    "errors": 0,
    "types": 0,
    "columns": 0,
    "checks": 1,
    "device_order": 1,
    "schedules": 2,
    "mesh": 2,
    "parallel": 3,
    "processes": 3,
    "model": 4,
    "layout": 5,
    "lowering": 5,
    "executor": 6,
    "data": 7,
    "optimizer": 7,
    "monitor": 7,
    "compat": 7,
    "training": 8,
    "checkpoint": 9,
    "evaluation": 9,
    "pipeline": 10,
    "summary": 11,
    "engine": 12,
    "initialization": 13,
    "hardware": 14,
    "planner": 15,
    "trainer": 15,
    "callbacks": 16,
    "cli": 16,
    "__main__": 17,
}

# Where a thing may be used; everywhere else it is forbidden.
ONLY_IN = {
    "ppermute": {"executor/loop.py", "executor/cycle.py"},
    "psum": {"executor/everywhere.py", "executor/owned_travel.py", "executor/reduce.py"},
    "psum_scatter": {"executor/along.py", "executor/data_cut.py", "executor/reduce.py"},
    "all_gather": {"executor/along.py", "executor/data_cut.py", "executor/reduce.py", "optimizer/collect.py"},
    "all_to_all": {"executor/owned_travel.py"},
    "pmean": set(),
    "pmax": set(),
    "pmin": set(),
    "axis_index": set(),  # rank and data rank are inputs of the loop
}
IMPORTED_ONLY_IN = {
    "flax": {
        "model/built.py",
        "model/flax_adapters.py",
        "model/flax_axes.py",
        "model/hidden.py",
        "model/linen_layers.py",
        "model/nnx_caches.py",
        "model/nnx_layers.py",
        "model/nnx_modules.py",
    },
    "orbax": {"checkpoint/items.py"},
    "optax": {
        "initialization.py",
        "hardware/compile.py",
        "optimizer/arguments.py",
        "optimizer/transformation.py",
        "pipeline.py",
        "training/optimizer.py",
    },
    "matplotlib": {"schedules/figure.py"},
    "safetensors": {"checkpoint/weights.py"},
    "tensorboardX": {"trainer/tensorboard.py"},
    "wandb": {"trainer/weights_and_biases.py"},
    "chex": set(),
}
# The groups of the params tree are spelled out in one file only; the rest asks the layout.
GROUPS_SPELLED_IN = {
    "layout/layout.py": "",
    "checkpoint/homes.py": "a field of the optimizer's state has the name, too",
}
# Integers only: testable by the thousand without a device.
WITHOUT_ARRAYS = (
    "schedules/",
    "lowering/",
    "errors.py",
    "checks.py",
    "cli.py",
    "columns.py",
    "model/partition.py",
    "layout/piles.py",
    "executor/rooms.py",
    "executor/owned_places.py",
    "checkpoint/board.py",
    "checkpoint/directory.py",
    "checkpoint/inspect.py",
    "checkpoint/manifest.py",
    "checkpoint/plain.py",
)

MAX_LINES = 300
BUDGET: dict[str, tuple[int, str]] = {  # file -> (lines it may have, why)
    "engine.py": (420, "wiring; most of it is what users read about each method"),
    "pipeline.py": (450, "the functional core; most of it is what users read about each method"),
}


def name_of(path):
    return str(path.relative_to(PACKAGE)).replace("\\", "/")


def imports(path):
    """The dotted names of all imports, those inside functions included; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(dotted):
    """`jaxpipe.executor.loop.run` -> `executor.loop`; None if it is not of this package."""
    parts = dotted.split(".")
    if parts[0] != "jaxpipe":
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return ".".join(parts[1:end])
    return "__init__"


@by_path
def test_imports_point_down(path):
    here = name_of(path).split("/")[0].removesuffix(".py")
    if here == "__init__":
        return
    for dotted in imports(path):
        if module := own_module(dotted):
            there = module.split(".")[0]
            assert there == here or FLOOR[there] < FLOOR[here], f"{here} must not import {dotted}"


def test_no_cycles_inside_a_folder():
    edges = {}
    for path in FILES:
        here = name_of(path).removesuffix(".py").replace("/", ".")
        if here.endswith("__init__"):
            continue
        edges[here] = {own_module(dotted) for dotted in imports(path)} - {None, here}
    while leaves := {module for module, below in edges.items() if not below & edges.keys()}:
        for module in leaves:
            del edges[module]
    assert not edges, f"a cycle among {sorted(edges)}"


@by_path
def test_collectives_are_where_they_belong(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        if isinstance(node, ast.alias):
            used = node.name.split(".")[-1]
        assert name_of(path) in ONLY_IN.get(used, {name_of(path)}), f"{used} belongs into {ONLY_IN[used]}"


@by_path
def test_groups_of_the_params_tree_are_spelled_in_the_layout(path):
    """Whole literals only, so docstrings may show what the params tree looks like."""
    spelled = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("stacked", "shared")
    }
    if name_of(path) in GROUPS_SPELLED_IN:
        assert spelled, "take it off GROUPS_SPELLED_IN"
    else:
        assert not spelled, f"{spelled}: use STACKED and SHARED of layout/layout.py, or ask the layout"


@by_path
def test_columns_of_a_row_are_known_to_rows_only(path):
    """Nobody else takes `row[2]`, or a piece of a row, by a number that is written out."""
    if not name_of(path).startswith(("lowering/", "executor/")) or name_of(path) == "lowering/rows.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("row", "here"):
            numbers = [n.value for n in ast.walk(node.slice) if isinstance(n, ast.Constant)]
            assert not numbers, f"line {node.lineno}: ask Columns.decode of lowering/rows.py"


@by_path
def test_libraries_are_imported_where_they_belong(path):
    for dotted in imports(path):
        library = dotted.split(".")[0]
        assert name_of(path) in IMPORTED_ONLY_IN.get(library, {name_of(path)}), (
            f"{library}: {IMPORTED_ONLY_IN[library]}"
        )
        assert not dotted.startswith("jax._src"), "private names of JAX change without notice"
        if name_of(path).startswith(WITHOUT_ARRAYS):
            assert library not in ("jax", "jaxlib", "numpy"), "integers only"


@by_path
def test_private_names_of_jax_are_not_used(path):
    assert "_src" not in re.findall(r"\bjax\.(\w+)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [*FILES, *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    allowed, _ = BUDGET.get(name_of(path) if path in FILES else path.name, (MAX_LINES, ""))
    assert lines <= allowed, f"{lines} lines: split it, or give a reason in BUDGET"


def test_budgets_are_needed():
    for name, (allowed, reason) in BUDGET.items():
        lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
        assert reason and MAX_LINES < lines <= allowed, f"{name} has {lines} lines"


def test_every_floor_exists():
    found = {name_of(path).split("/")[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert found == FLOOR.keys()


# ------------------------------------------------------------------------------------------------------ what is public

PUBLIC_ROOMS = {"schedules"}


def exported(path):
    """The names in `__all__` of a module, and all names that it imports or makes at its top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed, made = None, set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == ["__all__"]:
                listed = ast.literal_eval(node.value)
    return listed, {name for name in made if not name.startswith("_")}, ast.get_docstring(tree)


def test_what_is_public_is_listed():
    """No name is in `jaxpipe` but for those in `__all__`, and the modules that Python puts there as they are imported."""
    listed, made, docstring = exported(PACKAGE / "__init__.py")
    assert listed == sorted(listed, key=lambda name: (name.islower(), name)) and made == set(listed)
    assert "private" in docstring
    private = {name for name in FLOOR if name != "__main__"} - set(listed)
    script = "import jaxpipe; print(*(name for name in dir(jaxpipe) if not name.startswith('_')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(run.stdout.split()) - private == set(listed)


def test_every_room_says_what_it_is_for():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert PUBLIC_ROOMS <= rooms
    for room in sorted(rooms):
        listed, made, docstring = exported(PACKAGE / room / "__init__.py")
        assert listed is not None and set(listed) == made, f"{room}: __all__ is {listed}, and there is {sorted(made)}"
        assert docstring and ("public" if room in PUBLIC_ROOMS else "private") in docstring, room
        assert bool(listed) == (room in PUBLIC_ROOMS), f"{room} is {'' if room in PUBLIC_ROOMS else 'not '}public"


def test_public_names_are_documented():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [n for n in exported(PACKAGE / "__init__.py")[0] if not re.search(rf"\bjaxpipe\.{n}\b", text)]
    assert not missing, f"not in README.md or docs/: {missing}"


# ------------------------------------------------------------------------------------------------- tests mirror the tree

# Modules without a test file at the mirrored path, and where they are tested.
ELSEWHERE = {
    "checkpoint/compare.py": "what loading compares: tests/checkpoint/test_load.py",
    "evaluation/generator.py": "what users pass and get: tests/contracts/test_generate.py",
    "executor/generate.py": "its tokens: tests/contracts/test_generate.py",
    "engine.py": "wiring only: tests/contracts/test_engine.py",
    "hardware/examine.py": "on simulated devices: tests/hardware/test_compile.py",
    "training/start.py": "what engines begin with: tests/contracts/test_whole_step.py",
    "executor/residence.py": "the abstract class of all residences: tests/executor/test_weights.py",
    "executor/cut.py": "what `Halves` does with a trace: tests/executor/test_halves.py",
    "executor/scan_halves.py": "scans in such traces: tests/executor/test_halves.py",
    "executor/owned_travel.py": "how owned layers come and go: tests/executor/test_owned.py",
    "layout/grouping.py": "which layers are together in a layout: tests/layout/test_layout.py",
    "summary/layers.py": "a table of the summary: tests/summary/test_text.py",
    "summary/memory.py": "a table of the summary: tests/summary/test_text.py",
}


def mirrored(path):
    """Where the unit tests of a module are."""
    return ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")


def test_every_module_has_a_test_file_of_its_name():
    """Whoever changes `jaxpipe/a/b.py` runs `tests/a/test_b.py`, in seconds."""
    with_logic = [
        path
        for path in FILES
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(path.read_text("utf-8")).body)
    ]
    missing = {name_of(path) for path in with_logic if not mirrored(path).exists()}
    assert missing - ELSEWHERE.keys() == set(), "write a test file at the mirrored path, or say where it is tested"
    assert ELSEWHERE.keys() - missing == set(), "these need no exception"
    for name, reason in ELSEWHERE.items():
        (where,) = re.findall(r"tests/[\w/]+\.py", reason)
        assert (ROOT / where).exists(), f"{name}: {where}"


def test_every_test_file_of_a_room_is_of_one_of_its_modules():
    """A test file of a name that no module has is a suite: it belongs into tests/contracts."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {mirrored(path) for path in FILES}
    odd = {path for room in rooms for path in (ROOT / "tests" / room).glob("test_*.py")} - modules
    assert not odd, sorted(str(path.relative_to(ROOT)) for path in odd)
