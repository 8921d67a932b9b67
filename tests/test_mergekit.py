"""mergekit's files give mergekit's numbers; the tensor functions give peft's.

`mergekit.safetensors` is what mergekit 0.1.5 made of small models (`record_mergekit.py` made it: mergekit cannot live in our environment).
With $MAET_MERGEKIT, or `mergekit-yaml` on the path, its program is run as well, and a new record is made and compared."""
import importlib.util, json, os, shutil, subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from maet.weights.checkpoints import Checkpoint
from maet.weights.differences import Difference
from maet.weights.packs import save_pack
from maet.method.merging import agreed, cut_of, dare_linear, dare_ties, keep_count, task_arithmetic, ties, trim
from maet.method.merge import merge

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("record_mergekit", HERE/"record_mergekit.py")
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
MERGEKIT = os.environ.get("MAET_MERGEKIT") or shutil.which("mergekit-yaml")
RECIPES = [*recorder.RECIPES]


class Record:
    "A record: models, results, masks."
    def __init__(self, path: Path):
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file: meta = {key: json.loads(value) for key, value in file.metadata().items()}
        self.recipes, self.versions = meta["recipes"], meta["versions"]

    def of(self, name: str) -> dict: return {key.split("/", 1)[1]: t for key, t in self.tensors.items() if key.startswith(name + "/") and "#" not in key}

    def mask(self, recipe: str):
        "The masks that mergekit drew, in place of ours."
        order = [entry["model"] for entry in yaml.safe_load(self.recipes[recipe])["models"] if entry["model"] != "base"]
        def mask(seed, model, name, start, stop, density):
            drawn = np.unpackbits(self.tensors[f"{recipe}/{name}#{order[model]}"].numpy())
            return torch.from_numpy(drawn[start:stop].astype(bool))
        return mask

    def models(self, recipe: str) -> None:
        "The folders that the recipe names, in the working directory."
        recorder.write_models(self.of("base"), {m: self.of(m) for m in "abc"}, torch.bfloat16 if recipe.endswith("bfloat16") else torch.float32)


def ours(recipe: str, record: Record) -> dict:
    "What we make of the same file."
    record.models(recipe)
    Path("recipe.yml").write_text(record.recipes[recipe])
    dare = {"mask": record.mask(recipe)} if recipe.startswith("dare") else {}
    merged = merge("recipe.yml", f"ours {recipe}", **dare)
    return {name: merged.read(name) for name in merged.names}


def assert_equal(found: dict, expected: dict, dtype: torch.dtype) -> None:
    "Equal up to the last digits of float32 sums; bfloat16 up to one rounding of such a sum that lies next to the middle."
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype == dtype, name
        torch.testing.assert_close(found[name].float(), expected[name].float(), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=2e-7)
    if dtype == torch.bfloat16: assert sum((found[n] != expected[n]).sum().item() for n in found) <= 3  # of 2.8 thousand


@pytest.fixture(scope="module")
def recorded() -> Record: return Record(HERE/"mergekit.safetensors")


def test_the_record_is_of_these_recipes(recorded):
    assert recorded.recipes == recorder.RECIPES and recorded.versions["mergekit"] == "0.1.5"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_gives_mergekits_numbers(recipe, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_equal(ours(recipe, recorded), recorded.of(recipe), torch.bfloat16 if recipe.endswith("bfloat16") else torch.float32)


@pytest.mark.skipif(not MERGEKIT, reason="mergekit is not installed: set MAET_MERGEKIT to its mergekit-yaml")
def test_mergekit_itself(tmp_path, monkeypatch):
    "Its program on a file, and a new record of all of them (DARE's masks can only be seen from inside)."
    monkeypatch.chdir(tmp_path)
    python, environment = Path(MERGEKIT).with_name("python"), os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, HERE/"record_mergekit.py", tmp_path/"new.safetensors"], env=environment, check=True, capture_output=True)
    record = Record(tmp_path/"new.safetensors")
    print("mergekit", record.versions)
    for recipe in RECIPES:
        found, dtype = ours(recipe, record), torch.bfloat16 if recipe.endswith("bfloat16") else torch.float32
        assert_equal(found, record.of(recipe), dtype)
        if recipe not in ("linear-bfloat16", "ties-filters", "slerp-slices"): continue  # its start alone takes seconds
        subprocess.run([MERGEKIT, "recipe.yml", "theirs", "--no-write-model-card", "--no-copy-tokenizer"], env=environment, check=True, capture_output=True)
        assert_equal(found, {k: t for file in Path("theirs").glob("*.safetensors") for k, t in load_file(file).items()}, dtype)
        shutil.rmtree("theirs")


# ---- peft's functions on random tensors. They have no base and no lambda; their mean counts heads, so weights are equal here.

@pytest.fixture
def deltas() -> list:
    torch.manual_seed(0)
    return [torch.randn(31, 17) for _ in range(4)]


