"""Which learning rate is right for full training, for LoRA and for key neurons? The same candidates and the same judge for all: the English dev part
after CPT on the English ability with an expert's tokens, one seed, both abilities. Key neurons are trained as Algorithm 1, line 5, has it.
No other language and no merged model plays a part in it.

    python benchmarks/learning_rates.py --out runs/mini

The training stages lie in the run folder; rows go to data/results/learning_rates.jsonl."""
import argparse, math
from dataclasses import replace
from pathlib import Path

import torch

from maet.weights.checkpoints import Checkpoint
from maet.weights.differences import apply_delta
from maet.weights.packs import open_pack
from maet.exams.asking import examine
from maet.record.ledger import append, commit, versions
from maet.study.algorithm import Pipeline, expert, trained
from maet.study.recipes import Recipe, Rivals
from maet.study.stages import Store, progress_bar
from maet.training.settings import load

CANDIDATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"))
    parser.add_argument("--ledger", type=Path, default=Path("data/results/learning_rates.jsonl"))
    parser.add_argument("--training", nargs="+", default=["dense", "lora", "key-neuron"], choices=["dense", "lora", "key-neuron"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(Recipe, given.recipe)
    run = Pipeline(recipe, Store(given.out))
    run.store.progress = progress_bar
    dev, found = run.texts.folder() / "exams" / "dev", {}
    shared = dict(study="learning_rates", scale=recipe.scale, seed=0, versions=versions(), commit=commit())

    def model(ability: str, how: str, rate: float) -> Path:
        if how != "key-neuron":
            training = replace(Rivals().training(how, recipe.training), learning_rate=rate)
            return trained(run, how, {f"{ability}/{recipe.reference}": 1.0}, training)
        other = Pipeline(replace(recipe, training=replace(recipe.training, learning_rate=rate)), run.store)
        pack = expert(other, recipe.reference, ability)
        make = lambda part, step: apply_delta(part / "checkpoint", Checkpoint(run.base), open_pack(pack))
        return run.store.stage(f"whole.{ability}", make, pack=pack.parent.name) / "checkpoint"

    def score(ability: str, how: str, rate: float) -> dict:
        row, = examine(model(ability, how, rate), dev, [ability], [recipe.reference], batch_size=recipe.exam.batch_size)
        append(given.ledger, [shared | row | dict(method=how, setting={"ability": ability, "learning_rate": rate, "tokens": recipe.training.tokens, "part": "dev"})])
        return row

    print("| ability, dev, en, % | " + " | ".join(f"{rate:g}" for rate in CANDIDATES) + " |\n| --- " + "| --- " * len(CANDIDATES) + "|")
    for how in given.training:
        for ability in recipe.abilities:
            cells = []
            for rate in CANDIDATES:
                row = score(ability, how, rate)
                found.setdefault((how, rate), []).append(row["value"])
                cells.append(f"{100 * row['value']:.1f} ±{100 * row['stderr']:.1f}")
            print(f"| {how}, {ability} | " + " | ".join(cells) + " |", flush=True)
        best = max(CANDIDATES, key=lambda rate: math.fsum(found[how, rate]))
        print(f"{how}: {best:g} is best on the mean of the abilities", flush=True)


if __name__ == "__main__": main()
