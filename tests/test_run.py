"The main job as a process: whole, killed again and again, and the same bytes at the end."
import glob, json, os, pickle, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from maet.study.measured import MEASURES
from tiny import content, ended, finish, kill_at, larger_disk, on_a_small_disk, small_disk
from tiny import start as begin

ROOT = Path(__file__).resolve().parent.parent

TINY = yaml.safe_load("""
scale: mini
workers: 2
languages: [es, bn]
world: {seed: 1, trace: 0.02, documents: 300, items: 10}
base:
  vocabulary: 600
  model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, tie_word_embeddings: true, max_position_embeddings: 512}
  phases:
    - shares: {general/en: 1, mathematics/en: 1, general/es: 1, general/bn: 1}
      training: &training {tokens: 16_384, batch_tokens: 512, sequence_length: 64, learning_rate: 0.002, save_every: 5}
abilities: {mathematics: {tasks: [mathematics], select_ratio: 0.8}}
training: {<<: *training, tokens: 4_096}
locate: {training: {<<: *training, tokens: 2_048}, ratio: 0.05}
exam: {batch_size: 32}
""")


def run(out: str, recipe: str = "tiny.yml") -> tuple[str, ...]:
    "The arguments of the main job."
    return "run", "--recipe", recipe, "--out", out, "--ledger", f"{out}.jsonl"


