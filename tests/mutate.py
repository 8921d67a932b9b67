"""How a file gets broken: on the way to the disk, by a hand in an editor, or by somebody who means harm. Every change is drawn from a
random generator, so that the same generator breaks the same folder in the same way."""
import csv, gzip, io, json, re, zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import yaml

NUMBERS = ["0", "-1", "1", "2", "0.5", "-0.0", "1e-30", "1e308", "-1e308", "1e999", "NaN", "Infinity", ".nan", ".inf", "7" * 5000,
           *(str(2**power + more) for power in (15, 31, 32, 53, 63, 64) for more in (-1, 0))]
NAMES = ["", " ", ".", "..", "../x", "/", "/etc/hostname", "a\0b", "x\ny", "\u2028", "\x1b[2J", "\ud800", "\ufeff", "-", "~", "*", "[", "{0.__class__}",
         "a" * 5000, "hf://nobody/nothing", "nobody/nothing", "con:", "ñ", "👍", "null", "true", "#", "model.safetensors"]
VALUES = [None, True, False, 0, "", [], {}, "text", [None], [[]], [1, 2], {"a": 1}, {"a": None}, ["text"], "0", 1.5, -7]
ODD = {  # text that only its language knows
    "json": ['{"a": 1, "a": 2}', "[1, 2", '"\\ud800"', "1.", "undefined", "'a'", '"\\x"', "[1,]", "{,}", "\x00", "-"],
    "yaml": ["&a [*a]", "&a {b: *a}", "*nothing", "[&a [l,l,l,l,l,l,l,l,l,l]," + ",".join(f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi")) + "]",
             "!!python/object/apply:os.system [id]", "!!python/name:os.system", "{<<: 1}", "{<<: [{a: 1}]}", "{? [1] : 2}", "{? {a: 1} : 2}", "{1: 2, no: 3}",
             "2001-99-99", "2001-01-01", "2001-01-01 25:61:61", "!!int a", "!!float a", "!!binary ///", "!!set {a}", "!!omap [a]", "!!timestamp a", "!!bool a", "!!null a",
             "0x_", "0b_", "1:60:60", "1_000", "1e5", "=", "no", "~", "'", '"', "|", ">", "%", "@", "`", "{a", "[a", '"\\ud800"', "a: b: c", "- - a", "\t", "? a", "--- b", "..."]}


# ---- bytes ----

def place(data: bytes | bytearray, rng: Random) -> int:
    "Somewhere in the data, more often near its beginning, where headers are."
    return rng.randrange(min(len(data), rng.choice((16, 600, len(data))))) if data else 0


def some_bytes(rng: Random, most: int) -> bytes:
    size = rng.randint(1, most)
    return rng.randbytes(size) if rng.random() < .5 else bytes(rng.choice(b'{}[]()<>",:;\\\'\n\r\t\0 -0e&*!#%@`|~./') for _ in range(size))


def truncate(data: bytes, rng: Random) -> bytes: return data[:rng.randrange(len(data) + 1)] if rng.random() < .7 else data[:-rng.randint(1, 9)]


def flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 20)) if data else 0): changed[place(data, rng)] = some_bytes(rng, 1)[0]
    return bytes(changed)


def insert(data: bytes, rng: Random) -> bytes:
    at = place(data, rng)
    return data[:at] + some_bytes(rng, 12) + data[at:]


def span(data: bytes, rng: Random) -> tuple[int, int]:
    start = place(data, rng)
    return start, min(len(data), start + rng.choice((1, 2, 8, 100, len(data) or 1)))


def cut(data: bytes, rng: Random) -> bytes:
    start, stop = span(data, rng)
    return data[:start] + data[stop:]


def repeat(data: bytes, rng: Random) -> bytes:
    start, stop = span(data, rng)
    at = rng.choice((stop, place(data, rng)))
    return data[:at] + data[start:stop] * rng.choice((1, 1, 3)) + data[at:]


def number(data: bytes, rng: Random) -> bytes:
    "Another number in place of one that stands there in digits."
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e[+-]?\d+)?", data[:1 << 16]))
    if not found: return insert(data, rng)
    one = rng.choice(found)
    return data[:one.start()] + rng.choice(NUMBERS).encode() + data[one.end():]


