"""Wall time and peak memory of arithmetic on checkpoints, against mergekit, `cp` and plain reading, in turn, in rounds.

    python benchmarks/merging.py [--sizes 1.4 2.8] [--rounds 3 1] [--scratch DIR] [--mergekit mergekit-yaml] [--out FILE.json] [--figure STEM]

For each size it makes a random bfloat16 LLaMA in shards of 1 GB, three checkpoints tuned from it and five packs at 5 % (an
ability and four languages): about 16 bytes of disk for each parameter, and 2 more for what is being written. Then, in every
round, each contestant does its work once, in a process of its own:

    read        reads base and one tuned checkpoint once, and does nothing with them
    cp          copies the base
    cp+sync     the same, and waits until the disk has it, as maet does before a file gets its name
    mergekit    task arithmetic, base + three deltas, dtype float32, out_dtype bfloat16 (left out where mergekit is not found)
    merge       the same file by `maet merge`
    transfer    `maet merge`, merge_method maet: five packs on the base (Equations 3 to 5)
    locate      `maet locate`: the exact top 5 % of all scalars
    pack        `maet pack`: base and tuned checkpoint to a pack, at the keys that locate found
    fast        as merge, with all of the fast path (maet.weights.direct), however small the checkpoints are
    no-PIECE    as fast, without one piece of it: no-direct (reading past the page cache), no-writes (writing past it),
                no-ahead (reading ahead), no-stock (blocks that are used again), no-kept (malloc's memory), or no-all. Only where asked for:
                --contestants fast no-direct no-writes no-ahead no-stock no-kept no-all

Before each of them its inputs are dropped from the page cache (--cache warm: read into it instead). Seconds are those of the whole
process, Python's start and imports included; memory is the largest resident size that the system saw (getrusage). The load that
others put on the machine before a run is written beside it. Nothing is fetched from a network.
"""
import argparse, json, os, shutil, statistics, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

GB = 1e9
SIZES = {"1.4": dict(hidden_size=2048, num_hidden_layers=24, intermediate_size=5632, vocab_size=40960, num_attention_heads=16),
         "2.8": dict(hidden_size=2560, num_hidden_layers=32, intermediate_size=6912, vocab_size=50304, num_attention_heads=20),
         "0.05": dict(hidden_size=512, num_hidden_layers=8, intermediate_size=1408, vocab_size=24000, num_attention_heads=8)}
TUNED, PACKS, RATIO = ("a", "b", "c"), ("mathematics", "es", "zh", "bn", "te"), .05
GOALS = [("merge", "seconds", "mergekit", .30), ("merge", "peak_bytes", None, 1.0 * GB), ("transfer", "seconds", "cp", 2.5),
         ("locate", "seconds", "read", 3.0), ("locate", "peak_bytes", None, 1.0 * GB)]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1.4", "2.8"], help=f"billions of parameters, of {', '.join(SIZES)}; or config.json files")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3], help="of each size; one number is for all")
    parser.add_argument("--contestants", nargs="+", default=["read", "cp", "cp+sync", "mergekit", "merge", "transfer", "locate", "pack"])
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="the page cache before each run")
    parser.add_argument("--mergekit", default="mergekit-yaml", help="the program")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints; emptied of them afterwards. Default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in --scratch and use those that are there")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="stem of PNG, SVG and CSV")
    return parser.parse_args()


# ---- inputs ----

def noise(name: str, start: int, count: int, seed: int):
    "The same normal numbers whenever they are asked for."
    import torch, zlib
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {start}".encode()))
    return torch.randn(count, generator=generator)


def make_base(folder: Path, config) -> None:
    "A random checkpoint in shards of 1 GB."
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory as split
    from maet.weights.writers import Sink, lay_out
    from maet.weights.streams import in_order
    from maet.weights.saving import jobs_of
    from maet.weights.tensors import shapes
    from math import prod
    tensors = {name: (tuple(shape), torch.bfloat16) for name, shape in shapes(config).items()}
    planned = split(tensors, get_storage_size=lambda t: 2 * prod(t[0]), filename_pattern="model{suffix}.safetensors", max_shard_size="1GB")
    plan = {file: {n: tensors[n] for n in names} for file, names in planned.filename_to_tensors.items()}
    folder.mkdir()
    with Sink(folder) as sink:
        for file in plan:
            sink.begin(file, lay_out(plan[file], {"format": "pt"})[0])
            draw = lambda job: (.02 * noise(job.name, job.start, job.stop - job.start, 0)).bfloat16()
            for piece in in_order(draw, jobs_of(plan, file)): sink.write(piece)
    if planned.is_sharded:
        listed = {"metadata": {"total_size": sum(2 * prod(s) for s, _ in tensors.values())},
                  "weight_map": {n: file for file, names in plan.items() for n in names}}
        (folder/"model.safetensors.index.json").write_text(json.dumps(listed))
    config.save_pretrained(folder)


