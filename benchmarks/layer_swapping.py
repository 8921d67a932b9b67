"""Layer swapping (its Tables 1, 2, 5 and 6, and what sections 3.3, 4.1 and 4.2 say without a table), on the mini world. Three mathematics experts and three experts of
each language, of seeds 0 to 2, are the dense experts from which `maet run --study rivals` makes task vectors, soups and swaps; what is there is not trained again.
Every pair is merged in three ways, the pairs of equal seeds in more; a merged model lives as long as its exam. A killed run goes on.

Rows go to data/results/layer_swap.jsonl. Their setting says:
  config     how it was merged, or what was taken back of an expert
  pairs      `all` nine of a language, or those of the `same seed`
  statistic  over the pairs: mean; min, max
  target     language that a model was made for, where that is not the language of the exam
  minus      the row is a difference to this, question by question

Nine pairs of three experts on either side are not nine independent models. So the mean has a row for each seed s: the mean of the pairs with mathematics expert s, plus
that of the pairs with language expert s, minus that of all. The mean of these rows is the mean of the pairs, and they spread as the sum of both experts' effects does. Of a
difference between best (or worst) pairs, seed s is the best pair of mathematics expert s; its error over questions is a bootstrap. The best of all nine is a row without a seed.

    python benchmarks/layer_swapping.py --workers 2"""
import math, shutil
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from rows import arguments, told

from maet.study.rivals import ROWS, experts
from maet.exams.asking import drawn_sums, examine
from maet.exams.questions import template
from maet.record.ledger import append, commit, versions
from maet.method.merge import merge
from maet.study.algorithm import Pipeline
from maet.study.stages import Progress, Store, side_by_side
from maet.study.recipes import Recipe
from maet.training.settings import load
from maet.study.scores import ITEM_COST, exam_data, examined, marks, sat
from maet.study.study import at_work

ABILITY = "mathematics"
DRAWS = 500                                              # of the bootstrap
ENDS = {f"bottom {b}, top {u}": dict(bottom=b, top=u) for b, u in ((0, 0), (1, 0), (0, 1), (2, 1))}  # layers of four; the default is one at either end
ZONES = {"lower zone": dict(bottom_transition=1), "upper zone": dict(top_transition=1), "both zones": dict(bottom_transition=1, top_transition=1)}
OTHERS = {"outside: language": dict(outside="language"), "outside: task": dict(outside="task"), "by magnitude": dict(weights="magnitude"), "norms with their layer": dict(norms="layer")}
SWAPS = {"default": {}} | ENDS | ZONES | OTHERS
RANGE = ["default", "bottom 1, top 0", *ZONES, "by magnitude"]  # those of section 4.2's ranges that four layers can tell apart
BACK = {f"reverted: first {b}, last {u}": dict(bottom=b, top=u) for b, u in ((1, 1), (2, 0), (0, 2))}
KEPT = {f"kept: {k:.0%}": dict(bottom=0, top=0, keep=k) for k in (.9, .8, .7, .5)}
SOUPS = ("language soup", "multilingual soup")           # swapped into a soup of the mathematics experts

Exams = dict[tuple[str, str, str], dict[tuple, Path]]     # (method, config, target) -> seeds of its experts -> exam


# ---- models and their exams

def sat_once(run: Pipeline, name: str, file: Callable[[Callable], dict], languages: list[str]) -> Path:
    "The exam of a merged model, which is thrown away. `file(called)`: what room 20 merges, with models as `called` calls them."
    r, tasks = run.recipe, run.recipe.abilities[ABILITY].tasks
    (data, identity), asked = exam_data(run, tasks), dict(tasks=tasks, languages=languages, limit=r.exam.limit, batch_size=r.exam.batch_size)

    def make(part, step):
        shutil.rmtree(part / "checkpoint", ignore_errors=True)  # a kill left it
        merge(file(str), part / "checkpoint")
        examine(part / "checkpoint", data, *asked.values(), part / "samples", lambda done, total: step(done, total, math.nan), shots=r.exam.shots)
        shutil.rmtree(part / "checkpoint")

    items = r.exam.limit or (r.world.items if r.world else 250)
    return run.store.stage(f"exam.{ABILITY}.{name}", make, ITEM_COST * items * len(languages), merge=file(run.identity), data=identity, shots=r.exam.shots, **asked)


