"Pages that are made from the library itself: its commands, the keys of its files, its public names."
import ast, inspect, textwrap
from pathlib import Path

from maet.weights.columns import markdown


def escaped(text: str) -> str:
    "In a cell of a Markdown table."
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


# ---- commands ----

def option(parameter) -> list[str]: # a row
    name = f"`{parameter.opts[0]}`" if parameter.opts[0].startswith("-") else f"`{parameter.name.upper()}`"
    has_default = parameter.default not in (None, False, "") and not parameter.required
    default = f"`{parameter.default}`" if has_default else ""
    return [name, escaped(parameter.help or ""), "needed" if parameter.required else default]


def command_section(name: str, command) -> str: # Markdown
    words, _, example = command.help.partition("Example:")
    example = " ".join(example.split())
    rows = [option(parameter) for parameter in command.params if not parameter.hidden and parameter.name != "help"]
    return "\n\n".join([f"## maet {name}", " ".join(words.split()), f"```sh\n{example}\n```",
                        markdown([["", "what it is", "without it"], *rows], numbers=False)])


def commands() -> str: # Markdown
    import typer
    from maet.cli import app
    doors = typer.main.get_command(app).commands
    opening = ("# Commands\n> What `maet VERB --help` says.\n\nEach is a function of the same name in Python: "
               "[verbs](89_verbs.ipynb). What their files hold: [recipe keys](recipes.md).")
    return "\n\n".join([opening, *(command_section(name, command) for name, command in doors.items())])


# ---- keys ----

def recipe_keys(schemas: Path) -> str: # Markdown; writes the JSON schema
    from maet.study.keys import page, schema_text
    (schemas/"recipe.schema.json").write_text(schema_text(), encoding="utf-8")
    title, _, tables = page().partition("\n")
    opening = ("> Every key of every file that a command reads, from the classes that read them: what `maet keys` prints.\n\n"
               "A key that nobody reads is an error, and so is a value against its rule. An editor with a YAML language server completes keys "
               "and checks values if the first line of a file is `# yaml-language-server: $schema=` and the address of "
               "<a href=\"recipe.schema.json\">recipe.schema.json</a>. "
               "What a merge file holds is said in [merge files](37b_method.mergefile.ipynb).")
    return "\n\n".join([title, opening, tables.replace("<", "&lt;").replace("$", "\\$")])


# ---- public names ----

def header(value) -> str: # Python
    "The head of a function as it is written, with what is said beside each parameter."
    lines = inspect.getsource(value).splitlines()
    tree = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
    return textwrap.dedent("\n".join(lines[tree.lineno - 1:tree.body[0].lineno - 1]))


def signature(value) -> str: # Python
    if inspect.isfunction(value): return header(value)
    made = value.__dict__.get("__init__")
    has_source = inspect.isfunction(made) and not hasattr(value, "__dataclass_fields__")
    if not has_source: return f"class {value.__name__}"
    return f"class {value.__name__}:\n" + textwrap.indent(header(made), "    ")


def imported(place: str): # maet.study.recipes:Recipe -> the class
    from importlib import import_module
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def name_section(name: str, room: str, notebook: str, keys: set[str]) -> str: # Markdown
    value = imported(f"maet.{room}:{name}")
    said = textwrap.dedent(inspect.getdoc(value) or "")
    more = "\n\nIts keys: [recipe keys](recipes.md)." if name in keys else ""
    return (f"### {name}\n\n```python\n{signature(value)}\n```\n\n```text\n{said}\n```\n\n"
            f"At home in [`maet.{room}`]({notebook}.ipynb).{more}")


def api(rooms: dict[str, str]) -> str: # Markdown; rooms: module -> notebook
    import maet
    from maet.study.keys import schema
    keys = schema()["$defs"].keys()
    sections, last = [], None
    for name, room in maet._HOMES.items():
        wing = room.partition(".")[0]
        if wing != last: sections.append(f"## {wing.capitalize()}")
        last = wing
        sections.append(name_section(name, room, rooms[room], keys))
    opening = ("# Public names\n> What `import maet` offers: the [face](91_face.ipynb) of the library.\n\n"
               "Everything else is a room's own, and its notebook says so.")
    return "\n\n".join([opening, *sections])
