"""What a training step costs: dense AdamW, LoRA, masked dense AdamW (as the authors' earlier code trains key neurons), peft's SHiRA (a sparse adapter
of as many scalars) and key neurons of their own, also at the very places that SHiRA trains; and what it costs to locate them by Eq. 1 as it is defined: gradients added up, of a float32 base and of a bfloat16 one, which stays as it is.

    python benchmarks/training.py [--size 70m] [--ratios 0.01 0.05 0.2] [--rounds 9] [--threads 2]      CPU, some minutes
    python benchmarks/training.py --size 8b --device cuda        LLaMA-3 8B's shapes, random weights, one GPU, against no optimizer at all

A step is forward, backward, clipping and a fused AdamW step on the same batch. Times: a round takes one step of each way in one process, so
whatever else the machine does slows all alike; printed are medians, of the steps and of their ratios to dense in the same round. Memory: each way once more in a process of its own;
on a GPU the allocator's peak, on a CPU the resident set's, both above the level before the model is built. State: gradients, moments, and
whatever is kept beside the weights that the forward reads. A size that fills a GPU is timed in those processes too. Rows go to --ledger,
the figure to --figure."""
import argparse, gc, json, os, statistics, subprocess, sys, time, warnings
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from maet.record.ledger import append, commit, versions
from maet.record.pictures import save
from maet.record.estimates import style
from maet.study.plan import Cluster, modes
from maet.training.schedule import Training
from maet.training.gradients import Accumulator
from maet.training.loading import prepare
from maet.training.sparse import VALUES
from maet.training.train import state_bytes

warnings.filterwarnings("ignore", message="Sparse invariant checks")  # SHiRA makes a sparse tensor in each forward
GOALS = {"dense": {"gradient float32": dict(time=.8, peak=.45), "gradient bfloat16": dict(time=.8, peak=.45),
                   "key-neuron 5% element": dict(state=.12, time=1.), "key-neuron 5% row": dict(state=.12, time=.78)},  # of dense
         "no optimizer": {"key-neuron 5% element": dict(time=1.25)}}  # 0.8 of its tokens a second; at 8b no more than 40 GB
GRANULARITIES = ("element", "row", "column")
SIZES = {  # hidden, intermediate, layers, heads, heads of keys and values, vocabulary; sequences, length
    "tiny": (64, 176, 2, 4, 2, 500, 4, 32), "1m": (128, 352, 4, 4, 4, 1000, 4, 64), "9m": (320, 864, 6, 5, 5, 4000, 4, 64),
     "70m": (640, 1760, 10, 10, 10, 16000, 4, 128), "150m": (768, 2112, 14, 12, 12, 24000, 4, 128),
    "1b": (2048, 8192, 16, 32, 8, 128256, 1, 2048), "8b": (4096, 14336, 32, 32, 8, 128256, 1, 2048)}
BIG = ("1b", "8b")  # bf16, activations recomputed, one way at a time


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="70m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of key neurons; by default 0.01 0.05 0.2, at a big size 0.05")
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, help="by default all, at a big size element")
    parser.add_argument("--ways", nargs="+", help="only these, as the table names them; the first is what the others are compared with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of torch, on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, default=Path("data/results/training.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("figures/training"), help="without its ending")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    args.ratios = args.ratios or ([.05] if args.size in BIG else [.01, .05, .2])
    args.granularities = args.granularities or (["element"] if args.size in BIG else list(GRANULARITIES))
    return args


def names(args) -> list[str]:
    "The ways, dense first. A dense optimizer does not fit where a big model does."
    if args.ways: return args.ways
    sparse = [f"key-neuron {ratio:.0%} {granularity}" for ratio in args.ratios for granularity in args.granularities]
    beside = [f"{kind} {ratio:.0%}{places}" for ratio in args.ratios for kind, places in (("shira", ""), ("key-neuron", " shira"))]
    if args.size in BIG: return ["no optimizer", "gradient bfloat16", "lora", *sparse, *beside]
    return ["dense", "gradient float32", "gradient bfloat16", "lora", "masked 5%", *sparse, *beside]


def config(args) -> LlamaConfig:
    hidden, intermediate, layers, heads, kv, vocabulary, _, length = SIZES[args.size]
    return LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, use_cache=False,
                       num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=length,
                       dtype="bfloat16" if args.size in BIG else "float32")


def build(args):
    torch.manual_seed(args.seed)
    with torch.device(args.device): return AutoModelForCausalLM.from_config(config(args), dtype=config(args).dtype)


