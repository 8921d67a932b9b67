"""What only a GPU can show, one part a call; `benchmarks/gpu.sh` calls them in order, with a limit of time for all.

    train     key neurons (rows, elements), peft's SHiRA, LoRA and dense AdamW, all in bfloat16: tokens/s, share of the card's
              dense rate, peak memory, and how many sequences at once fit cards of 24 and 80 GB
    gradient  Eq. 1 by gradient: seconds and memory of a step that adds gradients up in float32
    files     locate, pack, merge and transfer of a checkpoint of this size on the local disk
    real      `maet run --scale real`, three seeds

The model is a Llama with the shapes of LLaMA-3 8B and random weights (--tiny: a very small one, on the CPU). Beside a measured number stands what
`maet plan` predicts (--no-plan: nothing). Smaller cards are imitated: torch's allocator is given no more than they have.
A number that nobody measured is not in the ledger; where a way does not fit, a line says so."""
import argparse, gc, json, os, shutil, statistics, subprocess, sys, time
from pathlib import Path

import torch
import training
from torch.utils.flop_counter import FlopCounterMode

from maet.record.ledger import append, commit, versions
from maet.study.memory import rehearse
from maet.study.gpus import GPUS
from maet.study.plan import memory, seconds
from maet.training.schedule import Training
from maet.weights.tensors import meta_model

WAYS = {  # of `training.Way` -> mode and granularity of a plan; None: the plan knows no such mode
    "key-neuron 5% row": ("key-neuron", "row"), "key-neuron 5% element": ("key-neuron", "element"),
    "shira 5%": None, "lora": ("lora", ""), "dense": ("dense", "")}
CARDS = (24, 80)  # GB
MOST = {"8b": 64, "tiny": 8}  # sequences at once; more are not tried
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "gradient", "files", "real"))
    parser.add_argument("--tiny", action="store_true", help="very small shapes, on the CPU")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--no-plan", action="store_true", help="no predictions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of part real")
    parser.add_argument("--scratch", type=Path, default=Path("runs/gpu"), help="a folder on the local disk; 53 GB at 8B")
    parser.add_argument("--ledger", type=Path, default=Path("data/results/gpu.jsonl"))
    args = parser.parse_args()
    args.size, args.device = ("tiny", "cpu") if args.tiny else ("8b", "cuda")
    if args.device == "cuda" and not torch.cuda.is_available(): sys.exit("gpu: torch sees no GPU here; --tiny runs on the CPU")
    return args


# ---- numbers and rows ----

def card(args) -> str | None:
    "The name of this GPU in the table of `maet plan`, the longest that fits."
    if args.device == "cpu": return None
    here = torch.cuda.get_device_name().upper().replace(" ", "-")
    fitting = [name for name in GPUS if name.upper().split("-80")[0].split("-40")[0] in here]
    return max(fitting, key=len, default=None)