def make_inputs(folder: Path, config) -> None:
    "base/, a/, b/, c/, five packs, and the merge files."
    import yaml
    from maet.weights.checkpoints import Checkpoint
    from maet.weights.saving import write_checkpoint
    if not (folder/"base").exists(): make_base(folder/"base", config)
    base = Checkpoint(folder/"base")
    for seed, name in enumerate(TUNED, 1):
        if (folder/name).exists(): continue
        write_checkpoint(folder/name, base, lambda n, start, stop: base.piece(n, start, stop).float() + 1e-3 * noise(n, start, stop - start, seed))
    for seed, name in enumerate(PACKS, 10):
        if not (folder/f"{name}.safetensors").exists(): make_pack(folder/f"{name}.safetensors", base, seed)
    task = dict(merge_method="task_arithmetic", base_model=str(folder/"base"), dtype="float32", out_dtype="bfloat16",
                models=[dict(model=str(folder/name), parameters=dict(weight=weight)) for name, weight in zip(TUNED, (.5, .3, .2))])
    maet = dict(merge_method="maet", base_model=str(folder/"base"), ability=dict(model=str(folder/f"{PACKS[0]}.safetensors")),
                languages=[dict(model=str(folder/f"{name}.safetensors"), weight=.25) for name in PACKS[1:]])
    for name, content in dict(task=task, maet=maet).items(): (folder/f"{name}.yml").write_text(yaml.safe_dump(content))


def make_pack(path: Path, base, seed: int) -> None:
    "A pack with values in bfloat16 at a random 5 % of every tensor."
    import numpy as np, torch, zlib
    from maet.weights.deltas import Lazy, Packed, pack_bits
    from maet.weights.packs import save_pack

    class Sparse(Lazy):
        shapes = {n: base.shape(n) for n in base.names}
        def piece(self, name, start, stop):
            drawn = np.random.default_rng(zlib.crc32(f"{seed} {name} {start}".encode()))
            mask = drawn.integers(0, 1 << 16, stop - start, np.uint16) < RATIO * (1 << 16)
            values = 1e-3 * drawn.standard_normal(np.count_nonzero(mask), np.float32)
            return Packed(pack_bits(torch.from_numpy(mask)), torch.from_numpy(values), (stop - start,))
    save_pack(path, Sparse(), base, torch.bfloat16, what="random")


# ---- contestants: each is `python merging.py --run NAME FOLDER OUT` or another program ----

def read(folder, out):
    buffer = bytearray(1 << 23)
    for file in sorted([*(folder/"base").glob("*.safetensors"), *(folder/"a").glob("*.safetensors")]):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer): pass


def locate(folder, out):
    from maet.weights.checkpoints import Checkpoint
    from maet.method.locate import locate
    locate(Checkpoint(folder/"base"), Checkpoint(folder/"a"), RATIO, "element", out)


def pack(folder, out):
    import torch
    from maet.weights.checkpoints import Checkpoint
    from maet.weights.differences import Difference
    from maet.weights.packs import Keys, save_pack
    base = Checkpoint(folder/"base")
    save_pack(out, Difference(Checkpoint(folder/"a"), base, Keys(folder/"keys.safetensors", base)), base, torch.bfloat16)


PIECES = ("direct", "writes", "ahead", "stock", "kept")


def merge_without(pieces, folder, out):
    "The merge on the fast path, some pieces of it switched off."
    from collections import defaultdict, deque
    from maet.method.merge import merge
    from maet.weights import checkpoints, direct, saving
    checkpoints.memory_size = lambda: 1e18 if "direct" in pieces else 0  # a checkpoint is large beside it, or is not
    if "writes" in pieces: saving.DirectFile = open
    if "ahead" in pieces:
        saving.in_one_go = lambda start, stop, step: [(start + first, start + last) for first, last in saving.pieces(stop - start, step)]
    if "stock" in pieces: direct._stock = defaultdict(lambda: deque(maxlen=0))
    if "kept" in pieces: direct.keep_memory = lambda: None
    merge(folder/"task.yml", out)


OURS = {f.__name__: f for f in (read, locate, pack)} | {"fast": partial(merge_without, ())}
OURS |= {f"no-{piece}": partial(merge_without, (piece,)) for piece in PIECES} | {"no-all": partial(merge_without, PIECES)}
MERGES = {"merge": "task.yml", "transfer": "maet.yml"}
INPUTS = {"cp": ["base"], "cp+sync": ["base"], "read": ["base", "a"], "locate": ["base", "a"], "pack": ["base", "a", "keys.safetensors"],
          "transfer": ["base", *(f"{name}.safetensors" for name in PACKS)]}


