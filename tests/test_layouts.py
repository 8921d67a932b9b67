"""Two checkpoints of one model that are laid out in two ways on disk are one model to `merge`, `locate` and `pack`: buffers that nobody reads are
set aside, prefixes and joined experts are aligned. The right values are those of the models that transformers loads from both."""
import shutil


import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maet.weights.checkpoints import Checkpoint
from maet.cli import main
from maet.weights.packs import Keys, open_pack
from maet.weights.differences import apply_delta
from maet.weights.names import layout
from test_written_ranks import configs


def gpt2():
    from transformers import GPT2Config
    return GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)


def with_frequencies(tensors):
    return tensors | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1)}


def old_gpt2(tensors):
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return plain | {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32).tril() for n in (0, 1)}


def old_pythia(tensors):
    words = {"bias": torch.ones(1, 1, 9, 9).bool(), "masked_bias": torch.tensor(-1e9)}
    return tensors | {f"gpt_neox.layers.{n}.attention.{word}": value.clone() for n in (0, 1) for word, value in words.items()}



def new_prefix(tensors):
    return {name.replace("language_model.model.", "model.language_model."): tensor for name, tensor in tensors.items()}


PAIRS = {"llama": with_frequencies, "gpt2": old_gpt2, "pythia": old_pythia, "mixtral": "joined", "qwen3 moe": "joined", "gemma 3": new_prefix}


def loaded(path):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model


def state(path): return {name: parameter.detach() for name, parameter in loaded(path).named_parameters()}


@pytest.fixture(scope="module", params=[(kind, turned) for kind in PAIRS for turned in (False, True)], ids=lambda p: f"{p[0]}{' turned' * p[1]}")
def folder(request, tmp_path_factory):
    "`base` and `tuned`; one of them, if turned the base, is laid out in the other way; `same` is the tuned model in the base's layout."
    kind, turned = request.param
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((configs() | {"gpt2": gpt2()})[kind])
    model.save_pretrained(folder/"base")
    with torch.no_grad():
        for parameter in model.parameters(): parameter.add_(.1 * torch.randn_like(parameter) * (torch.rand_like(parameter) < .5))
    model.save_pretrained(folder/"tuned")
    for name in ("base", "tuned"): shutil.copytree(folder/name, folder/f"{name} laid out")
    for name in ("base laid out", "tuned laid out"):
        tensors, change = load_file(folder/name/"model.safetensors"), PAIRS[kind]
        tensors = {n: p.clone() for n, p in loaded(folder/name).named_parameters()} if change == "joined" else change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder/name/"model.safetensors", {"format": "pt"})
    (folder/"base").rename(folder/"base plain")
    (folder/"tuned").rename(folder/"tuned plain")
    here, there = ("laid out", "plain") if turned else ("plain", "laid out")
    for name, how in (("base", here), ("tuned", there), ("same", here)):
        (folder/f"{'tuned' if name == 'same' else name} {how}").rename(folder/name)
    assert Checkpoint(folder/"base").names != Checkpoint(folder/"tuned").names
    return folder


def run(*line):
    with pytest.raises(SystemExit) as exit: main([str(word) for word in line])
    assert exit.value.code == 0


def merged(folder, out, **recipe):
    (folder/"merge.yml").write_text(yaml.safe_dump(recipe))
    run("merge", folder/"merge.yml", folder/out)
    assert Checkpoint(folder/out).names == Checkpoint(folder/"base").names  # laid out as the base
    return state(folder/out)


def close(found, right, **how):
    assert found.keys() == right.keys()
    for name in right: torch.testing.assert_close(found[name], right[name], **{"rtol": 1e-5, "atol": 1e-6} | how, msg=lambda said: f"{name}: {said}")


def test_merge(folder, capsys):
    base, tuned = state(folder/"base"), state(folder/"tuned")
    models = [{"model": str(folder/name), "parameters": {"weight": weight}} for name, weight in (("base", .25), ("tuned", .75))]
    close(merged(folder, "linear", merge_method="linear", models=models), {name: .25 * base[name] + .75 * tuned[name] for name in base})
    said = capsys.readouterr().err
    if layout(Checkpoint(folder/"base")).aside | layout(Checkpoint(folder/"tuned")).aside: assert said.count("set aside") == 1
    arithmetic = dict(merge_method="task_arithmetic", base_model=str(folder/"base"), models=[{"model": str(folder/"tuned"), "parameters": {"weight": .5}}])
    close(merged(folder, "arithmetic", **arithmetic), {name: base[name] + .5 * (tuned[name] - base[name]) for name in base})
    transfer = dict(merge_method="maet", base_model=str(folder/"base"), ability={"model": str(folder/"tuned")},
                    languages=[{"model": str(folder/"same"), "weight": .5}], parameters=dict(gamma=.2, eta=.4, select_ratio=1.))
    close(merged(folder, "maet", **transfer), {name: base[name] + .4 * (tuned[name] - base[name]) for name in base})


def test_pack(folder):
    run("pack", folder/"base", folder/"tuned", "--out", folder/"pack.safetensors")
    apply_delta(folder/"applied", base := Checkpoint(folder/"base"), open_pack(folder/"pack.safetensors"))
    close(state(folder/"applied"), state(folder/"tuned"))
    assert set(open_pack(folder/"pack.safetensors")) <= set(base.names)


def test_locate(folder):
    "The same keys as from the pair in one layout."
    for name in ("tuned", "same"): run("locate", folder/"base", folder/name, "--ratio", ".1", "--out", folder/f"{name}.safetensors")
    found, right = (Keys(folder/f"{name}.safetensors", Checkpoint(folder/"base")) for name in ("tuned", "same"))
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right) and len(right) > 5
