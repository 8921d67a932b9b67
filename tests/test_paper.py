"The papers' printed numbers: files whole, units known, and every average of theirs computed again from its own cells."
import csv, re
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pytest
import yaml

PAPER = Path(__file__).resolve().parent.parent / "data" / "paper"
FILES = sorted(p.name for p in PAPER.glob("*.csv"))
UNITS = {"percent", "points", "fraction", "BLEU", "tokens", "billion tokens", "questions", "sequences", "samples", "models", "layers of 32",
         "times", "weight", "none", "not stated", "text"}  # README.md says what each one is
SPOKEN = {"value", "unit", "printed", "note", "states", "cited as", "stage as printed"}  # these describe a row; the rest is its key
FOUND = ["check", "paper", "where", "quantity", "printed", "expected", "difference", "unit"]  # of mismatches.csv, which adds our `reading`


def read(name: str, **where) -> list[dict]:
    "Rows of a file whose fields have these values."
    with open(PAPER/name, newline="", encoding="utf-8") as file: rows = list(csv.DictReader(file, strict=True))
    return [r for r in rows if all(r[field] == str(value) for field, value in where.items())]

def exact(row: dict) -> Fraction:
    "The printed value; a share printed as a fraction becomes per cent."
    return Fraction(row["value"]) * (100 if row["unit"] == "fraction" else 1)

def half(row: dict) -> Fraction:
    "Half a unit of the last printed digit: how far rounding may have moved the value."
    return Fraction(10)**Decimal(row["value"]).as_tuple().exponent * (100 if row["unit"] == "fraction" else 1) / 2

def one(name: str, **where) -> Fraction:
    "The single value that is meant."
    found = read(name, **where)
    assert len(found) == 1, (name, where, len(found))
    return exact(found[0])

def mean(values) -> Fraction: return sum(values := list(values)) / Fraction(len(values))

def check(name: str, row: dict, quantity: str, expected: Fraction, slack: Fraction = Fraction(0), table: str = "") -> dict:
    "A printed value beside what it should be; `slack` is what the rounding of its parts may add to its own."
    where = table or (f"Table {row['table']}" if "table" in row else row["where"])
    return dict(check=name, paper=row["paper"], where=where, quantity=quantity, value=exact(row), expected=expected, slack=half(row) + slack)


# What a paper prints twice, or prints and lets one compute.
def averages():
    "MAET, Tables 2 and 3: Avg. is the mean of es, zh, bn, te."
    for file in ("maet_table2.csv", "maet_table3.csv"):
        for row in read(file, language="average"):
            cells = [r for r in read(file, method=row["method"], task=row["task"]) if r["language"] in ("es", "zh", "bn", "te")]
            assert len(cells) == 4
            yield check("average of languages", row, f"{row['method']}, {row['task']}", mean(map(exact, cells)), mean(map(half, cells)))

def changes():
    "MAET, Table 4: the bracket is the score minus the base's."
    for row in read("maet_table4.csv", statistic="change"):
        score, = read("maet_table4.csv", method=row["method"], task=row["task"], statistic="score")
        base, = read("maet_table4.csv", method="LLaMA-3 8B", task=row["task"])
        yield check("change against the base", row, f"{row['method']}, {row['task']}", exact(score) - exact(base), half(score) + half(base))

def shares():
    "MAET, Table 3: a group's share is the sum of its parts; every share is a whole number of the 232 = floor(0.8 * 291) tensors of T."
    share = {r["kinds"]: r for r in read("maet_table3.csv", statistic="share")}
    for group, kinds in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        parts = [share[k] for k in kinds]
        yield check("share is the sum of its parts", share[group], group, sum(map(exact, parts)), sum(map(half, parts)))
    for kind, row in share.items():
        yield check("share of 232 tensors", row, kind, Fraction(100 * round(exact(row) * 232 / 100), 232))

def repeats():
    "One quantity in two tables: MAET's Tables 2 and 3, layer swapping's Tables 1, 2, 5 and 6. Both may be rounded."
    for row in read("maet_table3.csv", method="All Tensors", statistic="score"):
        first, = read("maet_table2.csv", method="MAET", task=row["task"], language=row["language"])
        yield check("printed twice", row, f"MAET, {row['task']}, {row['language']}", exact(first), half(first), "Table 3 against Table 2")
    seen = {}
    for row in chain.from_iterable(read(f"swap_table{n}.csv") for n in (1, 2, 5, 6)):
        key = tuple(row[k] for k in ("method", "setting", "target", "language", "task", "statistic"))
        first = seen.setdefault(key, row)
        if first is row: continue
        quantity = ", ".join(filter(None, (row["method"], row["setting"], row["task"], row["language"], row["statistic"])))
        yield check("printed twice", row, quantity, exact(first), half(first), f"Table {row['table']} against Table {first['table']}")