def start(folder: Path, out: str) -> subprocess.Popen:
    "The command as a shell starts it. Most of that is imports; what needs no shell is forked, by `begin` and `ended`."
    command = [sys.executable, "-m", "maet.cli", *run(out)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                            # a shell that runs the tests in the background has them, and so their children, ignore SIGINT
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def merged(folder: Path, out: str) -> bytes:
    return (folder / out / "seed-0" / "mathematics" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, began = tmp_path_factory.mktemp("runs"), time.monotonic()
    (folder / "tiny.yml").write_text(yaml.safe_dump(TINY))
    (folder / "alone.yml").write_text(yaml.safe_dump(TINY | {"workers": 1}))
    process = start(folder, "whole")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return folder, said, time.monotonic() - began


def test_the_main_job_ends_with_a_table_and_a_sentence(undisturbed):
    folder, said, _ = undisturbed
    assert "| MAET" in said and "F-CPT L&A" in said and "average" in said and "replicated" in said
    seed = folder / "whole" / "seed-0"
    assert {p.name for p in seed.iterdir()} >= {"main.md", "mathematics", "main.png", "main.svg", "main.csv"}
    assert len((folder / "whole.jsonl").read_text().splitlines()) == (4 + 5) * (3 + 1)  # (methods + pairs) x (languages + average)
    assert not [p for p in (folder / "whole").iterdir() if p.name.endswith(".part")]
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained(seed / "mathematics").num_parameters() > 10_000
    assert (seed / "mathematics" / "maet_config.yml").is_file() and "base_model" in (seed / "mathematics" / "README.md").read_text()


def test_a_second_call_makes_nothing_and_adds_nothing(undisturbed):
    folder, said, _ = undisturbed
    stages, lines = sorted(p for p in (folder / "whole").glob("*-*") if p.name != "seed-0"), (folder / "whole.jsonl").read_bytes()
    times = [p.stat().st_mtime_ns for p in stages]
    code, again = ended(folder, run("whole"))
    assert code == 0, again
    assert [p.stat().st_mtime_ns for p in stages] == times and (folder / "whole.jsonl").read_bytes() == lines
    assert again.splitlines()[-3:] == said.splitlines()[-3:]


def test_killed_ten_times_it_ends_with_the_same_bytes(undisturbed):
    """Twice with two workers, each time after one more stage; then with one, by a moment of chance after a stage or a checkpoint came."""
    folder, rng, kills = undisturbed[0], random.Random(0), 0
    made = lambda: sum(len(glob.glob(f"{folder}/killed/{name}")) for name in ("[!.]*-*", ".*/*work*/checkpoint-*"))  # pathlib's fails where a folder goes meanwhile
    while kills < 10:
        before = made()
        if kills in (0, 5): process = start(folder, "killed")
        else: process, _ = begin(folder, run("killed", "alone.yml"))
        over = lambda: process.poll() is not None if kills in (0, 5) else not process.is_alive()
        while made() <= before and not over(): time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if over(): break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate() if kills in (0, 5) else process.join()
        kills += 1
    assert kills == 10
    code, said = ended(folder, run("killed"))
    assert code == 0, said
    assert merged(folder, "killed") == merged(folder, "whole")


def test_one_process_gives_the_same_bytes_as_two(undisturbed):
    folder, *_ = undisturbed
    code, said = ended(folder, run("alone", "alone.yml"))
    assert code == 0 and merged(folder, "alone") == merged(folder, "whole"), said


def test_what_stops_a_worker_is_one_line(undisturbed):
    folder, *_ = undisturbed
    base = shutil.copytree(next((folder / "whole").glob("base.1-*")) / "base", folder / "poisoned")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (folder / "broken.yml").write_text(yaml.safe_dump(TINY | {"base": str(base)}))
    code, said = ended(folder, run("broken", "broken.yml"))
    assert code == 2 and "Traceback" not in said and "maet: " in said.splitlines()[-1] and "holds nan" in said, said
    assert not list((folder / "broken").glob("dense*")) and not list((folder / "broken").glob(".*.part"))


def test_interrupted_it_says_how_to_go_on(undisturbed):
    folder, *_ = undisturbed
    process = start(folder, "interrupted")
    while not list((folder / "interrupted").glob("[!.]*-*")) and process.poll() is None: time.sleep(0.05)  # until a first stage is there
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in said, said
    assert "Traceback" not in said


def test_a_study_finds_what_another_has_trained(undisturbed):
    folder, *_ = undisturbed
    shutil.copytree(folder / "whole", folder / "swept")
    (folder / "sweep.yml").write_text(yaml.safe_dump(dict(recipe="tiny.yml", methods=["base", "soup", "maet"], seeds=[0], vary={"transfer.gamma": [0.1, 0.2]})))
    trained = lambda: {p.name for p in (folder / "swept").glob("*-*") if (p / "expert").exists() or (p / "expert.safetensors").exists()}
    before = trained()
    code, said = ended(folder, ("run", "--study", "sweep.yml", "--out", "swept"))
    assert code == 0, said
    assert {name.split("-")[0] for name in trained() - before} == {"dense.mathematics.en", "dense.general.es", "dense.general.bn"}  # a soup's experts
    assert "| MAET (transfer.gamma 0.1) " in said and (folder / "swept" / "seed-0" / "sweep.md").is_file()
    rows = [json.loads(line) for line in (folder / "swept" / "results" / "sweep.jsonl").read_text().splitlines()]
    assert not (folder / "data").exists()  # recording is asked for
    assert sum("minus" in r["setting"] for r in rows) == (2 + 2 + 1) * (3 + 1)  # MAET minus base and minus soup in each setting, soup minus base
    rows = [r for r in rows if "minus" not in r["setting"]]
    assert len(rows) == (2 + 1 + 1) * (3 + 1) and {r["study"] for r in rows} == {"sweep"}  # what a setting does not change is a row once
    assert {(r["method"], r["setting"].get("transfer.gamma")) for r in rows} == {("maet", 0.1), ("maet", 0.2), ("base", None), ("soup", None)}
    assert {r["value"] for r in rows if r["method"] == "base" and r["language"] == "en"} == \
        {json.loads(line)["value"] for line in (folder / "whole.jsonl").read_text().splitlines() if '"method": "base"' in line and '"en"' in line}


# ---- what was trained is there already: the rest of a run, and a search ----

LATE = ("maet.", "exam.mathematics.maet", "seed-")  # what a run makes last
ARGUMENTS = {"run": ("run", "--recipe", "alone.yml"), "search": ("search", "alone.yml", "--trials", "2", "--items", "2", "--methods", "maet")}


def late(verb: str, out: str) -> list[str]: return [*ARGUMENTS[verb], "--out", out, "--ledger", f"{out}.jsonl"]


def trained_already(folder: Path, out: Path) -> None:
    "A copy of the whole run as it was before the merge."
    shutil.copytree(folder / "whole", out, symlinks=True, ignore=lambda _, names: [name for name in names if name.startswith(LATE)])


MEASURED = {"selected": "share", "overlap": "share", "expert_maps": "share", "world": "loss", "empirical": "last training loss"}


@pytest.mark.parametrize("measure", MEASURED)
def test_a_measure_reads_what_a_run_left(undisturbed, tmp_path, measure):
    "In its folder, and makes what it lacks, one of them with two workers; called again, every row is known."
    (folder, *_), project = undisturbed, tmp_path / "project"
    shutil.copytree(folder / "whole", project / "out", symlinks=True)
    (project / "data").symlink_to(ROOT / "data")
    recipe = TINY | {"workers": 2 if measure == "world" else 1}
    if measure == "world": recipe |= {"languages": ["es", "zh", "bn", "te"]}
    base = next((folder / "whole").glob("base.1-*")) / "base"
    if measure == "empirical": recipe |= {"languages": ["zh", "bn"], "base": str(base)}
    (project / "tiny.yml").write_text(yaml.safe_dump(recipe))
    (project / "asked.yml").write_text(yaml.safe_dump({"recipe": "tiny.yml", "measure": measure, "seeds": [0]}))
    arguments = "run", "--study", "asked.yml", "--out", "out", "--ledger", "rows.jsonl"
    calls = 2 if measure == "selected" else 1
    (code, said), *more = [ended(project, arguments, "../log") for _ in range(calls)]
    assert code == 0 and not any(code for code, _ in more), (said, more)
    rows = [json.loads(line) for line in (project / "rows.jsonl").read_text().splitlines()]
    assert any(row["metric"] == MEASURED[measure] for row in rows) and {row["study"] for row in rows} == {"asked"}
    assert {path.name for path in project.iterdir()} == {"asked.yml", "data", "out", "rows.jsonl", "tiny.yml"}
    assert f"{len(rows)} of them new" in said and all(" 0 of them new" in again for _, again in more)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_a_measure_wants_reaches_a_worker(measure):
    "It is sent by its name."
    wanted = MEASURES[measure].wanted
    assert pickle.loads(pickle.dumps(wanted)) is wanted


def test_a_measure_that_nobody_knows(tmp_path):
    (tmp_path / "asked.yml").write_text("{recipe: mini, measure: length}")
    command = [sys.executable, "-m", "maet.cli", "run", "--study", "asked.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "measure: length is not known; known are controls, costs, empirical, " in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["asked.yml"]


def nearly_full(disk: Path, spare: str) -> None:
    "A disk with such a copy, and so many kilobytes left."
    small_disk(disk, "size=64m")
    trained_already(Path("."), disk / "out")
    used = shutil.disk_usage(disk).used >> 10
    larger_disk(disk, f"size={used + int(spare)}k,nr_inodes=10000")


@pytest.fixture(scope="module")
def right(undisturbed) -> dict: # verb -> ledger rows, what was merged, what was tried; and the seconds that a search takes
    folder, *_ = undisturbed
    trained_already(folder, folder / "searched")
    seconds = finish(folder, late("search", "searched"))
    return {"run": results(folder, "whole"), "search": results(folder, "searched"), "seconds": seconds}


def results(folder: Path, out: str) -> list:
    rows = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in (folder / f"{out}.jsonl").read_text().splitlines()]
    return [rows, {name: digest for name, digest in content(folder / out).items() if name.startswith("maet.") and name.endswith(".safetensors") or name.endswith("trials.json")}]


@pytest.mark.parametrize("verb, spare", [("run", "16"), ("run", "340"), ("search", "16")])
def test_a_full_disk_and_then_room(undisturbed, right, tmp_path, verb, spare):
    "The merge, or what comes after it, finds no room. When there is some, the same command goes on to the same rows."
    folder, *_ = undisturbed
    for name in ("whole", "alone.yml"): (tmp_path / name).symlink_to(folder / name)
    (code, said, _), (again, more, there, made) = on_a_small_disk(tmp_path, nearly_full, spare, late(verb, "disk/out"), larger_disk)
    *_, line = said.removesuffix("\n").split("\n")
    assert code == 2 and line.rpartition("\r")[2].startswith("maet: ") and "disk/out" in line and "goes on from here" in line and "Traceback" not in said, said
    assert again == 0, more
    rows, kept = right[verb]
    assert made["out.jsonl"] == rows and {name: digest for name, digest in made.items() if name.removeprefix("out/") in kept} == {f"out/{name}": digest for name, digest in kept.items()}
    assert not [path for path in there if path.endswith(".part")]


def test_a_killed_search_goes_on(undisturbed, right):
    folder, *_ = undisturbed
    trained_already(folder, folder / "shot")
    rng, killed = random.Random(1), 0
    for turn in range(3):
        process, began = begin(folder, late("search", "shot"))
        killed += kill_at(process, began + (turn + rng.random()) / 3 * right["seconds"])
    finish(folder, late("search", "shot"))
    assert killed and results(folder, "shot") == right["search"] and not list((folder / "shot").glob("*.part"))
