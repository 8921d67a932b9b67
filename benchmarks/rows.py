"""What the scripts share that add rows to the study from a run folder: arguments, the seeds whose files are there, and one line for what is wrong."""
import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from maet.record.ledger import append, commit, versions
from maet.study.algorithm import Pipeline
from maet.study.recipes import Recipe
from maet.study.stages import Store
from maet.training.settings import load
from maet.weights.tensors import MaetError


def arguments(study: str, about: str) -> argparse.ArgumentParser:
    "Those that all have; the ledger has the name of the study."
    parser = argparse.ArgumentParser(prog=study, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="the run folder of the rivals study")
    parser.add_argument("--ledger", type=Path, default=Path(f"data/results/{study}.jsonl"))
    parser.set_defaults(study=study)
    return parser


def complete(given: argparse.Namespace, files: Callable[[Pipeline], list[Path]]) -> Iterator[Pipeline]:
    "A run for each seed of which all files are there; what lacks is named."
    torch.set_num_threads(1)  # a thread more can change the last bit of a sum
    recipe, store = load(Recipe, given.recipe), Store(given.out, dry=True)  # dry: what is not there is not trained
    for seed in given.seeds:
        run = Pipeline(recipe, store, seed)
        if absent := sorted({file.parent.name for file in files(run) if not file.exists()}):
            print(f"seed {seed}: {given.out} lacks {', '.join(absent)}; `maet run --study rivals --seed {seed} --out {given.out}` makes them")
        else: yield run


def add(given: argparse.Namespace, run: Pipeline, rows: list[dict]) -> None:
    "Rows of a seed, with the fields that all rows of a study have."
    shared = dict(study=given.study, scale=run.recipe.scale, language="none", stderr=None, seconds=None, seed=run.seed, versions=versions(), commit=commit())
    print(f"seed {run.seed}: {append(given.ledger, [shared | row for row in rows])} of {len(rows)} rows are new in {given.ledger}")


def told(main: Callable[[], None], study: str) -> None:
    "What is wrong with the input, in one line."
    try: main()
    except MaetError as e: raise SystemExit(f"{study}: {e}") from None
