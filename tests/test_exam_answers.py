"""Where an answer ends and how it is asked for, through the command: a model whose every word is known, on both
backends, at every batch size. Such a model is a table: after a word it says the next one, whatever stood before, and
behind its end it goes on without an end."""
import dataclasses, importlib.util, json, shutil, sys
from pathlib import Path
from types import SimpleNamespace as Plain

import pytest
import torch
from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BartConfig, LlamaConfig, PreTrainedTokenizerFast

from maet.exams import asking, evaluation
from maet.cli import main
from maet.exams.asking import ask, examine
from maet.exams.evaluation import evaluation_job
from maet.exams.examinee import examinee
from maet.exams.exams import exam
from maet.exams.answers import read_number
from maet.text.miniworld import exam as mini_exam

BASE = Path(__file__).resolve().parent.parent / "data" / "miniworld" / "base"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MARKS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
RIGHT = 22  # of 40


def tokenizer_of(words, eos=MARKS[0], marks=MARKS, **more):
    "One token a word."
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys([*marks, "?", *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    others = [mark for mark in marks if mark != eos]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, additional_special_tokens=others, **more)


def saying(folder: Path, steps: dict[str, str], tokenizer, rows: int | None = None, **named) -> Path:
    "A Llama that says after each word the next of `steps`. Its files name no stop token, unless `named` does."
    size = rows or len(tokenizer)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=2048, tie_word_embeddings=False))
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for weight in model.parameters(): weight.zero_()
        model.model.embed_tokens.weight.fill_diagonal_(1)
        model.model.norm.weight.fill_(1)
        for word, said in steps.items():
            for n, one in enumerate(said.split(" or ")): model.lm_head.weight[ids(one), ids(word)] = 1 - n / 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config", "generation_config"):
        content = json.loads((folder / f"{name}.json").read_text())
        content.pop("eos_token_id", None)
        (folder / f"{name}.json").write_text(json.dumps(content | named.get(name, {})))
    return folder


def known(mark: str) -> tuple[list[dict], dict[str, str]]:
    "40 rows, 22 of them answered rightly, in answers of many lengths; behind the mark stands 99 without an end."
    steps, rows = {mark: "99", "99": "99"}, []
    for n in range(40):
        words = [f"A{n}", *(f"so{n}.{k}" for k in range(n % 6)), f"{n}", mark]
        steps |= dict(zip(words, words[1:]))
        row = {"question": "how many " * (n % 5 + 1), "question_label": "Q", "answer_label": f"A{n}"}
        rows.append(row | {"target": str(n if n < RIGHT else n + 1)})
    return rows, steps


def write(folder: Path, rows: list[dict], task: str = "mgsm_cot", language: str = "en") -> Path:
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def by_command(model: Path, data: Path, out: Path) -> int | str | None: # its exit code
    asked = {"--data": data, "--tasks": "mgsm_cot", "--languages": "en", "--shots": 0, "--out": out}
    with pytest.raises(SystemExit) as exit: main(["eval", str(model), *(str(word) for pair in asked.items() for word in pair)])
    return exit.value.code