class Drawn(Mapping):
    "Key neurons at random, a tensor's mask at a time. A vector's scalars are rows, and columns, of their own."
    def __init__(self, model, ratio, granularity):
        self.shapes, self.ratio, self.granularity = {name: p.shape for name, p in model.named_parameters()}, ratio, granularity
        self.device = next(model.parameters()).device
    def __iter__(self): return iter(self.shapes)
    def __len__(self): return len(self.shapes)
    def __getitem__(self, name):
        shape = self.shapes[name]
        lines = shape if self.granularity == "element" or len(shape) == 1 else (shape[0], 1) if self.granularity == "row" else (1, shape[1])
        return (torch.rand(lines, device=self.device) < self.ratio).cpu().expand(shape)


def between(model) -> dict: # name of a weight -> its layer: every linear layer but the head, which is what peft calls all-linear
    head = model.get_output_embeddings()
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}


@cache
def places(shape, count, seed) -> torch.Tensor: # bool
    "So many places at random. Layers of one shape share them, as they do in peft with a seed."
    chosen = torch.randperm(prod(shape), generator=torch.Generator().manual_seed(seed))[:count]
    mask = torch.zeros(prod(shape), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(shape)


class ShiraPlaces(Drawn):
    "As many scalars as that share of the whole model, in the layers and at the places that SHiRA trains: `rank` * (rows + columns) of each."
    def __init__(self, model, ratio, seed):
        self.layers, self.seed = between(model), seed
        self.shapes = {name: layer.weight.shape for name, layer in self.layers.items()}
        self.rank = max(1, round(ratio*sum(p.numel() for p in model.parameters())/sum(map(sum, self.shapes.values()))))
    def of(self, shape): return places(tuple(shape), self.rank*sum(shape), self.seed)
    def __getitem__(self, name): return self.of(self.shapes[name])


def with_shira(model, drawn: ShiraPlaces):
    "The model with peft's SHiRA at these places."
    from peft import ShiraConfig, get_peft_model
    def mask(layer, rank, **_): return drawn.of(layer.weight.shape).to(layer.weight.device)
    targets = [name.removesuffix(".weight") for name in drawn.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mask is our own
        config = ShiraConfig(r=drawn.rank, mask_type="of our own", target_modules=targets)
        config.mask_fn = mask
        return get_peft_model(model, config)


class Way:
    "A model, its optimizer, and the seconds of its steps."
    def __init__(self, args, name):
        kind, *rest = name.split()
        self.model, self.masks, self.seconds, self.cuda = build(args), {}, [], args.device == "cuda"
        training = Training(mode=kind if kind in ("lora", "key-neuron") else "dense", activation_checkpointing=args.size in BIG)
        keys = self.keys(kind, rest, args.seed) if kind in ("key-neuron", "shira") else None
        if kind == "masked": self.masks = dict(zip(self.model.parameters(), Drawn(self.model, .05, "element").values()))
        self.model = prepare(self.model, training, keys if kind == "key-neuron" else None)
        if kind == "shira": self.model = with_shira(self.model, keys)
        self.model.train()
        if kind == "gradient": self.model.to(getattr(torch, rest[0]))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        decay = 0. if kind == "masked" else .1  # it would move frozen scalars
        if kind == "no": self.optimizer = None
        elif kind == "gradient": self.optimizer = Accumulator(self.trained)
        else: self.optimizer = torch.optim.AdamW(self.trained, lr=5e-5, weight_decay=decay, fused=True)

    def keys(self, kind, rest, seed):
        ratio = float(rest[0][:-1])/100
        return ShiraPlaces(self.model, ratio, seed) if kind == "shira" or rest[1] == "shira" else Drawn(self.model, ratio, rest[1])

    def step(self, ids):
        self.wait()
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        for p, mask in self.masks.items(): p.grad.mul_(mask)
        if isinstance(self.optimizer, torch.optim.AdamW): torch.nn.utils.clip_grad_norm_(self.trained, 1.)
        if self.optimizer: self.optimizer.step()
        for p in self.trained: p.grad = None
        self.wait()
        self.seconds.append(time.perf_counter() - start)

    def wait(self):
        if self.cuda: torch.cuda.synchronize()

    def state(self) -> dict:
        "Bytes kept beside the weights that the forward reads."
        kept = state_bytes(self.model, self.optimizer) if self.optimizer else dict(gradients=sum(p.nbytes for p in self.trained))
        beside = sum(p.nbytes for n, p in self.model.named_parameters() if ".lora_" in n or ".shira_" in n)
        indices = sum(index.nbytes for module in self.model.modules() for index in getattr(module, "shira_indices", {}).values())
        masks = sum(m.nbytes for m in self.masks.values())
        return kept | dict(masters=kept.get("masters", 0) + beside, masks=masks + indices)


def batch(args):
    vocabulary, sequences, length = SIZES[args.size][5:]
    return torch.randint(vocabulary, (sequences, length), device=args.device)


def resident(field) -> int: # bytes: VmRSS now, or VmHWM at most
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])*1024


