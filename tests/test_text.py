"Text as people have it, at the command: what is read, and what is refused in one line that names the file and the line."
import gzip, json, os, shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from maet.weights.checkpoints import Checkpoint
from maet.cli import main
from maet.text.documents import Source
from maet.text.streams import check, documents, reader
from maet.text.tables import digest, identity, open_tokens, read_meta, write_tokens
from maet.weights.tensors import MaetError
from test_bad_input import expert, folder, refused

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
QUESTION, ANSWER = {"role": "user", "content": "a few words"}, {"role": "assistant", "content": "a few words more"}
SYSTEM = {"role": "system", "content": "be brief"}
SHAREGPT = [{"from": "human", "value": "a few words"}, {"from": "gpt", "value": "a few words more"}]


def talks(template: str = GEMMA) -> None:
    "Give the base a chat template."
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = template
    tokenizer.save_pretrained("base")


def in_lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped(rows: list) -> bytes:
    return gzip.compress(in_lines(rows))


def parquet(rows: list) -> bytes:
    import pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def refused_corpus(capsys, folder: Path, path: str, **columns) -> str:
    return refused(capsys, folder, *expert(folder, corpora=[{"path": path} | columns]))


@pytest.mark.parametrize("name, written, place", [("chats.jsonl", in_lines, "line 21"), ("chats.jsonl.gz", zipped, "line 21"),
                                                  ("chats.parquet", parquet, "row 21")])
def test_a_chat_that_the_template_refuses(folder, capsys, name, written, place):
    talks()
    for chat, why in (([SYSTEM, QUESTION, ANSWER], "System role not supported"),
                      ([QUESTION, ANSWER, ANSWER], "Conversation roles must alternate")):
        (folder / name).write_bytes(written([{"m": [QUESTION, ANSWER]}] * 20 + [{"m": chat}]))
        said = refused_corpus(capsys, folder, name, messages="m")
        assert f"{name}: {place}: the chat template refuses this chat ({why}" in said


@pytest.mark.parametrize("template, why", [
    ("{% for m in messages %}{{ m.content }", "the chat template is broken in its line 1"),
    ("", "text.jsonl: line 1: the chat template writes nothing as the assistant's"),
    ("{{ messages + 1 }}", 'text.jsonl: line 1: the chat template refuses this chat (can only concatenate list (not "int") to list)'),
    ("{{ messages[0].by.name }}", "has no attribute 'by'"),
    ("{{ ''.__class__.__mro__ }}", "unsafe")])
def test_a_template_that_fails(folder, capsys, template, why):
    talks(template)
    (folder / "text.jsonl").write_bytes(in_lines([{"m": [QUESTION, ANSWER]}]))
    assert why in refused_corpus(capsys, folder, "text.jsonl", messages="m")


@pytest.mark.parametrize("row, why", [
    (["a"], "is list, not an object"), ("text", "is str, not an object"), ({"text": 5}, "text is int, not a text"),
    ({"text": float("nan")}, "text is float"), ({"text": "\ud800"}, "is not JSON"),
    ({"body": SHAREGPT}, "lacks the column text: it has body; for its chat write messages: body")])
def test_a_row(folder, capsys, row, why):
    (folder / "text.jsonl").write_bytes(in_lines([{"text": "a few words"}, {"text": None}, row]))
    said = refused_corpus(capsys, folder, "text.jsonl")
    assert "text.jsonl: line 3" in said and why in said


@pytest.mark.parametrize("chat, why", [
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, ANSWER], "message 1 has a part that is no text ('image_url')"),
    ([{"from": "narrator", "value": "a"}], "message 1 is from 'narrator'; known are human, user, system"),
    ("[]", "its messages are str, not a list"), ([ANSWER, {"role": "user"}], "message 2 is not a role and a text")])
def test_a_message(folder, capsys, chat, why):
    talks()
    (folder / "text.jsonl").write_bytes(in_lines([{"m": [QUESTION, ANSWER]}, {"m": chat}]))
    assert f"text.jsonl: line 2: {why}" in refused_corpus(capsys, folder, "text.jsonl", messages="m")


