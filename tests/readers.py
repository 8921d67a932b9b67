"""Every reader of files that a user can hand in: how a valid sample is made in the working directory, and how it is opened, as the
commands open it. `fuzz.py` breaks the sample in between."""
import csv, gzip, json, shutil, tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
import yaml

from maet.exams import evaluation, exams, published
from maet.method import merge
from maet.record import claim_figures, claims, figures, ledger, report
from maet.study import fitting, plan, scores, studies, study
from maet.study import trials as trials_room
from maet.training import follow, jobs, launch
from maet.weights.adapted import open_checkpoint
from maet.weights.checkpoints import Checkpoint
from maet.text.tokens import Position, Tokens, corpus, encode
from maet.text.documents import Source
from maet.text.tables import Table, fingerprint, open_tokens, save_tokens
from maet.text.streams import documents, reader, shuffled
from maet.weights.differences import Difference, check_pack, open_delta
from maet.weights.gguf import dequantise, gguf_config, gguf_file
from maet.weights.packs import Keys, save_keys, save_pack
from maet.weights.names import complete, unquantised
from maet.method.locate import locate
from maet.study.recipes import make_tokenizer, open_tokenizer
from maet.weights.tensors import meta_model
from maet.verbs import init
from maet.training.schedule import Sequences, Training
from maet.training.loading import load_base
from tiny import TEXTS, tiny


ROOT = Path(__file__).resolve().parent.parent


class Reader(NamedTuple):
    make: Callable[[Path], None] # a valid sample in this folder, which is the working directory
    open: Callable[[], object]   # as a command does
    files: tuple = ("**/*",)     # patterns of what is broken
    imports: tuple = ()          # slow packages that it needs
    may: tuple = ()              # what else than a MaetError it may raise


READERS: dict[str, Reader] = {}
LLAMA = ("transformers.models.llama.modeling_llama",)


def add(name: str, make: Callable, open: Callable, *files: str, imports: tuple = (), may: tuple = ()) -> None:
    READERS[name] = Reader(make, open, files or ("**/*",), imports, may)


# ---- checkpoints, packs, keys ----

def read_all(path: str) -> None:
    "What every command that reads weights does: open, ask for a fingerprint, read each tensor."
    model = complete(unquantised(open_checkpoint(path)))
    model.fingerprint
    for name in model.names: model.dtype(name), list(model.chunks(name))


def of_one_file(folder: Path): tiny(folder/"model")
def in_shards(folder: Path): tiny(folder/"model", max_shard_size="20KB")


def two_models(folder: Path):
    tiny(folder/"base")
    tiny(folder/"tuned", seed=1)


def keys(folder: Path):
    two_models(folder)
    locate(Checkpoint("base"), Checkpoint("tuned"), .2, "element", "keys.safetensors")


def pack(folder: Path):
    keys(folder)
    base = Checkpoint("base")
    save_pack("pack.safetensors", Difference(Checkpoint("tuned"), base, Keys("keys.safetensors", base)), base, what="delta")


def read_keys():
    base = Checkpoint("base")
    dict(Keys("keys.safetensors", base))
    jobs.KeysUnion(["keys.safetensors"], base).identity
    plan._saved_keys(["keys.safetensors"])


def read_pack():
    check_pack("pack.safetensors", base := Checkpoint("base"))
    dict(open_delta("pack.safetensors", base))


