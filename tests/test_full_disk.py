"A merge, pack, locate or extract that cannot be finished: one line, exit code 2, nothing left behind, inputs as they were."
import errno, json, os, shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from maet.cli import main
from test_merge_kill import COMMANDS, command
from tiny import content, make_experts, on_a_small_disk, short_files, small_disk

VERBS = sorted(COMMANDS)


@pytest.fixture(scope="module")
def original(tmp_path_factory): return make_experts(tmp_path_factory.mktemp("original"), 64, 2, "100KB")


@pytest.fixture
def experts(original, tmp_path):
    "A copy that a test may damage."
    shutil.copytree(original, tmp_path/"experts")
    return tmp_path/"experts"


# ---- a disk that fills up ----

DISKS = {"no room from the start": (small_disk, "size=16k"), "no room for another file": (small_disk, "size=64m,nr_inodes=4"),
         "no room in a file": (short_files, "10000")}


@pytest.mark.parametrize("verb, disk", [(verb, disk) for verb in VERBS for disk in DISKS if verb == "merge" or "another" not in disk])
def test_full_disk(experts, verb, disk):
    before = content(experts)
    (code, said, left), = on_a_small_disk(experts, *DISKS[disk], command(verb, "disk/out"))
    assert code == 2 and said.count("\n") == 1 and said.startswith("maet: ") and "disk/out" in said, said
    assert left == [] and content(experts) == before
    if "start" in disk: assert os.strerror(errno.ENOSPC).lower() in said.lower() or "free" in said, said


# ---- what goes wrong with an input while it is read ----

def vanish(shard: Path) -> None: shard.unlink()
def shrink(shard: Path) -> None: os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("harm", [vanish, shrink])
def test_input_lost_half_way(experts, capsys, monkeypatch, verb, harm):
    "A deleted file may still be read to its end where it was open already; otherwise one line. Never a crash or half a result."
    monkeypatch.chdir(experts)
    from maet.weights import checkpoints
    shards, reads, read = sorted(Path("es").glob("*.safetensors")), [], checkpoints.Checkpoint.piece
    def piece(self, *where):
        reads.append(where)
        if len(reads) == 12:
            for shard in shards[1:]: harm(shard)
        return read(self, *where)
    monkeypatch.setattr(checkpoints.Checkpoint, "piece", piece)
    before = content(experts)
    code, said = run(capsys, verb)
    assert len(reads) >= 12
    for shard in shards: before.pop(str(shard))
    if code == 0: assert harm is vanish
    else: assert code == 2 and said.count("\n") == 1 and "es" in said and not Path("out").exists(), said
    assert {name: digest for name, digest in content(experts).items() if name in before} == before
    assert not [path for path in experts.iterdir() if path.name.startswith(".")]


def run(capsys, verb: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit: main(command(verb, "out"))
    return exit.value.code, capsys.readouterr().err


# ---- inputs that are wrong from the start ----

def refused(capsys, folder: Path, verb: str = "merge") -> str:
    before = content(folder)
    code, said = run(capsys, verb)
    assert code == 2 and said.startswith("maet: ") and said.count("\n") == 1, said
    assert content(folder) == before and not [path for path in folder.iterdir() if path.name.startswith(".")]
    return said


def spoil(file: Path, name: str, change) -> None:
    "Change one tensor of a safetensors file."
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, {"format": "pt"})


def shard_of(folder: Path, name: str) -> Path:
    return folder/json.loads((folder/"model.safetensors.index.json").read_text())["weight_map"][name]


def set_to(value: float):
    def change(tensor):
        tensor.view(-1)[-3] = value
        return tensor
    return change


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("model", ["base", "ability", "es", "bn.safetensors"])
def test_not_a_number(experts, capsys, monkeypatch, model, value):
    monkeypatch.chdir(experts)
    name = "model.layers.1.mlp.up_proj.weight"
    if model == "bn.safetensors":
        from safetensors import safe_open
        with safe_open(model, "pt") as file: meta = file.metadata()
        tensors = load_file(model)
        set_to(float(value))(tensors[name + "#values"])
        save_file(tensors, model, meta)
    else: spoil(shard_of(Path(model), name), name, set_to(float(value)))
    verbs = {"es": VERBS, "base": ["pack", "locate"]}.get(model, ["merge"])  # to a merge it is not the pack's base any more
    for verb in verbs: assert name in (said := refused(capsys, experts, verb)) and model in said


@pytest.mark.parametrize("model", ["ability", "es"])
def test_other_shape(experts, capsys, monkeypatch, model):
    monkeypatch.chdir(experts)
    name = "model.layers.0.mlp.up_proj.weight"
    spoil(shard_of(Path(model), name), name, lambda tensor: tensor.T.contiguous())
    assert model in (said := refused(capsys, experts)) and name in said


def test_truncated_shard(experts, capsys, monkeypatch):
    monkeypatch.chdir(experts)
    shard = sorted(Path("es").glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    for verb in VERBS: assert shard.name in refused(capsys, experts, verb)


def test_lying_index(experts, capsys, monkeypatch):
    monkeypatch.chdir(experts)
    file = Path("es/model.safetensors.index.json")
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(s for s in shards if s != index["weight_map"]["model.norm.weight"])
    file.write_text(json.dumps(index))
    for verb in VERBS: assert "model.norm.weight" in (said := refused(capsys, experts, verb)) and "es" in said


def test_pack_of_another_base(experts, capsys, monkeypatch):
    monkeypatch.chdir(experts)
    name = "model.layers.0.mlp.up_proj.weight"
    spoil(shard_of(Path("base"), name), name, set_to(.5))
    assert "bn.safetensors" in refused(capsys, experts)
