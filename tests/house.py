"""How the house reads, in numbers: `python tests/house.py [PART OF A NOTEBOOK'S NAME ...]`; `--picture FILE.svg` draws the wings.

Each line is a measure, its goal, and the worst places. A comprehension is nested where it stands inside another one; a lambda is
stored where it is given a name. Public is what a module's `__all__` lists. The picture is made from the imports of the modules."""
import ast, json, re, sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Room:
    "What one notebook exports."
    name: str
    module: str | None = None
    cells: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [line for cell in self.cells for line in cell.splitlines() if line.strip()]

    def trees(self) -> list[ast.AST]:
        return [ast.parse(cell) for cell in self.cells]


def rooms(parts: list[str]) -> list[Room]:
    found = []
    for path in sorted((ROOT/"nbs").glob("[!_.]*.ipynb")):
        if parts and not any(part in path.stem for part in parts): continue
        room = Room(path.stem)
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code": continue
            if module := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M): room.module = module[1]
            if re.match(r"\s*#\|\s*exporti?\b", source):
                room.cells.append("\n".join(line for line in source.splitlines() if not line.startswith("#|")))
        if room.module: found.append(room)
    return found


def functions(room: Room) -> list[tuple[int, str]]: # lines, name
    every = [node for tree in room.trees() for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return [(node.end_lineno - node.lineno + 1, f"{room.module}.{node.name}") for node in every]


def nested(room: Room) -> list[str]:
    "Comprehensions inside a comprehension."
    return [f"{room.module}: {ast.unparse(inner)[:60]}" for tree in room.trees() for outer in ast.walk(tree)
            if isinstance(outer, COMPREHENSIONS)
            for inner in ast.walk(outer) if inner is not outer and isinstance(inner, COMPREHENSIONS)]


def stored(room: Room) -> list[str]:
    "Lambdas that are given a name."
    assigned = [node for tree in room.trees() for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)]
    return [f"{room.module}: {ast.unparse(node)[:60]}" for node in assigned if isinstance(node.value, ast.Lambda)]


def public(room: Room) -> list[str]:
    path = ROOT/"maet"/(room.module.replace(".", "/") + ".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": return ast.literal_eval(node.value)
    return []


def module_lines(room: Room) -> int:
    return len((ROOT/"maet"/(room.module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines())


@dataclass
class Measure:
    "A number, the goal that it may not pass, and where it comes from."
    name: str
    value: float
    goal: float
    worst: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool: return self.value <= self.goal


def measures(house: list[Room]) -> list[Measure]:
    lines = [(len(line), f"{room.name}: {line.strip()[:70]}") for room in house for line in room.lines]
    lengths = [length for length, _ in lines]
    cells = [(len(cell.strip().splitlines()), f"{room.name}: {cell.strip().splitlines()[0][:60]}") for room in house for cell in room.cells if cell.strip()]
    every = [found for room in house for found in functions(room)]
    names = defaultdict(list)
    for room in house:
        for name in public(room): names[name].append(room.module)
    twice = [f"{name}: {', '.join(modules)}" for name, modules in sorted(names.items()) if len(modules) > 1]
    modules = [(module_lines(room), room.module) for room in house]
    comprehensions = [found for room in house for found in nested(room)]
    lambdas = [found for room in house for found in stored(room)]

    def longest(found, least): return [f"{size} {name}" for size, name in sorted(found, reverse=True) if size > least]

    return [
        Measure("lines of exported code", len(lines), float("inf")),
        Measure("lines over 100 characters, %", 100 * mean(length > 100 for length in lengths), 1, longest(lines, 100)),
        Measure("lines over 110 characters", sum(length > 110 for length in lengths), 0, longest(lines, 110)),
        Measure("mean length of a line", mean(lengths), 55),
        Measure("median export cell, lines", median(size for size, _ in cells), 12),
        Measure("largest export cell, lines", max(cells)[0], 30, longest(cells, 30)),
        Measure("median function, lines", median(size for size, _ in every), 12),
        Measure("largest function, lines", max(every)[0], 40, longest(every, 40)),
        Measure("nested comprehensions", len(comprehensions), 20, comprehensions),
        Measure("stored lambdas", len(lambdas), 0, lambdas),
        Measure("public names", len(names), 250),
        Measure("names public in two modules", len(twice), 0, twice),
        Measure("largest module, lines", max(modules)[0], 450, longest(modules, 450)),
    ]


# ---- the picture ----

WIDTH, LEFT, LINE = 900, 120, 116  # pixels: the picture, the names of wings; characters of a line


DOORS = {"errors", "verbs", "endings", "options", "cli", "__init__"}


def wing_of(module: str) -> str: # weights.tensors -> weights
    return "doors" if module in DOORS else module.split(".")[0]


def imports(room: Room) -> Counter: # wing -> names that the room takes from there
    found = Counter()
    for node in (node for tree in room.trees() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maet."):
            found[wing_of(node.module.removeprefix("maet."))] += len(node.names)
    return found


def rows_of(names: list[str]) -> list[str]:
    "Names, joined into lines that fit."
    rows = [""]
    for name in names:
        if len(rows[-1]) + len(name) > LINE: rows.append("")
        rows[-1] += ("   " if rows[-1] else "") + name
    return rows


def caption(wing: str, below: list[str]) -> str:
    if wing == "findings": return "the walk of a reader of the papers; exports nothing, reads the record"
    return "takes names from: " + ", ".join(below) if below else "stands on the ground"


def picture(house: list[Room]) -> str: # SVG
    """The wings from the ground up, their rooms in the order of their floors, and how many names each wing takes from those below."""
    wings, taken = defaultdict(list), defaultdict(Counter)
    findings = [path.stem.partition(".")[2].replace("_", " ") for path in sorted((ROOT/"nbs").glob("*_findings.*.ipynb"))]
    for room in house:
        name = "maet" if room.module == "__init__" else room.module.rpartition(".")[2]
        wings[wing_of(room.module)].append(name.replace("_", " "))
        taken[wing_of(room.module)] += imports(room)

    doors = wings.pop("doors")
    wings = wings | {"findings": findings, "doors": doors}  # findings export nothing

    parts, top = [], 10
    for wing in reversed(wings):
        below = [f"{name} {count}" for name, count in taken[wing].most_common() if name != wing]
        lines = rows_of(wings[wing]) + [caption(wing, below)]
        height = 16 * len(lines) + 14
        parts.append(f'<rect x="10" y="{top}" width="{WIDTH - 20}" height="{height}" rx="6" fill="#eef2f7" stroke="#8aa0b8"/>')
        parts.append(f'<text x="24" y="{top + 22}" font-weight="bold" fill="#12284c">{wing}</text>')
        for number, line in enumerate(lines):
            grey = ' fill="#666"' if number == len(lines) - 1 else ""
            parts.append(f'<text x="{LEFT}" y="{top + 22 + 16 * number}"{grey} xml:space="preserve">{line}</text>')
        top += height + 8
    style = 'font-family="system-ui,sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 2}" {style}>\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__" and sys.argv[1:2] == ["--picture"]:
    Path(sys.argv[2]).write_text(picture(rooms([])), encoding="utf-8")
elif __name__ == "__main__":
    for measure in measures(rooms(sys.argv[1:])):
        print(f"{measure.name:32} {measure.value:9.1f}   goal {measure.goal:g}{'' if measure.met else '   <-'}")
        if not measure.met:
            for place in measure.worst[:30 if sys.argv[1:] else 8]: print(f"      {place}")
