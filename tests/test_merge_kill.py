"""A merge that is killed with SIGKILL at any moment leaves a folder that is whole and right, or none. Called again, it does
not compute a finished shard twice."""
import hashlib, multiprocessing, os, random, shutil, signal, time
from pathlib import Path

import pytest
import torch
import yaml

from maet.checkpoints import Checkpoint
from maet.deltas import Difference, Packed, save_pack

# The server imports the slow packages once and computes nothing; each run is a process forked from it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["maet.cli", "maet.pipeline", "maet.neurons", "huggingface_hub.repocard", "tqdm"])


def make_experts(folder: Path, hidden: int, layers: int, shard: str) -> Path:
    "A bfloat16 Llama in shards, an ability expert and a language expert as checkpoints, a sparse language pack, a merge file."
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=3 * hidden,
                         vocab_size=8 * hidden, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for name in ("base", "ability", "es"):
        model.save_pretrained(folder/name, max_shard_size=shard)
        with torch.no_grad():
            for parameter in model.parameters(): parameter += .01 * torch.rand_like(parameter)
    base = Checkpoint(folder/"base")
    moved = Difference(Checkpoint(folder/"es"), base)
    save_pack(folder/"bn.safetensors", {name: Packed.of(part, torch.rand(part.shape) < .05) for name, part in moved.items()}, base)
    recipe = dict(merge_method="maet", base_model="base", ability={"model": "ability"},
                  languages=[{"model": "es", "weight": .5}, {"model": "bn.safetensors", "weight": .5}])
    (folder/"merge.yml").write_text(yaml.safe_dump(recipe))
    return folder


COMMANDS = {"merge": ("merge", "merge.yml", "OUT"), "pack": ("pack", "base", "es", "--out", "OUT"),
            "locate": ("locate", "base", "es", "--out", "OUT"),
            "extract": ("extract", "--base", "base", "--ability", "ability", "--minus", "es", "--out", "OUT")}


def command(folder: Path, verb: str, out: str, began, log: str = "log") -> None:
    "What a process does: one command in `folder`; it writes the time at which it began to work, and what it says to a file."
    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    began.value = time.monotonic()
    from maet.cli import main
    main([out if word == "OUT" else word for word in COMMANDS[verb]])


def start(*arguments):
    began = processes.Value("d", 0.)
    process = processes.Process(target=command, args=(*arguments, began))
    process.start()
    while not began.value and process.is_alive(): time.sleep(.0005)
    return process, began.value


def content(path: Path) -> dict[str, str] | None:
    "A digest of every file; None if there is nothing at `path`."
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else None
    return files and {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


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
    process, began = start(experts, verb, "undisturbed")
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
        process, began = start(experts, "merge", "merged")
        time.sleep(max(0, began + (turn % 5 + rng.random()) / 5 * seconds - time.monotonic()))
        moment = (time.monotonic() - began) / seconds
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), (experts/"log").read_text()
        if process.exitcode: killed.append(moment)
        assert content(out) in (None, right)
        if out.exists(): kept += reused(out, before); shutil.rmtree(out)
        if len(killed) == 20: break
    before = stamps(experts)
    process, _ = start(experts, "merge", "merged")
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
        process, began = start(experts, verb, "written")
        time.sleep(max(0, began + rng.uniform(0, seconds) - time.monotonic()))
        process.kill()
        process.join()
        assert content(out) in (None, right)
        out.unlink(missing_ok=True)
    process, _ = start(experts, verb, "written")
    process.join()
    assert process.exitcode == 0 and content(out) == right
    assert sorted(os.listdir(experts)) == sorted([*names, "written"])
