"""A merge that is killed with SIGKILL at any moment leaves a folder that is whole and right, or none. Called again, it does
not compute a finished shard twice."""
import os, random, shutil, signal, time
from pathlib import Path

import pytest

from tiny import content, kill_at, make_experts, start

COMMANDS = {"merge": ("merge", "merge.yml", "OUT"), "pack": ("pack", "base", "es", "--out", "OUT"),
            "locate": ("locate", "base", "es", "--out", "OUT"),
            "extract": ("extract", "--base", "base", "--ability", "ability", "--minus", "es", "--out", "OUT")}


def command(verb: str, out: str) -> list[str]: return [out if word == "OUT" else word for word in COMMANDS[verb]]


def stamps(folder: Path) -> dict[tuple, str]:
    "Every shard below `folder`, hidden or not: (inode, time of its last change, size) -> name."
    found = {}
    for file in folder.rglob("*.safetensors"):
        try: state = file.stat()
        except FileNotFoundError: continue
        found[state.st_ino, state.st_mtime_ns, state.st_size] = file.name
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory): return make_experts(tmp_path_factory.mktemp("experts"), 384, 6, "2MB")


@pytest.fixture
def experts(inputs):
    "The experts; afterwards the folder is as it was."
    before = content(inputs)
    yield inputs
    for name in set(os.listdir(inputs)) - {Path(file).parts[0] for file in before}:
        shutil.rmtree(inputs/name) if (inputs/name).is_dir() else (inputs/name).unlink()
    assert content(inputs) == before


def undisturbed(experts: Path, verb: str) -> tuple[dict, list[str], float]:
    "What the command makes when it is left alone, what lies in the folder then, and how long it takes."
    process, began = start(experts, command(verb, "undisturbed"))
    process.join()
    assert process.exitcode == 0, (experts/"log").read_text()
    return content(experts/"undisturbed"), sorted(os.listdir(experts)), time.monotonic() - began


def test_twenty_kills_of_a_merge(experts, tell):
    right, names, seconds = undisturbed(experts, "merge")
    shards = [name for name in right if name.endswith(".safetensors")]
    rng, killed, kept, out = random.Random(0), [], 0, experts/"merged"
    assert len(shards) > 8
    for turn in range(100):  # later runs take finished shards over and are quicker, so not every one is caught alive
        before = stamps(experts)  # what earlier runs left
        process, began = start(experts, command("merge", "merged"))
        moment = (turn % 5 + rng.random()) / 5
        kill_at(process, began + moment * seconds)
        assert process.exitcode in (-signal.SIGKILL, 0), (experts/"log").read_text()
        if process.exitcode: killed.append(moment)
        assert content(out) in (None, right)
        if out.exists(): kept += reused(out, before); shutil.rmtree(out)
        if len(killed) == 20: break
    before = stamps(experts)
    process, _ = start(experts, command("merge", "merged"))
    process.join()
    assert process.exitcode == 0, (experts/"log").read_text()
    kept += reused(out, before)
    assert content(out) == right
    assert sorted(os.listdir(experts)) == sorted([*names, "merged"])
    moments = " ".join(f"{moment:.0%}" for moment in sorted(killed))
    tell(f"{len(killed)} kills in {turn + 1} runs of a merge, at these shares of its {seconds:.2f} s: {moments}; "
         f"{kept} finished shards of {len(shards)} were taken over")
    assert len(killed) == 20
    assert kept > 0


def reused(out: Path, before: dict) -> int:
    "How many shards of `out` were there, finished, before the process that completed it was started."
    return len(stamps(out).keys() & before.keys())


@pytest.mark.parametrize("verb", ["pack", "locate", "extract"])
def test_kills_of_what_writes_a_file(experts, verb):
    right, names, seconds = undisturbed(experts, verb)
    rng, out = random.Random(verb), experts/"written"
    for _ in range(5):
        process, began = start(experts, command(verb, "written"))
        kill_at(process, began + rng.uniform(0, seconds))
        assert content(out) in (None, right)
        out.unlink(missing_ok=True)
    process, _ = start(experts, command(verb, "written"))
    process.join()
    assert process.exitcode == 0 and content(out) == right
    assert sorted(os.listdir(experts)) == sorted([*names, "written"])
