"Key neurons in others' trainers, beyond the page that shows them: narrow bases, other architectures, restarts, and SHiRA beside them."
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments,
)

import maet
from maet.training.sparse import VALUES

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.randint(3, 64, (16, 16), generator=torch.Generator().manual_seed(0)).tolist()
SAME = dict(learning_rate=2e-3, weight_decay=.1, max_grad_norm=.5, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1,
            train_sampling_strategy="sequential", bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", save_steps=2)
ENDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        tie_word_embeddings=tied, initializer_range=.1, **ENDS))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=.1, **ENDS))


BASES = {"tied bfloat16 Llama": lambda: llama(True).bfloat16(), "bfloat16 Llama": lambda: llama(False).bfloat16(), "GPT-2": gpt2}


@pytest.fixture(params=BASES)
def base(request, tmp_path):
    torch.manual_seed(0)
    BASES[request.param]().save_pretrained(tmp_path/"base")
    return maet.Checkpoint(tmp_path/"base")


def drawn(base):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(base.shape(name), generator=generator) < .1 for name in base.names}


def frozen(base):
    return maet.freeze(AutoModelForCausalLM.from_pretrained(base.path), drawn(base))


def texts():
    return Dataset.from_dict({"input_ids": IDS, "labels": IDS})


def saved_is_right(model, base, folder):
    "The checkpoint holds the trained values, rounded; and the base's bits everywhere else."
    written, keys = maet.Checkpoint(folder), drawn(base)
    values = dict(model.named_parameters())
    moved = 0
    for name, mask in keys.items():
        before, after = base.read(name), written.read(name)
        assert torch.equal(after[~mask], before[~mask]), name
        own = name if name + VALUES in values else f"{model.base_model_prefix}.{name}"
        assert torch.equal(after[mask], values[own + VALUES].detach().to(after.dtype)), name
        moved += int((after != before).sum())
    assert moved > 500


def test_trainer_saves_and_resumes(base, tmp_path):
    arguments = TrainingArguments(tmp_path/"runs", **SAME)
    trainer = Trainer(model := frozen(base), arguments, train_dataset=texts())
    trainer.train()
    trainer.save_model(tmp_path/"saved")
    saved_is_right(model, base, tmp_path/"saved")

    Trainer(again := frozen(base), arguments, train_dataset=texts()).train(resume_from_checkpoint=f"{tmp_path}/runs/checkpoint-2")
    for (name, there), here in zip(model.named_parameters(), again.parameters()):
        if there.requires_grad: assert torch.equal(there, here), name


def test_sft_is_as_the_trainer(base, tmp_path):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", pad_token="2")
    Trainer(plain := frozen(base), TrainingArguments(tmp_path/"runs", **SAME), train_dataset=texts()).train()
    arguments = trl.SFTConfig(tmp_path/"sft", max_length=None, **SAME)
    trainer = trl.SFTTrainer(model := frozen(base), arguments, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path/"saved")
    saved_is_right(model, base, tmp_path/"saved")
    start = dict(frozen(base).named_parameters())
    for (name, ours), theirs in zip(plain.named_parameters(), model.parameters()):
        if not ours.requires_grad or "c_attn.bias" in name: continue  # the keys' bias has no gradient but noise
        change = (ours - start[name]).abs().max().item()
        allowed = .05 if base.dtype(base.names[0]) == torch.bfloat16 else 1e-3  # the loss is summed in another order
        assert (ours - theirs).abs().max().item() <= allowed*max(change, 1e-3), name


def test_accelerate_goes_on_where_it_was(base, tmp_path):
    def step(model, optimizer):
        batch = torch.tensor(IDS[:4])
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), .5)
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True)
    model = frozen(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=2e-3, weight_decay=.1))
    step(model, optimizer)
    accelerator.save_state(tmp_path/"state")
    step(model, optimizer)
    after = [parameter.detach().clone() for parameter in trained]
    accelerator.load_state(tmp_path/"state")
    step(model, optimizer)
    assert all(map(torch.equal, after, trained))
    accelerator.unwrap_model(model).save_pretrained(tmp_path/"saved")
    saved_is_right(model, base, tmp_path/"saved")


def test_shira_at_the_same_places_is_the_same_training(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/"benchmarks"))
    import training
    gap, change = training.same_training(steps=5)
    sys.modules.pop("training")
    assert change > 3e-3 and gap < 1e-4*change
