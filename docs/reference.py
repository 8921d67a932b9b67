"Pages that are made from the library itself: its commands, the keys of its files, its public names."
import ast, inspect, json, textwrap
from pathlib import Path

# The class that reads the file of each command.
FILES = {
    "run": "maet.study.recipes:Recipe",
    "train": "maet.study.algorithm:Run",
    "locate": "maet.study.algorithm:Probe",
    "base": "maet.study.recipes:Base",
    "run --study": "maet.study.studies:Study",
}


def escaped(text: str) -> str:
    "In a cell of a Markdown table."
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"]*len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
                        table(["", "what it is", "without it"], rows)])


def commands() -> str: # Markdown
    import typer
    from maet.cli import app
    doors = typer.main.get_command(app).commands
    opening = ("# Commands\n> What `maet VERB --help` says.\n\nEach is a function of the same name in Python: "
               "[verbs](89_verbs.ipynb). What their files hold: [recipe keys](recipes.md).")
    return "\n\n".join([opening, *(command_section(name, command) for name, command in doors.items())])


# ---- keys ----

def kind(schema: dict) -> str: # Markdown
    "What a value may be, from a JSON schema."
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema: return " or ".join(dict.fromkeys(map(kind, schema["anyOf"])))
    if "enum" in schema: return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema: return f"`{schema['const']}`"
    if schema.get("type") == "array": return f"list of {kind(schema.get('items', {}))}"
    if isinstance(inner := schema.get("additionalProperties"), dict): return f"{kind(inner)} by name"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`",
             "object": "keys and values", "null": "none"}
    return words.get(schema.get("type"), "anything")


def bounds(schema: dict) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    parts = [schema, *schema.get("anyOf", [])]
    found = [f"{sign} {part[name]:g}" for part in parts for name, sign in signs.items() if name in part]
    return f" ({', '.join(found)})" if found else ""


def key_row(name: str, schema: dict, needed: bool, comment: str) -> list[str]:
    default = "needed" if needed else f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    said = schema.get("description") or comment
    return [f"`{name}`", kind(schema) + bounds(schema), default, escaped(said)]


def comments(cls) -> dict[str, str]: # key -> what stands beside it in the source
    from fastcore.docments import docments
    return {name: said or "" for name, said in docments(cls).items()}


def mapping_section(cls, schema: dict) -> str: # Markdown
    beside, needed = comments(cls), schema.get("required", [])
    rows = [key_row(name, value, name in needed, beside.get(name, "")) for name, value in schema["properties"].items()]
    said = escaped(schema.get("description", ""))
    return f"## {cls.__name__}\n\n{said}\n\n{table(['key', 'value', 'without it', ''], rows)}"


def classes_in(cls) -> dict[str, type]: # name -> the class, and those of its keys, at any depth
    from dataclasses import is_dataclass
    from typing import get_args, get_type_hints
    found, waiting = {}, [cls]
    while waiting:
        next_one = waiting.pop()
        waiting += get_args(next_one)
        if not is_dataclass(next_one) or next_one.__name__ in found: continue
        found[next_one.__name__] = next_one
        waiting += get_type_hints(next_one).values()
    return found


def imported(place: str): # maet.study.recipes:Recipe -> the class
    from importlib import import_module
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def recipe_keys(schemas: Path) -> str: # Markdown; writes the JSON schemas
    from pydantic import TypeAdapter
    heads, sections = [], {}
    for command, place in FILES.items():
        cls = imported(place)
        schema = TypeAdapter(cls).json_schema()
        name = f"{cls.__name__.lower()}.schema.json"
        (schemas/name).write_text(json.dumps(schema, indent=1), encoding="utf-8")
        heads.append([f"`maet {command}`", f"[{cls.__name__}](#{cls.__name__.lower()})", f"<a href=\"{name}\">{name}</a>"])
        inside = schema.get("$defs", {}) | {cls.__name__: schema}
        for inner, found in classes_in(cls).items():
            if inner in inside: sections.setdefault(inner, mapping_section(found, inside[inner]))
    opening = ("# Recipe keys\n> Every key of every file that a command reads, from the classes that read them.\n\n"
               "A key that nobody reads is an error, and so is a value against its rule. An editor with a YAML language server completes keys "
               "and checks values if the first line of a file is `# yaml-language-server: $schema=` and the address of a schema below. "
               "What a merge file holds is said in [merge files](37b_method.mergefile.ipynb).")
    return "\n\n".join([opening, table(["command", "its file", "JSON schema"], heads), *sections.values()])


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


def name_section(name: str, room: str, notebook: str, keys: set[str]) -> str: # Markdown
    value = imported(f"maet.{room}:{name}")
    said = textwrap.dedent(inspect.getdoc(value) or "")
    more = f"\n\nIts keys: [recipe keys](recipes.md#{name.lower()})." if name in keys else ""
    return (f"### {name}\n\n```python\n{signature(value)}\n```\n\n```text\n{said}\n```\n\n"
            f"At home in [`maet.{room}`]({notebook}.ipynb).{more}")


def api(rooms: dict[str, str]) -> str: # Markdown; rooms: module -> notebook
    import maet
    keys = {name for place in FILES.values() for name in classes_in(imported(place))}
    sections, last = [], None
    for name, room in maet._HOMES.items():
        wing = room.partition(".")[0]
        if wing != last: sections.append(f"## {wing.capitalize()}")
        last = wing
        sections.append(name_section(name, room, rooms[room], keys))
    opening = ("# Public names\n> What `import maet` offers: the [face](91_face.ipynb) of the library.\n\n"
               "Everything else is a room's own, and its notebook says so.")
    return "\n\n".join([opening, *sections])
