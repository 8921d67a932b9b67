"The smallest model that everything here can be tried on, and what tells two folders from each other."
import hashlib
from pathlib import Path

import torch

TEXTS = ["a few words", "few words and more words", "words"] * 9


def tiny(folder: Path, hidden: int = 16, seed: int = 0, layers: int = 1, **how) -> Path:
    "A Llama of random weights with a tokenizer. `how`: of save_pretrained."
    from transformers import LlamaConfig, LlamaForCausalLM
    from maet.pipeline import make_tokenizer
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, vocab_size=300,
                         bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder, **how)
    make_tokenizer(TEXTS, 300).save_pretrained(folder)
    return folder
