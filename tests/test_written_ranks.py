"""What training ends with is what is written, in one process and on two ranks under ZeRO 2 and 3, for models whose tensors go by other names on disk:
the loss of the written checkpoint, loaded by transformers, is the run's last held-out loss. One launch does it all (`ranks.py`)."""
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from maet.weights.checkpoints import Checkpoint
from maet.text.tokens import Tokens
from maet.weights.differences import apply_delta
from maet.weights.packs import open_pack
from maet.training.schedule import MODES, Training
from maet.training.resuming import rank
from maet.training.train import train
from ranks import settle

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, initializer_range=.1, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
STEPS = dict(tokens=4*8*16, batch_tokens=8*16, sequence_length=16, device_batch=4, learning_rate=.02, schedule="constant", lora_rank=4)
ZERO = {"one process": None, "ZeRO 2": 2, "ZeRO 3": 3}


def configs() -> dict:
    from transformers import Gemma3Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    gemma = Gemma3Config(text_config=SIZE | dict(head_dim=8, sliding_window=8), vision_config=eyes, mm_tokens_per_image=4,
                         image_token_index=63, boi_token_index=62, eoi_token_index=61)
    return {"llama": LlamaConfig(**SIZE), "pythia": GPTNeoXConfig(**SIZE), "mixtral": MixtralConfig(num_local_experts=4, **SIZE | EXPERTS),
            "qwen3 moe": Qwen3MoeConfig(num_experts=4, head_dim=8, **SIZE | EXPERTS), "gemma 3": gemma}


NAMES = ("llama", "pythia", "mixtral", "qwen3 moe", "gemma 3")


@cache
def data_of(folder: Path) -> dict:
    return torch.load(folder/"data.pt", weights_only=True)


def run(folder: Path, name: str, mode: str, where: str) -> None:
    data, out = data_of(folder), folder/f"{name} {mode} {where}"
    keys = data[name] if mode == "key-neuron" else None
    deepspeed = dict(zero_optimization=dict(stage=ZERO[where])) if ZERO[where] else None
    report = train(folder/name, Tokens(data["ids"]), out, Training(mode=mode, **STEPS), keys, data["held out"], deepspeed=deepspeed)
    if rank() == 0: (folder/f"{out.name}.json").write_text(json.dumps(report["held_out"]))
    settle()


@cache
def loss(path: Path) -> float:
    "Mean loss of a held-out token, by the model that transformers loads."
    from transformers import AutoModelForCausalLM
    ids = data_of(path.parent)["held out"].long()
    with torch.no_grad(): scores = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten()).item()


def prepare(folder: Path) -> None:
    "Bases and text, and what one process makes of them."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    data = {"ids": torch.randint(3, 60, (40, 16)).int(), "held out": torch.randint(3, 60, (8, 16)).int()}
    for name, config in configs().items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder/name)
        base = Checkpoint(folder/name)
        data[name] = {n: torch.rand(base.shape(n)) < .3 for n in base.names if "vision" not in n and "multi_modal" not in n}
    torch.save(data, folder/"data.pt")
    for name in NAMES:
        for mode in MODES: run(folder, name, mode, "one process")


def on_two_ranks(folder: Path) -> None:
    for name in NAMES:
        for mode in MODES:
            for where in ("ZeRO 2", "ZeRO 3"): run(folder, name, mode, where)


@pytest.fixture
def folder(two_ranks_did): return two_ranks_did["test_written_ranks"]


@pytest.mark.parametrize("where", ZERO)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_that_was_reached_is_the_loss_that_was_written(folder, name, mode, where):
    said = json.loads((folder/f"{name} {mode} {where}.json").read_text())
    first, last = said[min(said, key=int)], said[max(said, key=int)]
    written = folder/f"{name} {mode} {where}"
    if mode == "key-neuron":
        apply_delta(folder/f"{written.name} whole", base := Checkpoint(folder/name), open_pack(written))
        assert sum(part.count for part in open_pack(written).values()) > .2 * sum(base.size(n) for n in open_pack(written))
        written = folder/f"{written.name} whole"
    assert abs(loss(folder/name) - first) < 1e-5
    assert abs(loss(written) - last) < 1e-5
    assert abs(last - first) > 1e-3  # otherwise an unchanged base would pass