def command(name: str, folder: Path, out: Path, args) -> list[str]:
    if name == "cp": return ["cp", "-r", str(folder/"base"), str(out)]
    if name == "cp+sync": return ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(folder/"base"), str(out)]
    if name == "mergekit":
        return [args.mergekit, str(folder/"task.yml"), str(out), "--no-write-model-card", "--no-copy-tokenizer", "--quiet", "--out-shard-size", "500M"]
    if name in MERGES: return [sys.executable, "-m", "maet.cli", "merge", str(folder/MERGES[name]), str(out)]
    return [sys.executable, __file__, "--run", name, str(folder), str(out)]


# ---- measuring ----

def files(folder: Path, names: list[str]) -> list[Path]:
    return sorted(file for name in names for file in ([folder/name] if (folder/name).is_file() else (folder/name).glob("*.safetensors")))


def prepare(paths: list[Path], cache: str) -> None:
    "Drop files from the page cache, or read them into it."
    buffer = bytearray(1 << 23)
    for path in paths:
        with open(path, "rb", buffering=0) as handle:
            if cache == "cold": os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and handle.readinto(buffer): pass


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def measure(name: str, folder: Path, args) -> dict:
    "One run of one contestant."
    out = folder/"keys.safetensors" if name == "locate" else folder/f"out-{name}"
    remove(out)
    os.sync()
    prepare(files(folder, INPUTS.get(name, ["base", *TUNED])), args.cache)
    load, start = os.getloadavg()[0], time.perf_counter()
    with open(folder/"log", "w") as log:
        process = subprocess.Popen(command(name, folder, out, args), stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if status: sys.exit(f"{name} ended with {process.returncode}:\n" + (folder/"log").read_text()[-3000:])
    size = sum(f.stat().st_size for f in (out.rglob("*") if out.is_dir() else [out]) if f.is_file()) if out.exists() else 0
    if name != "locate": remove(out)
    return dict(contestant=name, seconds=seconds, processor_seconds=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024,
                written_bytes=size, load_before=load)


def summary(rows: list[dict]) -> list[str]:
    "The best and median seconds, the peak, and the ratios within each round."
    lines = [f"{'':12}{'seconds (median, least)':>26}{'peak GB':>9}{'x cp':>7}{'x cp+sync':>11}{'x read':>8}{'x mergekit':>12}"]
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name]
        times = [row["seconds"] for row in own]
        ratios = [ratio(rows, name, "seconds", other) for other in ("cp", "cp+sync", "read", "mergekit")]
        lines.append(f"{name:12}{statistics.median(times):17.1f}{min(times):9.1f}{max(r['peak_bytes'] for r in own) / GB:9.2f}"
                     + "".join(f"{'' if r is None else format(r, '.2f'):>{w}}" for r, w in zip(ratios, (7, 11, 8, 12))))
    return lines


def ratio(rows: list[dict], name: str, field: str, other: str) -> float | None:
    "Median over the rounds of one contestant's number by another's."
    by_round = {(row["round"], row["contestant"]): row[field] for row in rows}
    found = [value / by_round[r, other] for (r, n), value in by_round.items() if n == name and (r, other) in by_round]
    return statistics.median(found) if found else None


def judged(rows: list[dict]) -> list[str]:
    "The goals, and what was reached."
    lines = []
    for name, field, other, most in GOALS:
        own = [row[field] for row in rows if row["contestant"] == name]
        value = ratio(rows, name, field, other) if other else max(own, default=None)
        if value is None: continue
        said = f"{value:.2f} x {other}, at most {most}" if other else f"{value / GB:.2f} GB at peak, at most {most / GB} GB"
        lines.append(f"{'reached' if value <= most else 'MISSED ':8} {name}: {said}")
    return lines


def ledger_rows(results: list[dict]) -> list[dict]:
    "What the figure shows, in the words of the ledger."
    rows = []
    for result in results:
        for name in dict.fromkeys(row["contestant"] for row in result["rows"]):
            own = [row for row in result["rows"] if row["contestant"] == name]
            times = [row["seconds"] for row in own]
            common = dict(study="merging", scale=f"{result['parameters'] / 1e9:.1f}b", method=name, setting={"cache": result["cache"]}, language="", task="",
                          stderr=None, n=len(own), seed=0)
            rows.append(common | dict(metric="seconds", value=statistics.median(times)))
            rows.append(common | dict(metric="peak_gb", value=max(row["peak_bytes"] for row in own) / GB))
    return rows