def swap(run: Pipeline, task: list[Path], language: list[Path], parameters: dict) -> Callable[[Callable], dict]:
    def file(called):
        models = [{"model": called(m), "role": role} for role, of in (("task", task), ("language", language)) for m in of]
        needed = {"base_model": called(run.base)} if parameters.get("weights") == "magnitude" else {}
        return {"merge_method": "layer_swap", "models": models, "parameters": parameters} | needed
    return file


def mixed(run: Pipeline, method: str, of: list[Path], parameters: dict | None = None, each: dict | None = None) -> Callable[[Callable], dict]:
    def file(called):
        models = [{"model": called(m)} | ({"parameters": each} if each else {}) for m in of]
        return {"merge_method": method, "models": models, "parameters": parameters or {}} | ({} if method == "linear" else {"base_model": called(run.base)})
    return file


def pair_files(run: Pipeline, a: Path, l: Path) -> dict[tuple[str, str], Callable]:
    "The three merges that every pair gets. TIES as its authors advise where there is nothing to tune on (22)."
    return {("layer-swap", "default"): swap(run, [a], [l], {}), ("soup", "default"): mixed(run, "linear", [a, l], each={"weight": .5}),
            ("ties", "default"): mixed(run, "ties", [a, l], each={"weight": 1., "density": .2})}


def more_files(run: Pipeline, a: Path, l: Path) -> dict[tuple[str, str], Callable]:
    "Those of a pair of equal seeds."
    return {("layer-swap", c): swap(run, [a], [l], p) for c, p in SWAPS.items() if p} | {("soup", "by magnitude"): mixed(run, "magnitude_soup", [a, l])}


def pair_exams(runs: list[Pipeline], made: list[dict[str, Path]]) -> Exams:
    "All pairs in their language, those of equal seeds in every language; further merges of those in their language."
    found, everywhere = {}, [runs[0].recipe.reference, *runs[0].recipe.languages]
    for l, (i, a), (j, b) in product(runs[0].recipe.languages, enumerate(made), enumerate(made)):
        files = {c: (f, everywhere if i == j else [l]) for c, f in pair_files(runs[0], a[ABILITY], b[l]).items()}
        if i == j: files |= {c: (f, [l]) for c, f in more_files(runs[0], a[ABILITY], b[l]).items()}
        for (method, config), (file, languages) in files.items():
            found.setdefault((method, config, l), {})[i, j] = sat_once(runs[0], f"{method}.{l}", file, languages)
    return found


def expert_exams(runs: list[Pipeline], made: list[dict[str, Path]]) -> Exams:
    "Experts alone, and what sections 3.3 takes back of those of the ability. The ability's have no target: they stand for all."
    found, everywhere = {}, [runs[0].recipe.reference, *runs[0].recipe.languages]
    for s, (run, of) in enumerate(zip(runs, made)):
        for l in run.recipe.languages:
            found.setdefault(("language expert", "default", l), {})[s,] = sat(run, f"expert.{l}", of[l], ABILITY, [run.recipe.reference, l])
        exams = {"default": sat(run, "expert", of[ABILITY], ABILITY, everywhere)}
        exams |= {c: sat_once(run, "revert", mixed(run, "revert", [of[ABILITY]], p), everywhere) for c, p in (BACK | KEPT).items()}
        for (c, exam), l in product(exams.items(), run.recipe.languages): found.setdefault(("math expert", c, l), {})[s,] = exam
    return found


def soup_exams(run: Pipeline, made: list[dict[str, Path]]) -> Exams:
    "Table 6: a soup of the mathematics experts with a soup of a language's experts, or of all languages' experts."
    found, task, spoken = {}, [of[ABILITY] for of in made], run.recipe.languages
    every = [of[l] for l in spoken for of in made]
    for l in spoken: found["layer-swap", SOUPS[0], l] = {(): sat_once(run, f"soups.{l}", swap(run, task, [of[l] for of in made], {}), [run.recipe.reference, l])}
    one = sat_once(run, "soups", swap(run, task, every, {}), [run.recipe.reference, *spoken])
    return found | {("layer-swap", SOUPS[1], l): {(): one} for l in spoken}


