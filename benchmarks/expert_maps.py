"""Where the dense experts of the study changed (layer swapping, Figures 2 and 4 to 9): for each matrix of each layer the share of rows whose mean
absolute change is above a threshold. The paper prints thresholds for two maps and no rule, so there are two rules here, for each expert by itself:
`median` of all its rows' changes (half of the rows pass), and `as printed`, which as many rows pass as in the paper's maps of that kind of expert.

Reads the experts that `maet run --study rivals` keeps in the run folder, and trains nothing: a seed whose experts are not all there is named and left
out. Rows go to data/results/expert_maps.jsonl, a seed at a time; rows that are there are not added again.

    python benchmarks/expert_maps.py --seeds 0 1 2"""
import csv
from pathlib import Path
from statistics import fmean

import torch
from rows import add, arguments, complete, told

from maet.study.rivals import experts
from maet.weights.checkpoints import Checkpoint
from maet.weights.differences import open_delta
from maet.weights.deltas import shapes_of
from maet.method.layer_swapping import layer_matrices, row_changes, share_map
from maet.study.algorithm import Pipeline
from maet.weights.tensors import GROUPS

PAPERS = Path("data/paper")
PRINTED = {True: (4, 5), False: (6, 7, 8, 9)}  # figures of ability experts, of language experts
MATRIX_ROWS = {"down": 14336}                  # of LLaMA 3.1 8B; 4096 in all other kinds


def printed_share(ability: bool) -> float:
    "Of all rows of the paper's experts of one kind, how many are above their map's threshold."
    cells = [cell for n in PRINTED[ability] for cell in csv.DictReader((PAPERS / f"swap_figure{n}.csv").read_text(encoding="utf-8").splitlines())]
    weights = [MATRIX_ROWS.get(cell["kind"], 4096) for cell in cells]
    return sum(w * float(cell["value"]) for w, cell in zip(weights, cells)) / sum(weights)


def dense_experts(run: Pipeline) -> dict[str, Path]:  # ability or language -> checkpoint
    "Of every ability and every language; the languages' are those of the first ability's rivals."
    found = {}
    for ability in run.recipe.abilities: found = experts(run, ability) | found
    return {name: found[name] for name in (*run.recipe.abilities, *run.recipe.languages)}


def contrasts(shares: dict[tuple[int, str], float]) -> dict[tuple[str, str, str], float]:  # (kinds, part, minus)
    "What the paper claims of experts, as differences of mean shares: second half of the layers minus first half, a sixteenth at either end minus what is between."
    layers, found = 1 + max(layer for layer, _ in shares), {}
    end = max(1, layers // 16)
    for kinds in ("all", "attention"):
        mean = lambda where: fmean(v for (l, k), v in shares.items() if where(l) and (kinds == "all" or k in GROUPS[kinds]))
        found[kinds, "second half", "first half"] = mean(lambda l: l >= layers // 2) - mean(lambda l: l < layers // 2)
        found[kinds, "first and last", "between"] = mean(lambda l: not end <= l < layers - end) - mean(lambda l: end <= l < layers - end)
    return found


def rows_of(run: Pipeline, made: dict[str, Path]) -> list[dict]:
    "Thresholds, shares and contrasts of every expert, by one pass over their files."
    base = Checkpoint(run.base)
    deltas = {name: open_delta(path, base) for name, path in made.items()}
    changes, rows = row_changes(deltas, shapes=layer_matrices(shapes_of(deltas.values()))), []
    for name, change in changes.items():
        every = torch.cat([*change.values()])
        for rule, passing in (("median", .5), ("as printed", printed_share(name in run.recipe.abilities))):
            threshold = every.quantile(1 - passing).item()
            shares = share_map(change, threshold)
            about = dict(method=name, n=len(every))
            rows.append(about | dict(metric="weight", setting={"threshold": rule}, value=threshold))
            rows += [about | dict(metric="share", setting={"threshold": rule, "layer": l, "kind": k}, value=v) for (l, k), v in shares.items()]
            rows += [about | dict(metric="share", setting={"threshold": rule, "kinds": k, "part": a, "minus": b}, value=v) for (k, a, b), v in contrasts(shares).items()]
    return rows


def main():
    given = arguments("expert_maps", __doc__).parse_args()
    for run in complete(given, lambda run: [*dense_experts(run).values()]):
        add(given, run, [{"task": "experts"} | row for row in rows_of(run, dense_experts(run))])


if __name__ == "__main__": told(main, "expert_maps")
