"Any causal language model of transformers can be merged: ten of them to the logits, all of them to the last number."
import signal, tempfile
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from math import floor
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from maet.weights.checkpoints import Checkpoint
from maet.cli import main
from maet.weights.differences import Difference
from maet.weights.packs import save_pack
from maet.weights.tensors import MaetError
from written import disturbed, written

SIZES = {0: "num_kv_shared_layers",
         2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k num_decoder_layers decoder_layers "
            "encoder_layers num_encoder_layers depth n_layers_per_stage",
         4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
            "num_local_experts n_routed_experts moe_num_experts",
         8: "head_dim attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank",
         32: "hidden_size n_embd d_model dim embed_dim n_embed word_embed_proj_dim embedding_size hidden_dim",
         48: "intermediate_size ffn_dim n_inner d_ff moe_intermediate_size shared_expert_intermediate_size decoder_ffn_dim "
             "encoder_ffn_dim shared_intermediate_size expert_ffn_hidden_size",
         96: "vocab_size n_words vocab_size_per_layer_input"}
MOST = {word: size for size, words in SIZES.items() for word in words.split()}
REFUSED = set()  # model types that cannot be trained; one that is refused and not here is a fault
DEPTHS = "num_hidden_layers n_layer n_layers num_layers".split()
# what a default configuration lacks, and what must agree where the sizes above do not
LACKING = {"dbrx": {"attn_config": {"rope_theta": 1e4}}, "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
           "nemotron": {"num_key_value_heads": 2}, "reformer": {"is_decoder": True},
           **dict.fromkeys(["ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"], {"head_dim": 8}),
           "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2}}
AGREEING = {"reformer": {"axial_pos_embds_dim": [8, 24]}, "xlm": {"emb_dim": 32}, "mamba2": {"num_heads": 8, "head_dim": 8},
            **dict.fromkeys(["bamba", "granitemoehybrid"], {"mamba_n_heads": 8, "mamba_d_head": 8})}


def small(config) -> dict:
    "Arguments that make a configuration tiny: few and narrow layers, but one of each type."
    have = {key: value for key, value in config.__dict__.items() if not key.startswith("_")}
    types = have.get("layer_types") or have.get("layers_block_type") or []
    kept = sorted({kind: at for at, kind in reversed(list(enumerate(types)))}.values())
    kept = sorted(kept + [at for at in range(max(2, len(types))) if at not in kept][:max(0, 2 - len(kept))])
    depth = next((have[key] for key in DEPTHS if isinstance(have.get(key), int)), None)
    found = {}
    for key, value in have.items():
        if isinstance(value, PretrainedConfig): found[key] = small(value)
        elif isinstance(value, list) and len(value) == depth != len(kept): found[key] = [value[at] for at in kept]
        elif isinstance(value, bool) or not isinstance(value, int): continue
        elif key in DEPTHS: found[key] = min(value, len(kept))
        elif key == "num_key_value_heads" and value == have.get("num_attention_heads"): found[key] = min(value, MOST["num_attention_heads"])
        elif value > MOST.get(key, value): found[key] = MOST[key]
        elif key.endswith("token_id") and value >= MOST["vocab_size"]: found[key] = 1
    return found


def tiny(kind: str, **changes):
    "A random model of this architecture with at most 40 million parameters."
    lacking, config = LACKING.get(kind, {}), CONFIG_MAPPING[kind]
    config = config(**(small(config(**lacking)) | lacking | AGREEING.get(kind, {}) | changes))
    with torch.device("meta"): size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 4e7: raise ValueError(f"{size / 1e6:.0f} million parameters with every size reduced that is known here")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def merge(folder: Path, **recipe) -> Path:
    "`maet merge`, through its door."
    (folder / "merge.yml").write_text(yaml.safe_dump({"merge_method": "maet", "base_model": str(folder / "base")} | recipe))
    with pytest.raises(SystemExit) as exit: main(["merge", str(folder / "merge.yml"), str(folder / "merged")])
    assert exit.value.code == 0
    return folder / "merged"


def numbers(path: Path) -> dict[str, torch.Tensor]:
    "What lies in a folder, read by safetensors alone, in float64."
    return {name: tensor.double() for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---- ten architectures, to the logits ----

GAMMA, ETA, MU = .5, .9, {"es": .6, "bn": .3}
TEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "gpt_neox", "phi3", "mixtral")


@pytest.fixture
def experts(tmp_path, request):
    "A base, an ability expert and two language experts, one of them a sparse pack as well."
    kind, tied, shard, dtype = request.param
    model = tiny(kind, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    for seed, (name, share) in enumerate({"ability": 1, "es": 1, "bn": .2}.items()):
        torch.manual_seed(seed)
        disturbed(deepcopy(model), share).save_pretrained(tmp_path / name, max_shard_size=shard)
    base = Checkpoint(tmp_path / "base")
    whole = Difference(Checkpoint(tmp_path / "bn"), base)
    save_pack(tmp_path / "bn.safetensors", Difference(whole.tuned, base, {name: part != 0 for name, part in whole.items()}), base)
    return tmp_path, kind, tied, shard, dtype


def selection(base, moved, language, ratio):
    "The last 80 % in descending order of the dot product, from whole state dicts."
    names = sorted(base)
    ranked = sorted(names, key=lambda name: -float((moved["ability"][name] * language[name]).sum()))
    return set(ranked[len(ranked) - floor(ratio * len(ranked)):])


def formula(states: dict[str, dict], ratio: float):
    "Eq. 3 to 5 on state dicts, all in float64: the exact tensors, and the size of their terms."
    base = states["base"]
    moved = {kind: {name: states[kind][name] - base[name] for name in base} for kind in ("ability", *MU)}
    language = {name: sum(mu * moved[kind][name] for kind, mu in MU.items()) for name in base}
    chosen = selection(base, moved, language, ratio)
    added = {name: GAMMA * moved["ability"][name] + ETA * language[name] if name in chosen else language[name] for name in base}
    sizes = {name: sum(abs(states[kind][name]) for kind in states) for name in base}
    return {name: base[name] + added[name] for name in base}, sizes


def assert_rounded(found, exact, size, name):
    "No neighbour in the dtype is nearer to the exact number, but for a tie within 1e-7 of the terms."
    for way in (float("inf"), -float("inf")):
        neighbour = torch.nextafter(found, torch.full_like(found, way)).double()
        assert ((found.double() - exact).abs() <= (neighbour - exact).abs() + 1e-7 * size).all(), name


def load(path: Path):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


CASES = [(kind, tied, shard, dtype) for at, kind in enumerate(TEN) for tied in (False, True) for shard in ("1GB", "20KB")
         for dtype in [(torch.bfloat16, torch.float32)[(at + tied + (shard == "1GB")) % 2]]]


@pytest.mark.parametrize("experts", CASES, indirect=True,
                         ids=lambda c: f"{c[0]}-{'tied' if c[1] else 'untied'}-{'single' if c[2] == '1GB' else 'sharded'}-{str(c[3])[6:]}")
def test_ten_architectures(experts):
    folder, kind, tied, shard, dtype = experts
    ratio = 1. if kind == "mixtral" else .8  # its experts are joined in memory, so the tensors are others than on disk
    merged = merge(folder, ability={"model": str(folder / "ability")},
                   languages=[{"model": str(folder / "es"), "weight": MU["es"]}, {"model": str(folder / "bn.safetensors"), "weight": MU["bn"]}],
                   parameters={"gamma": GAMMA, "eta": ETA, "select_ratio": ratio})
    assert (len(list(merged.glob("*.safetensors"))) > 1) == (shard == "20KB")

    exact, sizes = formula({name: numbers(folder / name) for name in ("base", "ability", *MU)}, ratio)
    found = {name: tensor for file in merged.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == exact.keys() and {tensor.dtype for tensor in found.values()} == {dtype}
    for name in found: assert_rounded(found[name], exact[name], sizes[name], name)

    models = {name: load(folder / name) for name in ("base", "ability", *MU, "merged")}
    states = {name: {n: p.detach().double() for n, p in model.named_parameters()} for name, model in models.items()}
    result, by_hand = models["merged"], models["base"]
    exact, _ = formula({name: states[name] for name in ("base", "ability", *MU)}, ratio)
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        before = by_hand(ids).logits
        for name, parameter in by_hand.named_parameters(): parameter.copy_(exact[name].to(dtype))
        got, expected = result(ids).logits, by_hand(ids).logits
    head = result.get_output_embeddings()
    assert (head is None or head.weight is result.get_input_embeddings().weight) == tied
    moved = (expected - before).abs().max()
    assert moved > 0 and (got - expected).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * moved


# ---- every architecture that transformers can build ----

@contextmanager
def at_most(seconds: int):
    "A limit to the processor time of one architecture."
    def stop(*_): raise TimeoutError(f"took more than {seconds} s of processor time")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def reading(path: Path):
    "What transformers reports of a folder: the keys that miss or are too many; or why it cannot load it."
    try: report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")[1]
    except TimeoutError: raise
    except Exception as error: return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {key: sorted(map(str, value)) for key, value in report.items()}


def reason(error: Exception) -> str:
    said = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[min(1, len(said) - 1)].strip()}" if said else type(error).__name__


def through(kind: str, folder: Path) -> tuple[str, str, str]:
    "Build a tiny model, disturb it, merge the two, load the result; train it, so to say, and write that: what became of both, and why."
    try:
        with at_most(20):
            model = tiny(kind)
            model.save_pretrained(folder / "base")
            disturbed(model).save_pretrained(folder / "tuned")
    except Exception as error: return "not built", "not built", reason(error)
    with at_most(20):
        merged = merge(folder, ability={"model": str(folder / "tuned")}, languages=[{"model": str(folder / "tuned"), "weight": 1.}],
                       parameters={"gamma": .25, "eta": .25, "select_ratio": 1.})
        before, after, found = numbers(folder / "base"), numbers(folder / "tuned"), numbers(merged)
        assert found.keys() == before.keys(), kind
        for name in found: assert torch.allclose(found[name], (before[name] + after[name]) / 2, rtol=1e-5, atol=1e-7), (kind, name)
        original, result = reading(folder / "base"), reading(merged)
    assert result == original or isinstance(original, str), (kind, result)
    if isinstance(result, str): return "merged, but transformers cannot load its own base either", "not loaded", result
    with at_most(40):
        try: compared, apart = written(folder / "base", folder, kind)
        except MaetError as error: return "merged and loaded", "refused", str(error)
    return "merged and loaded", f"{'by another name' if apart else 'plainly'}, compared by {compared}", ""


def test_every_architecture(tell):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder: found[kind] = through(kind, Path(folder))
    counts, writings = (Counter(row[column] for row in found.values()) for column in (0, 1))
    lines = [f"transformers {transformers.__version__}: {len(found)} causal language models; " + ", ".join(f"{n} {w}" for w, n in counts.items()),
             "    changed, written and loaded again: " + ", ".join(f"{n} {w}" for w, n in writings.items())]
    lines += [f"    {kind:26} {what}; {why}"[:150] for kind, (what, _, why) in found.items() if why]
    tell("\n".join(lines))
    assert counts["merged and loaded"] >= .85 * len(found)
    refused = {kind: why for kind, (_, what, why) in found.items() if what == "refused"}
    assert refused.keys() == REFUSED, refused
    assert sum(n for what, n in writings.items() if what.endswith("compared by logits")) >= 160