def word(data: bytes, rng: Random) -> bytes:
    "A number in binary, which may be a length or a place."
    at, size = rng.choice((0, place(data, rng))), rng.choice((4, 8))
    value = rng.choice([0, 1, 2, 8, len(data), 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, rng.getrandbits(8 * size)])
    return data[:at] + (value % 256**size).to_bytes(size, "little") + data[at + size:]


BYTES = [truncate, flip, insert, cut, repeat, number, word]


# ---- the tree that a file's text is ----

class Raw(list):
    "Texts that go into a file as they are. Until then a word stands in the tree for each."
    def __call__(self, text: str) -> str:
        self.append(text)
        return f"zqxj{len(self) - 1}x"

    def put(self, text: str, quote: str = "") -> str:
        return re.sub(rf"{quote}zqxj(\d+)x{quote}", lambda found: self[int(found[1])], text)


def nodes(tree, most: int = 3000) -> list[tuple]: # (container, key) of everything in it
    found, waiting = [], [tree]
    while waiting and len(found) < most:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        found += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys]
    return found


def retype(inside, key, rng, raw, tree): inside[key] = json.loads(json.dumps(rng.choice(VALUES)))
def rename_value(inside, key, rng, raw, tree): inside[key] = rng.choice(NAMES)
def renumber(inside, key, rng, raw, tree): inside[key] = raw(rng.choice(NUMBERS))
def odd(inside, key, rng, raw, tree): inside[key] = raw(rng.choice(ODD["yaml" if rng.random() < .6 else "json"]))


def deepen(inside, key, rng, raw, tree):
    depth, (left, right) = rng.choice((2, 50, 130, 400, 5000, 200_000)), rng.choice((("[", "]"), ('{"a":', "}"), ("[", ""), ("[0,", "]")))
    inside[key] = raw(left * depth + "1" + right * depth)


def many(inside, key, rng, raw, tree):
    value = inside[key]
    count = rng.choice((2, 2, 2, 3000))
    if isinstance(value, list): inside[key] = (value * count)[:20_000]
    elif isinstance(value, dict): value.update({f"{name}{n}": of for name, of in list(value.items())[:1] for n in range(count)})
    elif isinstance(value, str): inside[key] = value * count if len(value) < 1000 else ""
    else: inside[key] = [value] * count


def drop(inside, key, rng, raw, tree): del inside[key]


def unknown(inside, key, rng, raw, tree):
    "A key that nobody knows, or one that is known elsewhere in the tree."
    known = [k for of, k in nodes(tree) if isinstance(of, dict)]
    target = inside if isinstance(inside, dict) else next((of for of, _ in nodes(tree) if isinstance(of, dict)), None)
    if target is None: inside.append(None)
    else: target[rng.choice(known + NAMES)] = rng.choice([inside[key], *VALUES])


def rename(inside, key, rng, raw, tree):
    if not isinstance(inside, dict): return retype(inside, key, rng, raw, tree)
    inside[rng.choice([*NAMES, f"{key}x", str(key)[:-1]])] = inside.pop(key)


def move(inside, key, rng, raw, tree):
    "Exchange two values."
    other, there = rng.choice(nodes(tree))
    inside[key], other[there] = json_copy(other[there]), json_copy(inside[key])


def json_copy(value): # no value may come to lie inside itself
    if isinstance(value, dict): return {k: json_copy(v) for k, v in value.items()}
    return [json_copy(v) for v in value] if isinstance(value, list) else value


TREE = [retype, rename_value, renumber, odd, deepen, many, drop, unknown, rename, move]


def change(tree, rng: Random, how: Callable, raw: Raw):
    "The tree with one change somewhere; a change that does not fit there is left out."
    box = [tree]
    found = nodes(box)
    inside, key = rng.choice(found[1:] if len(found) > 1 and rng.random() < .95 else found)
    try: how(inside, key, rng, raw, box)
    except (TypeError, ValueError, IndexError, KeyError): inside[key] = None
    return box[0] if box else None


# ---- file types: text -> tree -> text ----

class Json:
    quote = '"'
    @staticmethod
    def load(data: bytes): return json.loads(data)
    @staticmethod
    def dump(tree) -> str: return json.dumps(tree)


class Yaml(Json):
    quote = ""
    @staticmethod
    def load(data: bytes):
        if any(deep in data for deep in (b"[[[[[[", b"[0,[0,[0,", b'{"a":{"a":{"a":')): raise ValueError("an earlier change made it deep, and PyYAML takes seconds over that")
        return json_copy(yaml.safe_load(data))
    @staticmethod
    def dump(tree) -> str: return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


