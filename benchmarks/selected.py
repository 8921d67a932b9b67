"""Which tensors are ability-related (Eq. 4), by kind: the column "Proportion of T" of the paper's Table 3, for the experts of the study.

Reads what `maet run --study rivals` keeps in the run folder, and trains nothing: a seed whose experts are not all there is named and left out. Rows go
to data/results/selected.jsonl; rows that are there are not added again.

    python benchmarks/selected.py --seeds 0 1 2"""
import argparse
from pathlib import Path

import torch

from maet.checkpoints import Checkpoint
from maet.deltas import open_pack
from maet.ledger import append, commit, versions
from maet.pipeline import Pipeline, Recipe, Store, expert, extracted
from maet.settings import load
from maet.tensors import GROUPS, MaetError, of_kinds
from maet.transfer import MaetTransfer

KINDS = ("all", *GROUPS, "q", "k", "v", "o", "gate", "up", "down")  # the ten rows of Table 3


def packs(run: Pipeline, ability: str) -> dict[str, Path]:  # "ability" or language -> file
    "R(A) and every R(L)."
    return {"ability": extracted(run, ability)} | {l: expert(run, l) for l in run.recipe.languages}


def selected(run: Pipeline, ability: str, files: dict[str, Path]) -> set[str]:
    "T, as the merge of this ability takes it."
    r, languages = run.recipe.transfer, run.recipe.languages
    mu = [r.weights.get(l, 1 / len(languages)) for l in languages]
    return MaetTransfer(Checkpoint(run.base).names, open_pack(files["ability"]), [open_pack(files[l]) for l in languages], mu, r.gamma, r.eta,
                        run.recipe.abilities[ability].select_ratio, r.similarity).selected


def rows_of(run: Pipeline, ability: str, files: dict[str, Path]) -> list[dict]:
    "A share of T for each kind."
    chosen = selected(run, ability, files)
    return [dict(method="maet", setting={"kinds": k}, task=ability, metric="share", n=len(chosen), seed=run.seed, stderr=None, seconds=None,
                 value=sum(of_kinds(name, k) for name in chosen) / len(chosen)) for k in KINDS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="the run folder of the rivals study")
    parser.add_argument("--ledger", type=Path, default=Path("data/results/selected.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # a thread more can change the last bit of a sum
    recipe, store = load(Recipe, given.recipe), Store(given.out, dry=True)  # dry: what is not there is not trained
    shared = dict(study="selected", scale=recipe.scale, language="none", versions=versions(), commit=commit())
    for seed in given.seeds:
        run = Pipeline(recipe, store, seed)
        files = {ability: packs(run, ability) for ability in recipe.abilities}
        if absent := sorted({str(file.parent.name) for of in files.values() for file in of.values() if not file.exists()}):
            print(f"seed {seed}: {given.out} lacks {', '.join(absent)}; `maet run --study rivals --seed {seed} --out {given.out}` makes them")
            continue
        rows = [shared | row for ability in recipe.abilities for row in rows_of(run, ability, files[ability])]
        print(f"seed {seed}: {append(given.ledger, rows)} of {len(rows)} rows are new in {given.ledger}")


if __name__ == "__main__":
    try: main()
    except MaetError as e: raise SystemExit(f"selected: {e}") from None
