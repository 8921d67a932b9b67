"""Is the mini world right? It is, when the base half knows, by degrees; when dense CPT on the English ability teaches English;
and when a language expert lowers the loss of its language and keeps its mathematics. Nothing here merges anything: what
a merge scores plays no part in choosing the world. All on the dev part; rows go to data/results/world.jsonl.

    python benchmarks/world.py --out runs/world"""
import argparse, math
from pathlib import Path

import torch

from maet.weights.checkpoints import Checkpoint
from maet.text.documents import Source
from maet.text.tokens import corpus
from maet.weights.differences import apply_delta, open_delta
from maet.exams.evaluation import average, by_level
from maet.exams.asking import examine
from maet.record.ledger import append, commit, versions
from maet.text.miniworld import LANGUAGES
from maet.study.algorithm import Pipeline, expert, trained
from maet.study.stages import Store
from maet.study.recipes import Recipe
from maet.training.settings import load


@torch.no_grad()
def loss(model: Path, text: Path, run: Pipeline) -> tuple[float, float, int]:  # nats a token, standard error, sequences
    "Mean loss on held-out prose."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    network = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).eval()
    tokenizer, t = AutoTokenizer.from_pretrained(run.base, local_files_only=True), run.recipe.training
    ids = corpus([Source(text)], tokenizer, 16_384, t.sequence_length, t.seed).ids.long()
    each = torch.tensor([network(input_ids=row[None], labels=row[None]).loss for row in ids])
    return each.mean().item(), each.std().item() / math.sqrt(len(each)), len(each)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument("--ledger", type=Path, default=Path("data/results/world.jsonl"))
    parser.add_argument("--base-only", action="store_true", help="examine the base and train nothing")
    given = parser.parse_args()
    recipe, rows = load(Recipe, given.recipe), []
    run = Pipeline(recipe, Store(given.out))
    dev, languages = run.texts.folder() / "exams" / "dev", list(LANGUAGES)
    shared = dict(study="world", scale=recipe.scale, seed=0, versions=versions(), commit=commit())

    def score(method: str, model: Path, task: str, of: list[str]) -> None:
        samples = given.out / "samples" / method
        scores = examine(model, dev, [task], of, batch_size=recipe.exam.batch_size, out=samples)
        if len(of) == len(languages): scores.append(average(scores, samples, task, recipe.languages))
        rows.extend(shared | s | dict(method=method, setting={}) for s in scores)
        for language in of:
            for level, (value, n) in by_level(samples, task, language).items():
                rows.append(shared | dict(method=method, setting={"level": level}, language=language, task=task, metric=scores[0]["metric"],
                                          value=value, stderr=math.sqrt(value * (1 - value) / n), n=n, seconds=None))
        print(method, task, *(f"{s['language']} {100 * s['value']:.1f} ±{100 * s['stderr']:.1f}" for s in scores), flush=True)

    def lose(method: str, model: Path, language: str) -> None:
        value, stderr, n = loss(model, run.texts.folder() / "held_out" / f"{language}.jsonl", run)
        rows.append(shared | dict(method=method, setting={}, language=language, task="prose", metric="loss", value=value, stderr=stderr, n=n, seconds=None))
        print(method, f"loss of {language} {value:.4f} ±{stderr:.4f} nats a token", flush=True)

    for ability in recipe.abilities: score("base", run.base, ability, languages)
    for language in languages: lose("base", run.base, language)
    if not given.base_only:
        for ability in recipe.abilities:
            model = trained(run, "dense", {f"{ability}/{recipe.reference}": 1.0}, recipe.rivals.training("dense", recipe.training))
            score(f"ability-cpt-{ability}", model, ability, languages)
        for language in recipe.languages:
            model, base = given.out / f"expert-{language}", Checkpoint(run.base)
            if not model.exists(): apply_delta(model, base, open_delta(expert(run, language), base))
            score(f"expert-{language}", model, "mathematics", [language])
            lose(f"expert-{language}", model, language)
    print(append(given.ledger, rows), "rows are new in", given.ledger)


if __name__ == "__main__": main()