ZERO, ONES = torch.zeros(31, 17), [1.] * 4
close = {"rtol": 2e-6, "atol": 1e-6}


def test_task_arithmetic_is_pefts(deltas):
    from peft.utils import merge_utils as peft
    weights = [.7, -.2, .4, 1.3]
    torch.testing.assert_close(task_arithmetic(ZERO, deltas, weights), peft.task_arithmetic(deltas, torch.tensor(weights)), **close)
    trimmed = [trim(d.flatten(), cut_of(d.flatten(), keep_count(d.numel(), .3))).view(d.shape) for d in deltas]
    torch.testing.assert_close(task_arithmetic(ZERO, trimmed, weights), peft.magnitude_prune(deltas, torch.tensor(weights), .3), **close)


@pytest.mark.parametrize("elect, method", [("sum", "total"), ("count", "frequency")])
@pytest.mark.parametrize("density", [.01, .2, .5, .999])
def test_ties_is_pefts(deltas, density, elect, method):
    from peft.utils import merge_utils as peft
    theirs = peft.ties(deltas, torch.tensor([.6] * 4), density, method)
    torch.testing.assert_close(ties(ZERO, deltas, ONES, [density] * 4, scale=.6, elect=elect), theirs, **close)


@pytest.mark.parametrize("density", [.1, .5])
def test_dare_is_pefts_under_the_same_mask(deltas, density):
    from peft.utils import merge_utils as peft
    def masks():
        torch.manual_seed(1)
        return [torch.bernoulli(torch.full_like(d, density)).bool() for d in deltas]
    drawn, weights, of = masks(), [.7, -.2, .4, 1.3], [density] * 4
    torch.manual_seed(1)
    theirs = peft.dare_linear(deltas, torch.tensor(weights), density)
    torch.testing.assert_close(dare_linear(ZERO, deltas, weights, drawn, of, rescale="density"), theirs, **close)
    for elect, method in (("sum", "total"), ("count", "frequency")):
        torch.manual_seed(1)
        theirs = peft.dare_ties(deltas, torch.ones(4), density, method)
        torch.testing.assert_close(dare_ties(ZERO, deltas, ONES, drawn, of, normalize=True, rescale="density", elect=elect), theirs, **close)


def test_where_peft_and_mergekit_differ(deltas):
    "The tables in the notebook say so; here it is shown."
    from peft.utils import merge_utils as peft
    assert not peft.ties(deltas, torch.ones(4), 1e-4).any()                             # a count that rounds to 0 keeps nothing
    assert all(keep_count(d.numel(), 1e-4) == 1 for d in deltas)                        # mergekit 0.1.5 and we keep one
    weights = [1., 1., 1., .1]
    by_weight, by_head = agreed(deltas, weights, True, 1.), peft.ties(deltas, torch.tensor(weights), 1 - 1e-9)
    assert (by_weight - by_head).abs().max() > .1                                       # a weighted mean, and a mean of weighted deltas


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> tuple[dict, dict]:
    "The folders of a Llama of two layers and of three models tuned from it, by name; and their tensors."
    from transformers import LlamaConfig, LlamaForCausalLM
    config, folder = LlamaConfig(**{**recorder.LLAMA, "num_hidden_layers": 2}), tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "a", "b", "c"):
        model.save_pretrained(folder/name)
        with torch.no_grad():
            for tensor in model.parameters(): tensor.add_(.03 * torch.randn(tensor.shape))
    folders = {name: str(folder/name) for name in ("base", "a", "b", "c")}
    return folders, {name: {n: Checkpoint(at).read(n) for n in Checkpoint(at).names} for name, at in folders.items()}


def of_peft(name: str, deltas: list, weights: list, density: float):
    "peft's result, after the masks that it will draw."
    from peft.utils import merge_utils as peft
    torch.manual_seed(1)
    masks = [torch.bernoulli(torch.full_like(d, density)).bool() for d in deltas]
    torch.manual_seed(1)
    return getattr(peft, name)(deltas, torch.tensor(weights), *[] if name == "task_arithmetic" else [density]), masks


@pytest.mark.parametrize("method, weights, parameters, theirs", [
    ("linear", [.7, .2, .4], {"normalize": False}, "task_arithmetic"), ("task_arithmetic", [.7, -.2, .4], {}, "task_arithmetic"),
    ("ties", [1., 1., 1.], {}, "ties"), ("dare_linear", [.7, -.2, .4], {"rescale": "density"}, "dare_linear"),
    ("dare_ties", [1., 1., 1.], {"rescale": "density", "normalize": True}, "dare_ties")])