def rival_exams(runs: list[Pipeline]) -> Exams:
    "What the study of the rivals has examined: the base, and joint training on all languages."
    exams = {m: {(s,): examined(run, m, ROWS[m].make(run, ABILITY), ABILITY) for s, run in enumerate(runs)} for m in ("base", "joint-sft", "f-cpt-la")}
    return {(m, "default", l): of for m, of in exams.items() for l in runs[0].recipe.languages}


def all_exams(recipe: Recipe, seeds: list[int], store: Store) -> Exams:
    runs = [Pipeline(recipe, store, seed) for seed in seeds]
    made = [experts(run, ABILITY) for run in runs]
    return rival_exams(runs) | expert_exams(runs, made) | pair_exams(runs, made) | soup_exams(runs[0], made)


def wanted(recipe: Recipe, seeds: list[int], store: Store) -> None:  # what workers are sent
    all_exams(recipe, seeds, store)
    for _ in expert_tasks(recipe, seeds, store): pass


# ---- from answers to rows

class Answers:
    "Right answers as numbers: tensors (.., items), in the order of the first exam's items."
    def __init__(self, exams: Exams, task: str, spoken: list[str], reference: str):
        self.exams, self.task, self.spoken, self.reference = exams, task, spoken, reference
        self.ids, self.known = None, {}

    def of(self, exam: Path, language: str) -> torch.Tensor:  # (items,)
        if (exam, language) not in self.known:
            found = marks(exam, self.task, language)
            self.ids = self.ids or sorted(found)
            self.known[exam, language] = torch.tensor([found[i] for i in self.ids], dtype=torch.float64)
        return self.known[exam, language]

    def models(self, method: str, config: str, target: str, where: str, same: bool = False) -> dict[tuple, torch.Tensor]:  # where: own, all, or a language
        "Each model's answers, by the seeds of its experts."
        languages = {"own": [target], "all": [self.reference, *self.spoken]}.get(where, [where])
        found = {seeds: exam for seeds, exam in self.exams[method, config, target].items() if len({*seeds}) < 2 or not same}
        return {seeds: torch.stack([self.of(exam, l) for l in languages]).mean(0) for seeds, exam in found.items()}

    def by_seed(self, method: str, config: str, target: str, where: str, same: bool = False) -> torch.Tensor:  # (seeds, items)
        "A row for each seed, whose mean is the mean of the models. `target`: a language, or `average`."
        if target == "average": return torch.stack([self.by_seed(method, config, l, where, same) for l in self.spoken]).mean(0)
        return seeds_of(self.models(method, config, target, where, same))


def seeds_of(models: dict[tuple, torch.Tensor]) -> torch.Tensor:  # (seeds, items)
    "Models without a seed stand for each; those of one seed, or of the same seed twice, are its row; of a square, see above."
    if () in models: return models[()].expand(1, -1)
    count = 1 + max(max(seeds) for seeds in models)
    if len(models) == count: return torch.stack([models[key] for key in sorted(models)])
    square = torch.stack([torch.stack([models[i, j] for j in range(count)]) for i in range(count)])
    return square.mean(1) + square.mean(0) - square.mean((0, 1))


def of_expert(models: dict[tuple, torch.Tensor], s: int) -> torch.Tensor:  # (models, items)
    "Those from which mathematics expert s may take its best pair: its pairs, itself, or all language experts."
    return torch.stack([of for seeds, of in models.items() if seeds[:1] in ((), (s,))])


def score(items: torch.Tensor) -> dict:  # (items,)
    return dict(value=items.mean().item(), stderr=(items.std() / len(items) ** .5).item() if len(items) > 1 else None, n=len(items))


def best_apart(a: torch.Tensor, b: torch.Tensor, pick: Callable) -> dict:  # (models, items) each
    "Best (or worst) of one minus that of the other, with a bootstrap over questions."
    n, gap = a.shape[1], lambda means: pick(means[..., :len(a)]) - pick(means[..., len(a):])
    both = torch.cat([a, b])
    return dict(value=gap(both.mean(1)).item(), stderr=gap(drawn_sums(both.T, DRAWS) / n).std().item(), n=n)


PICKS = {"max": lambda means: means.amax(-1), "min": lambda means: means.amin(-1)}


class Line(NamedTuple):
    "What a row is about: one line of a table."
    method: str
    config: str = "default"
    same: bool | None = None  # the pairs of equal seeds only; None: it is not of pairs

    def setting(self, **more) -> dict:
        pairs = {} if self.same is None else {"pairs": "same seed" if self.same else "all"}
        return {"ability": ABILITY, "config": self.config} | pairs | {k: v for k, v in more.items() if v is not None}


