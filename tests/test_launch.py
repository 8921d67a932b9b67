"""Ranks for real, on CPU: the same result at every ZeRO stage, after kills, from a closed notebook, and by the commands for many machines."""
import json, multiprocessing, os, signal, socket, subprocess, sys, textwrap, threading, time
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
import psutil  # comes with deepspeed

from maet.training import jobs as room, launch
from maet.weights.checkpoints import Checkpoint
from maet.text.tokens import Tokens
from maet.text.tables import save_tokens
from maet.weights.differences import apply_delta
from maet.weights.packs import open_pack, save_keys
from maet.training.jobs import Job, Launch, curve
from maet.training.follow import RankError, _new_lines, follow, stop
from maet.training.launch import run_job
from maet.training.commands import running
from maet.weights.tensors import MaetError
from maet.training.schedule import Training
from ranks import free_port

STEPS, KILLS = 60, (7, 18)  # a kill of a rank, a kill of the launcher
OF_STAGE = {1: "dense", 2: "lora", 3: "key-neuron"}  # what is killed at which stage
SETTINGS = dict(tokens=STEPS*8*16, batch_tokens=8*16, sequence_length=16, learning_rate=5e-4, warmup_steps=2, save_every=4, eval_every=10)


def quiet(step, steps, loss): pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base, text, and two keys files. Ranks on CPU with one thread each, wherever the test runs."
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("launch")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                 max_position_embeddings=16, initializer_range=.1)).save_pretrained(folder/"base")
    save_tokens(folder/"tokens.safetensors", Tokens(torch.randint(64, (60, 16), dtype=torch.int32)))
    save_tokens(folder/"held out.safetensors", Tokens(torch.randint(64, (8, 16), dtype=torch.int32)))
    base = Checkpoint(folder/"base")
    for n, part in enumerate(("proj", "")):
        save_keys(folder/f"{n}.keys.safetensors", {name: torch.rand(base.shape(name)) < .1 for name in base.names if part in name}, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu"), patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def job(folder, name, mode, **more):
    keys = [folder/"0.keys.safetensors", folder/"1.keys.safetensors"] if mode == "key-neuron" else []
    out = folder/(f"{name}.safetensors" if mode == "key-neuron" else name)
    return Job(folder/"base", folder/"tokens.safetensors", out, folder/f"{name}.work", Training(mode=mode, **{**SETTINGS, **more}), keys,
               folder/"held out.safetensors")


def tensors(folder, out):
    "All weights of an expert; a pack is added to the base."
    out = Path(out)
    if out.is_file():
        if not out.with_suffix("").exists(): apply_delta(out.with_suffix(""), Checkpoint(folder/"base"), open_pack(out))
        out = out.with_suffix("")
    return {name: Checkpoint(out).read(name) for name in Checkpoint(out).names}


def content(out):
    out = Path(out)
    return {f.name: f.read_bytes() for f in out.iterdir()} if out.is_dir() else out.read_bytes()


def report(of): return json.loads((Path(of.work)/"report.json").read_text())


# ---- Show 1: every ZeRO stage gives what one process gives

@pytest.fixture(scope="module")
def alone(folder):
    jobs = {mode: job(folder, f"alone {mode}", mode) for mode in OF_STAGE.values()}
    for one in jobs.values(): run_job(one, progress=quiet)
    return jobs


@pytest.fixture(scope="module")
def together(folder, alone):
    "stage -> mode -> a finished job of two ranks. One launch does the three modes of a stage in turn, by the command that is kept for users."
    done = {}
    def of(stage):
        if stage in done: return done[stage]
        how, jobs = Launch(devices=2, zero=stage), {mode: job(folder, f"stage {stage} {mode}", mode) for mode in OF_STAGE.values()}
        logs, files = folder/f"logs of stage {stage}", [folder/f"stage {stage} {mode}.json" for mode in jobs]
        for file, one in zip(files, jobs.values()): room._write(file, launch._plain(one))
        port, names = launch._port(how), room.machines(how)
        env = launch._environment(how, names, port)
        launch._prepare(logs, names, env)
        line = launch.command(how, names, logs, port, [room.write_config(folder/f"stage {stage}.json", how), *files])
        ended = subprocess.run(line, cwd=logs, env=env, capture_output=True, text=True, timeout=300)
        said = "\n".join(log.read_text() for log in sorted(logs.glob("*rank*.log")))
        assert not ended.returncode and all(Path(one.out).exists() for one in jobs.values()), ended.stderr + said
        done[stage] = jobs
        return jobs
    return of


@pytest.mark.parametrize("stage", OF_STAGE)
def test_a_stage_gives_what_one_process_gives(folder, alone, together, stage):
    base = tensors(folder, folder/"base")
    masks = room.KeysUnion([folder/"0.keys.safetensors", folder/"1.keys.safetensors"], Checkpoint(folder/"base"))
    for mode, one in together(stage).items():
        ours, theirs = report(one), report(alone[mode])
        torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=0, atol=1e-4)
        assert len(ours["losses"]) == STEPS and ours["held_out"].keys() == theirs["held_out"].keys()
        for step in ours["held_out"]: assert abs(ours["held_out"][step] - theirs["held_out"][step]) < 1e-4
        expert, reference = tensors(folder, one.out), tensors(folder, alone[mode].out)
        for name, tensor in reference.items(): torch.testing.assert_close(expert[name], tensor, rtol=0, atol=1e-5)
        frozen = {name: torch.ones_like(t, dtype=torch.bool) for name, t in base.items()}
        if mode == "dense": continue
        if mode == "key-neuron": frozen = {name: ~masks[name] if name in masks else f for name, f in frozen.items()}
        if mode == "lora": frozen = {name: f for name, f in frozen.items() if torch.equal(reference[name], base[name])}
        assert len(frozen) > 2
        for name, where in frozen.items():  # bits, not only numbers
            assert torch.equal(expert[name][where].view(torch.int32), base[name][where].view(torch.int32)), name
        assert any(not torch.equal(expert[name], base[name]) for name in base)