def questions():
    "MGSM has 250 questions a language: one model's score is a multiple of 0.4, a mean of n models' a multiple of 0.4 / n."
    rows = [r for r in read("maet_table2.csv", task="mgsm") + read("maet_table3.csv", task="mgsm") if r["language"] != "average"]
    rows += [r for n in (1, 2, 5, 6) for r in read(f"swap_table{n}.csv", task="mgsm") if r["language"] != "average"]
    for row in rows:
        step = Fraction(2, 5) / (int(row.get("n", 1)) if row["statistic"] == "mean" else 1)
        quantity = ", ".join(filter(None, (row["method"], row.get("setting"), row["language"], row["statistic"])))
        yield check("score on 250 questions", row, quantity, round(exact(row) / step) * step)

def in_words():
    "Numbers of the running text that a table gives too."
    maet, base = (one("maet_table2.csv", method=m, task="mgsm", language="average") for m in ("MAET", "LLaMA-3 8B"))
    falls = [-exact(r) for r in read("maet_table4.csv", method="CPT", statistic="change")]
    recipe = {k: one("maet_table5.csv", **{"hyper-parameter": k}, block=1, task="mgsm") for k in ("learning rate", "batch size", "training steps")}
    best = lambda m, **more: one("swap_table2.csv", method=m, language="sw", statistic="max", **more)
    expected = {
        "t01": 100 * (maet / base - 1), "t02": recipe["learning rate"], "t03": recipe["batch size"], "t04": recipe["training steps"],
        "t05": one("maet_table5.csv", **{"hyper-parameter": "ratio of key neurons"}, block=1, task="mgsm"),
        "t06": one("maet_table5.csv", **{"hyper-parameter": "ratio of key neurons"}, block=2, task="mgsm"),
        "t07": one("maet_table5.csv", **{"hyper-parameter": "ratio of key neurons"}, block=2, task="science"),
        "t09": one("maet_table3.csv", kinds="attention", statistic="share"), "t10": one("maet_table3.csv", kinds="mlp", statistic="share"),
        "t11": max(falls), "s15": best("layer swap", setting="best config, 9 pairs") - best("joint SFT")}
    for row in read("statements.csv"):
        if row["id"] in expected: yield check("number in the text", row, row["states"], Fraction(expected[row["id"]]))

CHECKS = [averages, changes, shares, repeats, questions, in_words]

def mismatches() -> list[dict]:
    "Everything that does not add up, as mismatches.csv has it: per cent and points, four significant digits."
    wrong = [c for c in chain.from_iterable(make() for make in CHECKS) if abs(c["value"] - c["expected"]) > c["slack"]]
    return [c | dict(printed=f"{float(c['value']):.4g}", expected=f"{float(c['expected']):.4g}", unit="percent",
                     difference=f"{float(c['value'] - c['expected']):+.2g}") for c in wrong]

