"What is trained is written: every causal language model of transformers is changed in memory, written, loaded, and gives the same logits."
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from maet.checkpoints import Checkpoint
from maet.deltas import apply_delta
from maet.names import layout, needed_layout
from maet.sparse import VALUES, expert_delta, freeze
from maet.tensors import MaetError
from maet.training import Training, load_base, write_expert
from test_architectures import at_most, disturbed, reason, tiny

REFUSED = {}  # model type -> the first words of why it cannot be trained; one that is refused and not here is a fault


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


def dense(base: Checkpoint, folder: Path, kind: str) -> str:
    "Change every parameter, write, load: the trained model again. Returns what was compared."
    model = disturbed(load_base(base.path, torch.float32), size=.1)
    write_expert(folder / "dense", model, base, Training(), None, folder / "work", "")
    right = read(model)
    assert_same(read(loaded(folder / "dense")), right, kind)
    before = Checkpoint(base.path)
    moved = [name for name in layout(base).tensors if not torch.equal(before.read(name), Checkpoint(folder / "dense").read(name))]
    assert set(moved) == {name for name in layout(base).tensors if before.dtype(name).is_floating_point and is_parameter(name, base, model)}, kind
    return "logits" if "logits" in right else "parameters"


def is_parameter(name: str, base: Checkpoint, model) -> bool:
    "Is a stored tensor trained, and no buffer?"
    parameters = {other for other, _ in model.named_parameters(remove_duplicate=False)}
    return {run.name for run in layout(base).parts(name, 0, 1)} <= parameters


def sparse(base: Checkpoint, folder: Path, kind: str) -> None:
    "Keys by the checkpoint's names; change the key neurons, make a pack's delta, apply it, load: the trained model again."
    model = load_base(base.path, torch.float32)
    keys = {name: torch.rand(base.shape(name)) < .1 for name in base.names if is_parameter(name, base, model)}
    frozen = freeze(model, keys, needed_layout(base))
    for parameter in frozen.parameters():
        if parameter.requires_grad: parameter.data.add_(.1 * torch.randn_like(parameter))
    delta = expert_delta(frozen, base, keys, layout=layout(base))
    assert {name: part.count for name, part in delta.items()} == {name: int(mask.sum()) for name, mask in keys.items() if mask.any()}, kind
    apply_delta(folder / "sparse", base, delta)
    for module in frozen.modules():
        from maet import sparse as room
        for name in [name.removesuffix(VALUES) for name in module._parameters if name.endswith(VALUES)]: room._write(module, name)
    trained = {name: parameter for name, parameter in frozen.named_parameters() if not name.endswith(VALUES)}
    for name, parameter in loaded(folder / "sparse").named_parameters():
        torch.testing.assert_close(parameter.detach(), trained[name].detach(), rtol=1e-5, atol=1e-6, msg=lambda said: f"{kind}: {name}: {said}")


def through(kind: str, folder: Path) -> tuple[str, str]:
    "What became of one model type, and why."
    try:
        with at_most(20): disturbed(tiny(kind)).save_pretrained(folder / "base")
        with at_most(20): loaded(folder / "base")
    except Exception as error: return "not built, or not loaded again by transformers itself", reason(error)
    base = Checkpoint(folder / "base")
    with at_most(40):
        try: compared = dense(base, folder, kind)
        except MaetError as error: return "refused", str(error)
        sparse(base, folder, kind)
    names = layout(base)
    apart = sum(names.parts(name, 0, base.size(name)) != [(name, 0, base.size(name))] for name in names.tensors if base.size(name))
    return f"written and loaded, by {compared}", f"{apart} of {len(base.names)} tensors by another name or in another arrangement" if apart else ""


def test_every_architecture_is_written(capsys):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder: found[kind] = through(kind, Path(folder))
    counts, apart = Counter(what for what, _ in found.values()), sum("tensors by" in why for _, why in found.values())
    lines = [f"transformers {transformers.__version__}: {len(found)} causal language models; " + ", ".join(f"{n} {what}" for what, n in counts.items()),
             f"    {apart} of them with tensors by another name or in another arrangement than their parameters"]
    lines += [f"    {kind:26} {what}; {why}"[:150] for kind, (what, why) in found.items() if not what.startswith("written")]
    with capsys.disabled(): print("", *lines, sep="\n")
    refused = {kind: why for kind, (what, why) in found.items() if what == "refused"}
    assert refused.keys() == REFUSED.keys(), refused
    assert counts["written and loaded, by logits"] >= 150
