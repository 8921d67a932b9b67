"""What mergekit makes of a few files: run by mergekit's own Python, `python tests/record_mergekit.py tests/mergekit.safetensors`.

Its requirements clash with ours, so its numbers are recorded once and committed. The record holds a three-layer Llama `base`, three
checkpoints tuned from it, every result, and every random mask that mergekit drew: `<checkpoint or recipe>/<tensor>`, masks under
`<recipe>/<tensor>#<model>` as numpy.packbits. The metadata hold the recipes, the configuration of the Llama and the versions."""
import json, os, sys, tempfile
from importlib.metadata import version
from pathlib import Path

import torch, yaml
from safetensors.torch import load_file, save_file

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=16, hidden_size=12, intermediate_size=12, num_hidden_layers=3,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False)
GLOBAL = """
merge_method: {method}
base_model: base
dtype: float32
models:
  - {{model: a, parameters: {{weight: 0.7, density: 0.6}}}}
  - {{model: b, parameters: {{weight: 0.4, density: 0.35}}}}
  - {{model: c, parameters: {{weight: 0.2, density: 0.8}}}}
parameters: {{{more}}}
"""
FILTERS = """
merge_method: {method}
base_model: base
dtype: float32
models:
  - model: base
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight:
        - {{filter: mlp, value: [0.3, 0.9]}}
        - {{filter: self_attn, value: 0.5}}
        - {{value: 1e-1}}
  - model: b
    parameters: {{density: 0.33, weight: [0, 0.3, 0.7, 1]}}
parameters: {{{more}}}
"""
RECIPES = {
    "linear": "{merge_method: linear, dtype: float32, models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.3}},"
              " {model: c, parameters: {weight: 0.9}}]}",
    "linear-raw": "{merge_method: linear, base_model: base, dtype: float32, parameters: {normalize: false, weight: [0.2, 0.6]},"
                  " models: [{model: a}, {model: c, parameters: {weight: -0.5}}]}",
    "linear-bfloat16": "{merge_method: linear, dtype: float32, out_dtype: bfloat16, parameters: {weight: 1.0}, models: [{model: a}, {model: b}]}",
    "task_arithmetic": GLOBAL.format(method="task_arithmetic", more=""),
    "task_arithmetic-filters": FILTERS.format(method="task_arithmetic", more="normalize: true, lambda: 1.4"),
    "task_arithmetic-bfloat16": GLOBAL.format(method="task_arithmetic", more="").replace("float32", "float32\nout_dtype: bfloat16"),
    "ties": GLOBAL.format(method="ties", more=""),
    "ties-filters": FILTERS.format(method="ties", more="normalize: false, lambda: 0.8, int8_mask: true"),
    "ties-rescale": GLOBAL.format(method="ties", more="rescale: true"),
    "dare_linear": GLOBAL.format(method="dare_linear", more=""),
    "dare_linear-raw": GLOBAL.format(method="dare_linear", more="rescale: false, normalize: true"),
    "dare_ties": GLOBAL.format(method="dare_ties", more="lambda: 0.9"),
    "dare_ties-filters": FILTERS.format(method="dare_ties", more="normalize: true"),
    "slerp": """
merge_method: slerp
base_model: a
dtype: float32
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: c, layer_range: [0, 3]}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
""",
    "slerp-slices": """
merge_method: slerp
base_model: b
dtype: float32
slices:
  - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
    parameters: {t: 0.25}
  - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
    parameters: {t: [0.9, 0.6]}
""",
}


def write_models(base: dict, tuned: dict, dtype: torch.dtype) -> None:
    "The four checkpoints as folders in the working directory."
    for name, tensors in {"base": base, **tuned}.items():
        Path(name).mkdir(exist_ok=True)
        Path(name, "config.json").write_text(json.dumps(LLAMA | {"dtype": str(dtype).removeprefix("torch.")}))
        save_file({n: t.to(dtype) for n, t in tensors.items()}, f"{name}/model.safetensors", {"format": "pt"})


def record(recipe: str, text: str) -> dict:
    "The result of one file, and the masks that were drawn for it."
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.merge_methods import generalized_task_arithmetic as family
    from mergekit.options import MergeOptions
    drawn, merge_group, bernoulli = {}, family.GeneralizedTaskArithmeticMerge.merge_group, torch.bernoulli

    def watched(self, group, /, **parameters):
        waiting = [entry.id for entry in group.non_base if parameters["density"][entry.id] < 1]  # those that draw a mask, in this order

        def note(probabilities, *args, **kwargs):
            mask = bernoulli(probabilities, *args, **kwargs)
            drawn[f"{recipe}/{group.metadata.name}#{waiting.pop(0)}"] = mask.bool()
            return mask
        torch.bernoulli = note
        try: return merge_group(self, group, **parameters)
        finally: torch.bernoulli = bernoulli

    LoaderCache.loaders.clear()  # it remembers open files by name, and the last recipe's `a` was another file
    family.GeneralizedTaskArithmeticMerge.merge_group = watched
    try: run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), recipe, MergeOptions(write_model_card=False, quiet=True, copy_tokenizer=False))
    finally: family.GeneralizedTaskArithmeticMerge.merge_group = merge_group
    result = {k: t for file in sorted(Path(recipe).glob("*.safetensors")) for k, t in load_file(file).items()}
    return {f"{recipe}/{n}": t for n, t in result.items()} | drawn


def main(out: str) -> None:
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM
    out = Path(out).resolve()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = {n: t.shape for n, t in LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict().items()}
    base = {n: torch.ones(s) + .1 * torch.randn(s) if len(s) == 1 else .05 * torch.randn(s) for n, s in shapes.items()}
    tuned = {m: {n: t + .03 * torch.randn(t.shape) for n, t in base.items()} for m in "abc"}
    record_of = {f"{m}/{n}": t for m, tensors in {"base": base, **tuned}.items() for n, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for recipe, text in RECIPES.items():
            write_models(base, tuned, torch.bfloat16 if recipe.endswith("bfloat16") else torch.float32)
            torch.manual_seed(1)
            record_of |= record(recipe, text)
        os.chdir(out.parent)
    packed = {n: torch.from_numpy(np.packbits(t.numpy())) if t.dtype == torch.bool else t.contiguous() for n, t in record_of.items()}
    versions = {name: version(name) for name in ("mergekit", "torch", "transformers")}
    save_file(packed, out, {key: json.dumps(value) for key, value in dict(recipes=RECIPES, llama=LLAMA, versions=versions).items()})


if __name__ == "__main__": main(sys.argv[1])
