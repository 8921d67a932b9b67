"What a user can get wrong: one line that names it, exit code 2, and nothing left behind."
import json, logging, os, shutil, signal, tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from maet.study import algorithm
from maet.training import launch, train
from maet.weights import saving
from maet.weights.checkpoints import Checkpoint
from maet.cli import main
from maet.weights.differences import Difference
from maet.weights.packs import save_keys
from maet.study.stages import side_by_side
from maet.weights.tensors import MaetError
from test_run import TINY
from tiny import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "base")
    tiny(tmp_path / "tuned", seed=1)
    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    return tmp_path


def refused(capsys, folder: Path, *arguments: str) -> str:
    "Run the command; what it says must be one line, and the folder as it was."
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit: main(list(arguments))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("maet: ") and said.count("\n") == 1, said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return said


def locate(*more): return ("locate", "base", "tuned", "--out", "keys.safetensors", *more)


def expert(folder, **changes) -> tuple:
    recipe = dict(base="base", corpora=[{"path": "text.jsonl"}],
                  training=dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)) | changes
    (folder / "expert.yml").write_text(yaml.safe_dump(recipe))
    return "train", "expert.yml", "--out", "expert"


def test_what_is_right_passes(folder, capsys):
    with pytest.raises(SystemExit) as exit: main(list(locate()))
    assert exit.value.code == 0 and (folder / "keys.safetensors").is_file()
    with pytest.raises(SystemExit) as exit: main(list(expert(folder, keys=["keys.safetensors"], training=dict(
        mode="key-neuron", tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)) [:-1]) + ["expert.safetensors"])
    assert exit.value.code == 0 and (folder / "expert.safetensors").is_file()


@pytest.mark.parametrize("key, where", [({"gama": 1}, "unknown key gama"), ({"transfer": {"gama": 1}}, "unknown key gama"),
                                        ({"locate": TINY["locate"] | {"ratio": 0}}, "ratio: 0"), ({"locate": TINY["locate"] | {"ratio": 1.5}}, "ratio: 1.5"),
                                        ({"training": TINY["training"] | {"tokens": "many"}}, "tokens"), ({"languages": "es"}, "languages"),
                                        ({"base": "nowhere"}, "nowhere")])
def test_recipe(folder, capsys, key, where):
    (folder / "bad.yml").write_text(yaml.safe_dump(TINY | key))
    assert where in refused(capsys, folder, "run", "--recipe", "bad.yml", "--out", "out")


def named(folder: Path, name: str) -> dict[str, tuple]: # door -> arguments
    "Every door, with a name that no file can have where it asks for one."
    (folder / "linear.yml").write_text(yaml.safe_dump(dict(merge_method="linear", models=[{"model": "base"}, {"model": name}])))
    (folder / "ties.yml").write_text(yaml.safe_dump(dict(merge_method="ties", base_model="base", models=[{"model": name}])))
    return {
        "merge": ("merge", "linear.yml", "out"), "merge onto a base": ("merge", "ties.yml", "out"),
        "locate": ("locate", "base", name, "--out", "out"), "locate from": ("locate", name, "tuned", "--out", "out"),
        "pack": ("pack", "base", name, "--out", "out"), "check": ("pack", "base", "--check", name),
        "keys": ("pack", "base", "tuned", "--keys", name, "--out", "out"),
        "extract": ("extract", "--base", "base", "--ability", name, "--minus", "tuned", "--out", "out"),
        "eval": ("eval", name, "--data", "exams", "--tasks", "mathematics", "--languages", "en"),
    }


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000 + "b"], ids=["long", "deep"])  # a shell passes no NUL on; a file may
@pytest.mark.parametrize("door", ["merge", "merge onto a base", "locate", "locate from", "pack", "check", "keys", "extract", "eval"])
def test_a_name_that_no_file_can_have(folder, capsys, door, name):
    refused(capsys, folder, *named(folder, name)[door])


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "NUL"])
@pytest.mark.parametrize("key", ["base", "keys", "corpora", "held_out", "merge", "merge onto a base"])
def test_a_name_in_a_recipe_that_no_file_can_have(folder, capsys, key, name):
    if key.startswith("merge"):
        refused(capsys, folder, *named(folder, name)[key])
        return
    changes = {"base": name, "keys": [name], "corpora": [{"path": name}], "held_out": [{"path": name}]}
    more = {"training": dict(mode="key-neuron", tokens=128, batch_tokens=64, sequence_length=32)} if key == "keys" else {}
    refused(capsys, folder, *expert(folder, **{key: changes[key]}, **more))


@pytest.mark.parametrize("ratio", ["0", "1.5", "-1", "nan"])
def test_ratio(folder, capsys, ratio): assert "ratio" in refused(capsys, folder, *locate("--ratio", ratio))


def test_other_shapes(folder, capsys):
    shutil.rmtree("tuned")
    tiny(folder / "tuned", hidden=32)
    assert "tuned" in refused(capsys, folder, *locate())
    assert "tuned" in refused(capsys, folder, "pack", "base", "tuned", "--out", "pack.safetensors")


