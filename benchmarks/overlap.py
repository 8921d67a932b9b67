"""Do abilities and languages have neurons of their own? And where does R(A) sit? For the key neurons and the ability weights of the study.

    overlap   share of the key neurons of one corpus that are key for another too; by lot it would be k1. `by lot in each tensor`: if all that is known
              is how many key neurons each tensor has, or each row of it: a row of the embedding is a token. What is above that is agreement on single
              neurons. Where another seed of the same corpus is there, its overlap says how alike two draws of one corpus are.
    kinds     share of the key neurons of each corpus that are in tensors of a kind.
    words     share of the key neurons of the embedding that are in rows of tokens that do not occur in the text by which they were located,
              beside the share of all tokens that do not.
    R(A)      share of its squared norm by layer and kind, of all and of what lies in the layers, beside the share of all scalars that lie there.

Reads what `maet run --study rivals` keeps in the run folder, and trains nothing: a seed whose files are not all there is named and left out. Rows go
to data/results/overlap.jsonl; rows that are there are not added again.

    python benchmarks/overlap.py --seeds 0 1 2"""
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import torch
from rows import add, arguments, complete, told

from maet.weights.checkpoints import Checkpoint
from maet.text.tables import open_tokens
from maet.weights.packs import open_pack, read_keys
from maet.weights.deltas import squares
from maet.study.algorithm import Pipeline, extracted, located
from maet.study.recipes import Recipe
from maet.study.texts import tokens
from maet.weights.tensors import place

Masks = dict[str, torch.Tensor]  # tensor -> bool; a tensor that is absent has no key neuron


def corpora_of(recipe: Recipe) -> dict[str, str]:  # ability or language -> corpus
    "Of every corpus that Algorithm 1 locates key neurons of."
    return {a: f"{a}/{recipe.reference}" for a in recipe.abilities} | {l: f"general/{l}" for l in (recipe.reference, *recipe.languages)}


def files_of(run: Pipeline) -> dict[str, Path]: return {name: located(run, corpus) for name, corpus in corpora_of(run.recipe).items()}


def count(masks: Masks) -> int: return sum(int(mask.sum()) for mask in masks.values())


def shared(a: Masks, b: Masks) -> float:  # 0 to 1
    "Share of the key neurons of `a` that are key in `b`."
    return sum(int((a[n] & b[n]).sum()) for n in a if n in b) / count(a)


def by_rows(mask: torch.Tensor) -> torch.Tensor:  # (rows, columns); a vector is one row
    return mask.reshape(mask.shape[0] if mask.dim() > 1 else 1, -1)


def by_lot(a: Masks, b: Masks, scalars: int) -> dict[str, float]:
    "What `shared` would be if the neurons of `b` were drawn: from the whole model, or within each tensor or row as many as it has."
    both, k = [n for n in a if n in b], count(a)  # in order: a sum's last bit depends on it
    rows = {n: (by_rows(a[n]), by_rows(b[n])) for n in both}
    return {"by lot": count(b) / scalars, "by lot in each tensor": sum(int(a[n].sum()) * int(b[n].sum()) / a[n].numel() for n in both) / k,
            "by lot in each row": sum(float((x.sum(1).double() * y.sum(1) / x.shape[1]).sum()) for x, y in rows.values()) / k}


def overlap_rows(masks: dict[str, Masks], others: list[dict[str, Masks]], scalars: int) -> list[dict]:
    "Every pair of corpora, and each corpus with itself under other seeds."
    about = lambda of, other, value, what="found": dict(method=of, task="keys", setting={"with": other, "what": what}, value=value, n=count(masks[of]))
    rows = []
    for a, b in product(masks, masks):
        found = [shared(masks[a], masks[b])] if a != b else [shared(masks[a], other[a]) for other in others]
        if found: rows.append(about(a, b, sum(found) / len(found)))
        rows += [about(a, b, value, what) for what, value in by_lot(masks[a], masks[b], scalars).items()]
    return rows


def kind_rows(masks: dict[str, Masks]) -> list[dict]:
    "Which kinds of tensors the key neurons of each corpus are in."
    rows = []
    for name, of in masks.items():
        found = {}
        for n, mask in of.items(): found[place(n).kind] = found.get(place(n).kind, 0) + int(mask.sum())
        rows += [dict(method=name, task="keys", setting={"kind": kind}, value=value / count(of), n=count(of)) for kind, value in found.items()]
    return rows


def word_rows(run: Pipeline, masks: dict[str, Masks]) -> list[dict]:
    "Are key neurons of the embedding in rows of words that were read?"
    training, rows = replace(run.recipe.locate.training, seed=run.seed), []
    for name, corpus in corpora_of(run.recipe).items():
        mask, = (mask for n, mask in masks[name].items() if place(n).kind == "embed")
        read = open_tokens(tokens(run.texts, run.base, run.base_identity, {corpus: 1.0}, training)).ids.flatten().long()
        absent = torch.bincount(read, minlength=len(mask))[:len(mask)] == 0
        found = {"key neurons": float(mask[absent].sum() / mask.sum()), "tokens": float(absent.float().mean())}
        rows += [dict(method=name, task="keys", setting={"absent": of}, value=value, n=int(mask.sum())) for of, value in found.items()]
    return rows


def weight_rows(run: Pipeline, ability: str) -> list[dict]:
    "Where the squared norm of R(A) lies, and where the scalars do. Outside the layers the layer is `none`."
    base, delta = Checkpoint(run.base), open_pack(extracted(run, ability))
    found, size = {}, {}
    for name in base.names:
        where = place(name)
        key = ("none" if where.layer is None else where.layer, where.kind)
        found[key] = found.get(key, 0) + (squares(delta[name]) if name in delta else 0)
        size[key] = size.get(key, 0) + prod(base.shape(name))
    about, inside = dict(method="maet", task=ability, n=sum(size.values())), {key: value for key, value in found.items() if key[0] != "none"}
    return [about | dict(setting={"of": of, "layer": layer, "kind": kind}, value=value / sum(values.values()))
            for of, values in (("R(A)", found), ("R(A) in the layers", inside), ("scalars", size)) for (layer, kind), value in values.items()]


def main():
    given = arguments("overlap", __doc__).parse_args()
    runs = list(complete(given, lambda run: [*files_of(run).values(), *(extracted(run, ability) for ability in run.recipe.abilities)]))
    keys = {run.seed: {name: read_keys(file, Checkpoint(run.base)) for name, file in files_of(run).items()} for run in runs}
    for run in runs:
        scalars = sum(prod(Checkpoint(run.base).shape(n)) for n in Checkpoint(run.base).names)
        rows = overlap_rows(keys[run.seed], [other for seed, other in keys.items() if seed != run.seed], scalars)
        rows += kind_rows(keys[run.seed]) + word_rows(run, keys[run.seed]) + [row for ability in run.recipe.abilities for row in weight_rows(run, ability)]
        add(given, run, [{"metric": "share"} | row for row in rows])


if __name__ == "__main__": told(main, "overlap")
