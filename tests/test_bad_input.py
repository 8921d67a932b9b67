"What a user can get wrong: one line that names it, exit code 2, and nothing left behind."
import json, os, shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from maet.checkpoints import Checkpoint
from maet.cli import main
from maet.deltas import Difference, save_keys
from maet.pipeline import make_tokenizer
from test_run import TINY


def make(folder: Path, hidden: int = 16, seed: int = 0, layers: int = 1) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, vocab_size=300,
                                 bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    make_tokenizer(["a few words"] * 9, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base")
    make(tmp_path / "tuned", seed=1)
    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    return tmp_path


def refused(capsys, folder: Path, *arguments: str) -> str:
    "Run the command; what it says must be one line, and the folder as it was."
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit: main(list(arguments))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("maet: ") and said.count("\n") == 1, said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return said


def locate(*more): return ("locate", "base", "tuned", "--out", "keys.safetensors", *more)


def expert(folder, **changes) -> tuple:
    recipe = dict(base="base", corpora=[{"path": "text.jsonl"}],
                  training=dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)) | changes
    (folder / "expert.yml").write_text(yaml.safe_dump(recipe))
    return "train", "expert.yml", "--out", "expert"


def test_what_is_right_passes(folder, capsys):
    with pytest.raises(SystemExit) as exit: main(list(locate()))
    assert exit.value.code == 0 and (folder / "keys.safetensors").is_file()
    with pytest.raises(SystemExit) as exit: main(list(expert(folder, keys=["keys.safetensors"], training=dict(
        mode="key-neuron", tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)) [:-1]) + ["expert.safetensors"])
    assert exit.value.code == 0 and (folder / "expert.safetensors").is_file()


@pytest.mark.parametrize("key, where", [({"gama": 1}, "unknown key gama"), ({"transfer": {"gama": 1}}, "unknown key gama"),
                                        ({"locate": TINY["locate"] | {"ratio": 0}}, "ratio: 0"), ({"locate": TINY["locate"] | {"ratio": 1.5}}, "ratio: 1.5"),
                                        ({"training": TINY["training"] | {"tokens": "many"}}, "tokens"), ({"languages": "es"}, "languages"),
                                        ({"base": "nowhere"}, "nowhere")])
def test_recipe(folder, capsys, key, where):
    (folder / "bad.yml").write_text(yaml.safe_dump(TINY | key))
    assert where in refused(capsys, folder, "run", "--recipe", "bad.yml", "--out", "out")


@pytest.mark.parametrize("ratio", ["0", "1.5", "-1", "nan"])
def test_ratio(folder, capsys, ratio): assert "ratio" in refused(capsys, folder, *locate("--ratio", ratio))


def test_other_shapes(folder, capsys):
    shutil.rmtree("tuned")
    make(folder / "tuned", hidden=32)
    assert "tuned" in refused(capsys, folder, *locate())
    assert "tuned" in refused(capsys, folder, "pack", "base", "tuned", "--out", "pack.safetensors")


def test_keys_of_another_base(folder, capsys):
    other = Checkpoint("tuned")
    save_keys("other.safetensors", {n: torch.ones(other.shape(n), dtype=torch.bool) for n in other.names}, other)
    assert "other.safetensors" in refused(capsys, folder, "pack", "base", "tuned", "--keys", "other.safetensors", "--out", "pack.safetensors")
    training = dict(mode="key-neuron", tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    assert "other.safetensors" in refused(capsys, folder, *expert(folder, keys=["other.safetensors"], training=training))


def test_truncated_shard(folder, capsys):
    shard = folder / "tuned" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    assert "model.safetensors" in refused(capsys, folder, *locate())


def test_nan(folder, capsys):
    weights = load_file("tuned/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, "tuned/model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refused(capsys, folder, *locate())
    assert "model.norm.weight" in refused(capsys, folder, "pack", "base", "tuned", "--out", "pack.safetensors")


def test_index_that_names_another_folder(folder, capsys):
    (folder / "tuned" / "model.safetensors").rename(folder / "x.safetensors")
    names = Checkpoint("base").names
    (folder / "tuned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: "../x.safetensors" for n in names}}))
    assert "../x.safetensors" in refused(capsys, folder, *locate())


def test_pickle(folder, capsys):
    torch.save(load_file("tuned/model.safetensors"), "tuned/pytorch_model.bin")
    (folder / "tuned" / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(capsys, folder, *locate())


@pytest.mark.parametrize("content, where", [(b"", "no document"), (b'{"text": "ma\xf1ana"}\n', "UTF-8"), (b'{"body": "x"}\n', "lacks"), (b"{", "JSON")])
def test_corpus(folder, capsys, content, where):
    (folder / "text.jsonl").write_bytes(content)
    assert where in refused(capsys, folder, *expert(folder))
    files = {name: {"path": "text.jsonl"} for name in ("general/en", "general/es", "general/bn", "mathematics/en")}
    (folder / "run.yml").write_text(yaml.safe_dump(TINY | {"corpora": files}))
    assert where in refused(capsys, folder, "run", "--recipe", "run.yml", "--out", "out")


def test_unwritable_output(folder, capsys):
    (folder / "file").write_text("")
    (folder / "run.yml").write_text(yaml.safe_dump(TINY))
    assert "file" in refused(capsys, folder, "run", "--recipe", "run.yml", "--out", "file/out")
    assert "file" in refused(capsys, folder, *locate()[:3], "--out", "file/keys.safetensors")
    assert "file" in refused(capsys, folder, *expert(folder)[:2], "--out", "file/expert")
