"""`train`, `eval` and `figures` on a disk that fills up, killed at any moment, and with inputs that are cut off: one line, nothing half-written,
and the same command goes on to the same bytes. `run` and `search` are in test_run, what merges in test_full_disk and test_merge_kill."""
import json, os, random, shutil, time
from pathlib import Path

import pytest
import yaml

from maet.cli import main
from maet.record.ledger import append, versions
from maet.text.miniworld import write_world
from tiny import content, finish, kill_at, larger_disk, long_files, on_a_small_disk, short_files, small_disk, start, timeless, tiny

TRAINING = dict(tokens=8 * 64, batch_tokens=64, sequence_length=32, learning_rate=.001, save_every=1)
COMMANDS = {"train": ("train", "train.yml", "--out", "OUT"),
            "eval": ("eval", "base", "--data", "world/exams/test", "--tasks", "mini", "--languages", "en,es", "--batch-size", "4", "--out", "OUT"),
            "figures": ("figures", "main", "--ledgers", "results", "--papers", "results", "--out", "OUT")}
VERBS = list(COMMANDS)


def command(verb: str, out: str) -> list[str]: return [out if word == "OUT" else word for word in COMMANDS[verb]]


def rows() -> list[dict]:
    "All that the figure `main` needs."
    each = [(m, l, t, s) for m in ("base", "ability-cpt", "f-cpt-la", "maet") for l in ("en", "es", "zh", "bn", "te", "average") for t in ("mathematics", "science") for s in (0, 1, 2)]
    return [dict(study="main", scale="mini", method=m, setting={"ability": t}, language=l, task=t, metric="acc", value=.5 + .01 * s, stderr=.02, n=500, seed=s,
                 versions=versions(), commit=None, seconds=None) for m, l, t, s in each]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict, dict]: # the project, verb -> its result, verb -> seconds
    "What each command makes when it is left alone."
    folder = tmp_path_factory.mktemp("project")
    tiny(folder/"base")
    (folder/"text.jsonl").write_text("".join(json.dumps({"text": f"a few words {n}"}) + "\n" for n in range(60)))
    (folder/"train.yml").write_text(yaml.safe_dump(dict(base="base", corpora=[{"path": "text.jsonl"}], training=TRAINING)))
    write_world(folder/"world", documents=2, items=3)
    append(folder/"results"/"main.jsonl", rows())
    seconds = {verb: finish(folder, command(verb, f"{verb}-whole")) for verb in VERBS}
    results = {verb: timeless(folder/f"{verb}-whole") for verb in VERBS}
    for verb in VERBS: shutil.rmtree(folder/f"{verb}-whole")
    (folder/"log").unlink()
    return folder, results, seconds


@pytest.fixture
def project(whole, tmp_path):
    "A copy that a test may damage; what was there must be as it was in the end."
    shutil.copytree(whole[0], tmp_path/"project")
    before = content(tmp_path/"project")
    yield tmp_path/"project"
    after = content(tmp_path/"project")
    assert {name: after.get(name) for name in before} == before


def last_line(said: str) -> str:
    "The only line that a command says, behind bars."
    *bars, line = said.removesuffix("\n").split("\n")
    assert all(bar.startswith("\r") for bar in bars), said
    return line.rpartition("\r")[2]


def begun(out: Path, result: dict) -> bool:
    "Is all that is there a beginning of the result? Hidden files are what a killed process was about to write."
    there = {name: of for name, of in (timeless(out) or {}).items() if not Path(name).name.startswith(".")}
    return all(of == result[name][:len(of)] for name, of in there.items())


DISKS = {"full from the start": (small_disk, "size=16k", larger_disk), "full half-way": (small_disk, "size=200k", larger_disk), "short files": (short_files, "9000", long_files)}


@pytest.mark.parametrize("verb, disk", [("train", disk) for disk in DISKS] + [("eval", "full from the start"), ("figures", "full from the start"), ("figures", "short files")])
def test_a_full_disk_and_then_room(project, whole, verb, disk):
    limit, options, relief = DISKS[disk]
    if verb == "eval": options = "size=4k"
    first, second = on_a_small_disk(project, limit, options, command(verb, "disk/out"), relief)
    (code, said, left), (again, _, there, made) = first, second
    assert code == 2 and last_line(said).startswith("maet: ") and "disk/" in said, said
    assert not [path for path in left if path.startswith("disk/out") and verb == "train"]  # a checkpoint is all there, or not
    assert again == 0 and {name: of for name, of in made.items() if name.startswith("out/")} == {f"out/{name}": of for name, of in whole[1][verb].items()}
    assert not [path for path in there if Path(path).name.startswith(".")], "something was left"


