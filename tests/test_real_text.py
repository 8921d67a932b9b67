"Real corpora and the real MGSM, where a folder `shared/data` lies beside the project; said and skipped where it does not."
import gzip, json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from maet.text import tables
from maet.text.documents import Source
from maet.text.tokens import corpus
from maet.text.streams import documents
from maet.text.tables import identity, open_tokens, read_meta, write_tokens
from maet.exams.published import mgsm_exams, published_exams
from maet.exams.questions import read_exam
from maet.study import empirical
from maet.study.recipes import Recipe, make_tokenizer
from maet.study.stages import Store
from maet.training.settings import load
from maet.weights.tensors import MaetError
from tiny import processes

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real text at {DATA}")
LANGUAGES = ["en", "es", "zh", "bn", "te"]
SEVEN = [*LANGUAGES, "sw", "ja"]


def general(language: str, **more) -> Source:
    return Source(DATA / "general" / f"{language}.jsonl", **more)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer((text for l in SEVEN for text in islice(documents(general(l)), 40)), 1000)


def test_mgsm_as_it_is_published(tmp_path):
    mgsm_exams(DATA / "mgsm", LANGUAGES, tmp_path)
    exams = {l: read_exam(tmp_path, "mgsm_direct", l) for l in LANGUAGES}
    assert all(len(rows) == 150 for rows in exams.values())
    assert all([r["target"] for r in exams[l]] == [r["target"] for r in exams["en"]] for l in LANGUAGES)  # row n is the same problem
    assert all(len(read_exam(tmp_path, "bits_per_byte", l)) == 8 for l in LANGUAGES)


def test_real_scripts_survive_the_tokenizer(tokenizer):
    for l in SEVEN:
        for text in islice(documents(general(l)), 40): assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = corpus([Source(DATA / "gsm8k" / "train.jsonl", 1, "{question}\n{answer}"), general("te", share=2)], tokenizer, 20_000, 256, 0).ids
    assert ids.shape == (78, 256) and ids.max() < 1000


def test_the_recipe_finds_its_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load(Recipe, "real-mini.yml")
    assert all(Path(c.path).is_file() for c in recipe.corpora.values()) and Path(recipe.exam.published).is_dir()


def test_what_the_real_model_is_asked_was_never_read(tmp_path, monkeypatch):
    "The recipe `real` finds its files; the same problems in four languages; held-out prose begins no document of any corpus."
    monkeypatch.chdir(ROOT)
    recipe = load(Recipe, "real")
    tasks = recipe.abilities["mathematics"].tasks
    published_exams(recipe.exam.published, tasks, LANGUAGES, tmp_path)
    targets = [[row["target"] for row in read_exam(tmp_path, "msvamp", l)] for l in ("en", "es", "zh", "bn")]
    assert len(targets[0]) == 700 and targets.count(targets[0]) == 4
    right, wrong = (read_exam(tmp_path, task, "te") for task in ("mgsm_answers", "mgsm_shuffled"))
    assert [r["question"] for r in right] == [r["question"] for r in wrong] and sorted(r["target"] for r in right) == sorted(r["target"] for r in wrong)
    assert sum(a["target"] == b["target"] for a, b in zip(right, wrong)) < 8  # of 150: problems that happen to have the same answer
    begins = {text[:60] for source in recipe.corpora.values() for text in documents(source)}
    for l in LANGUAGES: assert len(held := read_exam(tmp_path, "general_text", l)) > 100 and begins.isdisjoint(row["text"][:60] for row in held)


def test_a_source_says_the_same_in_every_form(tmp_path):
    "Lines, gzipped lines, parquet and a folder in the form of a hub dataset: the same documents, whatever the script."
    import pyarrow, pyarrow.parquet
    for l in SEVEN:
        path = general(l).path
        rows = [json.loads(line) for line in path.read_bytes().splitlines()[:200]]
        (tmp_path / l).mkdir()
        (tmp_path / f"{l}.jsonl.gz").write_bytes(gzip.compress(b"\n".join(path.read_bytes().splitlines()[:200])))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / l / "train-0.parquet")
    configs = "".join(f"- config_name: {l}\n  data_files: {l}/*.parquet\n" for l in SEVEN)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for l in SEVEN:
        wanted = list(islice(documents(general(l)), 200))
        forms = Source(tmp_path / f"{l}.jsonl.gz"), Source(tmp_path / l), Source(f"hf://{tmp_path}", name=l)
        for source in forms: assert list(documents(source)) == wanted


