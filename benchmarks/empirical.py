"""The paper's empirical study (appendix A, Figure 4), on the mini world and on real text. Trains a base on a Chinese forum, an English forum
and code (and on general text of both languages, to compare with), and on the Chinese forum also key neurons alone: the top k1 %, as many random
ones, and random ones with as many in each tensor. Every method has the same tokens, order and hyper-parameters: those of the recipe's experts
(on real text half of their tokens, in batches of half). In the mini world and at one seed all methods are also trained at higher learning rates. Rows go to
data/results/empirical.jsonl. Stages are kept: a run that was killed goes on.

    python benchmarks/empirical.py mini --seeds 0 1 2
    python benchmarks/empirical.py real-mini --seeds 0 1 2     # reads ../shared/data, says so and ends where it is not"""
import argparse, json, sysconfig
from dataclasses import asdict, replace
from pathlib import Path

import torch

from maet.weights.checkpoints import Checkpoint
from maet.text.documents import Source
from maet.text.tables import write_tokens
from maet.weights.packs import keys_meta, save_keys
from maet.weights.differences import open_delta
from maet.training.jobs import Job
from maet.training.launch import run_job
from maet.record.ledger import append, commit, versions
from maet.text.miniworld import write_forums
from maet.study.algorithm import Pipeline, located
from maet.study.stages import Progress, Store
from maet.study.recipes import Recipe
from maet.study.texts import plain, tokens
from maet.training.settings import load
from maet.method.similarity import Weights, random_keys, similarities, thinned

FORUMS, OTHERS = ("forum/zh", "forum/en"), ("code", "general/zh", "general/en")
FITTED = "forum/zh"            # by every method
REAL = Path("../shared/data")
POINTS, HELD_OUT = 14, 16_384  # of a curve; tokens
PAIRS = [(FORUMS[0], FORUMS[1]), *((f, "code") for f in FORUMS), *((f, f.replace("forum", "general")) for f in FORUMS), ("general/zh", "general/en")]
FLOOR = (*FORUMS, "code")      # corpora that are compared with themselves at another seed
RATES = (4, 16)                # times the recipe's learning rate: is a method only behind for want of another?


def mini(store: Store) -> tuple[Recipe, Source]:  # recipe, held-out text of FITTED
    "The mini world's corpora, of the seed that the main study has."
    recipe = load(Recipe, "mini")
    world = asdict(recipe.world)
    settings = {k: world[k] for k in ("seed", "documents", "items")}
    forums = store.stage("forums", lambda part, step: write_forums(part, **settings), **settings)
    general = Pipeline(recipe, store).texts.folder()
    at = {c: (general if c.startswith("general") else forums) for c in FORUMS + OTHERS}
    corpora = {c: Source(at[c] / f"{c}.jsonl") for c in at}
    return replace(recipe, corpora=corpora), Source(forums / "held_out" / f"{FITTED}.jsonl")


def split(lines: list[str], out: Path, corpus: str) -> None:
    "Every tenth line is held out."
    for folder, kept in ((out, [l for n, l in enumerate(lines) if n % 10]), (out / "held_out", lines[::10])):
        (folder / corpus).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{corpus}.jsonl").write_text("".join(kept), encoding="utf-8")