def show(args, method: str, numbers: dict, predicted: dict = {}) -> None:
    "Print a line, and put its numbers into the ledger."
    parts = []
    for name, value in numbers.items():
        guess = predicted.get(name)
        beside = "" if guess is None else f" (plan {guess:.4g}, {value/guess:.2f} of it)"
        parts.append(f"{name} {value:.4g}{beside}")
    print(f"{method:24}", "  ".join(parts), flush=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores"
    shared = dict(study="gpu", scale=args.size, language="none", task=args.part, seed=args.seed, versions=versions(), commit=commit(),
                  seconds=None, method=method, setting=dict(device=args.device, name=name), stderr=None, n=1)
    plans = {f"predicted_{name}": guess for name, guess in predicted.items() if guess is not None}
    append(args.ledger, [shared | dict(metric=metric, value=float(value)) for metric, value in (numbers | plans).items()])


def plan_training(args, mode, sequences) -> Training:
    length = training.SIZES[args.size][7]
    precision = "bfloat16" if args.device == "cuda" else None
    return Training(mode=mode, tokens=length*sequences, batch_tokens=length*sequences, sequence_length=length,
                    precision=precision, activation_checkpointing=args.device == "cuda")


def predict(args, name, sequences=1) -> dict:
    "What `maet plan` says of a step. Dense AdamW in bfloat16 throughout is what ZeRO would leave of it."
    known = ("gradient", "") if name.startswith("gradient") else WAYS[name]
    if args.no_plan or known is None: return {}
    mode, granularity = known
    settings = plan_training(args, mode, sequences)
    r = rehearse(training.config(args), settings, 1, .05, granularity or "element", spread=mode == "dense")
    found = dict(peak_gb=sum(memory(r).values())/1e9)
    if card(args): found["step_s"] = seconds(r, settings, card(args))
    return found


# ---- one way of training ----

def ids(args, sequences, length=None):
    vocabulary, _, longest = training.SIZES[args.size][5:]
    return torch.randint(vocabulary, (sequences, length or longest), device=args.device)


def start_peak(args):
    training.forget_peak()
    if args.device == "cuda": torch.cuda.empty_cache()


def peak(args) -> int: # bytes since start_peak
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else training.resident("VmHWM")


def let_go(args):
    gc.collect()
    if args.device == "cuda": torch.cuda.empty_cache()


def counted(way, batch) -> int:
    "Operations of one step, by torch's own formulas; what activation checkpointing computes again counts."
    with FlopCounterMode(display=False) as counter: way.step(batch)
    return counter.get_total_flops()


def timed(args, way) -> dict:
    "Seconds of a step of one sequence, and what follows from them."
    batch = ids(args, 1 if args.device == "cuda" else 4)
    flops = counted(way, batch)
    start_peak(args)
    way.seconds.clear()
    for _ in range(args.steps): way.step(batch)
    step = statistics.median(way.seconds)
    numbers = dict(step_s=step, tokens_per_s=batch.numel()/step, peak_gb=peak(args)/1e9, trained_m=sum(p.numel() for p in way.trained)/1e6)
    if card(args): numbers["share_of_peak"] = flops/step/(GPUS[card(args)].bf16*1e12)
    return numbers


def fits(args, way, batch, limit) -> bool: # bytes
    "Does a step of these sequences stay within the limit? On a GPU the allocator sees to it."
    start_peak(args)
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., limit/total))
    enough = True
    try: way.step(batch)
    except OUT_OF_MEMORY: enough = False
    for p in way.trained: p.grad = None
    let_go(args)
    if args.device == "cuda": torch.cuda.set_per_process_memory_fraction(1.)
    return enough and peak(args) <= limit


def largest(args, way, limit) -> int:
    "The largest number of sequences at once that fits: doubled until it does not, then halved in between."
    low, high, most = 0, 1, MOST[args.size]
    while high <= most and fits(args, way, ids(args, high), limit): low, high = high, 2*high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high)//2
        if fits(args, way, ids(args, middle), limit): low = middle
        else: high = middle
    return low


def longest(args, way, limit) -> int:
    "Where not one whole sequence fits: the length of one that does, by halves. 0: the weights alone are too much."
    length = training.SIZES[args.size][7]
    while length > 1:
        length //= 2
        if fits(args, way, ids(args, 1, length), limit): return length
    return 0


def limits(args) -> dict: # GB -> bytes
    "Of the cards; at tiny shapes of two imagined ones, a little above what the process holds."
    if args.device == "cuda": return {gb: gb*1e9 for gb in CARDS}
    held = training.resident("VmRSS")
    return {gb: held + gb*1e6 for gb in CARDS}


def tell_way(args, name, largest_too=True):
    let_go(args)
    try: way = training.Way(args, name)
    except OUT_OF_MEMORY: return print(f"{name:24} does not fit: not even the model and what is beside it", flush=True)
    try: numbers = timed(args, way)
    except OUT_OF_MEMORY: return print(f"{name:24} does not fit: a step of one sequence takes more than there is", flush=True)
    show(args, name, numbers, predict(args, name) if args.device == "cuda" else predict(args, name, 4))
    if not largest_too: return None
    here = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else float("inf")
    for gb, limit in limits(args).items():
        if limit > 1.1*here: continue  # a smaller card is imitated, a larger one is not
        found = {f"device_batch_{gb}gb": largest(args, way, limit)}
        if found[f"device_batch_{gb}gb"] == 0: found[f"length_{gb}gb"] = longest(args, way, limit)
        show(args, name, found)
    return None


