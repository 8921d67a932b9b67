"""Two ranks against one process in what `tests/test_launch.py` leaves out: shards that are let go of after each use, offloading, recomputing,
bfloat16, masked targets, a tied head, the best of a run. One launch does it all (`ranks.py`)."""
import json
from pathlib import Path

import pytest
import torch

from maet.weights.checkpoints import Checkpoint
from maet.text.tokens import Tokens
from maet.training.schedule import Training
from maet.training.resuming import rank
from maet.training.train import train
from ranks import settle

STEPS = dict(tokens=6*8*32, batch_tokens=8*32, sequence_length=32, device_batch=2, learning_rate=.01, eval_every=3, schedule="constant")
BEST = dict(keep=2, save_samples=16)
LET_GO = dict(stage3_param_persistence_threshold=0, stage3_max_live_parameters=0)
ON_CPU = dict(offload_optimizer=dict(device="cpu"))
RUNS = {  # settings; DeepSpeed's zero_optimization; how far losses and tensors may be from one process
    "shards": (dict(mode="key-neuron", activation_checkpointing=True), dict(stage=3, offload_param=dict(device="cpu"), **LET_GO), 1e-5),
    "frozen bfloat16": (dict(mode="key-neuron"), dict(stage=3, **LET_GO), 1e-5),
    "best packs": (dict(mode="key-neuron", **BEST), dict(stage=2, **ON_CPU), 1e-5),
    "best adapters": (dict(mode="lora", lora_merge=False, **BEST), dict(stage=3, **LET_GO), 1e-4),  # Adam magnifies what rounds near A's first, tiny gradients
    "masters": (dict(mode="dense", precision="bfloat16", learning_rate=1e-3), dict(stage=2, **ON_CPU), 2e-2),
}


def last_row(path):
    "Any number of a checkpoint will do for a score. The folder is an ordinary checkpoint in every mode."
    return Checkpoint(path).read("model.layers.1.mlp.down_proj.weight")[-1].sum().item()


def run(folder, name, ranks):
    settings, zero, _ = RUNS[name]
    training, base = Training(**STEPS | settings), folder/("bfloat16" if "bfloat16" in name else "base")
    data, at = torch.load(folder/"data.pt", weights_only=True), folder/f"{name} {ranks}"
    report = train(base, Tokens(data["ids"], data["trained"]), at, training, data["keys"] if training.mode == "key-neuron" else None,
                   data["ids"][:7], deepspeed=dict(zero_optimization=zero) if ranks > 1 else None, score=last_row if training.keep else None)
    if rank() == 0: at.with_name(at.name + ".json").write_text(json.dumps(report))
    settle()


def content(path):
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    from safetensors.torch import load_file
    return {(str(file.relative_to(path)), name): tensor for file in files for name, tensor in load_file(file).items()}


def prepare(folder):
    "Bases and text, and what one process makes of them."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=32, initializer_range=.1, tie_word_embeddings=True))
    model.save_pretrained(folder/"base")
    keys = {name: torch.rand(p.shape) < .2 for name, p in model.named_parameters()}
    data = dict(ids=torch.randint(64, (40, 32)).int(), trained=torch.arange(32) >= torch.randint(2, 31, (40, 1)), keys=keys)
    torch.save(data, folder/"data.pt")
    model.bfloat16().save_pretrained(folder/"bfloat16")
    for name in RUNS: run(folder, name, 1)


def on_two_ranks(folder):
    for name in RUNS: run(folder, name, 2)


@pytest.fixture
def folder(two_ranks_did): return two_ranks_did["test_training_ranks"]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_what_one_process_gives(folder, name):
    far = RUNS[name][2]
    one, two = (json.loads((folder/f"{name} {ranks}.json").read_text()) for ranks in (1, 2))
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=far)
    torch.testing.assert_close(two["held_out"], one["held_out"], rtol=0, atol=far)
    ours, theirs = content(folder/f"{name} 2"), content(folder/f"{name} 1")
    assert ours.keys() == theirs.keys()
    for at, tensor in theirs.items(): torch.testing.assert_close(ours[at], tensor, rtol=0, atol=far)
    assert one["losses"][0] - one["losses"][-1] > .01 and not (folder/f"{name} 2.work").exists()


@pytest.mark.parametrize("name", [name for name in RUNS if "best" in name])
def test_the_best_are_kept_in_order(folder, name):
    rows = json.loads((folder/f"{name} 2/scores.json").read_text())
    assert [row["step"] for row in sorted(rows, key=lambda row: row["step"])] == [2, 4, 6] and rows[0]["samples"] == 8*rows[0]["step"]
    assert [bool(row["kept_as"]) for row in rows] == [True, True, False] and rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    assert all((folder/f"{name} 2"/row["kept_as"]).exists() for row in rows[:2])


def test_state_is_shared(folder):
    one, two = (json.loads((folder/f"masters {ranks}.json").read_text())["bytes"] for ranks in (1, 2))
    assert two["moments"] < .51*one["moments"] and two["gradients"] < .51*one["gradients"] and two["masters"] == two["gradients"]