def test_a_model_of_two_layers_is_pefts(two_layers, tmp_path, method, weights, parameters, theirs):
    "Through files, tensor by tensor. peft has no SLERP; mergekit's is recorded above."
    folders, tensors = two_layers
    whole, density = method == "linear", {} if method in ("linear", "task_arithmetic") else {"density": .3}
    expected, masks = {}, {}
    for n, before in tensors["base"].items():
        inputs = [tensors[m][n] - (0 if whole else before) for m in "abc"]
        found, masks[n] = of_peft(theirs, inputs, weights, .3)
        expected[n] = found + (0 if whole else before)
    models = [{"model": folders[m], "parameters": {"weight": w} | density} for m, w in zip("abc", weights)]
    recipe = {"merge_method": method, "models": models, "parameters": parameters} | ({} if whole else {"base_model": folders["base"]})
    merged = merge(recipe, tmp_path/"merged", mask=lambda seed, model, name, start, stop, density: masks[name][model].flatten()[start:stop])
    for n in expected: torch.testing.assert_close(merged.read(n), expected[n], **close)


# ---- tensors of several pieces

@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict:
    "Checkpoints whose one matrix has more than two pieces, in bfloat16, so that many deltas are equal."
    from maet.weights.streams import PIECE
    folder, rows = tmp_path_factory.mktemp("large"), 2 * PIECE // 1000 + 300
    torch.manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": .02 * torch.randn(rows, 1000), "model.norm.weight": torch.ones(1000)}
    tuned = {m: {n: t + .01 * torch.randn(t.shape) for n, t in base.items()} for m in "abc"}
    before = os.getcwd()
    os.chdir(folder)
    recorder.write_models(base, tuned, torch.bfloat16)
    for m in ("base", *tuned):  # two tensors are no Llama
        content = json.loads(Path(m, "config.json").read_text())
        Path(m, "config.json").write_text(json.dumps(content | {"model_type": "two_tensors"}))
    yield {m: {n: t.bfloat16().float() for n, t in tensors.items()} for m, tensors in {"base": base, **tuned}.items()}
    os.chdir(before)


def file(method: str, more: str = "", weight: float = .7) -> str:
    models = ", ".join(f"{{model: {m}, parameters: {{weight: {weight}, density: 0.3}}}}" for m in "abc")
    return f"{{merge_method: {method}, base_model: base, dtype: float32, models: [{models}], parameters: {{{more}}}}}"


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "slerp"])
def test_pieces_of_a_tensor_make_the_tensor(large, method):
    from maet.method.merging import random_mask, slerp
    recipe = file(method, "normalize: false, lambda: 0.9") if method != "slerp" else \
        "{merge_method: slerp, base_model: a, dtype: float32, models: [{model: b}], parameters: {t: 0.3}}"
    merged = merge(yaml.safe_load(recipe), f"merged {method}")
    for name in large["base"]:
        base, deltas = large["base"][name], [large[m][name] - large["base"][name] for m in "abc"]
        masks = [random_mask(0, n, name, 0, base.numel(), .3).view(base.shape) for n in range(3)]
        whole = {"ties": lambda: ties(base, deltas, [.7] * 3, [.3] * 3, False, .9), "slerp": lambda: slerp(.3, large["a"][name], large["b"][name]),
                 "dare_linear": lambda: dare_linear(base, deltas, [.7] * 3, masks, [.3] * 3, False, .9),
                 "dare_ties": lambda: dare_ties(base, deltas, [.7] * 3, masks, [.3] * 3, False, .9)}[method]()
        torch.testing.assert_close(merged.read(name), whole, rtol=2e-6, atol=1e-7)
        if method == "ties": assert (trim(deltas[0].flatten(), cut_of(deltas[0].flatten(), keep_count(base.numel(), .3))) != 0).sum() == int(.3 * base.numel())


def test_packs_and_tokenizers(large):
    "A pack stands for its checkpoint; a tokenizer_source is checked."
    base = Checkpoint("base")
    save_pack("c.safetensors", Difference(Checkpoint("c"), base), base)
    recipe = yaml.safe_load(file("ties", "normalize: false, lambda: 0.9"))
    recipe["models"][2]["model"] = "c.safetensors"
    assert merge(recipe, "packed").fingerprint == merge(yaml.safe_load(file("ties", "normalize: false, lambda: 0.9")), "plain").fingerprint
    from maet.weights.tensors import MaetError
    for m in ("base", "a", "b", "c"): Path(m, "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": []}))
    recipe = yaml.safe_load(file("linear")) | {"tokenizer_source": "union"}
    for entry in recipe["models"]: entry["parameters"].pop("density")
    recipe["models"].append({"model": "base", "parameters": {"weight": 0}})
    assert (merge(recipe, "union").path/"tokenizer.json").exists()
    Path("b", "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"y": 0, "x": 1}}, "added_tokens": []}))
    with pytest.raises(MaetError, match="b: 2 of 2 tokens are not those of base"): merge(recipe, "mixed")
    assert not Path("mixed").exists()
