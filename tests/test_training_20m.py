"""5 % of a 20 M-parameter Llama for 50 steps with weight decay: frozen bits, equality with a naive masked AdamW, memory."""
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from maet.weights.checkpoints import Checkpoint
from maet.weights.differences import apply_delta
from maet.weights.packs import open_pack
from maet.training.schedule import Training, reading_order, total_steps
from maet.training.train import train

TRAINING = Training(mode="key-neuron", tokens=50*2*32, batch_tokens=2*32, sequence_length=32, learning_rate=1e-4,
                    schedule="linear", warmup_steps=5, weight_decay=.1, max_grad_norm=1., save_every=1000)


def llama():
    "Weights of a trained model's size. With smaller ones a few gradients come near AdamW's eps, where rounding is magnified."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=32, initializer_range=.05))


def naive(model, keys, corpus):
    "Dense AdamW over all, the gradient masked; frozen scalars are put back after each step, since decay moves them too."
    named = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    norms, others = ([p for n, p in named.items() if ("norm" in n) == norm] for norm in (True, False))
    groups = [dict(params=norms, weight_decay=0.), dict(params=others, weight_decay=TRAINING.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=TRAINING.learning_rate, betas=(TRAINING.beta1, TRAINING.beta2))
    schedule = get_scheduler("linear", optimizer, TRAINING.warmup_steps, total_steps(TRAINING))
    for rows in reading_order(len(corpus), 2*50, TRAINING.seed).view(50, 2):
        ids = corpus[rows].long()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, p in named.items(): p.grad.mul_(keys[name])
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)
        optimizer.step(); schedule.step(); optimizer.zero_grad()
        for name, p in named.items(): p.data.copy_(torch.where(keys[name], p.data, start[name]))
    return {name: p.detach() for name, p in named.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = llama()
    assert 19e6 < sum(p.numel() for p in model.parameters()) < 22e6
    model.save_pretrained(folder/"base")
    torch.manual_seed(1)
    keys = {name: torch.rand(p.shape) < .05 for name, p in model.named_parameters()}
    corpus = torch.randint(8000, (80, 32), dtype=torch.int32)
    report = train(folder/"base", corpus, folder/"expert.safetensors", TRAINING, keys)
    base = Checkpoint(folder/"base")
    apply_delta(folder/"expert", base, open_pack(folder/"expert.safetensors"))
    return base, Checkpoint(folder/"expert"), open_pack(folder/"expert.safetensors"), keys, report, naive(model, keys, corpus)


def test_frozen_scalars_keep_their_bits(runs):
    base, expert, pack, keys, *_ = runs
    for name, mask in keys.items():
        assert torch.equal(base.read(name)[~mask].view(torch.int32), expert.read(name)[~mask].view(torch.int32)), name
        assert torch.equal(pack[name].bools(), mask)


def test_values_equal_naive_masked_adamw(runs):
    base, expert, pack, keys, _, wanted = runs
    far = max((expert.read(name)[mask] - wanted[name][mask]).abs().max().item() for name, mask in keys.items())
    moved = max(pack[name].values.abs().max().item() for name in keys)
    assert far < 1e-6 and moved > 1e-3, (far, moved)


def test_state_is_a_small_part_of_dense(runs):
    base, _, _, keys, report, _ = runs
    assert report["trained"] == sum(int(mask.sum()) for mask in keys.values())
    assert set(report["bytes"]) == {"gradients", "moments", "masters", "places"}
    dense = 12*sum(mask.numel() for mask in keys.values())  # gradient and two moments in float32
    assert sum(report["bytes"].values()) <= .12*dense
