"An adapter on its base is a model behind every door, as its merged checkpoint is; one left beside a whole model is nothing."
import json, shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maet.weights.checkpoints import Checkpoint
from maet.cli import main
from maet.weights.differences import open_delta
from maet.weights.packs import read_keys
from maet.exams.evaluation import evaluation_job
from maet.study.recipes import make_tokenizer
from test_bad_input import refused

FORMS = {"low": dict(use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}),
         "dora": dict(use_dora=True, target_modules=["v_proj", "down_proj"], modules_to_save=["lm_head", "norm"])}


def base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, vocab_size=300,
                         bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(["a few words"] * 9, 300).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    "A base, two adapters, and what peft makes of each: `low merged`, `dora merged`."
    folder = tmp_path_factory.mktemp("models")
    base(folder/"base")
    for name, form in FORMS.items():
        torch.manual_seed(len(name))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder/"base"), LoraConfig(r=4, task_type="CAUSAL_LM", **form))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad: weight.add_(.05 * torch.randn_like(weight))
        model.save_pretrained(folder/name)
        shutil.copytree(folder/"base", folder/f"{name} merged")
        (folder/f"{name} merged"/"model.safetensors").unlink()
        model.merge_and_unload().save_pretrained(folder/f"{name} merged")
    (folder/"data"/"bits_per_byte").mkdir(parents=True)
    rows = [json.dumps({"id": str(n), "question": f"a few words, {n} of them", "answer": f"{n} words"}) for n in range(8)]
    (folder/"data"/"bits_per_byte"/"en.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch) -> Path:
    "A folder of one's own, in which the models are found."
    for each in models.iterdir(): (tmp_path/each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def maet(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit: main(list(arguments))
    assert exit.value.code == 0


def merged(out: str, content: dict) -> dict[str, torch.Tensor]:
    "`maet merge`, through its door."
    Path(f"{out}.yml").write_text(yaml.safe_dump(content))
    maet("merge", f"{out}.yml", out)
    return load_file(Path(out)/"model.safetensors")


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found: torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=2e-7, msg=name)


def of(method: str, base: str | None, *models: tuple, **parameters) -> dict:
    return {"merge_method": method, "base_model": base, "parameters": parameters,
            "models": [{"model": model, "parameters": own} for model, own in models]}


WEIGHTED = [("low", {"weight": .7}), ("dora", {"weight": .4})]
RECIPES = {"linear": of("linear", None, *WEIGHTED), "linear on a base": of("linear", "base", *WEIGHTED, ("base", {"weight": 1})),
           "sum": of("task_arithmetic", "base", *WEIGHTED), "ties": of("ties", "base", *WEIGHTED, density=.4),
           "magnitudes": of("magnitude_soup", "base", ("low", {}), ("dora", {})), "slerp": of("slerp", "base", ("dora", {}), t=.3),
           "dare": of("dare_linear", "base", *WEIGHTED, density=.5),
           "named with its base": of("task_arithmetic", "base", ("base+low", {"weight": .7}), ("dora merged", {"weight": .4})),
           "maet": {"merge_method": "maet", "base_model": "base", "ability": {"model": "dora"}, "languages": [{"model": "low"}]},
           "swap": {"merge_method": "layer_swap", "models": [{"model": "low", "role": "task"}, {"model": "dora", "role": "language"}]},
           "revert": {"merge_method": "revert", "base_model": "base", "models": [{"model": "low"}], "parameters": {"keep": .5}}}

def without_adapters(content):
    "The same recipe with merged checkpoints in the adapters' places."
    if isinstance(content, dict): return {key: without_adapters(value) for key, value in content.items()}
    if isinstance(content, list): return list(map(without_adapters, content))
    return {"low": "low merged", "dora": "dora merged", "base+low": "low merged"}.get(content, content)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_merge_takes_an_adapter_as_its_merged_checkpoint(folder, recipe):
    found = merged("found", RECIPES[recipe])
    close(found, merged("expected", without_adapters(RECIPES[recipe])))
    assert not list(Path("found").glob("adapter*")) and any((found[n] != load_file("base/model.safetensors")[n]).any() for n in found)
    AutoModelForCausalLM.from_pretrained("found")


def test_locate_pack_and_extract_take_an_adapter_as_its_merged_checkpoint(folder):
    base = Checkpoint("base")
    for name in FORMS:
        for kind, path in {"adapter": name, "checkpoint": f"{name} merged"}.items():
            maet("locate", "base", path, "--ratio", ".02", "--out", f"{kind}.keys")
            maet("pack", "base", path, "--out", f"{kind}.pack")
            maet("pack", "base", path, "--keys", "checkpoint.keys" if kind == "adapter" and Path("checkpoint.keys").exists() else f"{kind}.keys",
                 "--out", f"{kind}.sparse")
        keys, right = (read_keys(f"{kind}.keys", base) for kind in ("adapter", "checkpoint"))
        both = sum(int((keys[n] & right[n]).sum()) for n in keys.keys() & right.keys())
        assert both >= .99 * sum(int(mask.sum()) for mask in right.values())  # what rounds may change places at the border
        close(*(dict(open_delta(f"{kind}.pack", base)) for kind in ("adapter", "checkpoint")))
    for kind, end in {"adapter": "", "checkpoint": " merged"}.items():
        maet("extract", "--base", "base", "--ability", f"dora{end}", "--minus", f"low{end}", "--out", f"{kind}.ability")
    close(*(dict(open_delta(f"{kind}.ability", base)) for kind in ("adapter", "checkpoint")))


def score(model: str, **how) -> float:
    "`maet eval`, as its door does it: the one number of its one line."
    line, = evaluation_job(model, "data", ["bits_per_byte"], ["en"], **how)
    return float(line.split()[3])


def test_an_exam_of_an_adapter_is_that_of_its_merged_checkpoint(folder):
    plain = score("base")
    for name in FORMS:
        assert score(name) == score(f"base+{name}") == score(f"{name} merged") != plain
    assert score("dora", dtype="bfloat16") == score("dora merged", dtype="bfloat16")


def test_an_exam_goes_on_only_with_the_same_adapter(folder):
    shutil.copytree("low", "mine", symlinks=False)
    first = score("mine", out="samples")
    tensors = load_file("mine/adapter_model.safetensors")
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, "mine/adapter_model.safetensors")
    assert score("mine", out="samples") != first == score("low", out="others")


@pytest.fixture
def left(folder) -> Path:
    "A whole model in whose folder its adapter was left, as merge_and_unload and save_pretrained leave it."
    shutil.copytree("low merged", "left")
    for file in Path("low").iterdir(): shutil.copy(file, "left")
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= {file.name for file in Path("left").iterdir()}
    return folder


def test_an_adapter_beside_a_whole_model_is_not_applied_and_not_copied(left, capsys):
    right, content = load_file("low merged/model.safetensors"), of("linear", None, ("left", {"weight": 1}))
    capsys.readouterr()
    close(merged("found", content), right)
    said = [line for line in capsys.readouterr().err.splitlines() if "left beside it is not applied" in line]
    assert len(said) <= 1  # once in a process; the next test looks at a process of its own
    assert sorted(file.name for file in Path("found").iterdir() if "adapter" in file.name) == []
    AutoModelForCausalLM.from_pretrained("found")
    assert score("left") == score("low merged")
    maet("locate", "base", "left", "--out", "left.keys"), maet("locate", "base", "low merged", "--out", "right.keys")
    assert all(torch.equal(*pair) for pair in zip(*(read_keys(f"{name}.keys").values() for name in ("left", "right"))))


def test_training_begins_with_the_whole_model_and_not_with_what_was_left(left):
    (left/"text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    for base in ("left", "low merged"):
        training = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=.001)
        Path("expert.yml").write_text(yaml.safe_dump(dict(base=base, corpora=[{"path": "text.jsonl"}], training=training)))
        maet("train", "expert.yml", "--out", f"from {base}")
    close(*(load_file(f"from {base}/model.safetensors") for base in ("left", "low merged")))
    assert not list(Path("from left").glob("adapter*"))


def test_what_was_left_is_said_in_one_line(left, python, tmp_path):
    program = ("import sys; from contextlib import redirect_stderr; sys.stderr = sys.stdout; from maet.weights.checkpoints import Checkpoint; "
               "Checkpoint('left'), Checkpoint('left')")
    assert python("-c", program, cwd=tmp_path) == "note: left: is a whole model; the adapter that was left beside it is not applied\n"


def test_an_adapter_that_maet_trained_is_the_checkpoint_that_it_would_have_merged(folder):
    (folder/"text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    training = dict(mode="lora", tokens=256, batch_tokens=64, sequence_length=32, learning_rate=.03, lora_rank=3)
    for out, merge in (("trained", True), ("adapter", False)):
        recipe = dict(base="base", corpora=[{"path": "text.jsonl"}], training=training | {"lora_merge": merge})
        Path("expert.yml").write_text(yaml.safe_dump(recipe))
        maet("train", "expert.yml", "--out", out)
    close(merged("found", of("linear", None, ("adapter", {"weight": 1}))), load_file("trained/model.safetensors"))
    assert any((load_file("trained/model.safetensors")[name] != tensor).any() for name, tensor in load_file("base/model.safetensors").items())


def adapter(name: str, **config) -> None:
    "A copy of `low` with another configuration."
    shutil.copytree("low", name)
    said = json.loads(Path(name, "adapter_config.json").read_text())
    Path(name, "adapter_config.json").write_text(json.dumps(said | config))


@pytest.mark.parametrize("config, said", [
    ({"peft_type": "IA3"}, "peft_type 'IA3' is not read here, only LORA"), ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
    ({"r": 6}, "lora_A.weight is (4, 32) where"), ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: '[1]' is not supported"),
    ({"rank_pattern": {"(": 2}}, "'(' is no pattern"), ({"rank_pattern": 7}, "rank_pattern: '7' is not what peft writes there")])
def test_what_is_no_sum_of_weights_is_one_line(folder, capsys, config, said):
    adapter("strange", **config)
    Path("merge.yml").write_text(yaml.safe_dump(of("linear", "base", ("strange", {"weight": 1}))))
    doors = (("merge", "merge.yml", "out"), ("locate", "base", "strange", "--out", "keys"), ("pack", "base", "strange", "--out", "pack"),
             ("extract", "--base", "base", "--ability", "low", "--minus", "strange", "--out", "pack"),
             ("eval", "strange", "--data", "data", "--tasks", "bits_per_byte", "--languages", "en", "--out", "samples"))
    for door in doors: assert said in refused(capsys, folder, *door)


def test_a_pickle_a_lost_base_and_an_adapter_in_a_base_s_place_are_one_line(folder, capsys):
    adapter("lost", base_model_name_or_path="gone/away/there")
    exam = ("--data", "data", "--tasks", "bits_per_byte", "--languages", "en")
    assert "lost: its base cannot be opened" in refused(capsys, folder, "eval", "lost", *exam)
    assert "low: is an adapter, not a whole model" in refused(capsys, folder, "locate", "low", "dora", "--out", "keys")
    shutil.copytree("low", "pickled")
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    assert "adapter_model.bin: a pickle" in refused(capsys, folder, "pack", "base", "pickled", "--out", "pack")