def test_keys_of_another_base(folder, capsys):
    other = Checkpoint("tuned")
    save_keys("other.safetensors", {n: torch.ones(other.shape(n), dtype=torch.bool) for n in other.names}, other)
    assert "other.safetensors" in refused(capsys, folder, "pack", "base", "tuned", "--keys", "other.safetensors", "--out", "pack.safetensors")
    training = dict(mode="key-neuron", tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    assert "other.safetensors" in refused(capsys, folder, *expert(folder, keys=["other.safetensors"], training=training))


def test_truncated_shard(folder, capsys):
    shard = folder / "tuned" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    assert "model.safetensors" in refused(capsys, folder, *locate())


def test_nan(folder, capsys):
    weights = load_file("tuned/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, "tuned/model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refused(capsys, folder, *locate())
    assert "model.norm.weight" in refused(capsys, folder, "pack", "base", "tuned", "--out", "pack.safetensors")


def test_index_that_names_another_folder(folder, capsys):
    (folder / "tuned" / "model.safetensors").rename(folder / "x.safetensors")
    names = Checkpoint("base").names
    (folder / "tuned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: "../x.safetensors" for n in names}}))
    assert "../x.safetensors" in refused(capsys, folder, *locate())


def test_pickle(folder, capsys):
    torch.save(load_file("tuned/model.safetensors"), "tuned/pytorch_model.bin")
    (folder / "tuned" / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(capsys, folder, *locate())


@pytest.mark.parametrize("content, where", [(b"", "no document"), (b'{"text": "ma\xf1ana"}\n', "UTF-8"), (b'{"body": "x"}\n', "lacks"), (b"{", "JSON")])
def test_corpus(folder, capsys, content, where):
    (folder / "text.jsonl").write_bytes(content)
    assert where in refused(capsys, folder, *expert(folder))
    files = {name: {"path": "text.jsonl"} for name in ("general/en", "general/es", "general/bn", "mathematics/en")}
    (folder / "run.yml").write_text(yaml.safe_dump(TINY | {"corpora": files}))
    assert where in refused(capsys, folder, "run", "--recipe", "run.yml", "--out", "out")


def test_unwritable_output(folder, capsys):
    (folder / "file").write_text("")
    (folder / "run.yml").write_text(yaml.safe_dump(TINY))
    assert "file" in refused(capsys, folder, "run", "--recipe", "run.yml", "--out", "file/out")
    assert "file" in refused(capsys, folder, *locate()[:3], "--out", "file/keys.safetensors")
    assert "file" in refused(capsys, folder, *expert(folder)[:2], "--out", "file/expert")


# ---- what nobody thought of ----

MODELS = [{"model": name, "parameters": {"weight": 1}} for name in ("base", "tuned")]
WRITERS = {"merge": "merge merge.yml out", "locate": "locate base tuned --out out", "pack": "pack base tuned --out out",
           "extract": "extract --base base --ability tuned --minus tuned --out out"}
FAULTS = [(ValueError("boom\nand more"), 1), (KeyError("boom"), 1), (AssertionError("boom"), 1),
          (MemoryError("boom"), 2), (RuntimeError("boom: CUDA out of memory.\nand more"), 2),
          (OSError(28, "boom: no space left", "x"), 2)]


def failing(error: Exception):
    "A function that fails like this, whatever it is asked."
    def fails(*arguments, **options): raise error
    return fails


def files(folder: Path) -> dict: return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def ended(capsys, *arguments: str) -> tuple[int, str]:
    "Run the command; it must end, and say one line, below bars if there were some."
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit: main(list(arguments))
    *bar, said = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert said.startswith("maet: ") and all(line.startswith("\r") for line in bar), [*bar, said]
    return exit.value.code, said


@pytest.fixture
def traces(tmp_path_factory, monkeypatch):
    "An empty folder for temporary files."
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("error, code", FAULTS)
def test_one_line_and_nothing_left(folder, traces, capsys, monkeypatch, verb, error, code):
    "The fault comes at the worst moment: when all numbers are written, and the output only needs its name."
    (folder / "merge.yml").write_text(yaml.safe_dump(dict(merge_method="linear", models=MODELS)))
    before = files(folder)
    monkeypatch.setattr("maet.weights.files.sync", failing(error))
    found, said = ended(capsys, *WRITERS[verb].split())
    assert found == code and "boom" in said and "and more" not in said and files(folder) == before
    written = list(traces.glob("maet-traceback-*.txt"))
    assert len(written) == (code == 1)
    if code == 1:
        text = written[0].read_text()
        assert str(written[0]) in said and type(error).__name__ in said and "please report it" in said
        versions, command, *_ = text.splitlines()
        assert "torch " in versions and command == f"maet {WRITERS[verb]}" and "in fails" in text


def test_a_traceback_that_cannot_be_written(folder, traces, capsys, monkeypatch):
    monkeypatch.setattr("maet.weights.files.sync", failing(ValueError("boom")))
    monkeypatch.setattr(tempfile, "mkstemp", failing(OSError(28, "No space left on device")))
    code, said = ended(capsys, *locate())
    assert code == 1 and "cannot be written (No space left on device), MAET_TRACEBACK=1 shows it" in said


def test_developers_see_the_traceback(folder, capsys, monkeypatch):
    monkeypatch.setattr("maet.weights.files.sync", failing(ValueError("boom")))
    monkeypatch.setenv("MAET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="boom"): main(list(locate()))


def test_log_lines_of_libraries_do_not_come_first(folder, traces, capsys, monkeypatch):
    def fails(path):
        for name in ("torch._subclasses", "transformers"): logging.getLogger(name).error("forty lines")
        raise ValueError("boom")
    monkeypatch.setattr("maet.weights.files.sync", fails)
    before = logging.root.manager.disable
    assert ended(capsys, *locate())[0] == 1 and logging.root.manager.disable == before


# ---- what a training leaves behind ----

def trained(folder: Path, arguments: tuple, out: str) -> dict:
    "The weights of an uninterrupted run."
    with pytest.raises(SystemExit) as exit: main([*arguments[:-1], out])
    assert exit.value.code == 0
    return load_file(folder / out / "model.safetensors")


def test_a_training_that_fails_before_anything_is_made(folder, traces, capsys, monkeypatch):
    arguments = expert(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("maet.study.algorithm.write_tokens", failing(ValueError("boom")))
    assert ended(capsys, *arguments)[0] == 1 and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("error, code", [(ValueError("boom"), 1), (OSError(28, "boom", "x"), 2)])
def test_a_training_that_fails_goes_on(folder, traces, capsys, monkeypatch, error, code):
    "The table of tokens is kept, and used."
    arguments = expert(folder)
    with monkeypatch.context() as patch:
        patch.setattr("maet.study.algorithm.run_job", failing(error))
        found, said = ended(capsys, *arguments)
    table = folder / ".expert.work" / "tokens.safetensors"
    state = table.stat().st_ino
    assert found == code and "boom" in said and "the same command goes on from here" in said
    assert not (folder / "expert").exists()
    whole, seen = trained(folder, arguments, "whole"), []
    with monkeypatch.context() as patch:
        original = launch.run_job
        def watched(*arguments):
            seen.append(table.stat().st_ino)
            return original(*arguments)
        patch.setattr(algorithm, "run_job", watched)
        again = trained(folder, arguments, "expert")
    assert seen == [state] and not table.parent.exists()
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_a_disk_that_is_full_at_the_end_loses_no_training(folder, traces, capsys, monkeypatch):
    "The last checkpoint stays where the result finds no room; when there is room, no step is taken again."
    steps = dict(tokens=256, batch_tokens=64, sequence_length=32, learning_rate=0.001, save_every=2)
    arguments = expert(folder, training=steps)
    whole = trained(folder, arguments, "whole")
    room_for = saving.room_for
    with monkeypatch.context() as patch:
        patch.setattr(saving, "room_for", lambda out, size: room_for(out, 10**18))
        code, said = ended(capsys, *arguments)
    assert code == 2 and "needs 1,000,000,000.00 GB" in said and "the same command goes on from here" in said
    assert not (folder / "expert").exists() and list((folder / ".expert.work").rglob("*.safetensors"))
    seen, go_through = [], train._go_through
    def watched(trainer, last, work):
        seen.append(last.name)
        go_through(trainer, last, work)
    monkeypatch.setattr(train, "_go_through", watched)
    again = trained(folder, arguments, "expert")
    assert seen == ["checkpoint-4"] and not (folder / ".expert.work").exists()  # the last of 4 steps
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def nobody_thought_of_it(store): raise KeyError("boom")
def out_of_memory(store): os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_fails_or_is_killed(folder):
    with pytest.raises(RuntimeError, match="KeyError: 'boom'") as caught:
        side_by_side(nobody_thought_of_it, folder / "run", 1)
    assert "in nobody_thought_of_it" in str(caught.value.__cause__)
    with pytest.raises(MaetError, match="a worker was ended with code -9"):
        side_by_side(out_of_memory, folder / "run", 1)


def test_a_base_of_bad_input(folder, capsys):
    model = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    training = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    recipe = dict(corpora={"x": {"path": "text.jsonl"}}, vocabulary=300, model=model,
                  phases=[dict(shares={"x": 1}, training=training)])
    (folder / "base.yml").write_text(yaml.safe_dump(recipe))
    (folder / "text.jsonl").write_text('{"text": "a few words"}\n{"body": 1}\n')
    before = files(folder)
    code, said = ended(capsys, "base", "base.yml", "--out", "made")
    assert code == 2 and "text.jsonl: line 2 lacks the column" in said and files(folder) == before
