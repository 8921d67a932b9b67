"The notebooks as pages: what a reader of the site needs of them, and a page for each wing."
import json, re, shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOORS = {"88", "89", "90", "91"}  # these rooms have no wing in their names
FRONT, TOUR = "index", "00_tour"
ELSEWHERE = {"../figures/": "figures/", "../CONTRIBUTING.md": "contributing.md"}


@dataclass
class Page:
    "A notebook."
    name: str      # 05_weights.checkpoints
    notebook: dict

    @property
    def wing(self) -> str:
        if self.name[:2] in DOORS: return "doors"
        return re.sub(r"^\d+[a-z]?_", "", self.name).partition(".")[0]

    @property
    def opening(self) -> str:
        "The first cell: title, then what the room promises."
        return "".join(self.notebook["cells"][0]["source"])

    @property
    def title(self) -> str:
        return self.opening.partition("\n")[0].removeprefix("# ")

    @property
    def promise(self) -> str:
        lines = [line for line in self.opening.splitlines() if line.startswith("> ")]
        return " ".join(line.removeprefix("> ") for line in lines)


def pages() -> list[Page]:
    paths = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
    return [Page(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


# ---- a notebook ----

def at_home(text: str) -> str:
    "Markdown whose links lead to where things are in the site."
    for before, after in ELSEWHERE.items(): text = text.replace(f"]({before}", f"]({after}")
    return text


def whole_equations(text: str) -> str:
    "Sphinx splits an equation with a line break in it, and would split one in the middle of its cases."
    return re.sub(r"^\$\$(.*\\\\.*)\$\$$", r"\n\\begin{equation*}\n\1\n\\end{equation*}\n", text, flags=re.M)


def without_directives(source: str) -> tuple[str, set[str]]: # code, nbdev's words
    lines = source.splitlines()
    words = {line.removeprefix("#|").split()[0] for line in lines if line.startswith("#| ")}
    return "\n".join(line for line in lines if not line.startswith("#|")).strip(), words


def is_slider(output: dict) -> bool:
    "What only a kernel can move; a page does without."
    return any("widget" in kind for kind in output.get("data", {}))


def staged_cell(cell: dict) -> dict | None: # None: nothing for a reader
    if cell["cell_type"] == "markdown":
        return cell | {"source": whole_equations(at_home("".join(cell["source"])))}

    source, words = without_directives("".join(cell["source"]))
    if "hide" in words or not source: return None
    tags = ["export"] if words & {"export", "exporti"} else []
    outputs = [output for output in cell["outputs"] if not is_slider(output)]
    return cell | {"source": source, "metadata": {"tags": tags}, "outputs": outputs}


def staged(notebook: dict) -> dict:
    cells = [staged_cell(cell) for cell in notebook["cells"]]
    metadata = {"kernelspec": notebook["metadata"]["kernelspec"]}
    return notebook | {"cells": [cell for cell in cells if cell], "metadata": metadata}


# ---- the wings ----

def wing_lines(front: Page) -> dict[str, tuple[str, str]]: # wing -> what is at home there, first rooms
    "The table of wings on the front page."
    text = "\n".join("".join(cell["source"]) for cell in front.notebook["cells"])
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \|$", text, flags=re.M)
    return {wing: (home, first) for wing, home, first in rows if wing != "wing"}


def toctree(names: list[str], caption: str = "") -> str:
    head = f":caption: {caption}\n" if caption else ""
    return f"```{{toctree}}\n:hidden:\n{head}\n" + "\n".join(names) + "\n```\n"


def wing_page(wing: str, rooms: list[Page], home: str, first: str) -> str: # Markdown
    rows = [f"| [{room.title}]({room.name}.ipynb) | {room.promise} |" for room in rooms]
    table = "\n".join(["| room | |", "| --- | --- |", *rows])
    opening = f"# {wing.capitalize()}\n> {home[0].upper() + home[1:]}.\n\nA good first room: {first}."
    return f"{opening}\n\n{table}\n\n{toctree([room.name for room in rooms])}"


def stage(folder: Path) -> None:
    "Everything that is written by hand, as Sphinx wants it. The reference comes on top."
    house = {page.name: page for page in pages()}
    front = house.pop(FRONT)
    tour = [TOUR] if house.pop(TOUR, None) else []
    wings: dict[str, list[Page]] = {}
    for page in house.values(): wings.setdefault(page.wing, []).append(page)

    for wing, (home, first) in wing_lines(front).items():
        (folder/f"{wing}.md").write_text(wing_page(wing, wings[wing], home, first), encoding="utf-8")
    library = [wing for wing in wings if wing != "findings"]
    trees = [toctree([*tour, "findings"], "Read"), toctree(library, "The library by wings"),
             toctree(["commands", "recipes", "api"], "Reference"), toctree(["contributing", "changelog"], "The house")]
    front.notebook["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": "\n".join(trees)})

    for page in pages():
        notebook = staged(front.notebook if page.name == FRONT else page.notebook)
        (folder/f"{page.name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    for name in ("CONTRIBUTING", "CHANGELOG"):
        shutil.copyfile(ROOT/f"{name}.md", folder/f"{name.lower()}.md")
    shutil.copytree(ROOT/"figures", folder/"figures", ignore=shutil.ignore_patterns("*.csv", "*.md"))