def real(store: Store) -> tuple[Recipe, Source]:
    "Real forums, and the standard library of the Python that runs this as code."
    recipe = load(Recipe, "real-mini")

    def make(part, step):
        for corpus in FORUMS: split((REAL / f"{corpus}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), part, corpus)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        split([json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n" for file in files], part, "code")

    files = [f"{c} {(REAL / f'{c}.jsonl').stat().st_size}" for c in FORUMS] + [sysconfig.get_python_version()]
    text = store.stage("text", make, files=files)
    corpora = recipe.corpora | {c: Source(text / f"{c}.jsonl") for c in (*FORUMS, "code")}
    training = replace(recipe.training, tokens=recipe.training.tokens // 2, batch_tokens=recipe.training.batch_tokens // 2)
    return replace(recipe, corpora=corpora, training=training), Source(text / "held_out" / f"{FITTED}.jsonl")


def fit(run: Pipeline, corpus: str, keys: Path | None = None, held_out: Source | None = None, rate: int = 1) -> Path:
    "One training of the base, with what it reports: a stage with `expert` and `report.json`."
    from transformers import AutoTokenizer
    given = run.recipe.training
    training = replace(given, seed=run.seed, mode="key-neuron" if keys else "dense", learning_rate=rate * given.learning_rate)
    table = tokens(run.texts, run.base, run.base_identity, {corpus: 1.0}, training)

    def make(part, step):
        held = held_out and str(write_tokens(part / "held.safetensors", [held_out], AutoTokenizer.from_pretrained(run.base), HELD_OUT, training.sequence_length, 0))
        job = Job(str(run.base), str(table), str(part / "expert"), str(part / "work"), training, [str(keys)] if keys else [], held)
        report = run_job(job, run.recipe.launch, step)
        (part / "report.json").write_text(json.dumps({k: report[k] for k in ("losses", "held_out", "trained", "seconds")}))

    return run.store.stage(f"fit.{corpus.replace('/', '.')}", make, training.tokens, base=run.base_identity, training=plain(training),
                           tokens=table.parent.name, keys=keys and keys.parent.name, held_out=held_out and HELD_OUT)


def random_ones(run: Pipeline, top: Path, alike: bool) -> Path:
    "A keys file with as many random scalars as `top` has, in all or in each tensor."
    def make(part, step):
        base, counts = Checkpoint(run.base), keys_meta(top)["counts"]
        masks = random_keys({n: base.shape(n) for n in base.names}, counts if alike else sum(counts.values()), run.seed)
        save_keys(part / "keys.safetensors", masks, base, granularity="element", random=True)

    return run.store.stage("keys.random", make, like=top.parent.name, alike=alike, seed=run.seed) / "keys.safetensors"


def fits(run: Pipeline, corpus: str, held_out: Source, rates: tuple = ()) -> dict[tuple[str, int], Path]:
    "All methods of Figure 4a, also at each of `rates`: (method, rate) -> stage."
    top = located(run, corpus)
    keys = {"dense": None, "top": top, "random": random_ones(run, top, False), "random-alike": random_ones(run, top, True)}
    return {(m, rate): fit(run, corpus, k, held_out, rate) for rate in (1, *rates) for m, k in keys.items()}


def loss_rows(run: Pipeline, corpus: str, found: dict[tuple[str, int], Path]) -> list[dict]:
    "Curves of the training loss at the recipe's rate, thinned; for every rate where they end, and the held-out loss before and after."
    rows, (task, language) = [], corpus.split("/")
    for (method, rate), stage in found.items():
        report = json.loads((stage / "report.json").read_text())
        about = dict(method=method, language=language, task=task, seed=run.seed, seconds=report["seconds"], stderr=None)
        last = report["losses"][-max(1, len(report["losses"]) // 10):]
        rows.append(about | dict(metric="last training loss", setting={"rate": rate}, value=sum(last) / len(last), n=len(last)))
        rows += [about | dict(metric="held-out loss", setting={"rate": rate, "step": int(s)}, value=l, n=HELD_OUT) for s, l in report["held_out"].items()]
        if rate > 1: continue
        rows += [about | dict(metric="training loss", setting={"step": p.step}, value=p.mean, stderr=p.stderr, n=p.n) for p in thinned(report["losses"], POINTS)]
        rows.append(about | dict(metric="trained scalars", setting={}, value=report["trained"], n=1))
    return rows


def similarity_rows(runs: list[Pipeline], experts: dict[tuple[str, int], Path]) -> list[dict]:
    "PAIRS at equal seeds, and FLOOR with themselves at the next seed, by one scan. Of single layers only the cosine is kept."
    base, seeds = Checkpoint(runs[0].base), [run.seed for run in runs]
    pairs = [((a, s), (b, s)) for a, b in PAIRS for s in seeds]
    pairs += [((c, s), (c, t)) for c in FLOOR for s, t in zip(seeds, seeds[1:] + seeds[:len(seeds) > 2])]
    deltas = {key: open_delta(path / "expert", base) for key, path in experts.items()}
    return [dict(method=f"{s.a[0]} ~ {s.b[0]}", setting={"part": s.part}, language="-".join(sorted({c.split("/")[-1] for c in (s.a[0], s.b[0])})),
                 task="experts", metric=metric, value=value, stderr=None, n=s.scalars, seed=s.a[1], seconds=None)
            for s in similarities(deltas, pairs, Weights(base)) if s.part != "norm" for metric, value in s.measures().items() if metric == "cosine" or s.part in ("layers", "all")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=["mini", "real-mini"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/empirical"))
    parser.add_argument("--ledger", type=Path, default=Path("data/results/empirical.jsonl"))
    given = parser.parse_args()
    if given.scale == "real-mini" and not REAL.is_dir(): return print(f"{REAL}: not there, nothing is measured on real text")
    torch.set_num_threads(1)  # a thread more can change the last bit of a sum
    store, plan = Store(given.out), Store(given.out, dry=True)
    make = mini if given.scale == "mini" else real
    recipe, held_out = make(store)

    def work(at: Store) -> tuple[list[Pipeline], dict, dict]:  # runs, curves by seed, experts by corpus and seed
        runs = [Pipeline(recipe, at, seed) for seed in given.seeds]
        tried = RATES if given.scale == "mini" else ()
        curves = {run.seed: fits(run, FITTED, held_out, tried if run is runs[0] else ()) for run in runs}
        experts = {(c, run.seed): curves[run.seed]["dense", 1] if c == FITTED else fit(run, c) for c in FORUMS + OTHERS for run in runs}
        return runs, curves, experts

    work(plan)
    store.progress = Progress(plan.plan, given.out)
    runs, curves, experts = work(store)
    rows = [row for run in runs for row in loss_rows(run, FITTED, curves[run.seed])] + similarity_rows(runs, experts)
    shared = dict(study="empirical", scale=given.scale, versions=versions(), commit=commit())
    print(append(given.ledger, [shared | row for row in rows]), "rows are new in", given.ledger)


if __name__ == "__main__": main()
