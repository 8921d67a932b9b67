"The road of a user: each command says what it wrote and what comes next, and the examples of the help are commands that run."
import contextlib, io, json, re, shlex
from pathlib import Path

import pytest
import yaml

from maet import verbs
from maet.cli import app, main
from maet.weights.tensors import MaetError
from test_run import TINY
from tiny import tiny

ROOT = Path(__file__).resolve().parent.parent


def maet(line: str) -> str:
    "Run a command as the shell would, and give what it printed; `> FILE` at its end is a file."
    line, _, file = line.removeprefix("maet ").partition(" > ")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main(shlex.split(line))
    assert not end.value.code, (line, err.getvalue())
    if file: Path(file).write_text(out.getvalue())
    return out.getvalue() + err.getvalue()


def refused(line: str) -> str:
    "What a command says that is refused: one line, behind the bars of what it did before."
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main(shlex.split(line.removeprefix("maet ")))
    said = [line for line in err.getvalue().split("\n") if line and not line.startswith("\r")]
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("maet: "), err.getvalue()
    return said[0]


def next_of(said: str) -> list[str]: return re.findall(r"^next: (maet .*)$", said, re.M)


def examples() -> list[str]:
    found = []
    for command in app.registered_commands:
        words = " ".join((command.callback.__doc__ or "").split())
        found += [example.strip() for example in words.split("Example: ")[1:]]
    return found


# ---- the examples of the help ----

def test_every_command_has_an_example_that_it_understands(monkeypatch, tmp_path):
    "Each is read by its command, whose verb is replaced: no option in an example is unknown."
    monkeypatch.chdir(tmp_path)
    called = []
    for name in ("run", "search", "init", "keys", "base", "train", "plan", "locate", "pack", "extract", "merge", "evaluate", "figures", "report"):
        def verb(*_, name=name, **__):
            called.append(name)
            raise SystemExit(0)
        monkeypatch.setattr(verbs, name, verb)
    asked = [example for example in examples() if "--check" not in example]
    for example in asked: maet(example)
    assert len(called) == len(asked) >= 18
    assert set(called) == {"run", "search", "init", "keys", "base", "train", "plan", "locate", "pack", "extract", "merge", "evaluate", "figures", "report"}


QUICK = ("maet init", "maet keys", "maet plan my", "maet train", "maet locate", "maet pack", "maet extract", "maet merge", "maet report")


def test_the_quick_examples_run_as_they_stand(monkeypatch, tmp_path):
    "In a folder that has what they name; what one of them made the next one takes."
    from maet.study import drafts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drafts, "draft", lambda aim, config=None: Path(ROOT / "maet/recipes/1b.yml").read_text())  # minutes: test_plan plans it
    tiny(tmp_path / "base")
    for seed, name in enumerate(("tuned", "es", "bn"), 1): tiny(tmp_path / name, seed=seed)
    Path("text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    small = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    text = dict(base="base", corpora=[{"path": "text.jsonl"}])
    Path("probe.yml").write_text(yaml.safe_dump(text | dict(training=small, ratio=0.05)))
    Path("expert.yml").write_text(yaml.safe_dump(text | dict(training=small | {"mode": "key-neuron"}, keys=["keys.safetensors"])))
    Path("merge.yml").write_text("{merge_method: maet, base_model: base, ability: {model: R_math.safetensors}, languages: [{model: es}, {model: bn}]}")
    Path("runs").mkdir()
    maet("locate base/ tuned/ --out keys.safetensors")
    for name in ("math-en", "en"): maet(f"pack base/ tuned/ --out {name}.safetensors")
    maet("keys --schema > schema.json")
    assert "properties" in Path("schema.json").read_text()
    keys = Path("keys.safetensors")

    for example in examples():
        if not example.startswith(QUICK) or "--push" in example or example.startswith(("maet report", "maet plan")): continue
        if example.startswith("maet locate"): keys.unlink(missing_ok=True)
        out = re.search(r"--out (\S+)|merge.yml (\S+)", example)
        place = Path(next(filter(None, out.groups()))) if out else None
        said = maet(example)
        if place: assert place.exists() and f"wrote {place} (" in said and "next: maet " in said, (example, said)
    assert yaml.safe_load(Path("my.yml").read_text())["base"] == "meta-llama/Llama-3.2-1B"
    assert (tmp_path / "merged" / "config.json").is_file()


# ---- plan and run ----

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "base")
    Path("text.jsonl").write_text('{"text": "a few words"}\n' * 50)
    return tmp_path


OWN = dict(scale="mine", base="base", languages=["es"], abilities=dict(mathematics=dict(tasks=["mgsm_direct"], select_ratio=0.8)), methods=["base", "maet"],
           training=dict(tokens=128, batch_tokens=64, sequence_length=32), locate=dict(training=dict(tokens=128, batch_tokens=64, sequence_length=32)),
           corpora={name: {"path": "text.jsonl"} for name in ("general/en", "general/es", "mathematics/en")}, exam={"data": "exams"})