def test_only_answers_are_learnt(tokenizer, tmp_path):
    path = DATA / "gsm8k" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chats = ([{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in rows)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in chats), encoding="utf-8")
    turn = "{{ m.role + ': ' + m.content + '<|end|>' }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    answers = {r["answer"].strip() for r in rows}
    for source in (Source(path, prompt="{question}\n", completion="{answer}"), Source(tmp_path / "chats.jsonl", messages="messages")):
        got = corpus([source], tokenizer, 40_000, 1024, 0, whole_documents=True)
        learnt = [tokenizer.decode(ids[trained]) for ids, trained in zip(got.ids, got.trained)]
        assert all(text.endswith("<|end|>") for text in learnt) and 0.2 < got.trained.float().mean() < 0.8
        assert {part.strip() for text in learnt for part in text.split("<|end|>")[:-1]} <= answers  # whole ones, and nothing else


def writer(out, tokenizer, paths, told):
    "What the killed process does. It tells how far it is."
    tables.CHUNK = 10_000
    sources = [Source(path, n + 1) for n, path in enumerate(paths)]
    write_tokens(out, sources, AutoTokenizer.from_pretrained(tokenizer), 200_000, 256, 7, False, lambda now, of: told.send(now))


def test_a_killed_writer_goes_on(tokenizer, tmp_path, monkeypatch):
    "SIGKILL, twice, at different places: the table that is there in the end has the bytes of one that was written at once."
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(tables, "CHUNK", 10_000)
    sources = [general(l, share=n + 1) for n, l in enumerate(SEVEN)]
    out, reached = tmp_path / "killed.safetensors", 0
    for more in (2, 5):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=writer, args=(out, tmp_path / "tokenizer", [s.path for s in sources], theirs))
        process.start()
        theirs.close()
        lines = [ours.recv() for _ in range(more)]
        process.kill()
        process.join()
        assert lines[0] > reached and not out.exists()  # it did not begin again
        reached = lines[-1]
    said = []
    write = lambda name, progress=None: write_tokens(tmp_path / name, sources, tokenizer, 200_000, 256, 7, False, progress)
    killed = write("killed.safetensors", lambda now, of: said.append(now))
    assert said[0] > reached and killed.read_bytes() == write("straight.safetensors").read_bytes()

    got, at_once = open_tokens(killed), corpus(sources, tokenizer, 200_000, 256, 7)
    assert torch.equal(got.ids, at_once.ids) and got.trained is None
    used = [u["tokens"] for u in json.loads(read_meta(killed)["used"])]
    longest = (got.ids.flatten() == tokenizer.eos_token_id).nonzero().flatten().diff().max()  # document
    assert all(abs(tokens - sum(used) * (n + 1) / 28) <= longest for n, tokens in enumerate(used))


def test_the_empirical_study_reads_forums_and_code(tmp_path, monkeypatch):
    "Two forums and the standard library of this Python; what is held out is in no training text; without the folder it says so and ends."
    monkeypatch.chdir(ROOT)
    recipe = load(Recipe, "real-mini")
    found, held_out = empirical.real_text(recipe, Store(tmp_path / "store"))
    for name in (*empirical.FORUMS, "code"):
        text = set(documents(found.corpora[name]))
        assert len(text) > 100
        if name == empirical.FITTED: assert text.isdisjoint(held := set(documents(held_out))) and len(held) > 100
    assert any("def dumps(" in text for text in text)
    assert len({identity(found.corpora[name]) for name in empirical.FORUMS + empirical.OTHERS}) == 5
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaetError, match="not there"): empirical.real_text(recipe, Store(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
