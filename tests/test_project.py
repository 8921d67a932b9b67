"The rules of the house that can be checked: what is generated, who imports whom, how long a cell is, what is pinned."
import ast, json, re, sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import house

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
MODULES = sorted(path for path in (ROOT/"maet").rglob("*.py") if not path.stem.startswith("_"))
dotted = lambda module: ".".join(module.relative_to(ROOT/"maet").with_suffix("").parts)  # weights.tensors
LETTERS = "_abcdefghijklmnopqrstuvwxyz"  # after the number of a floor
LONGEST_CELL = 30  # lines
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@cache
def exported_module(notebook: Path) -> str | None:
    names = [found[1] for cell in code_cells(notebook) if (found := re.search(r"^#\|\s*default_exp\s+(\S+)", cell, re.M))]
    return names[0] if names else None


def floor(notebook: Path) -> float:
    "The number of a room. The front page has none; it and the tour (00) may look into every room."
    number = re.match(r"(?!00)(\d+)([a-z]?)_", notebook.stem)
    return int(number[1]) + LETTERS.index(number[2] or "_") / len(LETTERS) if number else float("inf")  # 02b lies between 02 and 03


def imported(source: str) -> set[str]:
    "Absolute names of all modules that a piece of Python imports, at any depth, as `yaml`, `maet.weights.tensors`."
    plain = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    names = set()
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["maet" if node.level else "", node.module]))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names if base == "maet")}
    return names


def settings(key: str) -> list[Requirement]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return [Requirement(text) for name, value in config["DEFAULT"].items() if re.fullmatch(key, name) for text in value.split()]


def files(folder: Path) -> dict[str, bytes]:
    found = [path for part in ("nbs", "maet") for path in (folder/part).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_export_and_clean_change_nothing(checkout, python):
    before = files(checkout)
    for verb in ("nbdev_export", "nbdev_clean"): python(Path(sys.executable).with_name(verb), cwd=checkout)
    after = files(checkout)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"run `make export`: {', '.join(changed)}"


@each_notebook
def test_a_room_imports_from_lower_rooms_only(notebook):
    floors = {f"maet.{name}": floor(room) for room in NOTEBOOKS if (name := exported_module(room))}
    above = {name for cell in code_cells(notebook) if not cell.startswith("%%") for name in imported(cell)
             if floors.get(name, -1) >= floor(notebook)}
    assert above - {f"maet.{exported_module(notebook)}"} == set()


@each_notebook
def test_export_cells_are_short(notebook):
    exported = [cell for cell in code_cells(notebook) if re.search(r"^#\|\s*exporti?\b", cell, re.M)]
    bodies = [[line for line in cell.splitlines() if not line.startswith("#|")] for cell in exported]
    assert [f"{len(body)} lines: {body[0]}" for body in bodies if len(body) > LONGEST_CELL] == []


def test_the_house_reads_as_it_should():
    "What `make lint` prints."
    found = {measure.name: measure for measure in house.measures(house.rooms([]))}
    bounds = {
        "names public in two modules": 0,
        "public names": 250,
        "median export cell, lines": 12,
        "largest export cell, lines": 30,
        "median function, lines": 12,
        "largest function, lines": 40,
        "largest module, lines": 450,
        "mean length of a line": 55,
        "lines over 100 characters, %": 1,
        "lines over 110 characters": 0,
        "nested comprehensions": 20,
        "stored lambdas": 0,
    }
    too_much = {name: found[name] for name, bound in bounds.items() if found[name].value > bound}
    assert too_much == {}


def test_ruff_has_nothing_to_say(python):
    python("-m", "ruff", "check", "--no-cache")


def test_the_picture_of_the_wings_is_that_of_the_imports():
    assert (ROOT/"figures/house.svg").read_text(encoding="utf-8") == house.picture(house.rooms([])), "run `make export`"


@each_notebook
def test_outputs_name_no_place_of_a_machine(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [json.dumps(output) for cell in cells for output in cell.get("outputs", [])]
    assert [text[:200] for text in outputs if "site-packages" in text or str(ROOT) in text] == []


def test_only_the_tour_keeps_widgets():
    for notebook in NOTEBOOKS:
        held = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
        assert "widgets" not in held or notebook.name.startswith("00_"), f"{notebook.name}: state of widgets"


def test_notebooks_are_small_with_their_outputs():
    assert [f"{notebook.name}: {size:,} bytes" for notebook in NOTEBOOKS if (size := notebook.stat().st_size) >= 1_000_000] == []


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_development_tools_stay_out_of_the_library(module):
    tools = {"nbdev", "fastcore", "execnb", "pytest"}
    assert {name for name in imported(module.read_text(encoding="utf-8")) if name.split(".")[0] in tools} == set()


def test_every_module_imports_without_the_extras(python):
    bare = {canonicalize_name(requirement.name) for requirement in settings("requirements")}
    extras = {canonicalize_name(requirement.name) for requirement in settings(".+_requirements")} - bare - {"setuptools"}
    absent = sorted({name.replace("-", "_") for name in extras} | {"peft", "deepspeed", "IPython"})
    program = "import sys, importlib\nabsent, modules = (text.split() for text in sys.argv[1:])\n" \
              "sys.modules.update(dict.fromkeys(absent))\nfor name in modules: importlib.import_module(f'maet.{name}')"
    python("-c", program, " ".join(absent), " ".join(map(dotted, MODULES)))


def test_help_loads_no_torch(python):
    program = "import sys\nfrom maet.cli import main\nsys.argv = ['maet', '--help']\ntry: main()\nexcept SystemExit as e: assert not e.code\n" \
              "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    assert "run" in python("-c", program)


def test_requirements_are_pinned():
    lines = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)) for pin in pins)  # no range, no local version such as +cpu
    versions = {}
    for pin in pins: versions.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    for wanted in settings("(.+_)?requirements"):
        allowed = [wanted.specifier.contains(version) for version in versions.get(canonicalize_name(wanted.name), [])]
        assert allowed and all(allowed), f"{wanted} has no pin that fits in constraints.txt"


def test_readme_says_what_the_index_says():
    cells = json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    for cell in cells:
        text = re.sub(r"\]\((\d\d[a-z]?_)", r"](nbs/\1", "".join(cell["source"])).replace("](../", "](")
        if not text.startswith("#| hide"): assert text in readme, f"run `make export`: README.md lacks\n{text}"