REFUSED = {
    "no exam": (dict(exam={}), "exam: there is none"),
    "no French": (dict(languages=["fr"]), "no corpus general/fr"),
    "no such method": (dict(methods=["magic"]), "magic is not known"),
    "no such task": (dict(abilities=dict(mathematics=dict(tasks=["rhymes"], select_ratio=0.8))), "rhymes"),
    "not the task's data set": (dict(exam={"hub": "me/mine"}), "not from me/mine")}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_and_run_refuse_in_the_same_words(folder, case):
    changes, says = REFUSED[case]
    Path("my.yml").write_text(yaml.safe_dump(OWN | changes))
    by_plan, by_run = refused("plan my.yml"), refused("run my.yml --out out")
    assert says in by_plan and by_plan == by_run
    assert not Path("out").exists()


def test_what_is_missing_on_this_machine_is_listed_by_plan_and_refused_by_run(folder):
    Path("my.yml").write_text(yaml.safe_dump(OWN))
    said = maet("plan my.yml --gpu L4 --price 0.5")
    (line,) = (line for line in said.splitlines() if "asks for it" in line and "/en.jsonl" in line)
    missing = line.partition("asks for it: ")[2]
    assert missing in refused("run my.yml --out out") and "exams/mgsm_direct/en.jsonl" in missing
    assert "hours" in said and "price" in said and next_of(said) == ["maet run my.yml --out runs/my"]


def test_published_collections_are_looked_for_before_the_first_step(folder):
    Path("my.yml").write_text(yaml.safe_dump(OWN | dict(exam=dict(published="collections"))))
    lines = [line for line in maet("plan my.yml --gpu L4").splitlines() if "asks for it" in line]
    assert any("collections/mgsm" in line for line in lines), lines
    assert "collections/mgsm" in refused("run my.yml --out out")
    assert not list(Path("out").glob("[!.]*-*"))


def test_a_hub_id_is_a_base_everywhere(folder, monkeypatch):
    "In plan only its config is fetched; in train the model."
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: asked.append((name, file)) or str(folder / "base" / file))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder / "base"))
    training = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    Path("expert.yml").write_text(yaml.safe_dump(dict(base="me/smol", corpora=[{"path": "text.jsonl"}], training=training)))
    assert "dense" in maet("plan expert.yml")
    assert set(asked) == {("me/smol", "config.json")}
    said = maet("train expert.yml --out expert")
    assert "me/smol" in asked and "wrote expert (" in said and "loss" in said
    assert next_of(said) == ["maet eval expert", "maet pack BASE expert --out PACK.safetensors"]


def test_tokens_that_are_not_taken_as_written_are_said(folder):
    training = dict(tokens=100, batch_tokens=640, sequence_length=32, learning_rate=0.001)
    Path("expert.yml").write_text(yaml.safe_dump(dict(base="base", corpora=[{"path": "text.jsonl"}], training=training)))
    for line in ("plan expert.yml", "train expert.yml --out expert"):
        assert "training.tokens: 100 become 640" in maet(line)


def test_exams_of_the_hub_are_asked_before_the_first_step(folder, monkeypatch):
    "Once, at the revision; a run that goes on needs no hub, and one that the hub refuses has trained nothing."
    Path("my.yml").write_text(yaml.safe_dump(OWN | dict(exam=dict(hub="juletxara/mgsm", revision="v1", shots=0, limit=2))))
    asked = []
    def gone(*_): raise MaetError("the hub is gone")
    def theirs(dataset, config, split, revision):
        asked.append((dataset, config, split, revision))
        return [dict(question=f"{n} + {n}?", answer=f"{n + n}", answer_number=n + n) for n in range(1, 9)]
    monkeypatch.setattr("maet.exams.questions._download", gone)
    assert "the hub is gone" in refused("run my.yml --out out")
    assert not list(Path(".").glob("out/*tokens*")) and not list(Path(".").glob("out/*probe*"))

    monkeypatch.setattr("maet.exams.questions._download", theirs)
    maet("run my.yml --out out")
    assert {(config, split) for _, config, split, _ in asked} == {(config, split) for config in ("en", "es") for split in ("test", "train")}
    assert len(asked) == 4 and {(dataset, revision) for dataset, _, _, revision in asked} == {("juletxara/mgsm", "v1")}
    monkeypatch.setattr("maet.exams.questions._download", gone)
    assert "mgsm_direct" in maet("run my.yml --out out")


# ---- eval ----