def forget_peak():
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass  # then building the model counts as well


def alone(args):
    "One way in this process: its peak, its state and its times, as JSON."
    warm = argparse.Namespace(**vars(args) | dict(size="1m", device="cpu"))
    Way(warm, "lora").step(batch(warm)); gc.collect()  # what is imported late does not count
    level = torch.cuda.memory_allocated() if args.device == "cuda" else resident("VmRSS")
    way = Way(args, args.way)
    forget_peak()
    for _ in range(1 + (args.rounds if args.size in BIG else 2)): way.step(batch(args))
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
    print(json.dumps(dict(peak=peak - level, state=way.state(), seconds=way.seconds[1:], trained=sum(p.numel() for p in way.trained))))


def measure_alone(args, name) -> dict:
    command = [sys.executable, __file__, "--way", name, *(f"--{k}={v}" for k, v in vars(args).items() if k in ("size", "device", "rounds", "threads", "seed"))]
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_=str(2**20))  # what is freed is given back, and not counted
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode: sys.exit(f"{name}: ended with {done.returncode}; what it printed is above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(args, bar) -> dict[str, list[float]]:
    "Seconds of each step, the ways in turn. The first round warms up."
    ids, ways = batch(args), {}
    for name in names(args):
        ways[name] = Way(args, name)
        bar.update()
    for _ in range(args.rounds + 1):
        for way in ways.values():
            way.step(ids)
            bar.update()
    return {name: way.seconds[1:] for name, way in ways.items()}


def measure(args) -> dict[str, dict]:
    big, ways = args.size in BIG, names(args)
    with tqdm(total=len(ways)*(1 if big else args.rounds + 3), unit="step", desc=f"{args.size} on {args.device}") as bar:
        times = {} if big else measure_times(args, bar)
        gc.collect()
        found = {}
        for name in ways:
            found[name] = measure_alone(args, name)
            found[name]["seconds"] = times.get(name, found[name]["seconds"])
            bar.update()
    return found


def time_ratio(row, dense) -> float:
    "Of the same round, in the median; apart from each other there are no rounds."
    return statistics.median(a/b for a, b in zip(row["seconds"], dense["seconds"]))


def told(name, row, first, dense, tokens) -> str: # first: name of what is compared with, here called dense
    time, ratio = statistics.median(row["seconds"]), time_ratio(row, dense)
    state, all_state = sum(row["state"].values()), sum(dense["state"].values())
    goal = GOALS[first].get(name, {})
    against = lambda ratio, what: f"{ratio:.3f}" + (f" (goal {goal[what]})" if what in goal else "")
    return (f"{name:24} {row['trained']/1e6:9.2f} M trained  step {time:8.3f} s = {against(ratio, 'time'):18} best {min(row['seconds'])/min(dense['seconds']):.3f}"
            f"  {tokens/time:9.1f} tokens/s  peak {row['peak']/1e6:9.1f} MB = {against(row['peak']/dense['peak'], 'peak')}"
            f"  state {state/1e6:8.1f} MB = {against(state/all_state, 'state')}")


def beside_shira(found) -> list[str]:
    "Key neurons over SHiRA, same run: the same places in the same layers, and (element) places in all tensors."
    lines = []
    for name, row in found.items():
        if not name.startswith("shira"): continue
        for places in ("shira", "element"):
            other = f"key-neuron {name.split()[1]} {places}"
            if other not in found: continue
            ours = found[other]
            ratios = dict(trained=ours["trained"]/row["trained"], time=time_ratio(ours, row), peak=ours["peak"]/row["peak"],
                          state=sum(ours["state"].values())/sum(row["state"].values()))
            lines.append(f"{other:24} over {name:10} " + "  ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items()))
    return lines


def same_training(steps: int = 20) -> tuple[float, float]: # the largest difference between the two, the largest change
    "A small float32 model trained by SHiRA, and by key neurons at the same places. AdamW without decay, which would pull on different numbers."
    args = argparse.Namespace(size="1m", device="cpu", seed=0)
    base, (theirs, ours) = build(args), (Way(args, name) for name in ("shira 5%", "key-neuron 5% shira"))
    for way in (theirs, ours):
        way.optimizer = torch.optim.AdamW(way.trained, lr=1e-3, weight_decay=0.)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps): way.step(torch.randint(1000, (4, 64), generator=generator))
    gaps, changes = [], []
    for name, start in base.named_parameters():
        if name not in between(base): continue
        layer = theirs.model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        change = layer.shira_weight["default"].detach()
        values = dict(ours.model.named_parameters())[name + VALUES].detach()
        mask = places(tuple(start.shape), len(values), args.seed)
        gaps.append((values - start.detach()[mask] - change).abs().max().item())
        changes.append(change.abs().max().item())
    return max(gaps), max(changes)


def needs(args) -> str:
    "What each mode would need on one GPU, by maet.plan."
    sequences, length = SIZES[args.size][6:]
    training = Training(tokens=length*sequences, batch_tokens=length*sequences, sequence_length=length, precision="bfloat16", activation_checkpointing=True)
    return "by maet.plan one GPU needs " + ", ".join(f"{row['memory']/1e9:.1f} GB for {row['mode']}" for row in modes(config(args), training, Cluster()))


def ledger_rows(args, found, load) -> list[dict]:
    "A row for each number."
    shared = dict(study="training", scale=args.size, language="none", task="step", seed=args.seed, versions=versions(), commit=commit(), seconds=None)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores"
    setting = dict(device=args.device, name=device, threads=args.threads if args.device == "cpu" else None, load=load)
    rows = []
    for name, row in found.items():
        each = row["seconds"]
        error = 1.2533 * statistics.stdev(each) / len(each) ** .5 if len(each) > 1 else None  # of a median of normal times
        numbers = dict(step_s=(statistics.median(each), error, len(each)), peak_bytes=(row["peak"], None, 1),
                       state_bytes=(sum(row["state"].values()), None, 1))
        rows += [shared | dict(method=name, setting=setting, metric=metric, value=value, stderr=error, n=n) for metric, (value, error, n) in numbers.items()]
    return rows


def figure(args, found):
    "Three panels: step time, peak memory, state (gradients, moments, masters, places, masks); beside a bar its ratio to the first way."
    from matplotlib.figure import Figure
    with style():
        fig = Figure(figsize=(8, .6 + .26*len(found)))
        axes, first = fig.subplots(1, 3, sharey=True), next(iter(found.values()))
        axes[0].invert_yaxis()
        numbers = {"step (s)": lambda r: statistics.median(r["seconds"]), "peak memory (MB)": lambda r: r["peak"]/1e6,
                   "state (MB)": lambda r: sum(r["state"].values())/1e6}
        for ax, (label, number) in zip(axes, numbers.items()):
            values = [number(row) for row in found.values()]
            colours = ["#8C8C8C" if not name.startswith("key") else "#12284C" for name in found]
            ax.barh(range(len(found)), values, color=colours)
            ratios = [time_ratio(row, first) for row in found.values()] if "step" in label else [value/values[0] for value in values]
            for y, (value, ratio) in enumerate(zip(values, ratios)): ax.annotate(f" {ratio:.2f}", (value, y), va="center", fontsize=6)
            ax.set(xlabel=label, yticks=range(len(found)), yticklabels=list(found), xlim=(0, 1.15*max(values)))
            ax.grid(axis="x"); ax.grid(axis="y", visible=False)
    return fig


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    if args.way: return alone(args)
    load = [round(os.getloadavg()[0], 2)]
    found = measure(args)
    load.append(round(os.getloadavg()[0], 2))
    tokens, first = SIZES[args.size][6]*SIZES[args.size][7], next(iter(found))
    print(f"load {load[0]} before, {load[1]} after; {args.threads} threads of torch, {os.cpu_count()} cores; ratios to: {first}")
    for name, row in found.items(): print(told(name, row, first, found[first], tokens))
    print(*beside_shira(found), sep="\n")
    gap, change = same_training()
    print(f"the same training by SHiRA and by key neurons, 20 steps, float32: they differ by {gap:.1e} at most, the largest change is {change:.1e}")
    if gap > 1e-3*change: sys.exit("that is more than rounding")
    if args.size in BIG: print(needs(args))
    rows = ledger_rows(args, found, load)
    print(append(args.ledger, rows), "rows are new in", args.ledger)
    print(*save(figure(args, found), args.figure, rows), sep="\n")


if __name__ == "__main__": main()