# ---- files ----

def write_checkpoints(args) -> Path:
    "A base with random weights, and one tuned from it: a twentieth of its scalars moved."
    from safetensors.torch import save_file
    config = training.config(args)
    config.architectures = ["LlamaForCausalLM"]
    folder = args.scratch/"files"
    for kind in ("base", "tuned"):
        (folder/kind).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder/kind)
    named = {name: p.shape for name, p in meta_model(config).named_parameters()}
    shard, size, weight_map, number = {}, 0, {}, 0
    torch.manual_seed(args.seed)

    def flush():
        for kind, at in (("base", 0), ("tuned", 1)):
            tensors = {name: pair[at] for name, pair in shard.items()}
            save_file(tensors, folder/kind/f"model-{number}.safetensors", metadata={"format": "pt"})

    for name, shape in named.items():
        before = torch.randn(shape, device=args.device).mul_(.02).bfloat16()
        moved = torch.rand(shape, device=args.device) < .05
        shard[name] = before.cpu(), torch.where(moved, before*1.05, before).cpu()
        weight_map[name] = f"model-{number}.safetensors"
        size += shard[name][0].nbytes
        if size > 2e9:
            flush()
            shard, size, number = {}, 0, number + 1
    if shard: flush()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    for kind in ("base", "tuned"): (folder/kind/"model.safetensors.index.json").write_text(index)
    return folder


def verb(args, *words) -> dict:
    "One verb of maet in a process of its own: seconds, and the most that it held."
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "maet.cli", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode: sys.exit(f"maet {words[0]}: ended with {process.returncode}; what it said is above")
    return dict(seconds=time.perf_counter() - began, peak_gb=usage.ru_maxrss*1024/1e9)


def files(args):
    began = time.perf_counter()
    folder = write_checkpoints(args)
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    show(args, "write", dict(seconds=time.perf_counter() - began, written_gb=written/1e9))
    try:
        base, tuned, keys, pack = (folder/name for name in ("base", "tuned", "keys.safetensors", "pack.safetensors"))
        show(args, "locate by movement", verb(args, "locate", base, tuned, "--out", keys))
        show(args, "pack", verb(args, "pack", base, tuned, "--keys", keys, "--out", pack))
        arithmetic = dict(merge_method="task_arithmetic", base_model=str(base), dtype="float32", out_dtype="bfloat16",
                          models=[dict(model=str(tuned), parameters=dict(weight=.5))])
        transfer = dict(merge_method="maet", base_model=str(base), ability=dict(model=str(pack)),
                        languages=[dict(model=str(pack), weight=.5)], parameters=dict(gamma=.2, eta=1.))
        for name, recipe in (("merge", arithmetic), ("transfer", transfer)):
            (folder/f"{name}.yml").write_text(json.dumps(recipe))  # JSON is YAML
            show(args, name, verb(args, "merge", folder/f"{name}.yml", folder/name))
            shutil.rmtree(folder/name)
    finally: shutil.rmtree(folder)


# ---- the study of a real model ----

def real(args):
    if args.tiny: return print("real: it has one size, which is not tiny; `make real` runs it on CPUs")
    for seed in args.seeds:
        out = args.scratch/"real"
        numbers = verb(args, "run", "--scale", "real", "--out", out, "--seed", seed)
        show(args, f"scale real, seed {seed}", numbers)
    return None


def main():
    args = parse()
    if args.part == "real": return real(args)
    if args.part == "files": return files(args)
    if args.tiny: torch.set_num_threads(1)
    training.Way(argparse.Namespace(size="1m", device="cpu", seed=0), "lora").step(torch.zeros((1, 8), dtype=torch.long))  # late imports
    if args.part == "gradient": return tell_way(args, "gradient bfloat16", largest_too=False)
    for name in args.ways: tell_way(args, name)
    return None


if __name__ == "__main__": main()
