"Same shapes, another meaning: every door that reads two models refuses what would be noise, and warns of the rest."
import json, shutil
from pathlib import Path

import pytest
import yaml

from maet.cli import main
from test_bad_input import refused

SHAPE = dict(hidden_size=16, num_hidden_layers=2, intermediate_size=24, vocab_size=40)
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
VOCABULARY = {f"w{number}": number for number in range(40)}


def weighted(*names) -> list: return [{"model": name, "parameters": {"weight": 1}} for name in names]


TUNED, PLAIN, ROLES = {"model": "tuned"}, {"model": "plain"}, {"base": "task", "tuned": "language"}
ON_DELTAS = dict(base_model="base", models=weighted("tuned"))
ENDS = {"bottom": 1, "top": 0}  # layers
METHODS = {"linear": dict(models=weighted("base", "tuned")),
           "magnitude_soup": dict(base_model="base", models=[TUNED]),
           "task_arithmetic": ON_DELTAS, "ties": ON_DELTAS, "dare_linear": ON_DELTAS, "dare_ties": ON_DELTAS,
           "slerp": dict(base_model="base", models=[TUNED], parameters={"t": .5}),
           "layer_swap": dict(models=[{"model": name, "role": role} for name, role in ROLES.items()], parameters=ENDS),
           "revert": dict(base_model="base", models=[TUNED], parameters=ENDS | {"threshold": 1e-6}),
           "maet": dict(base_model="base", ability=TUNED, languages=[PLAIN]),
           "maet of a language": dict(base_model="base", ability=PLAIN, languages=[TUNED])}
COMMANDS = {"locate": "locate base tuned --out out", "pack": "pack base tuned --out out",
            "extract": "extract --base base --ability tuned --minus plain --out out",
            "extract minus": "extract --base base --ability plain --minus tuned --out out"}
every_door = pytest.mark.parametrize("door", [*METHODS, *COMMANDS])


def make(folder: Path, seed: int, kind: str = "llama", **changes) -> None:
    "A checkpoint of random numbers; which ones depends on the seed alone."
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SHAPE | HEADS | changes)).save_pretrained(folder)
    (folder/"tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}, "added_tokens": []}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make(folder/"base", 0)
    make(folder/"plain", 1, eos_token_id=7, dtype="float32", attention_dropout=.5, use_cache=False)
    make(folder/"rope", 1, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    make(folder/"heads", 1, num_attention_heads=8, num_key_value_heads=8)
    make(folder/"mistral", 1, "mistral")
    shutil.copytree(folder/"plain", folder/"words")
    swapped = VOCABULARY | {"w5": 9, "w9": 5}
    (folder/"words"/"tokenizer.json").write_text(json.dumps({"model": {"vocab": swapped}, "added_tokens": []}))
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    "A folder with base and plain; `tuned` is a copy of another model."
    for name in ("base", "plain"): shutil.copytree(models/name, tmp_path/name)
    monkeypatch.chdir(tmp_path)
    return lambda name: shutil.copytree(models/name, tmp_path/"tuned")


def arguments(door: str, *more: str) -> list[str]:
    if door in COMMANDS: return [*COMMANDS[door].split(), *more]
    Path("merge.yml").write_text(yaml.safe_dump({"merge_method": door.split()[0]} | METHODS[door]))
    return ["merge", "merge.yml", "out", *more]


def made(capsys, door: str, *more: str) -> tuple[bytes, list[str]]:
    "The numbers that a door writes, and what it says on stderr. The output is removed."
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit: main(arguments(door, *more))
    said, out = capsys.readouterr().err.splitlines(), Path("out")
    assert exit.value.code == 0, said
    if out.is_dir():
        assert json.loads((out/"config.json").read_text()) == json.loads(Path("base/config.json").read_text())
        data = b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))
        shutil.rmtree(out)
    else:
        data = out.read_bytes()
        out.unlink()
    return data, said


@every_door
def test_every_door(door, models, place, capsys):
    "Silent for a usual fine-tune, a line for positions, refused for heads; the numbers are the same for all three."
    place("plain")
    expected, said = made(capsys, door)
    assert said == []
    heads = ["head_dim is 2, in base 4", "num_attention_heads is 8, in base 4", "num_key_value_heads is 8, in base 4"]
    for name, more, lines in (("rope", (), ["rope_parameters.rope_theta is 1000000.0, in base 10000.0"]),
                              ("heads", ("--allow-mismatch",), heads)):
        shutil.rmtree("tuned"), shutil.copytree(models/name, "tuned")
        found, said = made(capsys, door, *more)
        assert said == [f"maet: warning: tuned: {line}; that of base stands" for line in lines]
        assert found == expected
    for more in ((), ("--dry-run",)) if door in METHODS else ((),):
        assert f"tuned: {'; '.join(heads)}: shapes are" in refused(capsys, Path.cwd(), *arguments(door, *more))


@pytest.mark.parametrize("door", ["linear", "task_arithmetic", "layer_swap", "maet", "locate", "pack"])
def test_llama_and_mistral(door, place, capsys):
    place("mistral")
    said = refused(capsys, Path.cwd(), *arguments(door))
    assert 'tuned: model_type is "mistral", in base "llama": shapes are the same' in said
    _, said = made(capsys, door, "--allow-mismatch")
    assert "model_type" in said[0] and all(line.startswith("maet: warning: tuned: ") for line in said)


@pytest.mark.parametrize("door", "linear task_arithmetic slerp layer_swap maet locate extract".split())
def test_another_vocabulary_of_the_same_size(door, place, capsys):
    place("words")
    _, (said,) = made(capsys, door)
    assert said == ("maet: warning: tuned: 2 of 40 tokens are not those of base: token 'w5' is id 5 in base and id 9 in "
                    "tuned; token 'w9' is id 9 in base and id 5 in tuned; that of base stands")


@pytest.mark.parametrize("door", ["linear", "task_arithmetic", "layer_swap"])
def test_a_promise_of_one_vocabulary(door, place, capsys):
    "With tokenizer_source it is refused, in one line, whatever else is allowed."
    place("words")
    Path("merge.yml").write_text(yaml.safe_dump(METHODS[door] | {"merge_method": door, "tokenizer_source": "union"}))
    for more in ((), ("--allow-mismatch",)):
        said = refused(capsys, Path.cwd(), "merge", "merge.yml", "out", *more)
        assert "models of different tokenizers" in said


def test_shapes_are_refused_whatever_is_allowed(place, capsys):
    make(Path("tuned"), 1, intermediate_size=32)
    said = refused(capsys, Path.cwd(), *arguments("linear", "--allow-mismatch"))
    assert "does not fit base; shape:" in said


def test_an_architecture_that_transformers_does_not_know(place, capsys):
    place("plain")
    for name, clipping in (("base", 3), ("tuned", 4)):
        config = json.loads(Path(name, "config.json").read_text()) | {"model_type": "of tomorrow", "clipping": clipping}
        Path(name, "config.json").write_text(json.dumps(config))
    _, said = made(capsys, "linear")
    assert said == ["maet: warning: tuned: clipping is 4, in base 3; that of base stands"]
    Path("tuned/config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert 'hidden_act is "relu", in base "silu"' in refused(capsys, Path.cwd(), *arguments("linear"))