class Lines(Json):
    "A JSON object a line."
    @staticmethod
    def load(data: bytes): return [json.loads(line) for line in data.splitlines() if line.strip()]
    @staticmethod
    def dump(tree) -> str: return "".join(json.dumps(row) + "\n" for row in (tree if isinstance(tree, list) else [tree]))


class Table(Json):
    "A CSV file."
    quote = ""
    @staticmethod
    def load(data: bytes): return list(csv.reader(io.StringIO(data.decode())))
    @staticmethod
    def dump(tree) -> str:
        csv.writer(text := io.StringIO(), lineterminator="\n").writerows(row if isinstance(row, list) else [row] for row in (tree if isinstance(tree, list) else [tree]))
        return text.getvalue()


TEXTS = {".json": Json, ".yml": Yaml, ".yaml": Yaml, ".jsonl": Lines, ".csv": Table, ".position": Json}


def through_text(kind, data: bytes, rng: Random, how: Callable) -> bytes:
    raw = Raw()
    tree = change(kind.load(data), rng, how, raw)
    return raw.put(kind.dump(tree), kind.quote).encode("utf-8", "surrogatepass")


def through_header(data: bytes, rng: Random, how: Callable) -> bytes:
    "A safetensors file with a changed header; what is JSON inside of its metadata is part of the tree."
    size = int.from_bytes(data[:8], "little")
    header, raw = json.loads(data[8:8 + size]), Raw()
    meta = header.get("__metadata__")
    if isinstance(meta, dict): header["__metadata__"] = {k: inner(v) for k, v in meta.items()}
    header = change(header, rng, how, raw)
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(meta, dict) and rng.random() < .9:  # otherwise no text, as the format wants it
        header["__metadata__"] = {k: v if isinstance(v, str) else raw.put(json.dumps(v), '"') for k, v in meta.items()}
    text = raw.put(json.dumps(header), '"').encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


def inner(text):
    try: return json.loads(text)
    except (ValueError, TypeError): return text


def through_parquet(data: bytes, rng: Random, how: Callable) -> bytes:
    import pyarrow, pyarrow.parquet
    rows = change(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist(), rng, how, Raw())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made := io.BytesIO())
    return made.getvalue()


def in_text(name: str, data: bytes, rng: Random, how: Callable) -> bytes:
    "Change what a file says. What has no tree is changed as bytes."
    suffix = Path(name).suffix
    try:
        if suffix == ".safetensors": return through_header(data, rng, how)
        if suffix == ".parquet": return through_parquet(data, rng, how)
        return through_text(TEXTS[suffix], data, rng, how)
    except Exception: return rng.choice(BYTES)(data, rng)  # it was broken before, or no file of this type can say such a thing


def broken(name: str, data: bytes, rng: Random, how: Callable) -> bytes:
    "The content of a file after a change; of a .gz file mostly what is inside."
    if name.endswith(".gz") and rng.random() < .8:
        try: return gzip.compress(broken(name.removesuffix(".gz"), gzip.decompress(data), rng, how), mtime=0)
        except (OSError, EOFError, zlib.error): pass  # broken before
    return in_text(name, data, rng, how) if how in TREE else how(data, rng)


# ---- whole files ----

def empty(file: Path, others: list[Path], rng: Random) -> None: file.write_bytes(b"")
def lost(file: Path, others: list[Path], rng: Random) -> None: file.unlink()


def folder(file: Path, others: list[Path], rng: Random) -> None:
    file.unlink()
    file.mkdir()
    if rng.random() < .5: (file/"inside").write_bytes(b"")


def loop(file: Path, others: list[Path], rng: Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


def swap(file: Path, others: list[Path], rng: Random) -> None:
    other = rng.choice(others)
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs), other.write_bytes(ours)


FILES = [empty, lost, folder, loop, swap]
KINDS = {how.__name__: how for how in (*FILES, *BYTES, *TREE)}


def mutate(files: list[Path], rng: Random) -> Iterator[tuple[str, Path]]: # what was done to which file
    "Break files in one to three ways, one after another."
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        there = [file for file in files if file.is_file() and not file.is_symlink()]
        if not there: return
        file, how = rng.choice(there), rng.choice(rng.choices((FILES, BYTES, TREE), (1, 3, 8))[0])
        if how in FILES: how(file, there, rng)
        else: file.write_bytes(broken(file.name, file.read_bytes(), rng, how))
        yield how.__name__, file
