"A checkpoint that lacks what its config.json asks for, or has more, or is quantised: one line, exit code 2 and nothing left, at every door."
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from test_bad_input import refused
from tiny import tiny

LAYERS = 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A base, a tuned one, a text, an exam, and a file for each command."
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "tuned", "other")): tiny(tmp_path/name, layers=LAYERS, seed=seed)
    Path("text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    Path("data/mathematics").mkdir(parents=True)
    question = {"id": 0, "question": "1 + 1 = ", "target": "2", "answer": "2", "answer_label": "Answer:", "level": 1}
    Path("data/mathematics/en.jsonl").write_text("".join(json.dumps(question | {"id": n}) + "\n" for n in range(4)))
    training = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=.001)
    files = {"expert.yml": dict(base="base", corpora=[{"path": "text.jsonl"}], training=training),
             "linear.yml": dict(merge_method="linear", models=[{"model": name, "parameters": {"weight": .5}} for name in ("base", "tuned")]),
             "arithmetic.yml": dict(merge_method="task_arithmetic", base_model="base", models=[{"model": "tuned", "parameters": {"weight": 1.}}]),
             "maet.yml": dict(merge_method="maet", base_model="base", ability={"model": "tuned"}, languages=[{"model": "other", "weight": 1.}])}
    for name, content in files.items(): Path(name).write_text(yaml.safe_dump(content))
    return tmp_path


DOORS = {"merge linear": ("merge", "linear.yml", "out"), "merge task_arithmetic": ("merge", "arithmetic.yml", "out"),
         "merge maet": ("merge", "maet.yml", "out"), "locate": ("locate", "base", "tuned", "--out", "out.safetensors"),
         "pack": ("pack", "base", "tuned", "--out", "out.safetensors"),
         "extract": ("extract", "--base", "base", "--ability", "tuned", "--minus", "other", "--out", "out.safetensors"),
         "train": ("train", "expert.yml", "--out", "out"),
         "eval": ("eval", "base", "--data", "data", "--tasks", "mathematics", "--languages", "en", "--shots", "0", "--out", "out")}


def change(model: str, tensors=lambda tensors: None, **config) -> None:
    "Damage a checkpoint: its tensors in place, its configuration by keys."
    weights, file = load_file(f"{model}/model.safetensors"), Path(model, "config.json")
    tensors(weights)
    save_file(weights, f"{model}/model.safetensors", {"format": "pt"})
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


DAMAGES = {"no head": (lambda model: change(model, lambda t: t.pop("lm_head.weight")), "lacks lm_head.weight"),
           "no matrix": (lambda model: change(model, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "lacks model.layers.0.mlp.up_proj.weight"),
           "a layer too few": (lambda model: change(model, num_hidden_layers=LAYERS + 1), f"lacks model.layers.{LAYERS}."),
           "a layer too many": (lambda model: change(model, num_hidden_layers=LAYERS - 1), f"holds model.layers.{LAYERS - 1}."),
           "gptq": (lambda model: change(model, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised with gptq; dequantize it first"),
           "awq": (lambda model: change(model, quantization_config={"quant_method": "awq", "bits": 4}), "quantised with awq; dequantize it first"),
           "bitsandbytes": (lambda model: change(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                            "quantised with bitsandbytes; dequantize it first"),
           "compressed": (lambda model: change(model, quantization_config={"quant_method": "compressed-tensors"}),
                          "quantised with compressed-tensors; dequantize it first"),
           "eight bits": (lambda model: change(model, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
                          "lm_head.weight is stored as F8_E4M3; dequantize it first")}
MISFITS = ("no head", "no matrix", "a layer too few", "a layer too many")  # an exam may load quantised weights, where transformers can
CASES = [(door, model, damage) for door, line in DOORS.items() for model in ("base", "tuned") for damage in DAMAGES
         if (model == "base" or door not in ("train", "eval")) and (door != "eval" or damage in MISFITS)]


@pytest.mark.parametrize("door, model, damage", CASES, ids=lambda word: word.replace(" ", "_"))
def test_one_line(folder, capsys, door, model, damage):
    harm, said = DAMAGES[damage]
    harm(model)
    line = refused(capsys, folder, *DOORS[door])
    assert said in line and model in line