PAIRED = [Line(m, same=False) for m in ("layer-swap", "soup", "ties")]
SINGLE = [Line("base"), Line("joint-sft"), Line("f-cpt-la"), Line("math expert"), Line("language expert")]
EQUAL = [Line("layer-swap", c, True) for c in SWAPS] + [Line("soup", c, True) for c in ("default", "by magnitude")] + [Line("ties", same=True)]
TAKEN = [Line("math expert", c) for c in BACK | KEPT]
STIRRED = [Line("layer-swap", c) for c in SOUPS]
ELSEWHERE = [l for l in SINGLE if l.method != "language expert"] + [l for l in EQUAL if l.config == "default"]  # examined in every language


def mean_rows(answers: Answers, line: Line, where: str, minus: Line | None = None, word: str | None = None, targets: Iterable[str] | None = None) -> list[dict]:
    "A row for each seed and target; with `minus`, of the difference, which is called `word`."
    rows = []
    for target in targets or [*answers.spoken, "average"]:
        of = answers.by_seed(line.method, line.config, target, where, bool(line.same))
        if minus: of = of - answers.by_seed(minus.method, minus.config, target, where, bool(minus.same))
        about = dict(language=target) if where == "own" else dict(language=where)
        setting = line.setting(statistic="mean", target=None if where == "own" else target, minus=word)
        rows += [about | score(items) | dict(method=line.method, setting=setting, seed=None if len(of) == 1 and line in STIRRED else s) for s, items in enumerate(of)]
    return rows


def extreme_rows(answers: Answers, line: Line) -> list[dict]:
    "Best and worst model in each language, and every pair."
    rows = []
    for l in answers.spoken:
        models = answers.models(line.method, line.config, l, "own", bool(line.same))
        means = torch.stack([*models.values()]).mean(1)
        rows += [dict(language=l, value=pick(means).item(), stderr=None, n=len(answers.ids), method=line.method, setting=line.setting(statistic=k), seed=None) for k, pick in PICKS.items()]
        if line.same is False:
            rows += [dict(language=l, method=line.method, setting=line.setting(math=i, language=j), seed=None) | score(items) for (i, j), items in models.items()]
    return rows


def apart_rows(answers: Answers, line: Line, minus: Line, word: str) -> list[dict]:
    "Differences of the best and of the worst, a row for each mathematics expert."
    rows = []
    for l, (k, pick) in product(answers.spoken, PICKS.items()):
        a, b = (answers.models(of.method, of.config, l, "own", bool(of.same)) for of in (line, minus))
        rows += [dict(language=l, method=line.method, setting=line.setting(statistic=k, minus=word), seed=s) | best_apart(of_expert(a, s), candidates(minus, b, s), pick)
                 for s in range(len(answers.exams["math expert", "default", l]))]
    return rows


def candidates(line: Line, models: dict[tuple, torch.Tensor], s: int) -> torch.Tensor:  # (models, items)
    return torch.stack([*models.values()]) if line.method == "language expert" else of_expert(models, s)


# ---- best configuration

def chosen(answers: Answers, lines: list[Line], target: str, other_half: bool) -> torch.Tensor:  # (seeds, items)
    "The configuration with the best mean, chosen by the same questions (as the paper's), or each half of them by the other."
    every = torch.stack([answers.by_seed(l.method, l.config, target, "own", True) for l in lines])
    if not other_half: return every[every.mean((1, 2)).argmax()]
    found, halves = torch.empty_like(every[0]), torch.arange(every.shape[2]) % 2
    for half in (0, 1): found[:, halves == half] = every[every[..., halves != half].mean((1, 2)).argmax()][:, halves == half]
    return found


def best_rows(answers: Answers) -> list[dict]:
    rows = []
    for method, lines in (("layer-swap", [Line("layer-swap", c, True) for c in RANGE]), ("soup", [l for l in EQUAL if l.method == "soup"])):
        for name, other_half in (("best", False), ("best by the other half", True)):
            each = {l: chosen(answers, lines, l, other_half) for l in answers.spoken}
            each["average"] = torch.stack([*each.values()]).mean(0)
            setting = Line(method, name, True).setting(statistic="mean")
            rows += [dict(language=l, method=method, setting=setting, seed=s) | score(items) for l, of in each.items() for s, items in enumerate(of)]
    return rows


