"Every reader, a second each, on files that are broken in every way: success or one line. And a fault that is planted is found."
import os, random, re, sys
from pathlib import Path

import pytest

import mutate

PLANTED = """
import os, signal, sys
from pathlib import Path
import fuzz
from fuzz import MaetError
from readers import READERS, Reader

fuzz.LIMIT = 1
class Panic(BaseException): pass
def silent(): Path("new").write_text("left behind")
def loud(): [print("warning", flush=True) for _ in range(50)]
def large(): bytearray(1 << 45)
def hangs():
    while True: pass
def raises(error):
    def run(): raise error
    return run
FAULTS = dict(key=raises(KeyError("name")), panic=raises(Panic("index")), leaves=raises(SystemExit(2)), segfault=lambda: os.kill(os.getpid(), signal.SIGSEGV),
              killed=lambda: os.kill(os.getpid(), signal.SIGKILL), hangs=hangs, large=large, loud=loud, silent=silent, right=raises(MaetError("a.json: broken")))
def planted(fault):
    "A reader of a file that must hold 200 bytes; where it does not, it does what it should not."
    return Reader(lambda folder: Path("a.json").write_text(str([1] * 66)[:200].ljust(200)), lambda: fault() if not Path("a.json").is_file() or Path("a.json").stat().st_size != 200 else None)
READERS.clear()
READERS.update({name: planted(fault) for name, fault in FAULTS.items()})
fuzz.BATCH = 4
sys.argv = ["fuzz", "--seconds", "0", "--least", "5", "--seed", "0"]
sys.exit(not fuzz.main())  # it must say that something failed
"""
FOUND = dict(key="KeyError", panic="Panic", leaves="SystemExit", segfault="killed by SIGSEGV", killed="killed by SIGKILL", hangs="more than 1 s", large="MemoryError",
             loud="printed 50 lines", silent="left new")


def counts(said: str) -> dict[str, list[int]]: # reader -> cases, accepted, refused, failed ...
    rows = [line.split() for line in said.partition("\n\n")[0].splitlines() if not line.startswith((" ", "FAILED"))]
    return {name: [int(cell.replace(",", "")) for cell in cells] for name, *cells in rows if cells[0] != "cases"}


def test_every_reader(python, tell):
    from readers import READERS
    said = python("tests/fuzz.py", "--seconds", len(READERS), "--least", 10, "--seed", 0)
    found = counts(said)
    assert list(found) == [*READERS, "all"] and all(cases >= 10 and cases == accepted + refused and not failed and refused for cases, accepted, refused, failed, *_ in found.values())
    assert found["all"][1] > 50 and re.search(r"seed 0: .* refused in one line, 0 failed in 0 ways$", said.strip()), said
    tell(said.strip())


def test_planted_faults_are_found(python):
    said = python("-c", f"import sys; sys.path.insert(0, 'tests')\n{PLANTED}")
    found, heads = counts(said[said.index("\nreader") + 1:]), dict(re.findall(r"^FAILED (\w+), after .*?: (.*)$", said, re.M))
    for name, word in FOUND.items():
        assert word in heads[name] and found[name][0] >= 5 and found[name][3], said
        assert re.search(rf"python tests/fuzz.py {name} --seed 0 --case \d+", said)
    assert "right" not in heads and found["right"][2] and not found["right"][3]


def test_a_seed_breaks_files_in_one_way_only(tmp_path):
    texts = {"a.json": b'{"a": [1, 2.5, {"b": null}], "c": "text"}', "b.yml": b"a: [1, x]\nb: {c: 2}\n", "c.jsonl": b'{"a": 1}\n{"a": 2}\n', "d.csv": b"a,b\n1,2\n", "e.bin": bytes(range(256)),
             "f.safetensors": (2).to_bytes(8, "little") + b"{}"}
    def broken(folder: Path, seed: int) -> list:
        folder.mkdir()
        for name, text in texts.items(): (folder/name).write_bytes(text)
        kinds = [kind for kind, _ in mutate.mutate(sorted(folder.iterdir()), random.Random(seed))]
        return [kinds, [(p.name, p.is_dir(), p.is_symlink(), p.read_bytes() if p.is_file() else None) for p in sorted(folder.iterdir())]]
    first, second = ([broken(tmp_path/f"{turn}-{seed}", seed) for seed in range(150)] for turn in "ab")
    whole = [(name, False, False, text) for name, text in texts.items()]
    assert first == second and sum(files != whole for _, files in first) > 140
    assert {kind for kinds, _ in first for kind in kinds} == set(mutate.KINDS)
