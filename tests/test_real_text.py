"Real corpora and the real MGSM, where a folder `shared/data` lies beside the project; said and skipped where it does not."
from pathlib import Path

import pytest

from maet.corpora import Source, corpus, documents
from maet.evaluation import read_exam
from maet.pipeline import Recipe, load, make_tokenizer
from maet.study import mgsm_exams

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real text at {DATA}")
LANGUAGES = ["en", "es", "zh", "bn", "te"]


def test_mgsm_as_it_is_published(tmp_path):
    mgsm_exams(DATA / "mgsm", LANGUAGES, tmp_path)
    exams = {l: read_exam(tmp_path, "mgsm", l) for l in LANGUAGES}
    assert all(len(rows) == 150 for rows in exams.values())
    assert all([r["target"] for r in exams[l]] == [r["target"] for r in exams["en"]] for l in LANGUAGES)  # row n is the same problem
    assert all(len(read_exam(tmp_path, "bits_per_byte", l)) == 8 for l in LANGUAGES)


def test_real_scripts_survive_the_tokenizer():
    texts = [text for l in LANGUAGES for text in documents(DATA / "general" / f"{l}.jsonl")[:40]]
    tokenizer = make_tokenizer(texts, 1000)
    for text in texts: assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = corpus([Source(DATA / "gsm8k" / "train.jsonl", 1, "{question}\n{answer}"), Source(DATA / "general" / "te.jsonl", 2)], tokenizer, 20_000, 256, 0)
    assert ids.shape == (78, 256) and ids.max() < 1000


def test_the_recipe_finds_its_files(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    recipe = load(Recipe, "real-mini.yml")
    assert all(Path(c.path).is_file() for c in recipe.corpora.values()) and Path(recipe.exam.mgsm).is_dir()