def adapter(folder: Path):
    "LoRA with a rank of its own for one module, DoRA, a bias and a head that is stored whole."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    tiny(folder/"base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 4}, use_dora=True, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    with torch.no_grad():
        for parameter in model.parameters(): parameter += .01 * torch.rand_like(parameter)
    model.save_pretrained("adapter")


def read_adapter():
    model = open_checkpoint("adapter")
    for name in model.names: model.dtype(name), list(model.chunks(name))
    dict(open_delta("adapter", Checkpoint("base")))


def read_pair():
    dict(open_delta("tuned", Checkpoint("base")))
    dict(open_delta("tuned", Checkpoint("base"), allow_mismatch=True))


def words(folder: Path):
    of_one_file(folder)
    Path("text.txt").write_text("\n\n".join(TEXTS))


def read_words():
    words = open_tokenizer(Path("model"))
    fingerprint(words)
    corpus([Source("text.txt")], words, 64, 16, 0)


GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk"}


def gguf_base(folder: Path):
    "The tiny Llama as llama.cpp stores one, its numbers as they are."
    import gguf
    tiny(folder/"model", hidden=64)
    words = json.loads(Path("model/tokenizer.json").read_text())["model"]
    file = gguf.GGUFWriter("base.gguf", "llama")
    for add_number, number in ((file.add_block_count, 1), (file.add_context_length, 128), (file.add_embedding_length, 64), (file.add_feed_forward_length, 24),
                               (file.add_head_count, 2), (file.add_head_count_kv, 2), (file.add_layer_norm_rms_eps, 1e-6), (file.add_rope_freq_base, 1e4), (file.add_vocab_size, 300)):
        add_number(number)
    listed = sorted(words["vocab"], key=words["vocab"].get)
    listed += [f"<{n}>" for n in range(len(listed), 300)]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(listed)
    file.add_token_types([3] + [1] * 299)
    file.add_token_merges([" ".join(pair) for pair in words["merges"]])
    for add_token in (file.add_bos_token_id, file.add_eos_token_id, file.add_unk_token_id, file.add_pad_token_id): add_token(0)
    model = Checkpoint("model")
    for name in model.names:
        theirs = name
        for one, other in GGUF_NAMES.items(): theirs = theirs.replace(one, other)
        file.add_tensor(theirs, model.read(name).numpy())
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file()
    file.close()
    shutil.rmtree("model")


def read_gguf():
    "What a recipe's base that names a GGUF file goes through: the plan asks what it is, the run writes it out."
    path = gguf_file("base.gguf")
    gguf_config(path)
    try: dequantise(path, Path("out"))
    finally: shutil.rmtree("out", ignore_errors=True)


add("shard", of_one_file, lambda: read_all("model"), "model/model.safetensors", imports=LLAMA)
add("index", in_shards, lambda: read_all("model"), "model/*.safetensors", "model/*.index.json", imports=LLAMA)
add("config", of_one_file, lambda: (read_all("model"), meta_model(Path("model"))), "model/config.json", imports=LLAMA)
add("pair", two_models, read_pair, "tuned/*.json", imports=LLAMA)
add("model", of_one_file, lambda: load_base("model", torch.float32), "model/*.json", "model/model.safetensors", imports=LLAMA)
add("tokenizer", words, read_words, "model/tokenizer*.json", imports=LLAMA)
add("adapter", adapter, read_adapter, "adapter/*.json", "adapter/*.safetensors", imports=(*LLAMA, "peft"))
add("keys", keys, read_keys, "keys.safetensors")
add("pack", pack, read_pack, "pack.safetensors")
add("gguf", gguf_base, read_gguf, "base.gguf", imports=(*LLAMA, "gguf"))


# ---- text ----

ROWS = [{"text": f"few words {n}", "score": n / 10, "language": {"script": "Latn", "code": "es"}} for n in range(12)]
CHATS = [{"messages": [{"role": "user", "content": f"words {n}"}, {"role": "assistant", "content": "few"}]} for n in range(8)]
PAIRS = [{"prompt": f"words {n}", "completion": "few", "id": n} for n in range(8)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def lines(rows: list) -> bytes: return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list, file: Path) -> None:
    import pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def tokenizer():
    "A tokenizer with a chat template, in memory."
    made = make_tokenizer(TEXTS, 300)
    made.chat_template = TEMPLATE
    return made


def read_text(*sources: Source) -> None:
    "What training does: every document once, as tokens; then in an order of its own; the name of it all."
    words = tokenizer()
    for source in sources:
        encode(list(documents(source)), source, words)
        encode([found for found, _ in islice(shuffled(reader(source), "0"), 20)], source, words)


def sources(end: str) -> list[Source]:
    where = {"score": {"min": .1}, "language.code": ["es", "ca"]}
    return [Source(f"text{end}", text="{text} ({language.code})", where=where), Source(f"chats{end}", messages="messages"),
            Source(f"pairs{end}", prompt="prompt", completion="completion")]


def corpora(end: str, write: Callable) -> None:
    for name, rows in (("text", ROWS), ("chats", CHATS), ("pairs", PAIRS)): write(rows, Path(f"{name}{end}"))


def tokens(folder: Path):
    save_tokens("plain.safetensors", Tokens(torch.arange(60).reshape(6, 10).int()))
    save_tokens("masked.safetensors", Tokens(torch.arange(60).reshape(6, 10).int(), torch.arange(60).reshape(6, 10) % 3 == 0))
    table = Table("begun.safetensors", (6, 10), True, "made")
    table.append(torch.ones(2, 10).int().numpy(), torch.ones(2, 10).bool().numpy(), dict(sources=[[0, None, 2]], used=[20], documents=[2], unfilled=[[[1], [True]]]))


def read_tokens():
    for name in ("plain", "masked"): list(Sequences(table := open_tokens(f"{name}.safetensors"), range(len(table.ids))))
    begun = Table("begun.safetensors", (6, 10), True, "made")
    if begun.note["position"]: Position.read(begun.note["position"])


add("jsonl", lambda folder: corpora(".jsonl", lambda rows, file: file.write_bytes(lines(rows))), lambda: read_text(*sources(".jsonl")))
add("txt", lambda folder: Path("text.txt").write_text("\n\n".join(TEXTS)), lambda: read_text(Source("text.txt")))
add("gz", lambda folder: (corpora(".jsonl.gz", lambda rows, file: file.write_bytes(gzip.compress(lines(rows), mtime=0))),
                          Path("text.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS).encode(), mtime=0))),
    lambda: read_text(*sources(".jsonl.gz"), Source("text.txt.gz")))
add("parquet", lambda folder: corpora(".parquet", parquet), lambda: read_text(*sources(".parquet")), imports=("datasets", "pyarrow.parquet"))
add("tokens", tokens, read_tokens)


# ---- recipes ----

RUN = yaml.safe_load("""
base: base
corpora: [{path: text.jsonl, share: 2}, {path: text.jsonl, where: {score: {min: 0.1}, text: [a, b]}}]
training: {mode: key-neuron, tokens: 256, batch_tokens: 64, sequence_length: 32, learning_rate: 0.001, schedule: cosine, lora_targets: all-linear}
keys: [keys.safetensors]
held_out: [{path: text.jsonl}]
held_out_tokens: 64
launch: {devices: 1, zero: 2}
""")
BASE = yaml.safe_load("""
vocabulary: 300
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}
world: {seed: 1, trace: 0.02, documents: 30, items: 4}
phases:
  - shares: {general/en: 1, general/es: 0.5}
    training: {tokens: 256, batch_tokens: 64, sequence_length: 32}
  - shares: {mathematics/en: 1}
    training: {tokens: 128, batch_tokens: 64, sequence_length: 32}
""")
MAIN = yaml.safe_load("""
scale: mini
base: base
languages: [es, bn]
abilities: {mathematics: {tasks: [mathematics], select_ratio: 0.8}}
training: &training {tokens: 256, batch_tokens: 64, sequence_length: 32}
locate: {training: *training, ratio: 0.05, kinds: [attention, mlp]}
extract: {alpha: 0.8, beta: 0.2, minus: general}
transfer: {gamma: 0.2, eta: 1.0, weights: {es: 0.5, bn: 0.5}, kinds: all}
rivals: {lora: {learning_rate: 0.01}}
methods: [base, maet, ties]
exam: {limit: 2, batch_size: 4}
launch: {devices: 1}
world: {seed: 1, documents: 30, items: 4}
""")
STUDY = yaml.safe_load("""
recipe: main.yml
title: how much
methods: [base, maet]
abilities: [mathematics]
seeds: [0, 1]
change: {exam.limit: 1}
vary: {transfer.gamma: [0.1, 0.2], size: {small: {training.tokens: 128}, large: {training.tokens: 256}}}
against: [{transfer.gamma: 0.1}, {method: base}]
""")


def recipe(content: dict, name: str, folder: Path):
    keys(folder)
    Path("text.jsonl").write_bytes(lines(ROWS))
    Path(name).write_text(yaml.safe_dump(content, sort_keys=False))


def read_plan(name: str) -> None:
    "What `maet plan` says, and what `maet train` and `maet run` ask before they begin."
    what = fitting.read(name)
    plan.describe(what, fitting.cluster_of(what))
    fitting.must_fit(what)


def read_study() -> None:
    asked = studies.load_study("study.yml")
    for _, each in studies.settings(asked): studies.methods_of(asked, each)
    study.planned(asked, Path("out"), 0)


def studied(folder: Path):
    recipe(MAIN, "main.yml", folder)
    Path("study.yml").write_text(yaml.safe_dump(STUDY, sort_keys=False))


def read_launch():
    jobs.read_config("deepspeed.json")
    jobs.machines(jobs.Launch(hosts="hosts", devices=2, zero=1))


def launched(folder: Path):
    jobs.write_config("deepspeed.json", jobs.Launch(zero=3, offload=True))
    Path("hosts").write_text("node-1 slots=8\n# a comment\nnode-2 slots=4\n")


add("train", partial(recipe, RUN, "run.yml"), lambda: read_plan("run.yml"), "run.yml", imports=LLAMA)
add("base", partial(recipe, BASE, "base.yml"), lambda: read_plan("base.yml"), "base.yml", imports=LLAMA)
add("run", partial(recipe, MAIN, "main.yml"), lambda: read_plan("main.yml"), "main.yml", imports=LLAMA)
add("study", studied, read_study, "*.yml", imports=LLAMA)
add("launch", launched, read_launch)
add("init", of_one_file, lambda: init("owner/name", languages=["es"], gpu="L4", hours=.1, config="model/config.json"), "model/config.json", imports=LLAMA)


# ---- merges ----

MERGES = yaml.safe_load("""
linear:
  merge_method: linear
  models: [{model: base, parameters: {weight: 0.5}}, {model: tuned, parameters: {weight: [0.1, 0.5, 0.2]}}]
  dtype: bfloat16
  tokenizer_source: base
ties:
  merge_method: ties
  base_model: base
  models: [{model: tuned, parameters: {weight: [{filter: mlp, value: 0.5}, {value: 1}], density: 0.5}}, {model: pack.safetensors, parameters: {weight: 1}}]
  parameters: {normalize: true, lambda: 0.7, elect: count, trim: tensor, rescale: density, int8_mask: true}
slices:
  merge_method: task_arithmetic
  base_model: base
  slices:
    - sources: [{model: base, layer_range: [0, 1]}, {model: tuned, layer_range: [0, 1], parameters: {weight: 0.3}}]
      parameters: {weight: 0.5}
dare:
  merge_method: dare_ties
  base_model: base
  models: [{model: tuned, parameters: {weight: 0.4, density: 0.3}}]
  parameters: {seed: 7}
slerp:
  merge_method: slerp
  base_model: base
  models: [{model: tuned}]
  parameters: {t: 0.4}
layer_swap:
  merge_method: layer_swap
  models: [{model: base, role: task}, {model: tuned, role: language, weight: 2}]
  parameters: {bottom: 0, top: 0, outside: task, weights: {task: 0.4, language: 0.6}, norms: layer}
  out_dtype: float32
revert:
  merge_method: revert
  base_model: base
  models: [{model: tuned}]
  parameters: {bottom: 0, top: 0}
maet:
  merge_method: maet
  base_model: base
  ability: {model: pack.safetensors}
  languages: [{model: tuned, weight: 0.5}, {model: tuned}]
  parameters: {gamma: 0.2, eta: 1.0, select_ratio: 0.8, kinds: [attention, mlp], similarity: dot}
""")


def merges(folder: Path):
    pack(folder)
    for name, content in MERGES.items(): Path(f"{name}.yml").write_text(yaml.safe_dump(content, sort_keys=False))


def read_merges():
    for name in MERGES: merge.merge(f"{name}.yml", "out", dry_run=True)


add("merge", merges, read_merges, "*.yml")


# ---- exams, answers, ledgers, run folders ----

QUESTIONS = {"mgsm_cot": ([{"id": n, "question": f"{n} and {n}?", "target": str(2 * n)} for n in range(4)],
                          [{"question": "1 and 2?", "answer": "The answer is 3.", "target": "3"}] * 8),
             "mmlu_science": ([{"id": n, "question": "Which?", "choices": ["a", "b", "c", "d"], "label": n % 4, "subject": f"s{n % 2}"} for n in range(4)],
                              [{"question": "Which?", "choices": ["a", "b", "c", "d"], "label": 1, "subject": f"s{n % 2}"} for n in range(10)]),
             "flores": ([{"id": n, "source": "words", "target": "palabras", "text": "words"} for n in range(4)], [])}


def questions(folder: Path):
    for task, (rows, shots) in QUESTIONS.items():
        for language in exams.held(task, ["en", "es"]):
            file = Path("data")/task/f"{language}.jsonl"
            (file.parent/"shots").mkdir(parents=True, exist_ok=True)
            file.write_bytes(lines(rows))
            if shots: (file.parent/"shots"/file.name).write_bytes(lines(shots))


def read_questions():
    for task in QUESTIONS:
        for language in exams.held(task, ["en", "es"]): exams.exam("data", task, language, limit=3)


def mgsm(folder: Path):
    for language in ("en", "es"): Path(f"mgsm_{language}.tsv").write_text("".join(f"{n} and {n}?\t{2 * n}\n" for n in range(4)))
    Path("exemplars.json").write_text(json.dumps({language: [{"question": "Question: 1 and 2?", "answer": "Answer: 3.", "answer_number": 3}] * 8 for language in ("en", "es")}))


def read_mgsm():
    try: published.mgsm_exams(".", ["en", "es"], "out")
    finally: shutil.rmtree("out", ignore_errors=True)  # it writes into a stage, which goes where it fails


MGSM_SETS = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.parquet}, {split: test, path: en/test.parquet}]
- config_name: es
  data_files: [{split: train, path: es/train.parquet}, {split: test, path: es/test.parquet}]
---
"""


def hub_set(folder: Path):
    "A data set of the hub as a folder that has its name, with a card that says where its files are."
    home = Path("juletxara/mgsm")
    asked = [dict(question=f"{n} and {n}?", answer=None, answer_number=2 * n) for n in range(4)]
    shots = [dict(question="Question: 1 and 2?", answer="Step-by-Step Answer: The answer is 3.", answer_number=3)] * 8
    for language in ("en", "es"):
        (home/language).mkdir(parents=True)
        for name, rows in (("train", shots), ("test", asked)): parquet(rows, home/language/f"{name}.parquet")
    (home/"README.md").write_text(MGSM_SETS)


def read_hub_set():
    import datasets
    with tempfile.TemporaryDirectory() as cache, patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
        try:
            exams.hub_exams("juletxara/mgsm", ["mgsm_cot"], ["en", "es"], Path("out"))
            for language in ("en", "es"): exams.exam("out", "mgsm_cot", language, limit=3)
        finally: shutil.rmtree("out", ignore_errors=True)


add("exams", questions, read_questions)
add("hub_exams", hub_set, read_hub_set, imports=("datasets", "pyarrow.parquet"))
add("mgsm", mgsm, read_mgsm)


def answers(folder: Path):
    "What `maet eval --out` leaves of a model, and of another one; without asking them."
    of_one_file(folder)
    for file in Path("model").glob("tokenizer*"): file.unlink()  # so that what is asked again is refused, quickly
    questions(folder)
    def told(lm, asked, out, *_):
        rows = []
        for e in asked:
            kept = [dict(id=row["id"], level=None, target=row["target"], output="0", prediction="0", correct=n % 2 == 0) for n, row in enumerate(e.rows)]
            (out/e.task).mkdir(parents=True, exist_ok=True)
            (out/e.task/f"{e.language}.jsonl").write_bytes(lines(kept))
            rows.append(dict(task=e.task, language=e.language, metric="exact_match", value=.5, stderr=.1, n=len(kept), seconds=1.))
        return rows
    with patch.object(evaluation, "ask", told), patch.object(evaluation, "_seated", lambda *_, **__: SimpleNamespace(in_force=lambda until: {}, set_aside=None)):
        for out in ("there", "here"): list(evaluation.evaluation_job("model", "data", ["mgsm_cot"], ["en", "es"], out, shots=0))


def read_answers():
    list(evaluation.evaluation_job("model", "data", ["mgsm_cot"], ["en", "es"], "here", "there", shots=0))
    evaluation.over_levels("there", "mgsm_cot", "en")


add("answers", answers, read_answers, "here/**/*", "there/**/*")


def measured(**changes) -> dict:
    return dict(study="main", scale="mini", method="maet", setting={"ability": "mathematics"}, language="en", task="mathematics", metric="acc", value=.5, stderr=.02,
                n=500, seed=0, versions=ledger.versions(), commit="1a2b3c4", seconds=3.) | changes


ENTRY = yaml.safe_load("""
main:
  title: The main job
  caption: Two methods.
  study: main
  rows: [{method: [base, maet], language: [en, average], task: [mathematics], seed: [0, 1]}]
  only: {method: [base, maet]}
  table: {}
  paper: {file: paper.csv, title: Paper, model: LLaMA-3 8B, metric: acc, where: {table: '2'}, names: {task: {mgsm: mathematics}, method: {MAET: maet}}}
""")
CLAIM = yaml.safe_load("""
M01:
  short: MAET beats the base
  evidence: [{study: main, rows: {language: [average], task: [mathematics], seed: [0, 1]}, of: {method: [maet]}, minus: {method: [base]}, lies: [0, 0.2]}]
  explain: It is small.
""")


def catalogue(folder: Path):
    rows = [measured(method=m, language=l, seed=s, value=.5 + .1 * (m == "maet") + .01 * s) for m in ("base", "maet") for l in ("en", "average") for s in (0, 1)]
    ledger.append("main.jsonl", rows)
    Path("figures.yml").write_text(yaml.safe_dump(ENTRY, sort_keys=False))
    Path("claims.yml").write_text(yaml.safe_dump(CLAIM, sort_keys=False))
    Path("claims.csv").write_text("id,paper,listed,claim,where,evidence,own_numbers,note\nM01,maet,yes,MAET beats the base,5.2,37 against 34,yes,\n")
    Path("paper.csv").write_text("paper,table,method,setting,language,task,metric,statistic,value,unit,note\nmaet,2,MAET,,en,mgsm,accuracy,score,17.20,percent,\n")


def read_ledger():
    for every in (False, True): ledger.read("main.jsonl", every, **{"seed": [0, 1], "setting.ability": "mathematics"})
    ledger.append("main.jsonl", [measured(seed=9)])  # it repairs what a kill cut short, and refuses what is broken
    ledger.read("main.jsonl", seed=9)


def read_catalogue():
    try: figures.figures("out", ".", papers=".", source="figures.yml")
    finally: shutil.rmtree("out", ignore_errors=True)
    found = claims.findings(".", ".", "claims.yml")
    for of in claims.by_paper(found).values(): claims.told(of), claims.as_csv(of)


def drawn(folder: Path):
    catalogue(folder)
    content = yaml.safe_load(Path("figures.yml").read_text())
    of = content["main"]
    for form, how in (("scores", dict(methods=["base", "maet"], languages=["en", "average"], tasks=["mathematics"])), ("dots", dict(panels="language")),
                      ("lines", dict(x="seed", xlabel="seed", panels="language")), ("heat", dict(x="method", y="language", xlabel="method", ylabel="language"))):
        content[form] = {key: value for key, value in of.items() if key != "table"} | dict(form=form, draw=how)
    Path("figures.yml").write_text(yaml.safe_dump(content, sort_keys=False))


def read_drawn():
    try: figures.figures("out", ".", papers=".", source="figures.yml")
    finally: shutil.rmtree("out", ignore_errors=True)
    claim_figures.forest(list(claims.findings(".", ".", "claims.yml").values()))


add("figures", drawn, read_drawn, "main.jsonl", "figures.yml", imports=("seaborn",))
add("ledger", catalogue, read_ledger, "main.jsonl")
add("catalogue", catalogue, read_catalogue)


def run_folder(folder: Path):
    "What `maet run` leaves."
    for name, inputs in (("world", {"seed": 1}), ("expert.es", {"base": "b", "training": {"tokens": 64}}), ("exam.mathematics.maet", {"tasks": ["mathematics"]})):
        stage = Path("run")/f"{name}-0123456789"
        stage.mkdir(parents=True)
        (stage/"stage.json").write_text(json.dumps([1, name, inputs]))
    rows = [dict(task="mathematics", language=l, metric="acc", value=.5, stderr=.1, n=4, seconds=2.) for l in ("en", "average")]
    (stage/"scores.json").write_text(json.dumps(rows))
    for name in ("en", "es"):
        (stage/"samples/mathematics").mkdir(parents=True, exist_ok=True)
        (stage/f"samples/mathematics/{name}.jsonl").write_bytes(lines([dict(id=n, correct=n % 2 == 0, bits=1.5, bytes=7) for n in range(5)]))
    Path("run/seed-0").mkdir()
    Path("run/seed-0/main.md").write_text("| mathematics (acc) | en |\n| --- | --- |\n| MAET | 50.0 ±10.0 |\n\nMAET is **above** `base`.\n")


def read_run_folder():
    exam = Path("run/exam.mathematics.maet-0123456789")
    ledger.read_scores(exam)
    for compare in (scores.paired, scores.paired_texts): compare(exam, exam, "mathematics", ["en", "es"])
    try:
        report.report("run", "page.html")
    finally: Path("page.html").unlink(missing_ok=True)


SPACE = {"alpha": trials_room.Range(0., 2., .8), "zone": trials_room.Range(0, 3, 1)}


def tried(trials: int):
    file, new = Path("trials.json"), not Path("trials.json").exists()
    trials_room.search(lambda constants: constants["alpha"] - constants["zone"], SPACE, trials, 0, file)
    if new and trials == 13: file.unlink()  # it was lost, and the search began anew


def job(folder: Path):
    "What a finished run of `maet train` leaves beside its result."
    two_models(folder)
    save_tokens("tokens.safetensors", Tokens(torch.arange(64).reshape(4, 16).int()))
    work = Path("work")
    work.mkdir()
    asked = a_job()
    (work/"job.json").write_text(json.dumps(asdict(asked)))
    (work/"launcher.json").write_text(json.dumps(dict(id="20260101-000000-abcdef", host="here", port=29500, ranks=1, command=["python"], progress_from=0, pid=1, born=1.)))
    (work/"report.json").write_text(json.dumps(dict(losses=[1., .5], steps=2, held_out={"2": .5}, tokens=64)))
    (work/"progress.jsonl").write_bytes(lines([dict(step=s, steps=2, loss=1. / s, tokens_per_second=9., tokens_left=0, peak_bytes=1) for s in (1, 2)]))
    logs = work/"logs"/"20260101-000000-abcdef"
    logs.mkdir(parents=True)
    (logs/"rank0.error.json").write_text(json.dumps(dict(rank=0, kind="ValueError", ours=False, said="a broken value", at=1.)))
    (logs/"rank0.log").write_text("Traceback\nValueError: a broken value\n")


def a_job() -> jobs.Job:
    return jobs.Job("base", "tokens.safetensors", "tuned", "work", Training(tokens=64, batch_tokens=32, sequence_length=16))


def read_job():
    jobs.curve("work")
    follow.follow("work", lambda *_: None)
    follow.stop("work")
    jobs.read_job("work/job.json")
    launch.run_job(a_job())


add("run_folder", run_folder, read_run_folder, "run/**/*")
add("trials", lambda folder: tried(12), lambda: tried(13), "trials.json", imports=("optuna",))
add("job", job, read_job, "work/**/*", may=(follow.RankError,))
