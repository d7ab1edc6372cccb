"""The shape of the library: rooms in one line, names that say one thing."""

import ast
import importlib
import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
PACKAGE = HERE / "fsc147lib"
ROOMS = ("data", "model", "evaluation", "training", "report")  # each uses those before it
BELOW, ABOVE = ("files", "options", "readers"), ("__init__", "__main__")
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]


def imports_of(path: Path, tree: ast.AST) -> list[tuple[str, ...]]:
    """What a file of the library imports from the library, inside functions as well: ("model", "load"), ..."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(HERE).parts[:-1]  # of the package that a relative import starts from
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*start, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "fsc147lib"]
    return found


def floor(place: str) -> int:
    """The floors from the ground up: `files`, `options` and `readers`, the five rooms, the command line."""
    return 0 if place in BELOW else ROOMS.index(place) + 1 if place in ROOMS else len(ROOMS) + 1


def upward(path: Path, tree: ast.AST) -> list[str]:
    """The imports of a file that go to a room above its own."""
    place = path.relative_to(PACKAGE).with_suffix("").parts[0]
    reached = [(name, floor(name[0]) if name else len(ROOMS) + 1) for name in imports_of(path, tree)]
    return [".".join(("fsc147lib", *name)) for name, level in reached if level > floor(place)]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_room_uses_those_above_it_in_the_table_and_none_below(path):
    assert not upward(path, TREES[path]), f"{path.relative_to(HERE)} imports from a later room"


def test_every_file_lies_in_a_room_or_beside_them():
    places = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES}
    assert places == {*ROOMS, *BELOW, *ABOVE}


@pytest.mark.parametrize("room", ROOMS)
def test_modules_of_a_room_do_not_import_each_other_in_a_circle(room):
    stems = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    uses = {}
    for stem in stems:
        path = PACKAGE / room / f"{stem}.py"
        uses[stem] = {name[1] for name in imports_of(path, TREES[path]) if name[0] == room and name[1] in stems}
    while ready := [stem for stem, used in uses.items() if not used & uses.keys()]:
        for stem in ready:
            del uses[stem]
    assert not uses, f"in a circle, or using one that is: {uses}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_hands_on_names_it_has(room):
    module = importlib.import_module(f"fsc147lib.{room}")
    assert len(module.__doc__.split()) >= 20
    assert module.__all__, "a room hands on its public names"
    for name in module.__all__:
        assert hasattr(module, name) or importlib.import_module(f"fsc147lib.{room}.{name}"), name


def test_the_package_hands_on_the_names_of_its_rooms():
    package = importlib.import_module("fsc147lib")
    for name in package.__all__:
        assert getattr(package, name).__module__.startswith("fsc147lib."), name
    with pytest.raises(AttributeError, match="has no name 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_module_opens_with_what_it_is_for(path):
    assert len((ast.get_docstring(TREES[path]) or "").split()) >= 5


def test_no_public_function_has_a_modules_name():
    modules = {path.stem for path in MODULES} | set(ROOMS)
    for path, tree in TREES.items():
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        defined = {node.name for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"}
        assert not defined & modules, path.relative_to(HERE)


@pytest.mark.parametrize("path", sorted((HERE / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_use_names_that_the_package_and_its_rooms_hand_on(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        for node in ast.walk(ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fsc147lib"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert alias.name in module.__all__, f"{node.module} does not hand on {alias.name}"
