"""`maet plan` against the measured peak of real training: a Llama of 50 M parameters in each mode, each in a process of its own.

Measured are the peak of what torch's allocator gave out during a step, and the peak of the resident set above its level before loading."""
import ctypes, gc, json, os, sys, warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maet.text.documents import Source
from maet.training.settings import load
from maet.weights.tensors import MaetError
from maet.training.schedule import Training
from maet.training.train import train

VOCABULARY, LENGTH, STEPS = 16000, 128, 3
CASES = {  # settings; share of key neurons and granularity
    "dense": (dict(mode="dense", batch_tokens=2*LENGTH), ()),
    "dense, accumulated": (dict(mode="dense", batch_tokens=4*LENGTH, device_batch=2), ()),
    "lora": (dict(mode="lora", batch_tokens=6*LENGTH), ()),
    "key-neuron": (dict(mode="key-neuron", batch_tokens=6*LENGTH), (.05, "element")),
    "key-neuron, recomputed": (dict(mode="key-neuron", batch_tokens=8*LENGTH, activation_checkpointing=True), (.05, "row"))}


def training(case: str) -> Training:
    settings = CASES[case][0]
    return Training(**settings, tokens=STEPS*settings["batch_tokens"], sequence_length=LENGTH, save_every=1000)


def config(**more) -> LlamaConfig:
    size = dict(vocab_size=VOCABULARY, hidden_size=640, intermediate_size=1760, num_hidden_layers=6, num_attention_heads=10, num_key_value_heads=5)
    return LlamaConfig(**size | more, max_position_embeddings=LENGTH, dtype="float32")


def masks(shapes: dict, ratio: float, granularity: str) -> dict:
    lines = lambda shape: shape if granularity == "element" or len(shape) == 1 else (shape[0], 1)
    return {name: (torch.rand(lines(shape)) < ratio).expand(shape) for name, shape in shapes.items()}


class Measured:
    "Peaks in bytes, as training goes by; to be given to `train` as its `progress`."
    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.level, self.resident, self.allocated = resident("VmRSS"), 0, 0

    def __call__(self, step, steps, loss):
        if step < STEPS: self.resident = resident("VmHWM") - self.level  # the profiler's own memory comes later
        if step == STEPS - 1:
            self.before = sum(s.nbytes() for s in {s.data_ptr(): s for s in map(lambda t: t.untyped_storage(), tensors())}.values())
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        if step == STEPS:
            self.profiler.__exit__(None, None, None)
            alive = 0
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            for event in sorted(events, key=lambda e: e.start_ns()):
                alive += event.nbytes()
                self.allocated = max(self.allocated, self.before + alive)


def tensors() -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)]


def resident(field: str) -> int: # bytes: VmRSS now, VmHWM at most
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])*1024


def measure(case: str, folder: Path) -> dict:
    "In a fork: one run, measured."
    keys = None
    if ratio := CASES[case][1]:
        from maet.weights.checkpoints import Checkpoint
        from maet.weights.packs import Keys, save_keys
        base = Checkpoint(folder/"base")
        save_keys(folder/f"{case}.keys", masks({name: base.shape(name) for name in base.names}, *ratio), base)
        keys = Keys(folder/f"{case}.keys", base)
    corpus, measured = torch.randint(VOCABULARY, (64, LENGTH), dtype=torch.int32), Measured()
    train(folder/"base", corpus, folder/case, training(case), keys, None, measured, folder/f"{case}.work")
    return dict(resident=measured.resident, allocated=measured.allocated)


def main(folder: Path):
    "Import and try everything once; then a fork for each case, so that all begin at the same level."
    torch.manual_seed(0)
    for name, model in dict(base=config(), small=config(hidden_size=40, intermediate_size=40, num_hidden_layers=1, vocab_size=50)).items():
        LlamaForCausalLM(model).save_pretrained(folder/name)
    tiny = Training(mode="lora", tokens=2*LENGTH, batch_tokens=LENGTH, sequence_length=LENGTH)
    train(folder/"small", torch.ones(4, LENGTH, dtype=torch.int32), folder/"tried", tiny)
    gc.collect()
    for case in CASES:
        if not os.fork():
            try: (folder/f"{case}.json").write_text(json.dumps(measure(case, folder)))
            finally: os._exit(0)
        os.wait()
    print(json.dumps({case: json.loads((folder/f"{case}.json").read_text()) for case in CASES}))


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    import subprocess
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1",  # a fork may have no threads
                                    MALLOC_MMAP_THRESHOLD_=str(2**16))  # what torch gives back is given back, and not counted
    done = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("plan")], env=environment, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident sets are read from Linux's /proc")