@pytest.mark.parametrize("stage", OF_STAGE)
def test_nothing_is_left_as_a_pickle(folder, together, stage):
    for one in together(stage).values():
        left = [p.name for place in (one.out, one.work) for p in (Path(place).rglob("*") if Path(place).is_dir() else [Path(place)])]
        assert "report.json" in left and any(name.endswith(".safetensors") for name in left)
        assert not [name for name in left if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]


# ---- Show 2: killed and called again

def family(work):
    "The launcher's processes: deepspeed, its helper on this machine, and the ranks."
    launcher = psutil.Process(json.loads((work/"launcher.json").read_text())["pid"])
    helper, = launcher.children()
    return [launcher, helper, *helper.children()]


def reached(work, before, step):
    "Has a launch that is not `before` come to this step?"
    known = room._read(work/"launcher.json") or {}
    if known.get("id") in (None, before) or "pid" not in known: return False
    return any(line["step"] >= step for line in _new_lines(work/"progress.jsonl", known["progress_from"])[0])


def newest(work): # launch of a folder, or None
    return (room._read(work/"launcher.json") or {}).get("id")


def kill_at(work, step, victim, before):
    """In the background: kill process number `victim` of the family of a launch that is not `before`, at a step.
    Gives a function that waits until all of it is gone."""
    killed = []
    def kill():
        while not reached(work, before, step): time.sleep(.01)
        killed.extend(family(work))
        killed[victim].kill()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    def wait():
        thread.join(60)
        assert killed and not psutil.wait_procs(killed, timeout=30)[1]
    return wait


LAUNCHER, HELPER, RANK = 0, 1, -1


def start_and_vanish(one, how):
    "What a notebook does that is closed at once."
    launch.start(one, how)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("stage", OF_STAGE)
def test_killed_and_called_again(folder, together, stage):
    """A rank is killed, then the launcher; called a third time it ends with the undisturbed run's bytes.
    The first launch is by a process that is gone at once, as a closed notebook is."""
    undisturbed, mode, how = together(stage)[OF_STAGE[stage]], OF_STAGE[stage], Launch(devices=2, zero=stage)
    one = job(folder, f"killed at stage {stage}", mode)
    work, rank_dies, launcher_dies = Path(one.work), KILLS[0] + stage, KILLS[1] + stage
    notebook = multiprocessing.get_context("fork").Process(target=start_and_vanish, args=(one, how))
    notebook.start()
    notebook.join()
    assert notebook.exitcode == -signal.SIGKILL
    gone = kill_at(work, rank_dies, RANK, None)
    with pytest.raises(RankError, match="rank (0 or )?1 was killed or crashed.*called again"): follow(work, quiet)
    gone()

    gone = kill_at(work, launcher_dies, LAUNCHER if stage != 2 else HELPER, newest(work))
    with pytest.raises(RankError, match="the launcher .*called again"): run_job(one, how, quiet)
    gone()

    saved = max(int(mark.parent.name.removeprefix("checkpoint-")) for mark in (work/"checkpoints").glob("checkpoint-*/whole.json"))
    seen = []
    assert run_job(one, how, lambda step, steps, loss: seen.append(step))["losses"] == report(undisturbed)["losses"]
    assert content(one.out) == content(undisturbed.out)
    assert [line["loss"] for line in curve(work)] == report(undisturbed)["losses"]  # goes on as if nothing had been
    assert saved + 1 == seen[0] > rank_dies and seen == list(range(seen[0], STEPS + 1))
    assert not running(work) and not (work/"checkpoints").exists()


