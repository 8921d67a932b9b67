"""Every reader of files that a user can hand in: how a valid sample is made in the working directory, and how it is opened, as the
commands open it. `fuzz.py` breaks the sample in between."""
import csv, gzip, json, shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import yaml

from maet import claims, evaluation, exams, figures, launch, ledger, merging, plan, report, settings, study
from maet import layer_swapping  # adds layer_swap
from maet.checkpoints import Checkpoint
from maet.corpora import Source, Table, Tokens, documents, encode, open_tokens, reader, save_tokens, shuffled
from maet.deltas import Difference, Keys, check_pack, open_delta, save_keys, save_pack
from maet.neurons import locate
from maet.pipeline import make_tokenizer
from maet.tensors import meta_model
from maet.training import Training, load_base
from tiny import TEXTS, tiny


class Reader(NamedTuple):
    make: Callable[[Path], None] # a valid sample in this folder, which is the working directory
    open: Callable[[], object]   # as a command does
    files: tuple = ("**/*",)     # patterns of what is broken
    imports: tuple = ()          # slow packages that it needs
    may: tuple = ()              # what else than a MaetError it may raise


READERS: dict[str, Reader] = {}
LLAMA = ("transformers.models.llama.modeling_llama",)


def add(name: str, make: Callable, open: Callable, *files: str, imports: tuple = (), may: tuple = ()) -> None:
    READERS[name] = Reader(make, open, files or ("**/*",), imports, may)


# ---- checkpoints, packs, keys ----

def read_all(path: str) -> None:
    "What every command that reads weights does: open, ask for a fingerprint, read each tensor."
    model = Checkpoint(path)
    model.fingerprint
    for name in model.names: model.dtype(name), list(model.chunks(name))


def of_one_file(folder: Path): tiny(folder/"model")
def in_shards(folder: Path): tiny(folder/"model", max_shard_size="20KB")


def two_models(folder: Path):
    tiny(folder/"base")
    tiny(folder/"tuned", seed=1)


def keys(folder: Path):
    two_models(folder)
    locate(Checkpoint("base"), Checkpoint("tuned"), .2, "element", "keys.safetensors")


def pack(folder: Path):
    keys(folder)
    base = Checkpoint("base")
    save_pack("pack.safetensors", Difference(Checkpoint("tuned"), base, Keys("keys.safetensors", base)), base, what="delta")


def read_keys():
    base = Checkpoint("base")
    dict(Keys("keys.safetensors", base))
    launch.KeysUnion(["keys.safetensors"], base).identity
    plan._saved_keys(["keys.safetensors"])


def read_pack():
    check_pack("pack.safetensors", base := Checkpoint("base"))
    dict(open_delta("pack.safetensors", base))


add("shard", of_one_file, lambda: read_all("model"), "model/model.safetensors")
add("index", in_shards, lambda: read_all("model"), "model/*.safetensors", "model/*.index.json")
add("config", of_one_file, lambda: (read_all("model"), meta_model(Path("model"))), "model/config.json", imports=LLAMA)
add("model", of_one_file, lambda: load_base("model", torch.float32), "model/*.json", "model/model.safetensors", imports=LLAMA)
add("keys", keys, read_keys, "keys.safetensors")
add("pack", pack, read_pack, "pack.safetensors")
