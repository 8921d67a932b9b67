"""Eq. 1 as it is defined gives the same keys in one process and on two ranks under ZeRO 0 to 3, also where a run was killed between two
checkpoints."""
from pathlib import Path

import pytest
import torch

from maet.weights.checkpoints import Checkpoint
from maet.weights.packs import open_pack, read_keys
from maet.text.tokens import Tokens
from maet.training.schedule import GRADIENT, Training
from maet.training import trainer
from maet.training.train import train
from maet.method.locate import locate

STEPS = dict(mode=GRADIENT, tokens=4*8*16, batch_tokens=8*16, sequence_length=16, device_batch=2, save_every=2)
STAGES = (0, 1, 2, 3)


class Killed(Exception): pass


def add_up(folder: Path, stage: int | None, name: str, killed: bool = False) -> None:
    "The sums of one run, as a pack; none yet where it is killed after three of four steps."
    where = "alone" if stage is None else f"ZeRO {stage}"
    out = folder/f"{where}{name}.safetensors"
    deepspeed = None if stage is None else dict(zero_optimization=dict(stage=stage))
    ids, after_step = torch.load(folder/"ids.pt", weights_only=True), trainer._after_step

    def stop(trainer, loss):  # in all ranks at once
        after_step(trainer, loss)
        if trainer.state.global_step == 3: raise Killed

    if killed: trainer._after_step = stop
    try: train(folder/"base", Tokens(ids), out, Training(**STEPS), deepspeed=deepspeed)
    except Killed: assert not out.exists()
    finally: trainer._after_step = after_step


def prepare(folder: Path) -> None:
    "A base, a text, and what one process makes of them."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, initializer_range=.1)).save_pretrained(folder/"base")
    torch.save(torch.randint(3, 60, (40, 16)).int(), folder/"ids.pt")
    everywhere(folder, [None])


def everywhere(folder: Path, stages) -> None:
    "Each stage in one go, and again with a kill after three of four steps."
    for stage in stages:
        add_up(folder, stage, "")
        add_up(folder, stage, " killed", killed=True)
        add_up(folder, stage, " killed")


def on_two_ranks(folder: Path) -> None: everywhere(folder, STAGES)


@pytest.fixture
def folder(two_ranks_did): return two_ranks_did["test_gradient_ranks"]


def keys_of(folder: Path, name: str) -> dict:
    base, keys = Checkpoint(folder/"base"), folder/f"{name}.keys.safetensors"
    found = locate(base, open_pack(folder/f"{name}.safetensors"), .05, "element", keys)
    assert found["threshold"] > 0
    return read_keys(keys, base)


@pytest.mark.parametrize("name", ["alone killed", *(f"ZeRO {stage}{killed}" for stage in STAGES for killed in ("", " killed"))])
def test_the_same_keys(folder, name):
    alone, found = open_pack(folder/"alone.safetensors"), open_pack(folder/f"{name}.safetensors")
    assert set(alone) == set(found)
    for tensor, total in alone.items(): torch.testing.assert_close(found[tensor], total, rtol=1e-4, atol=1e-6)
    expected, masks = keys_of(folder, "alone"), keys_of(folder, name)
    differ = sum(int((expected[tensor] ^ masks[tensor]).sum()) for tensor in expected.keys() & masks.keys())
    assert set(expected) == set(masks) and differ == 0