# ---- Many machines: DeepSpeed's own commands, run by stand-ins that take every machine for this one

STAND_INS = dict(
    ssh="""
        #!/bin/sh
        case "$*" in *"hostname -I"*) echo 127.0.0.1;; esac""",
    pdsh=f"""
        #!{sys.executable}
        import subprocess, sys
        at = sys.argv.index("-w")
        line = " ".join(sys.argv[at + 2:])  # as pdsh does; %n is the machine's number
        runs = [subprocess.Popen(["sh", "-c", line.replace("%n", str(n))]) for n, name in enumerate(sys.argv[at + 1].split(","))]
        sys.exit(max(run.wait() for run in runs))""",
    srun=f"""
        #!{sys.executable}
        import os, subprocess, sys
        value = lambda option: next(a for a in sys.argv if a.startswith(option)).partition("=")[2]
        count, each, runs = sys.argv[sys.argv.index("-n") + 1], value("--ntasks-per-node"), []
        program = sys.argv[next(n for n, a in enumerate(sys.argv) if a.startswith("--export=ALL")) + 1:]
        for n in range(int(count)):
            told = dict(SLURM_PROCID=str(n), SLURM_NTASKS=count, SLURM_LOCALID=str(n % int(each)), SLURM_NTASKS_PER_NODE=each)
            log = open(value("--output").replace("%t", str(n)), "w")
            runs.append(subprocess.Popen(program, env={{**os.environ, **told}}, stdout=log, stderr=log))
        sys.exit(max(run.wait() for run in runs))""",
    scontrol="#!/bin/sh\necho 127.0.0.1\necho node-2", sinfo="#!/bin/sh")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, text in STAND_INS.items():
        (tmp_path/name).write_text(textwrap.dedent(text).strip() + "\n")
        (tmp_path/name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[1-2]")


def test_two_machines_by_pdsh_and_by_slurm(folder, together, cluster):
    "Begun with pdsh, stopped, and ended with srun."
    one, work = job(folder, "two-machines", "dense"), folder/"two-machines.work"
    launch.start(one, Launch(hosts=["node-1", "node-2"], zero=1, port=free_port()))
    with pytest.raises(MaetError, match="two-machines.work: another process runs a job there"): run_job(job(folder, "two-machines", "dense", seed=1), Launch(zero=1))
    with pytest.raises(MaetError, match="another process runs a job there"): launch.start(one, Launch(zero=1))
    while not reached(work, None, 6): time.sleep(.05)
    stop(work)
    assert not running(work) and not Path(one.out).exists()

    seen = []
    run_job(one, Launch(hosts="slurm", zero=1, port=free_port()), lambda step, steps, loss: seen.append(step))
    assert seen[0] > 1 and content(one.out) == content(together(1)["dense"].out)
    assert len(list((work/"logs").glob("*/*rank1.log"))) == 2


# ---- A rank that fails

def test_a_bad_input_that_only_a_rank_finds_is_one_line(folder):
    one = job(folder, "longer", "dense", sequence_length=32)
    with pytest.raises(MaetError) as found: run_job(one, Launch(devices=2, zero=1), quiet)
    assert str(found.value).startswith("corpus: sequences of 16 tokens, but sequence_length is 32") and "\n" not in str(found.value)
    assert not Path(one.out).exists()


def test_a_rank_that_breaks_is_quoted(folder):
    "DeepSpeed refuses a misspelt key of a section; its own words reach the user."
    (folder/"edited.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket": 1}}))
    with pytest.raises(RankError) as found: run_job(job(folder, "broken", "dense"), Launch(devices=2, config=str(folder/"edited.json")), quiet)
    assert "its last lines" in str(found.value) and "reduce_bucket" in str(found.value)


# ---- Bad input: one line, and nothing is started

@pytest.mark.parametrize("settings, said", [
    (dict(devices=2, zero=4), "zero is 4; a ZeRO stage is 0, 1, 2, 3"), (dict(devices=3, zero=1), "3 ranks"),
    (dict(hosts="nowhere", zero=1), "nowhere: no hostfile"), (dict(devices=2, config="nowhere.json"), "nowhere.json: the DeepSpeed config cannot"),
    (dict(devices=2), "zero is missing"), (dict(devices=2, zero=1, port="taken"), "port .* is not free")])
def test_bad_input_starts_nothing(folder, settings, said):
    with socket.create_server(("", 0)) as server, pytest.raises(MaetError, match=said) as found:
        if "port" in settings: settings = settings | dict(port=server.getsockname()[1])
        run_job(job(folder, "never", "dense"), Launch(**settings), quiet)
    assert "\n" not in str(found.value) and not list(folder.glob("never*"))
