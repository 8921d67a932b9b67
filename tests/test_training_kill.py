"""A training process that is killed with SIGKILL, again and again, ends with the bytes of one that is left alone."""
import os, random, signal, time

import pytest
import torch

from maet.training.resuming import MARK
from maet.training.schedule import MODES, Training
from maet.training.train import train
from tiny import content, processes

SETTINGS = dict(tokens=24*8*16, batch_tokens=8*16, sequence_length=16, device_batch=4, learning_rate=1e-3, warmup_steps=2,
                save_every=2, eval_every=5)


def base_in(folder):
    "A GPT-2 with dropout: its bits depend on the random state that a checkpoint holds."
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder/"base")
    return folder/"base"


def run(folder, mode, out, at):
    "What the killed process does. It tells its step through `at`."
    def tell(step, steps, loss): at.value = step

    torch.set_num_threads(1)
    torch.manual_seed(1)
    corpus, held_out = torch.randint(32, (50, 16)), torch.randint(32, (8, 16))
    shapes = {"wte.weight": (32, 16), "h.0.ln_1.weight": (16,), "h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_attn.bias": (48,)}
    keys = {f"transformer.{name}": torch.rand(shape) < .2 for name, shape in shapes.items()} if mode == "key-neuron" else None
    train(folder/"base", corpus, folder/out, Training(mode=mode, **SETTINGS), keys, held_out, tell)


def unsealed(folder):
    "Is a checkpoint being written at this moment?"
    return any(not (c/MARK).exists() for c in folder.glob("killed.work/checkpoint-*"))


def start(folder, mode, out):
    at = processes.Value("i", 0)
    process = processes.Process(target=run, args=(folder, mode, out, at))
    process.start()
    return process, at


def kill_when(process, ready):
    "Kill the process as soon as `ready`; False if it ended before."
    while process.is_alive() and not ready(): time.sleep(.0005)
    if process.is_alive(): os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("mode", MODES)
def test_same_bytes_after_kills(tmp_path, mode):
    base_in(tmp_path)
    steady, _ = start(tmp_path, mode, "steady")
    rng, kills = random.Random(mode), 0
    for turn, step in enumerate((0, 3, 7, 10, 14, 17)):  # every other kill comes while a checkpoint is being written
        process, at = start(tmp_path, mode, "killed")
        wait = rng.uniform(0, .02)
        def ready():
            if at.value < step: return False
            return unsealed(tmp_path) or at.value > step + 4 if turn % 2 else time.sleep(wait) is None
        kills += kill_when(process, ready)
        if (tmp_path/"killed").exists(): break
    if not (tmp_path/"killed").exists():
        process, _ = start(tmp_path, mode, "killed")
        process.join()
        assert process.exitcode == 0
    steady.join()

    assert steady.exitcode == 0 and kills >= 3
    assert content(tmp_path/"killed") == content(tmp_path/"steady")