@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_any_moment(project, whole, verb):
    _, results, seconds = whole
    rng, out, killed = random.Random(verb), project/"out", 0
    for turn in range(3):
        process, began = start(project, command(verb, "out"), "../log")
        killed += kill_at(process, began + (turn + rng.random()) / 3 * seconds[verb])
        assert begun(out, results[verb])
        if verb == "train" and out.exists(): break
    else: finish(project, command(verb, "out"), "../log")
    assert killed and timeless(out) == results[verb]
    assert not [path for path in [*project.glob(".*"), *out.rglob(".*")]], "something was left"


def test_what_a_killed_training_left_is_cut_off(project, whole):
    "Half of a file of the newest checkpoint is lost: it does not count, and the run ends with the same bytes all the same."
    process, _ = start(project, command("train", "out"), "../log")
    checkpoints = project/".out.work/job/checkpoints"
    while process.is_alive() and not (checkpoints/"checkpoint-3/whole.json").exists(): time.sleep(.0005)
    assert kill_at(process, 0)
    shutil.copytree(project/".out.work", kept := project.parent/"kept")
    newest = max((mark.parent for mark in kept.rglob("whole.json")), key=lambda folder: int(folder.name.split("-")[1]))
    for file in (newest.relative_to(kept)/name for name in ("trained.safetensors", "optimizer.pt")):
        for path in (project/".out.work", project/"out"): shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, project/".out.work")
        os.truncate(project/".out.work"/file, (kept/file).stat().st_size // 2)
        finish(project, command("train", "out"), "../log")
        assert timeless(project/"out") == whole[1]["train"], file


BASE = dict(corpora={"x": {"path": "text.jsonl"}}, vocabulary=300, model=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24),
            phases=[dict(shares={"x": 1}, training=TRAINING)])


@pytest.mark.parametrize("arguments", [command("train", "out"), ["base", "base.yml", "--out", "out"]])
def test_killed_when_only_the_work_is_left_to_remove(project, monkeypatch, capfd, arguments):
    monkeypatch.chdir(project)
    Path("base.yml").write_text(yaml.safe_dump(BASE))
    remove = shutil.rmtree
    def killed(path, *how, **more):
        if Path(path).name.startswith(".out."): raise KeyboardInterrupt
        remove(path, *how, **more)
    for patched, code in ((killed, 130), (remove, 0), (remove, 2)):  # the third call finds a result, and nothing to go on from
        monkeypatch.setattr(shutil, "rmtree", patched)
        with pytest.raises(SystemExit) as exit: main(arguments)
        assert exit.value.code == code and Path("out/model.safetensors").is_file()
        assert bool(list(project.glob(".out.*"))) == (code == 130)
    assert capfd.readouterr().err.endswith("\nmaet: out: exists; choose a new place\n")


INPUTS = {"train": ["train.yml", "text.jsonl", "base/config.json", "base/model.safetensors", "base/tokenizer.json"],
          "eval": ["base/config.json", "base/model.safetensors", "base/tokenizer.json", "world/exams/test/mathematics/es.jsonl"], "figures": ["results/main.jsonl"]}


@pytest.mark.parametrize("verb, name", [(verb, name) for verb, names in INPUTS.items() for name in names])
def test_an_input_that_is_cut_off(project, monkeypatch, capfd, verb, name):
    monkeypatch.chdir(project)
    file, data = project/name, (project/name).read_bytes()
    file.write_bytes(data[:len(data) // 2])
    before = content(project)
    with pytest.raises(SystemExit) as exit: main(command(verb, "out"))
    said = capfd.readouterr().err
    file.write_bytes(data)
    if verb == "figures":  # the last line is what a kill leaves, and rows are missing then
        assert exit.value.code == 0 and last_line(said).startswith("main: no row for") and not Path("out").exists()
    else: assert exit.value.code == 2 and (name in last_line(said) or str(Path(name).parent) in said), said
    assert content(project) | {name: before[name]} == before