@pytest.mark.parametrize("case", CASES)
def test_peak_is_within_a_tenth_of_the_measured_one(peaks, case):
    from maet.study.plan import memory
    from maet.study.memory import rehearse
    planned = sum(memory(rehearse(config(), training(case), 1, *CASES[case][1])).values())
    allocated, held = peaks[case]["allocated"], peaks[case]["resident"]
    print(f"{case}: planned {planned/1e6:.1f} MB, allocated {allocated/1e6:.1f} MB, resident {held/1e6:.1f} MB")
    assert abs(planned/allocated - 1) < .05, (planned, allocated)
    assert abs(planned/held - 1) < .1, (planned, held)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    from maet.study import fitting
    from maet.training.jobs import Launch
    from maet.study.algorithm import Run
    config().save_pretrained(tmp_path)  # no weights are there: it is known before they are read
    run = lambda devices: Run(str(tmp_path), [Source("text.jsonl")], training("dense"), launch=Launch(devices=devices, zero=2))
    monkeypatch.setattr(fitting, "device_memory", lambda ranks: 1e8)
    with pytest.raises(MaetError, match=r"train \(dense\) needs .* GB on each of 2 devices, and one has 0.1 GB; even with device_batch: 1") as said: fitting.must_fit(run(2))
    assert "\n" not in str(said.value)
    with pytest.raises(MaetError, match="3 ranks with .* cannot share"): fitting.must_fit(run(3))
    monkeypatch.setattr(fitting, "device_memory", lambda ranks: 1e11)
    fitting.must_fit(run(2))


@pytest.mark.parametrize("name, offloads", [("0.6b", False), ("1b", True)])
def test_the_recipes_between_fit_a_card_of_24_gb_and_ten_hours(name, offloads):
    "On one RTX-4090, with what a card does not give; corpora and exam are the hub's, by name and revision."
    from functools import partial
    from maet.study.fitting import ROOM, cluster_of
    from maet.study.plan import config_of, plan
    from maet.study.recipes import Recipe
    from maet.study.rivals import models
    recipe = load(Recipe, name)
    cluster = cluster_of(recipe, gpu="RTX-4090")
    rows = plan(recipe, cluster, config_of(recipe), partial(models, methods=recipe.methods))
    trained = [row for row in rows if row["mode"]]
    assert {row["mode"] for row in trained} == {"gradient", "key-neuron", "dense"}
    assert max(row["memory"] for row in trained) <= ROOM*24e9
    assert 8 < sum(row["seconds"] for row in trained)/3600 <= 10
    assert len(recipe.languages) == 2 and len(recipe.abilities) == 1 and recipe.methods == ["base", "ability-cpt", "maet"]
    assert not cluster.offload and bool(cluster.rivals and cluster.rivals.offload) == offloads
    assert all(source.remote and source.revision for source in recipe.corpora.values()) and recipe.exam.hub and recipe.exam.revision


def test_the_paper_s_recipe_is_planned_without_its_base_or_corpora():
    from maet.study.recipes import Recipe
    from maet.study.plan import Cluster, describe, plan
    recipe = load(Recipe, "8b")
    assert not Path(recipe.base).exists()
    rows = plan(recipe, Cluster("H100", 8, zero=2), config())
    assert sum(row["mode"] == "key-neuron" for row in rows) == 7 and all(row["fits"] for row in rows if row["mode"])
    assert "key-neuron" in describe(recipe, Cluster("H100", 8, zero=2), config())
    assert max(row["trained"] for row in plan(recipe) if row["mode"]) == 8_030_261_248  # the catalogue knows its shapes
    with pytest.raises(MaetError, match="config.json: no such file"): plan(replace(recipe, base="./not/here"))


if __name__ == "__main__": main(Path(sys.argv[1]))