def readable(rows: list[dict]) -> str:
    "A table for people."
    cells = [FOUND, *[[r[f] for f in FOUND] for r in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)

def test_what_does_not_add_up(tell):
    found, committed = mismatches(), read("mismatches.csv")
    tell(f"printed numbers that do not add up:\n{readable(found)}")
    assert [[r[f] for f in FOUND] for r in found] == [[r[f] for f in FOUND] for r in committed]
    assert all(r["reading"] for r in committed)

@pytest.mark.parametrize("make, count", list(zip(CHECKS, (36, 8, 12, 38, 206, 11))), ids=lambda p: getattr(p, "__name__", ""))
def test_every_check_looks_at_what_it_should(make, count):
    assert len(list(make())) == count


# The files.
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_whole(name):
    rows = read(name)
    assert rows and None not in rows[0] and all(None not in r and None not in r.values() for r in rows)
    assert all(r["paper"] in ("maet", "maec", "swap") for r in rows)
    spoken = SPOKEN - {"value"} if name == "swap_section42.csv" else SPOKEN  # there a parameter has several good values
    keys = [tuple(v for k, v in r.items() if k not in spoken) for r in rows]
    assert len(set(keys)) == len(keys)
    assert all(v == v.strip() and "\n" not in v for r in rows for v in r.values())
    assert f"`{name}`" in (PAPER/"README.md").read_text(encoding="utf-8") or re.fullmatch(r"swap_figure[4-9]\.csv", name)

@pytest.mark.parametrize("name", [n for n in FILES if ",value," in (PAPER/n).read_text(encoding="utf-8").partition("\n")[0]])
def test_values_and_units(name):
    for row in read(name):
        assert row["unit"] in UNITS, row
        if row["unit"] == "text": assert row["value"]
        elif row["value"] == "": assert row["note"], row  # what is not printed is said
        else: Fraction(row["value"])
        if row["unit"] in ("percent", "fraction"): assert 0 <= exact(row) <= 100

@pytest.mark.parametrize("n", range(4, 10))
def test_a_heat_map_is_whole(n):
    "32 layers of 7 tensors; every share is k/4096, for down k/14336, and where it is not the note says so."
    rows = read(f"swap_figure{n}.csv")
    assert [(r["layer"], r["kind"]) for r in rows] == [(str(layer), k) for layer in range(32) for k in ("q", "k", "v", "o", "gate", "up", "down")]
    def on_grid(row, size): return f"{round(Fraction(row['value']) * size) / size:.6f}" == row["value"]
    for row in rows: assert on_grid(row, 14336 if row["kind"] == "down" else 4096) != bool(row["note"]), row
    assert not all(on_grid(r, 1024) for r in rows if r["kind"] in "kv")  # not their 1,024 output features
    assert not all(on_grid(r, 4096) for r in rows if r["kind"] == "down")

def test_backbones_are_copies():
    "The package's table of published scores holds every score of a backbone that one model got in one language, as the papers print it."
    sources = {("MAET", 2): read("maet_table2.csv"), ("MAET", 4): read("maet_table4.csv", statistic="score"), ("layer swapping", 5): read("swap_table5.csv")}
    models = yaml.safe_load((PAPER.parent.parent / "maet" / "catalogue" / "backbones.yml").read_text(encoding="utf-8"))
    assert set(models) == {"Baichuan-2 7B", "Mistral 7B", "LLaMA-2 7B", "LLaMA-3 8B", "LLaMA 3.1 8B"}
    copies = [(m, row["paper"], row["table"], "mmlu" if row["exam"] == "global_mmlu" else row["exam"], l, Fraction(str(v)))
              for m, about in models.items() for row in about["scores"] for l, v in row.items() if l not in ("paper", "table", "exam")]
    printed = [(r["method"], paper, table, r["task"], r["language"], exact(r)) for (paper, table), rows in sources.items() for r in rows
               if r["method"] in models and r["language"] != "average" and (paper, r["task"]) != ("layer swapping", "mbpp")]
    assert sorted(copies) == sorted(printed)

def test_worst_mean_best_are_in_order():
    for row in read("swap_table2.csv", language="sw", statistic="mean"):
        low, high = (one("swap_table2.csv", method=row["method"], setting=row["setting"], language="sw", statistic=s) for s in ("min", "max"))
        assert low <= exact(row) <= high
        if row["n"] == "3":  # the third checkpoint lies between the two others
            assert low - 3 * half(row) <= 3 * exact(row) - low - high <= high + 3 * half(row)


# The claims, against the papers' own numbers.
def score(method: str, task: str, language: str = "average") -> Fraction:
    return one("maet_table2.csv", method=method, task=task, language=language)

def swap(table: int, method: str, language: str, statistic: str = "mean", setting: str = "") -> Fraction:
    chosen = {"setting": setting} if setting else {}
    return one(f"swap_table{table}.csv", task="mgsm", method=method, language=language, statistic=statistic, **chosen)

def level(figure: int, kinds: str | tuple, *layers: int) -> Fraction:
    "Mean share of a printed map."
    return mean(exact(r) for r in read(f"swap_figure{figure}.csv") if r["kind"] in kinds and int(r["layer"]) in layers)

def held() -> dict[str, list[bool]]:
    "Claim -> whether each of its comparisons holds in the printed numbers."
    tasks, default, best = ("mgsm", "science"), "default config, 9 pairs", "best config, 9 pairs"
    methods = {r["method"] for r in read("maet_table2.csv")}
    above = lambda better, others: [score(better, t) > score(o, t) for t in tasks for o in others]
    kinds = {k: one("maet_table3.csv", kinds=k, statistic="score", language="average") for k in ("mlp", "attention")}
    ood = lambda method: [exact(r) for r in read("maet_table4.csv", method=method, statistic="change")]
    swaps = lambda languages, rivals, settings: [swap(1, "layer swap", l, s, c) > swap(1, r, l, s)
                                                 for l in languages for s in ("mean", "max") for r in rivals for c in settings]
    experts, few, every = ("language expert", "math expert"), ("sw", "te"), ("sw", "te", "bn", "ja")
    ends = lambda n, k: min(level(n, (k,), 0, 1), level(n, (k,), 30, 31)) > level(n, (k,), *range(2, 30))
    gain = lambda r: exact(r) > one("swap_table5.csv", method="LLaMA 3.1 8B", task=r["task"], language=r["language"])
    layer, pairs = "layer swap of language soup with math soup", lambda l: swap(6, "layer swap", l)
    return {
        "M01": above("MAET", ["LLaMA-3 8B"]), "M02": above("MAET", methods - {"MAET"}), "M03": above("F-CPT_L&A", methods - {"MAET", "F-CPT_L&A"}),
        "M04": above("LLaMA-3 8B", ["F-TV"]), "M05": above("L-TV", ["LLaMA-3 8B"]), "M09": [kinds["mlp"] > kinds["attention"]],
        "M10": [c < 0 for c in ood("CPT")], "M11": [c >= 0 for c in ood("MAET")],
        "M14": [abs(c["value"] - c["expected"]) <= c["slack"] for c in in_words() if c["quantity"].startswith("relative improvement")],
        "S01": swaps(few, experts, [default]), "S02": swaps(few, ["model soup"], [default]),
        "S03": [swap(2, "layer swap", "sw", s, c) > swap(2, "TIES", "sw", s) for s in ("min", "mean", "max") for c in (default, best)],
        "S04": [10 * level(n, ("q", "k", "v", "o", "gate", "up", "down"), *range(16)) <
                level(n, ("q", "k", "v", "o", "gate", "up", "down"), *range(16, 32)) for n in (4, 5)],
        "S05": [ends(n, k) for n in (6, 7, 8, 9) for k in "qkvo"],
        "S10": [(swap(2, "layer swap", "sw", s, c) - swap(2, "joint SFT", "sw", s) > 1) == (s == "max")
                for s in ("mean", "max") for c in (default, best)],
        "S11": [swap(6, layer, l) > pairs(l) - 1 for l in every],
        "S12": swaps(every, experts, [best]), "S13": swaps(every, ["model soup"], [default, best]),
        "S14": [swap(2, "layer swap", l, setting=c) > swap(2, m, l)
                for l in ("average", "en") for c in (default, best) for m in ("model soup", "TIES")],
        "S16": [gain(r) for r in read("swap_table5.csv", method="language expert") if r["language"] != "en"]}

def test_claims_and_the_papers_own_numbers():
    computed = {name: "yes" if all(parts) else "partly" if any(parts) else "no" for name, parts in held().items()}
    assert {r["id"]: r["own_numbers"] for r in read("claims.csv")} == {r["id"]: computed.get(r["id"], "not printed") for r in read("claims.csv")}
    assert computed.keys() <= {r["id"] for r in read("claims.csv")}

def test_what_the_readme_remarks():
    "Remarks that no list above holds."
    counts = {r["language"]: Fraction(r["value"]) for r in read("maet_table6.csv", quantity="evaluation instances", task="science")}
    cells = [r for r in read("maet_table2.csv", task="science") if r["language"] in counts]
    pooled = [abs(round(exact(r) * counts[r["language"]] / 100) * 100 / counts[r["language"]] - exact(r)) <= half(r) for r in cells]
    assert (sum(pooled), len(pooled)) == (4, 52)  # so a science score is not right answers by questions
    five = mean(swap(5, "LLaMA 3.1 8B", l) for l in ("en", "ja", "bn", "sw", "te"))
    assert abs(five - swap(5, "LLaMA 3.1 8B", "average")) < Fraction(1, 20)  # the printed ten-language average
    for l in ("sw", "te", "bn", "ja"): assert swap(1, "model soup", l) == swap(6, "model soup", l)  # best there, default here
    assert [r["value"] for r in read("swap_table4.csv", expert="te")] == [r["value"] for r in read("swap_table4.csv", expert="bn")]
    rivals = {r["method"] for r in read("maet_table2.csv")} - {"MAET"}
    leads = [(t, l) for t in ("mgsm", "science") for l in ("es", "zh", "bn", "te") if score("MAET", t, l) > max(score(m, t, l) for m in rivals)]
    assert leads == [("mgsm", "es"), ("science", "es"), ("science", "bn")]
    assert sum(bool(r["note"]) for n in range(4, 10) for r in read(f"swap_figure{n}.csv")) == 6
    total = lambda method, statistic, **more: sum(swap(1, method, l, statistic, **more) for l in ("sw", "te", "bn", "ja"))
    gain = lambda c, rival, s: round(float(100 * (total("layer swap", s, setting=f"{c} config, 9 pairs") / total(rival, s) - 1)), 1)
    gains = {(c, rival): [gain(c, rival, s) for s in ("mean", "max")]
             for c in ("best", "default") for rival in ("language expert", "math expert", "model soup")}
    assert gains == {("best", "language expert"): [18.0, 27.7], ("best", "math expert"): [3.1, 4.9], ("best", "model soup"): [7.1, 12.0],
                     ("default", "language expert"): [14.5, 21.0], ("default", "math expert"): [0.1, -0.5], ("default", "model soup"): [4.0, 6.1]}