def test_what_people_have_is_trained(folder, capsys):
    "Windows' paragraphs; null rows; ShareGPT, of which nothing was said; parts of a text: the bits that plain files give."
    talks()
    parts = {"role": "user", "content": [{"type": "text", "text": "a few"}, {"type": "text", "text": " words"}]}
    plain = {"text.jsonl": in_lines([{"text": "a few\nwords"}, {"text": "more"}]), "chats.jsonl": in_lines([{"m": [QUESTION, ANSWER]}])}
    windows = {"text.txt": b"\xef\xbb\xbfa few\r\nwords\r\n \t\r\nmore\r\n", "sharegpt.jsonl": in_lines([{"id": 1, "conversations": SHAREGPT}])}
    nulls = {"null.jsonl": in_lines([{"text": None}, {"text": "a few\nwords"}, {"text": "more"}]), "parts.jsonl": in_lines([{"m": None}, {"m": [parts, ANSWER]}])}
    made = set()
    for files in (plain, windows, nulls):
        for name, data in files.items(): Path(name).write_bytes(data)
        text, chats = files
        said = {} if chats == "sharegpt.jsonl" else {"messages": "m"}
        with pytest.raises(SystemExit) as exit: main(list(expert(folder, corpora=[{"path": text}, {"path": chats} | said])))
        assert exit.value.code == 0, capsys.readouterr().err
        made.add(Checkpoint("expert").fingerprint)
        shutil.rmtree("expert")
    assert len(made) == 1 and Checkpoint("base").fingerprint not in made


class Letters:
    eos_token_id = 0
    def __call__(self, texts, add_special_tokens): return type("Batch", (), {"input_ids": [[ord(c) for c in t] for t in texts]})


@contextmanager
def somebody_else():
    "Root may read everything; another user may not."
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)


READERS = {"documents": lambda source: list(documents(source)), "check": check, "reader": reader, "identity": identity}


def test_a_file_of_another_user(folder):
    "It is called unreadable and never missing, by every reader; what may be read beside it is read."
    row = [{"text": "a"}]
    files = {"a.txt": b"a\n\nb\n", "a.txt.gz": gzip.compress(b"a\n\nb\n"), "a.jsonl": in_lines(row), "a.jsonl.gz": zipped(row), "a.parquet": parquet(row)}
    for name, data in files.items(): Path(name).write_bytes(data)
    Path("closed").mkdir()
    Path("closed/a.jsonl").write_bytes(in_lines(row))
    read_meta(write_tokens("table", [Source("text.jsonl")], Letters(), 64, 8, 0))  # also imports what the other user cannot
    for name in (*files, "table", "closed"): os.chmod(name, 0)
    os.chmod(folder, 0o755)
    asked = [(read, Source(name)) for read in READERS.values() for name in (*files, "closed", "closed/a.jsonl", "closed/*.jsonl")]
    asked += [(digest, "a.txt"), (read_meta, "table"), (open_tokens, "table")]
    try:
        with somebody_else():
            assert list(documents("text.jsonl"))[0] == "a few words"
            for read, what in asked:
                with pytest.raises(MaetError, match=r"^(a\.|table|closed)[^\n]*: cannot be read \(Permission denied\)$"): read(what)
    finally: os.chmod("closed", 0o700)


def test_what_is_no_file(folder, capsys, tmp_path_factory):
    "A folder, a link to nothing and a pipe are called what they are."
    odd = tmp_path_factory.mktemp("odd")
    (odd / "folder.jsonl").mkdir()
    (odd / "link.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(odd / "pipe.jsonl")
    for name, why in (("folder.jsonl", "no .jsonl"), ("fold*.jsonl", "cannot be read (Is a directory)"), ("pipe.jsonl", "cannot be read (a pipe"),
                      ("link.jsonl", "cannot be read (a link to gone.jsonl, which is not there)"), ("gone.jsonl", "cannot be read (No such file")):
        assert why in refused_corpus(capsys, folder, str(odd / name))