def draw(results: list[dict], stem: Path) -> None:
    "Seconds and peak memory of each contestant at each size."
    from matplotlib.figure import Figure
    from maet.record.pictures import save
    from maet.record.estimates import style
    rows = ledger_rows(results)
    scales, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("scale", "method"))
    colours, height = ("#12284C", "#F0A202", "#1E8F6E", "#CC79A7"), .8 / len(scales)
    with style():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = dict(zip(("seconds", "peak_gb"), figure.subplots(1, 2)))
        for row in rows:
            place = names.index(row["method"]) + height * (scales.index(row["scale"]) - (len(scales) - 1) / 2)
            ax, number = axes[row["metric"]], f" {row['value']:.{1 if row['metric'] == 'seconds' else 2}f}"
            ax.barh(place, row["value"], height, color=colours[scales.index(row["scale"])],
                    label=f"{row['scale'].upper()} parameters" if row["method"] == names[0] else None)
            ax.annotate(number, (row["value"], place), va="center", fontsize=7)
        for ax, label in zip(axes.values(), ("seconds (median)", "peak resident memory (GB)")):
            ax.set(yticks=range(len(names)), yticklabels=names, xlabel=label)
            ax.invert_yaxis()
            ax.margins(x=.12)
        axes["seconds"].legend(fontsize=7)
        save(figure, stem, rows)


def make(folder: Path, out: str) -> None:
    "The inputs of one size; prints what they are."
    from transformers import AutoConfig, LlamaConfig
    from maet.weights.checkpoints import Checkpoint
    given = SIZES.get(out)
    config = LlamaConfig(**given, max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16") \
        if given else AutoConfig.from_pretrained(out)
    make_inputs(folder, config)
    base = Checkpoint(folder/"base")
    share = max((folder/f"{name}.safetensors").stat().st_size for name in PACKS) / base.bytes
    print(json.dumps(dict(parameters=sum(base.size(n) for n in base.names), checkpoint_bytes=base.bytes, shards=len(base.shards), pack_share=share)))


def contest(size: str, rounds: int, folder: Path, args) -> dict:
    "All rounds at one size. This process stays small: a child that is started from it is counted with what it had before."
    made = subprocess.run([sys.executable, __file__, "--run", "make", str(folder), size], stdout=subprocess.PIPE, text=True)
    if made.returncode: sys.exit(f"the inputs of {size} could not be made")
    facts = json.loads(made.stdout.splitlines()[-1])
    print(f"\n{facts['parameters'] / 1e9:.2f}B parameters, {facts['checkpoint_bytes'] / GB:.2f} GB in {facts['shards']} shards; "
          f"a pack at 5 % is {facts['pack_share']:.2%} of that (at most 12 %)", flush=True)
    rows = []
    for number in range(rounds):
        for name in args.contestants:
            row = dict(round=number) | measure(name, folder, args)
            rows.append(row)
            print(f"  round {number} {name:10} {row['seconds']:7.1f} s  {row['processor_seconds']:7.1f} s of processor  {row['peak_bytes'] / GB:6.2f} GB"
                  f"  load before {row['load_before']:.1f}", flush=True)
    print("\n".join([*summary(rows), *judged(rows)]))
    return dict(size=size, **facts, cache=args.cache, cores=len(os.sched_getaffinity(0)), rows=rows)


def main():
    args = parse()
    if "mergekit" in args.contestants and not shutil.which(args.mergekit):
        print(f"{args.mergekit} is not here: mergekit is left out")
        args.contestants.remove("mergekit")
    results = []
    if len(args.rounds) not in (1, len(args.sizes)): sys.exit(f"--rounds: give one number, or {len(args.sizes)} for {' '.join(args.sizes)}")
    for size, rounds in zip(args.sizes, args.rounds * len(args.sizes)):
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="maet-merging-") as made:
            folder = args.scratch/f"maet-merging-{Path(size).parent.name or size}" if args.keep else Path(made)
            folder.mkdir(parents=True, exist_ok=True)
            results.append(contest(size, rounds, folder, args))
        if args.out: args.out.write_text(json.dumps(results, indent=1) + "\n")
    if len(results) > 1:
        for name in ("merge", "locate", "transfer"):
            peaks = [max((r["peak_bytes"] for r in result["rows"] if r["contestant"] == name), default=0) for result in results]
            if peaks[0]: print(f"{name}: peak memory {peaks[-1] / peaks[0] - 1:+.1%} from {args.sizes[0]} to {args.sizes[-1]}")
    if args.figure: draw(results, args.figure)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--run", "make"]: make(Path(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["--run"]: OURS[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
    else: main()