def rows_of(answers: Answers) -> list[dict]:
    "Every row on the exam of the ability."
    rows = [r for line in (*SINGLE, *PAIRED, *EQUAL, *TAKEN, *STIRRED) for r in mean_rows(answers, line, "own")]
    rows += [r for line in (*ELSEWHERE, *TAKEN) for where in (answers.reference, "all") for r in mean_rows(answers, line, where)]
    rows += [r for line in SINGLE[-1:] for r in mean_rows(answers, line, answers.reference)]
    rows += [r for line in (*SINGLE, *PAIRED, *EQUAL) for r in extreme_rows(answers, line)] + best_rows(answers)
    default, math = PAIRED[0], Line("math expert")
    for other in (*SINGLE, *PAIRED[1:]):
        rows += mean_rows(answers, default, "own", other, other.method) + apart_rows(answers, default, other, other.method)
    equal = Line("layer-swap", same=True)
    for where, other in product((answers.reference, "all"), [l for l in ELSEWHERE if l != equal]): rows += mean_rows(answers, equal, where, other, other.method)
    for line in EQUAL: rows += mean_rows(answers, line, "own", equal, "default") if line.method == "layer-swap" and line != equal else []
    rows += mean_rows(answers, Line("language expert"), "own", Line("base"), "base")
    for where, line in product(("own", answers.reference, "all"), TAKEN): rows += mean_rows(answers, line, where, math, "math expert")
    for line in STIRRED: rows += mean_rows(answers, line, "own", default, "default")
    return rows


# ---- experts on other exams (Table 5)

def expert_tasks(recipe: Recipe, seeds: list[int], store: Store) -> list[tuple[str, str, int, str, Path]]:  # method, language, seed, task, exam
    "Experts and base on the other abilities, in the expert's language."
    found = []
    for s, run in enumerate(Pipeline(recipe, store, seed) for seed in seeds):
        of = experts(run, ABILITY)
        for other, l in product((a for a in recipe.abilities if a != ABILITY), recipe.languages):
            models = {"base": run.base, "math expert": of[ABILITY], "language expert": of[l]}
            found += [(m, l, s, recipe.abilities[other].tasks[0], sat(run, f"expert.{l}", path, other, [l])) for m, path in models.items()]
    return found


def other_rows(sittings: list[tuple]) -> list[dict]:
    "Their scores, and experts minus the base."
    of = {key: marks(exam, key[3], key[1]) for *key, exam in sittings for key in [tuple(key)]}
    rows = []
    for (m, l, s, task), found in of.items():
        base = of["base", l, s, task]
        for word, taken in ((None, None), ("base", base)):
            if taken and m == "base": continue
            items = torch.tensor([found[i] - (taken[i] if taken else 0) for i in sorted(found)], dtype=torch.float64)
            setting = {"ability": ABILITY, "config": "default", "statistic": "mean"} | ({"minus": word} if word else {})
            rows.append(dict(method=m, language=l, task=task, setting=setting, seed=s) | score(items))
    return rows


def main():
    parser = arguments("layer_swap", __doc__)
    parser.add_argument("--workers", type=int, default=2, help="models that are examined side by side, one thread each")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a thread more can change the last bit of a sum
    recipe = load(Recipe, given.recipe)
    task = recipe.abilities[ABILITY].tasks[0]
    wanted(recipe, given.seeds, plan := Store(given.out, dry=True))
    with at_work(given.out):
        (store := Store(given.out)).progress = Progress(plan.plan, given.out)
        if given.workers > 1: side_by_side(partial(wanted, recipe, given.seeds), given.out, given.workers)
        exams, others = all_exams(recipe, given.seeds, store), expert_tasks(recipe, given.seeds, store)
    rows = [{"task": task} | row for row in rows_of(Answers(exams, task, recipe.languages, recipe.reference))] + other_rows(others)
    for row in rows: row |= dict(metric=template(row["task"])["metric_list"][0]["metric"], seed=None if row["seed"] is None else given.seeds[row["seed"]])
    shared = dict(study="layer_swap", scale=recipe.scale, seconds=None, versions=versions(), commit=commit())
    print(append(given.ledger, [shared | row for row in rows]), "rows are new in", given.ledger)


if __name__ == "__main__": told(main, "layer_swap")
