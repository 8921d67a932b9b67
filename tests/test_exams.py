"""The exams, end to end: real MGSM and science questions to a model that says what it is told to; every group on a tiny checkpoint from files,
without a network; every task file; one line for each mistake. The real questions lie in `shared/data` beside the project and are skipped where absent."""
import json, math, os, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import yaml

from maet.exams.evaluation import average, compare, evaluation_job, over_levels
from maet.exams.asking import examine
from maet.exams.examinee import examinee
from maet.exams.questions import GROUPS, TASKS, expand, read_exam, template
from maet.exams.exams import exam, held, tasks_of
from maet.exams.published import mgsm_exams
from maet.exams.answers import read_number
from maet.weights.tensors import MaetError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real questions at {DATA}")
SEVEN = ["en", "es", "zh", "bn", "te", "sw", "ja"]
DIGITS = {"bn": "০১২৩৪৫৬৭৮৯", "te": "౦౧౨౩౪౫౬౭౮౯", "zh": "０１２３４５６７８９", "ja": "０１２３４５６７８９", "en": "0123456789", "es": "0123456789", "sw": "0123456789"}
CLOSING = {"en": "The answer is {}.", "es": "La respuesta es {}.", "zh": "答案是 {}。", "bn": "উত্তর হল {}।", "te": "సమాధానం {}.", "sw": "Jibu ni {}.", "ja": "答えは{}です。"}
AFTER = {"en": " She has 3 left.", "es": " Le quedan 3.", "zh": "还剩3个。", "bn": " ৩টি বাকি।", "te": " 3 మిగిలాయి.", "sw": " Zimebaki 3.", "ja": "残りは3個です。"}
UNIT = {"en": " dollars", "es": " dólares", "zh": "美元", "bn": "টি ডিম", "te": " డాలర్లు", "sw": " dola", "ja": "ドル"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refused(*_): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def scripted(say=None, prefer=None):
    "A model for lm-eval: `say(prompt)` is what it writes, `prefer(prompt)` the choice that it finds likeliest."
    from lm_eval.api.model import LM

    class Scripted(LM):
        tokenizer_name, prompts = "", []
        def generate_until(self, requests):
            self.prompts = [r.args[0] for r in requests]
            return [say(p) for p in self.prompts]
        def loglikelihood(self, requests): return [(0.0 if r.args[1] == prefer(r.args[0]) else -1.0, False) for r in requests]
        def loglikelihood_rolling(self, requests): raise NotImplementedError
    return Scripted()


def replies(language: str, number: str, wrong: str) -> list[tuple[str, bool]]:
    "What a model may write in a chain of thought, and whether it is right: judged by eye, form by form."
    native = number.translate(str.maketrans("0123456789", DIGITS[language]))
    grouped = f"{int(number):,}"
    say = lambda n: " 7 + 5 = 12. " + CLOSING[language].format(n)
    return [(say(number), True), (say(wrong), False), (say(native), True), (say(grouped), True), (say(f"${number}"), True), (say(f"{number}.0"), True),
            (say(number) + AFTER[language], True), (f" 7 + 5 = 12. = {native}{UNIT[language]}", True), (f" {wrong}{UNIT[language]}", False), (" ...", False), ("", False),
            (say(f"{number}.5"), False), (say(f"-{number}"), False)]


@pytest.fixture(scope="session")
def mgsm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mgsm")
    mgsm_exams(DATA / "mgsm", SEVEN, folder)
    return folder


@real
@pytest.mark.parametrize("task", ["mgsm_cot", "mgsm_direct"])
def test_a_scripted_model_gets_the_score_that_it_earned(mgsm, tmp_path, task):
    "150 real problems in seven languages, 8 native exemplars: the score is the number of right replies, divided."
    script, wanted = {}, {}
    for l in SEVEN:
        for n, row in enumerate(read_exam(mgsm, task, l)):
            forms = replies(l, row["target"], str(int(row["target"]) + 1))
            reply, right = forms[n % len(forms)]
            script[row["question"]] = reply
            wanted.setdefault(l, []).append(right)
    lm = scripted(say=lambda prompt: next(reply for q, reply in script.items() if prompt.rsplit("\n", 2)[-2].endswith(q)))
    found = {r["language"]: r for r in examine(lm, mgsm, [task], SEVEN, out=tmp_path)}
    for l in SEVEN:
        kept = [json.loads(line) for line in (tmp_path / task / f"{l}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [k["correct"] for k in kept] == wanted[l], [k for k, w in zip(kept, wanted[l]) if k["correct"] != w][:3]
        p = sum(wanted[l]) / 150
        assert found[l]["n"] == 150 and math.isclose(found[l]["value"], p) and math.isclose(found[l]["stderr"], math.sqrt(p * (1 - p) / 149))
    assert len(lm.prompts) == 7 * 150
    mean = average(list(found.values()), tmp_path, task, SEVEN)
    assert math.isclose(mean["value"], sum(map(sum, wanted.values())) / 1050)


@real
def test_the_prompt_is_the_published_one_and_that_of_lm_eval(mgsm):
    "Chain of thought: the exemplars' own text, byte for byte; where lm-eval cuts its labels off in the right place, its prompt too."
    import lm_eval
    examples = json.loads((DATA / "mgsm" / "exemplars.json").read_text(encoding="utf-8"))
    folder = Path(lm_eval.__file__).parent / "tasks" / "mgsm" / "native_cot"
    same = []
    for l in SEVEN:
        (task,) = tasks_of([exam(mgsm, "mgsm_cot", l, limit=3)])
        prompt = task.fewshot_context(task.test_docs()[2], 8)
        labels = template("mgsm_cot")["metadata"]["labels"][l]
        end = f"{labels['question_label']}{read_exam(mgsm, 'mgsm_cot', l)[2]['question']}\n{labels['answer_label']}"
        assert prompt == "".join(f"{e['question']}\n{e['answer']}\n\n" for e in examples[l]) + end
        theirs = yaml.safe_load((folder / f"mgsm_native_cot_{l}.yaml").read_text(encoding="utf-8"))
        render = lambda form, doc: lm_eval.utils.apply_template(form, doc)
        shots = [f"{render(theirs['doc_to_text'], e)} {render(theirs['doc_to_target'], e)}\n\n" for e in examples[l]]
        same.append(prompt == "".join(shots) + render(theirs["doc_to_text"], read_exam(mgsm, "mgsm_cot", l)[2] | {"answer": None}))
    assert same == [l not in ("zh", "ja") for l in SEVEN]  # there lm-eval 0.4.13 drops the answer's first character


@real
def test_how_lm_eval_itself_would_have_read_the_replies(mgsm):
    "Why numbers are read here: lm-eval's flexible-extract on the same replies."
    import re
    theirs, missed = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"), {}
    for l in SEVEN:
        for reply, right in replies(l, "1234", "1235"):
            said = [a or b for a, b in theirs.findall(reply)]
            value = re.sub(r"[^\w\s]", "", said[-1]) if said else None
            missed.setdefault(l, 0)
            missed[l] += (value == "1234") != right
            assert (read_number(reply, **{k: v for k, v in template("mgsm_cot")["filter_list"][0]["filter"][0].items() if k != "function"}) == "1234") == right
    assert all(n >= 2 for n in missed.values()), missed


@real
def test_the_published_number_is_read_from_published_solutions(mgsm):
    """3,000 worked solutions of GSM8K without the line that names the number: it stands in the line before, mostly behind a sum. And the
    exemplars of MGSM in seven languages, eight each."""
    import re
    ways = {way: template(f"mgsm_{way}")["filter_list"][0]["filter"][0] for way in ("cot", "direct")}
    ways = {way: {key: value for key, value in rule.items() if key != "function"} for way, rule in ways.items()}
    theirs, right = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"), {"cot": 0, "direct": 0, "lm-eval": 0}
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        *_, last, named = json.loads(line)["answer"].split("\n")
        said, number = " " + re.sub("<<.*?>>", "", last), named.removeprefix("#### ").replace(",", "")
        for way, rule in ways.items(): right[way] += read_number(said, **rule) == number
        found = [a or b for a, b in theirs.findall(said)]
        right["lm-eval"] += bool(found) and re.sub(r"[^\w\s]", "", found[-1]) == number
    assert len(lines) == 3000 and right == {"cot": 2922, "direct": 2895, "lm-eval": 2851}  # where the question's unit is another one, none is right
    examples = json.loads((DATA / "mgsm" / "exemplars.json").read_text(encoding="utf-8"))
    for l in SEVEN:
        for e in examples[l]: assert read_number(e["answer"], **ways["cot"]) == str(e["answer_number"]), (l, e["answer"])


def science(language: str, subjects: list[str] | None, folder: Path, shots: int) -> None:
    "The sample data's multiple choice as exam files; the first rows of a subject are exemplars."
    rows, given, items = [json.loads(line) for line in (DATA / "science" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()], {}, []
    for n, r in enumerate(rows):
        if subjects and r["subject"] not in subjects: continue
        row = {"id": n, "question": r["question"], "choices": r["choices"], "label": "ABCDEFGH".index(r["answer"]), "subject": r["subject"]}
        if len(given.setdefault(r["subject"], [])) < shots: given[r["subject"]].append(row)
        elif r["split"] in ("test", "all"): items.append(row)
    for place, kept in (("", items), ("shots", [s for many in given.values() for s in many])):
        (folder / "mmlu_science" / place).mkdir(parents=True, exist_ok=True)
        (folder / "mmlu_science" / place / f"{language}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


@real
def test_science_by_log_likelihood(tmp_path):
    "Real questions with three and four choices: a model that prefers a known letter is right as often as that letter is."
    six = template("mmlu_science")["metadata"]["source"]["where"]["subject"]
    for l in ("en", "es", "zh", "ja"): science(l, six if l in ("en", "ja") else None, tmp_path, 3)
    rows = {l: read_exam(tmp_path, "mmlu_science", l) for l in ("en", "es", "zh", "ja")}
    truth = {r["question"].strip(): "ABCD"[r["label"]] for l in rows for r in rows[l]}
    asked = lambda prompt: prompt.rsplit("\n\n", 1)[-1].split("\nA. ")[0]
    always = examine(scripted(prefer=lambda p: " B"), tmp_path, ["mmlu_science"], list(rows), out=tmp_path / "b", shots=3)
    for r in always:
        right = [row["label"] == 1 for row in rows[r["language"]]]
        p, n = sum(right) / len(right), len(right)
        assert math.isclose(r["value"], p) and math.isclose(r["stderr"], math.sqrt(p * (1 - p) / (n - 1))) and r["n"] == n
        subjects = {row["subject"] for row in rows[r["language"]]}
        each = [[x for x, row in zip(right, rows[r["language"]]) if row["subject"] == s] for s in subjects]
        assert math.isclose(over_levels(tmp_path / "b", "mmlu_science", r["language"])[0], sum(sum(e) / len(e) for e in each) / len(each))
    knows = examine(scripted(prefer=lambda p: " " + truth.get(asked(p), "A")), tmp_path, ["mmlu_science"], ["es"], out=tmp_path / "k", shots=0)
    assert knows[0]["value"] > 0.98  # a question with a blank line in it is not found again
    better = compare(tmp_path / "k", tmp_path / "b", "mmlu_science", ["es"])
    assert better["low"] > 0 and better["p"] < 1e-9 and better["only_b"] <= 2 and math.isclose(better["difference"], knows[0]["value"] - always[1]["value"])


# ---------------------------------------------------------------- every group, from files, on a checkpoint
def dump(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def small_exams(folder: Path, language: str) -> None:
    "Three rows and two exemplars for every task."
    pick = [{"question": f"{n} + 1 = ?", "choices": ["1", "2", "3", "4"], "label": n % 4, "subject": "college_physics", "passage": "p"} for n in range(3)]
    sums = [{"question": f"{n} + 1 = ?", "target": str(n + 1), "answer": f"The answer is {n + 1}.", "answer_label": "Answer:", "text": f"{n} apples"} for n in range(3)]
    code = [{"prompt": "def f(x):\n", "question": "Add.", "tests": "assert f(1) == 2", "answer": "def f(x): return x + 1"}] * 3
    for task in TASKS:
        rows = code if task in ("humaneval", "mbpp") else pick if template(task)["output_type"] == "multiple_choice" else sums
        if task == "flores": rows = [{"source": "a b c d e", "target": "a b c d"}] * 3
        if task == "science": rows = [r | {"answer_label": "Answer:"} for r in pick]
        for l in held(task, [language]):
            dump(folder / task / f"{l}.jsonl", rows)
            dump(folder / task / "shots" / f"{l}.jsonl", rows)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from maet.study.recipes import make_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(["Question: 1 + 1 = ? Answer: 2 প্রশ্ন 问题"] * 50, 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                                 max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_group_runs_from_files(group, checkpoint, tmp_path):
    "As `maet eval` does it, twice: each score has an error, the answers are kept, and a model is as good as itself."
    small_exams(tmp_path, "te")
    first, second = (list(evaluation_job(checkpoint, tmp_path, [group], ["te"], shots=2, allow_code=True, out=tmp_path / name, against=against))
                     for name, against in (("out", None), ("again", tmp_path / "out")))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {r["task"] for r in rows} == set(expand([group])) and len(first) == len(rows) and len(second) == 2 * len(rows)
    for r, line, again, against in zip(rows, first, second[::2], second[1::2]):
        assert r["stderr"] is not None and r["seconds"] > 0 and r["n"] == 3 and f" {r['value']:.4f} ±{r['stderr']:.4f}  n 3 " in line
        assert again.split("  n ")[0] == line.split("  n ")[0] and "against it +0.0000 ±0.0000" in against
        assert len((tmp_path / "out" / r["task"] / f"{r['language']}.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@real
def test_a_killed_call_keeps_the_languages_that_are_finished(checkpoint, mgsm, tmp_path):
    "Real problems; SIGKILL after the first language; the second call asks only what is missing."
    job, notes = dict(names=["mgsm_direct"], languages=["en", " es", "zh"], shots=1, limit=20, batch_size=2, out=str(tmp_path)), tmp_path / "results.jsonl"
    program = f"from maet.exams.evaluation import evaluation_job\nlist(evaluation_job({str(checkpoint)!r}, {str(mgsm)!r}, **{job!r}))"
    child = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not notes.exists() and child.poll() is None: time.sleep(0.02)
    child.kill()
    child.wait()
    done = notes.read_text(encoding="utf-8").splitlines()
    assert 1 <= len(done) < 3
    again = list(evaluation_job(checkpoint, mgsm, **job))
    assert [line.split()[1] for line in again] == ["en", "es", "zh"]
    rows = notes.read_text(encoding="utf-8").splitlines()
    assert rows[:len(done)] == done and len(rows) == 3  # their seconds too: they were not asked again
    assert sorted(p.name for p in (tmp_path / "mgsm_direct").iterdir()) == ["en.jsonl", "es.jsonl", "zh.jsonl"]  # and nothing half-written


def test_options_reach_the_model(checkpoint, tmp_path):
    "Chat template with exemplars as turns, dtype, device, batch size: passed through; a choice between two dtypes shows in the likelihoods."
    from transformers import AutoTokenizer
    small_exams(tmp_path / "data", "te")
    chat = tmp_path / "chat"
    chat.mkdir()
    for file in checkpoint.iterdir(): (chat / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(chat, local_files_only=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(chat)
    for task in ("mgsm_cot", "mmlu_science"):
        (found,) = examine(chat, tmp_path / "data", [task], ["te"], shots=2, chat_template=True, dtype="bfloat16", device="cpu", batch_size=2, limit=2)
        assert found["n"] == 2
    assert examinee(chat, dtype="bfloat16", device="cpu", max_length=99).model.dtype == torch.bfloat16
    assert examinee(chat, device="cpu", max_length=99).max_length == 99


def test_what_vllm_is_given(checkpoint, monkeypatch):
    "vLLM is not here, so a stand-in takes the place of lm-eval's class of it; the names are those of that class's parameters."
    import ast, importlib.util, types
    import lm_eval
    tree = ast.parse((Path(lm_eval.__file__).parent / "models" / "vllm_causallms.py").read_text(encoding="utf-8"))
    (theirs,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    (init,) = (node for node in theirs.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: True if name == "vllm" else found(name, *more))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", types.SimpleNamespace(VLLM=dict))
    given = examinee(checkpoint, batch_size=8, dtype="bfloat16", backend="vllm", tensor_parallel_size=2)
    assert given == dict(pretrained=str(checkpoint), batch_size=8, dtype="bfloat16", tensor_parallel_size=2) and set(given) <= {a.arg for a in init.args.args}
    with pytest.raises(MaetError, match="CUDA_VISIBLE_DEVICES"): examinee(checkpoint, backend="vllm", device="cuda:1")


def test_every_task_file_names_data_that_is_no_script():
    "By the files: a data set of the hub, plain data, with its languages, columns and where that was confirmed."
    for task in TASKS:
        config = yaml.safe_load(TASKS[task].read_text(encoding="utf-8"))
        assert config["task"] and config["metadata"]["columns"], task
        if (source := config["metadata"].get("source")) is None: continue
        assert source["format"] in ("parquet", "json") and source["checked"] and source["dataset"].count("/") == 1 and source["dataset"] != "facebook/flores"
        wanted = set(config["metadata"]["columns"]) - {"source", "target"} if task == "flores" else set(config["metadata"]["columns"])
        assert wanted <= set(source["row"]) and set(source["configs"]) <= set(SEVEN), task
        if config.get("num_fewshot"): assert source.get("shots") or config["metadata"].get("shots_from_test"), task
    assert set(template("mgsm_cot")["metadata"]["source"]["configs"]) == set(SEVEN)
    assert set(template("mmlu_science")["metadata"]["source"]["configs"]) == {"en", "es", "zh", "bn", "te"}


def test_one_line_for_each_mistake(checkpoint, tmp_path):
    small_exams(tmp_path / "data", "te")
    short, bare, out = tmp_path / "short", tmp_path / "bare", tmp_path / "out"
    for folder in (short, bare):
        folder.mkdir()
        for file in checkpoint.iterdir():
            if folder is short or not file.name.startswith(("tokenizer", "special")): (folder / file.name).write_bytes(file.read_bytes())
    (short / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 600}))
    eight = [{"question": "2 + 2 = ? " * 8, "answer": "The answer is 4."}] * 8
    dump(tmp_path / "data/mgsm_cot/shots/te.jsonl", eight)
    dump(tmp_path / "bad/mgsm_cot/te.jsonl", [{"question": "?", "target": "four"}])
    ask = lambda model=checkpoint, data=tmp_path / "data", tasks=("mgsm_cot",), languages=("te",), **more: examine(model, data, list(tasks), list(languages), out=out, **more)
    for do, said in ((lambda: ask(data=tmp_path / "bad"), "is not a number"), (lambda: ask(languages=["bn"]), "bn.jsonl"), (lambda: ask(bare), "no tokenizer"),
                     (lambda: ask(short), "too short for 8 shots"), (lambda: ask(tasks=["chess"]), "unknown"), (lambda: ask(backend="vllm"), "vLLM is not installed"),
                     (lambda: ask(tasks=["mbpp"]), "runs code"), (lambda: ask(shots=9), "8 exemplars where 9 are wanted"), (lambda: ask(data=None, languages=["xx"]), "no language 'xx'"),
                     (lambda: ask(data=None), "cannot be had from the hub"), (lambda: ask(chat_template=True), "no chat template"), (lambda: ask(batch_size=0), "batch_size 0"),
                     (lambda: ask(device="abacus"), "refused its options"), (lambda: ask(languages=["../te"]), "letters, digits"), (lambda: ask(languages=[]), "no exam is asked"),
                     (lambda: ask(backend_args={"dtype": "auto"}), "an option of its own")):
        with pytest.raises(MaetError, match=said) as caught: do()
        assert "\n" not in str(caught.value) and not out.exists()