def result(out: Path) -> dict:
    (row,) = (json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return row


PLACES = {"tokenizer": (MARKS[0], {}, {}), "chat template": (MARKS[1], {"chat_template": CHATML}, {}),
          "config.json": (MARKS[1], {}, {"config": {"eos_token_id": [1]}}),
          "generation_config.json": (MARKS[1], {}, {"generation_config": {"eos_token_id": 1}})}


@pytest.mark.parametrize("place", PLACES)
def test_one_score_at_every_batch_size(place, tmp_path):
    "mgsm_cot without exemplars: 0.550, as was made; each answer is the one that was made, and its end is in the results."
    mark, template, named = PLACES[place]
    rows, steps = known(mark)
    data = write(tmp_path / "data", rows)
    model = saying(tmp_path / "model", steps, tokenizer_of([*steps, "how", "many", "Q"], **template), **named)
    for size in (1, 3, 4, 50):
        out = tmp_path / f"out{size}"
        (line,) = evaluation_job(model, data, ["mgsm_cot"], ["en"], out=out, shots=0, batch_size=size, device="cpu")
        assert f"{RIGHT / 40:.4f}" in line and result(out)["value"] == RIGHT / 40, (place, size)
        # <|im_end|> is a stop text of the task, and a token here
        assert result(out)["stops"] == list(dict.fromkeys([MARKS[0], mark, MARKS[1]]))
        kept = [json.loads(line) for line in (out / "mgsm_cot/en.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [k["prediction"] for k in kept] == [str(n) for n in range(40)] and {k["end"] for k in kept} == {mark}
        assert (out / "mgsm_cot/en.jsonl").read_bytes() == (tmp_path / "out1/mgsm_cot/en.jsonl").read_bytes()


def test_both_backends_end_alike(tmp_path, monkeypatch):
    """vLLM is not here. What stands for it does what it does: it goes on to a stop token it was given, to a stop text in
    its own text, which keeps special tokens, or to the end of the room. What it takes for the end of text by itself stops
    it too, unless that is switched off."""
    rows, steps = known(MARKS[1])
    data, words = write(tmp_path / "data", rows), tokenizer_of([*steps, "how", "many", "Q"], chat_template=CHATML)
    model = saying(tmp_path / "model", steps, words, generation_config={"repetition_penalty": 3.0})

    @dataclasses.dataclass
    class SamplingParams:  # fields of vLLM's class of this name
        temperature: float
        max_tokens: int
        stop: list
        stop_token_ids: list
        ignore_eos: bool = False
        skip_special_tokens: bool = True
        spaces_between_special_tokens: bool = True

    class VLLM(LM):
        think_end_token, max_length = None, 2048
        def __init__(self, **how):
            super().__init__()
            self.batch_size, self.tokenizer = how["batch_size"], words
        def tok_encode(self, text): return words(text).input_ids
        def loglikelihood(self, requests): raise NotImplementedError
        def loglikelihood_rolling(self, requests): raise NotImplementedError
        def _model_generate(self, requests, generate, sampling_params):
            said = [self.speak(*one) for one in zip(requests, sampling_params, strict=True)]
            return [Plain(outputs=[Plain(token_ids=tuple(ids))]) for ids in said]
        def speak(self, prompt, how):
            ids, by_itself = [], set() if how.ignore_eos else {2}  # Llama's default, which here is <|im_start|>
            word = words.convert_ids_to_tokens(prompt[-1])
            while len(ids) < how.max_tokens:
                word = steps.get(word, MARKS[0])
                ids.append(words.convert_tokens_to_ids(word))
                text = words.decode(ids)
                if ids[-1] in {*how.stop_token_ids, *by_itself} or any(stop in text for stop in how.stop): break
            return ids

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: True if name == "vllm" else found(name, *more))
    monkeypatch.setitem(sys.modules, "vllm", Plain(SamplingParams=SamplingParams))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", Plain(VLLM=VLLM))
    for backend in ("hf", "vllm"):
        more = dict(shots=0, batch_size=7, backend=backend, out=tmp_path / backend)
        list(evaluation_job(model, data, ["mgsm_cot"], ["en"], **more))
    assert (tmp_path / "hf/mgsm_cot/en.jsonl").read_bytes() == (tmp_path / "vllm/mgsm_cot/en.jsonl").read_bytes()
    ours, theirs = result(tmp_path / "hf"), result(tmp_path / "vllm")
    for key in ("value", "stops", "set_aside"): assert ours[key] == theirs[key], key
    assert theirs["value"] == RIGHT / 40 and theirs["set_aside"] == {"repetition_penalty": 3.0}


def test_the_model_of_the_mini_world_says_the_same_at_every_batch_size(tmp_path):
    """Its own files, and its files without eos_token_id, where a Llama's default is token 2, an ordinary quotation mark.
    And its answers are plain numbers: the reader of MGSM and the mini exam's rule find the same."""
    data = tmp_path / "data"
    for language, rows in mini_exam("mathematics", "dev", 25).items(): write(data, rows, "mathematics", language)
    shutil.copytree(BASE, tmp_path / "bare")
    content = json.loads((BASE / "config.json").read_text())
    content.pop("eos_token_id")
    (tmp_path / "bare/config.json").write_text(json.dumps(content))
    (tmp_path / "bare/generation_config.json").unlink()
    kept = {}
    for model, sizes in ((BASE, (1, 3, 4, 50)), (tmp_path / "bare", (4,))):
        for size in sizes:
            out = tmp_path / f"{model.name}{size}"
            examine(model, data, ["mathematics"], ["en", "te"], batch_size=size, out=out, dtype="float32", device="cpu")
            kept[out.name] = b"".join((out / f"mathematics/{l}.jsonl").read_bytes() for l in ("en", "te"))
    assert len(set(kept.values())) == 1, {name: len(text) for name, text in kept.items()}
    for line in kept["base1"].decode().splitlines():
        answer = json.loads(line)
        assert read_number(answer["output"]) == answer["prediction"], answer


def test_an_exam_asks_greedily_whatever_the_model_brings(tmp_path, capsys):
    "By the command: a penalty would forbid the 7 that the question names. One line, and results.jsonl, say what was set aside."
    steps = {f"A{n}": "7 or 8" for n in range(4)} | {"7": MARKS[0], "8": MARKS[0]}
    rows = [{"question": "7 is", "question_label": "Q", "answer_label": f"A{n}", "target": "7"} for n in range(4)]
    data, words = write(tmp_path / "data", rows), tokenizer_of([*steps, "is", "Q"])
    own = {"repetition_penalty": 5.0, "temperature": 0.7, "top_k": 3, "no_repeat_ngram_size": 1, "min_length": 100,
           "suppress_tokens": [words.convert_tokens_to_ids("7")], "forced_eos_token_id": 4, "do_sample": True}
    scores = {}
    for name, said in (("plain", {}), ("own", own)):
        model = saying(tmp_path / name, steps, words, generation_config=said)
        out = tmp_path / f"out-{name}"
        assert not by_command(model, data, out)
        scores[name], said = result(out), capsys.readouterr().err
        warned = [line for line in said.splitlines() if line.startswith("warning: ")]
        assert len(warned) == (name == "own") and all(key in line for line in warned for key in own), warned
    assert scores["own"]["value"] == scores["plain"]["value"] == 1
    assert scores["own"]["set_aside"] == own and "set_aside" not in scores["plain"]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path, capsys):
    "One line before the first question, and nothing is written. A token that only fills may lie beyond: it is never asked."
    rows, steps = known(MARKS[0])
    data, out = write(tmp_path / "data", rows), tmp_path / "out"
    words = tokenizer_of([*steps, "how", "many", "Q"], pad_token="<pad>")
    model = saying(tmp_path / "model", {}, words, rows=len(words) - 2)
    capsys.readouterr()
    assert by_command(model, data, out) == 2
    said = capsys.readouterr().err.strip()
    assert f"ids from 0 to {len(words) - 2}, but the model knows 0 to {len(words) - 3}" in said and "\n" not in said
    assert not out.exists() and words.pad_token_id == len(words) - 1
    filled = saying(tmp_path / "filled", steps, words, rows=len(words) - 1)
    assert examine(filled, data, ["mgsm_cot"], ["en"], shots=0, batch_size=4)[0]["value"] == RIGHT / 40


def test_an_older_result_is_not_taken_for_one_of_now(tmp_path, monkeypatch):
    "Asked again after a change of how answers are asked and read, and after a file named another stop token; else not."
    rows, steps = known(MARKS[1])
    data, words = write(tmp_path / "data", rows[:6]), tokenizer_of([*steps, "how", "many", "Q"])
    model, asked = saying(tmp_path / "model", steps, words), []
    def counted(*given):
        asked.append(1)
        return ask(*given)
    monkeypatch.setattr(evaluation, "ask", counted)
    def job(): return list(evaluation_job(model, data, ["mgsm_cot"], ["en"], out=tmp_path / "out", shots=0))
    assert job() == job() and len(asked) == 1
    monkeypatch.setattr(evaluation, "ASKING", evaluation.ASKING + 1)
    assert job() == job() and len(asked) == 2
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert job() == job() and len(asked) == 3 and MARKS[1] in result(tmp_path / "out")["stops"]


def test_the_batch_of_a_model_that_hears_its_filling_has_one_length(tmp_path):
    "BART's decoder counts its places from the start of the filling, mask or not."
    words = tokenizer_of([str(n) for n in range(20)])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BartConfig(
        vocab_size=len(words), d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, init_std=0.3,
        is_decoder=True, is_encoder_decoder=False, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    like = {"question_label": "4", "target": "1"}
    rows = [like | {"question": "1 2 3 " * (n % 3 + 1), "answer_label": str(n)} for n in range(9)]
    data, kept, loose = write(tmp_path / "data", rows, "mgsm_direct"), set(), []
    for size in (1, 4, 50):
        out = tmp_path / str(size)
        examine(tmp_path / "model", data, ["mgsm_direct"], ["en"], shots=0, batch_size=size, out=out, device="cpu")
        kept.add((out / "mgsm_direct/en.jsonl").read_bytes())
    assert len(kept) == 1
    for fills in (None, True):  # the check of the check: without the trial the answers would be others
        lm = examinee(tmp_path / "model", device="cpu")
        lm.fills, prompts = fills, [[5, 6, 7, 8, 9, 10], [7, 8], [9]]
        alone = [lm.written([prompt], 8, lm.stops, [])[0] for prompt in prompts]
        loose.append(lm.written(prompts, 8, lm.stops, []) == alone)
    assert loose == [True, False]