def test_a_model_that_is_not_there_is_said_at_once(folder, monkeypatch):
    def asked(*_, **__): raise AssertionError("the hub was asked")
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)
    (folder / "runs").mkdir()
    for model in ("nowhere", "./nowhere", "runs/nothing", str(folder / "gone")):
        for more in ("", " --tasks mgsm"): assert "no such model here" in refused(f"eval {model}{more}")
    assert "say --data FOLDER" in refused("eval base")


# ---- the whole road ----

def test_each_command_of_the_road_is_said_by_the_one_before(tmp_path, monkeypatch):
    "plan says run, run says report and eval; nothing appears beside the run folder and the page."
    monkeypatch.chdir(tmp_path)
    Path("my.yml").write_text(yaml.safe_dump(TINY | {"workers": 1, "methods": ["base", "maet"]}))
    (run,) = next_of(maet("plan my.yml --gpu L4"))
    said = maet(run)
    assert "wrote runs/my (" in said and "wrote runs/my/results/main.jsonl (" in said
    assert {path.name for path in tmp_path.iterdir()} == {"my.yml", "runs"}  # and no data/results
    report, examine = next_of(said)
    assert "wrote report.html (" in maet(report) and Path("report.html").is_file()
    said = maet(examine)
    rows = [json.loads(line) for line in Path("runs/my/results/main.jsonl").read_text().splitlines()]
    for language in ("en", "es", "bn"):
        (row,) = (row for row in rows if row["method"] == "maet" and row["language"] == language and "minus" not in row["setting"])
        assert re.search(rf"^mathematics +{language} +exact_match {row['value']:.4f} ", said, re.M), said


# ---- what is kept, and what is sent ----

@pytest.mark.parametrize("mode, out", [("dense", "expert"), ("lora", "adapter"), ("key-neuron", "es.safetensors")])
def test_recipe_losses_and_card_stand_beside_what_was_trained(folder, mode, out):
    import pandas as pd
    small = dict(tokens=128, batch_tokens=64, sequence_length=32, learning_rate=0.001)
    content = dict(base="base", corpora=[{"path": "text.jsonl"}], held_out=[{"path": "text.jsonl"}], held_out_tokens=32, training=small | {"mode": mode})
    if mode == "key-neuron":
        tiny(folder / "tuned", seed=1)
        maet("locate base tuned --out keys.safetensors")
        content["keys"] = ["keys.safetensors"]
    Path("expert.yml").write_text(yaml.safe_dump(content))
    said = maet(f"train expert.yml --out {out}")
    beside = Path(out.removesuffix(".safetensors") + ".training")
    assert f"wrote {beside} (" in said
    assert sorted(file.name for file in beside.iterdir()) == ["README.md", "losses.csv", "losses.png", "recipe.yml"]
    table = pd.read_csv(beside / "losses.csv")
    table = table[table.loss.notna()]
    assert table.tokens.tolist() == [64, 128] and f"loss {table.loss.iloc[0]:.3f} at first" in said
    again = maet(f"train {beside}/recipe.yml --out again{Path(out).suffix}")  # the kept recipe makes the same
    assert pd.read_csv("again.training/losses.csv").equals(pd.read_csv(beside / "losses.csv")) and "wrote again" in again


def test_a_merged_model_is_sent_with_its_card(folder, monkeypatch):
    from types import SimpleNamespace
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **_: sent.append(name))
    def upload(self, repo_id, folder_path, **_):
        sent.append((repo_id, {file.name for file in Path(folder_path).iterdir()}))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    tiny(folder / "tuned", seed=1)
    Path("merge.yml").write_text("{merge_method: linear, models: [{model: base}, {model: tuned}], parameters: {weight: 0.5}}")
    assert "no token" in refused("merge merge.yml merged --push me/merged")
    assert "no token" in refused("pack base tuned --out pack.safetensors --push me/pack")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert "no owner/name" in refused("merge merge.yml merged --push merged")
    assert not sent and not Path("merged").exists() and not Path("pack.safetensors").exists()
    maet("merge merge.yml merged --push me/merged --dry-run")
    assert not sent
    said = maet("merge merge.yml merged --push me/merged")
    assert "https://huggingface.co/me/merged" in said and "wrote merged (" in said
    (name, (repository, files)) = sent
    assert name == repository == "me/merged" and {"README.md", "maet_config.yml", "config.json", "model.safetensors"} <= files


def test_the_shell_completes_without_torch():
    import subprocess, sys
    program = "import sys; sys.argv = ['maet']; from maet.cli import main\ntry: main([])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    import os
    asked = os.environ | dict(_MAET_COMPLETE="complete_bash", COMP_WORDS="maet tr", COMP_CWORD="1")
    done = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True)
    assert done.stdout.split() == ["train"] and done.stderr.split()[-1] == "False", (done.stdout, done.stderr)
    assert "--install-completion" in maet("--help")
