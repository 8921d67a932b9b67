"What is trained is written: change a model in memory, write it, load it, and it is the same. For a sweep over architectures."
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from maet.weights.checkpoints import Checkpoint
from maet.weights.differences import apply_delta
from maet.weights.names import layout, needed_layout
from maet.training.changes import expert_delta
from maet.training.sparse import VALUES, _write, freeze
from maet.training.schedule import Training
from maet.training.loading import load_base
from maet.training.experts import write_expert


def disturbed(model, share=1., size=.01):
    "The same model with a share of its scalars moved."
    with torch.no_grad():
        for parameter in model.parameters(): parameter.add_(size * torch.randn_like(parameter) * (torch.rand_like(parameter) < share))
    return model


def read(model, ids=torch.arange(3, 19)[None]):
    "The logits of a model; of one that cannot be asked with ids alone, all its parameters."
    torch.manual_seed(0)  # some draw numbers in their forward
    with torch.no_grad():
        try: return {"logits": model.eval()(input_ids=ids, use_cache=False).logits}
        except Exception: return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(found: dict, right: dict, kind: str):
    assert found.keys() == right.keys(), kind
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=lambda said: f"{kind}: {name}: {said}")


def loaded(path: Path):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), (path.name, report)
    return model


def dense(model, base: Checkpoint, folder: Path, kind: str) -> str:
    "Change every parameter, write, load: the trained model again. Returns what was compared."
    disturbed(model, size=.1)
    write_expert(folder / "dense", model, base, Training(), None, folder / "work", "")
    right = read(model)
    assert_same(read(loaded(folder / "dense")), right, kind)
    before, after = Checkpoint(base.path), Checkpoint(folder / "dense")
    found = layout(base)
    moved = {name for name in found.tensors if not torch.equal(before.read(name), after.read(name))}
    assert moved == {name for name in trained_names(base, model) if before.dtype(name).is_floating_point}, kind
    return "logits" if "logits" in right else "parameters"


def trained_names(base: Checkpoint, model) -> list[str]:
    "The stored tensors that are trained, and no buffers."
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = layout(base)
    return [name for name in found.tensors if {run.name for run in found.parts(name, 0, 1)} <= parameters]


def sparse(model, base: Checkpoint, folder: Path, kind: str) -> None:
    "Keys by the checkpoint's names; change the key neurons, make a pack's delta, apply it, load: the trained model again."
    keys = {name: torch.rand(base.shape(name)) < .1 for name in trained_names(base, model)}
    frozen = freeze(model, keys, needed_layout(base))
    for parameter in frozen.parameters():
        if parameter.requires_grad: parameter.data.add_(.1 * torch.randn_like(parameter))
    delta = expert_delta(frozen, base, keys, layout=layout(base))
    assert {name: part.count for name, part in delta.items()} == {name: int(mask.sum()) for name, mask in keys.items() if mask.any()}, kind
    apply_delta(folder / "sparse", base, delta)
    for module in frozen.modules():
        for name in [name for name in module._parameters if name.endswith(VALUES)]: _write(module, name.removesuffix(VALUES))
    trained = {name: parameter for name, parameter in frozen.named_parameters() if not name.endswith(VALUES)}
    for name, parameter in loaded(folder / "sparse").named_parameters():
        torch.testing.assert_close(parameter.detach(), trained[name].detach(), rtol=1e-5, atol=1e-6, msg=lambda said: f"{kind}: {name}: {said}")


def written(path: Path, folder: Path, kind: str) -> tuple[str, int]: # what was compared; how many tensors are not a parameter of their name
    "All of a model and a tenth of it. Raises MaetError if the model cannot be trained."
    base = Checkpoint(path)
    found = needed_layout(base).settle()
    model = load_base(base.path, torch.float32)
    compared = dense(deepcopy(model), base, folder, kind)
    sparse(model, base, folder, kind)
    apart = [name for name in found.tensors if base.size(name) and found.parts(name, 0, base.size(name)) != [(name, 0, base.size(name))]]
    return compared, len(apart)
