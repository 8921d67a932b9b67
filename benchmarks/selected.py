"""Which tensors are ability-related (Eq. 4), by kind: the column "Proportion of T" of the paper's Table 3, for the experts of the study.

Reads what `maet run --study rivals` keeps in the run folder, and trains nothing: a seed whose experts are not all there is named and left out. Rows go
to data/results/selected.jsonl; rows that are there are not added again.

    python benchmarks/selected.py --seeds 0 1 2"""
from pathlib import Path

from rows import add, arguments, complete, told

from maet.weights.checkpoints import Checkpoint
from maet.weights.packs import open_pack
from maet.study.algorithm import Pipeline, expert, extracted
from maet.weights.tensors import GROUPS, of_kinds
from maet.method.transfer import MaetTransfer

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
    return [dict(method="maet", setting={"kinds": k}, task=ability, metric="share", n=len(chosen),
                 value=sum(of_kinds(name, k) for name in chosen) / len(chosen)) for k in KINDS]


def main():
    given = arguments("selected", __doc__).parse_args()
    for run in complete(given, lambda run: [file for ability in run.recipe.abilities for file in packs(run, ability).values()]):
        add(given, run, [row for ability in run.recipe.abilities for row in rows_of(run, ability, packs(run, ability))])


if __name__ == "__main__": told(main, "selected")
