"The smallest models that everything can be tried on, processes that can be killed, disks that fill up, and what tells two folders apart."
import ctypes, hashlib, json, multiprocessing, os, resource, sys, tempfile, time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

TEXTS = ["a few words", "few words and more words", "words"] * 9

# The server imports the slow packages once and computes nothing; each run is a process forked from it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["maet.cli", "maet.study.search", "maet.study.measured", "maet.record.report", "maet.training.train",
                                  "huggingface_hub.repocard", "transformers.trainer", "transformers.models.llama.modeling_llama",
                                  "transformers.models.gpt2.modeling_gpt2", "lm_eval.models.huggingface", "seaborn", "optuna"])


# ---- models ----

def tiny(folder: Path, hidden: int = 16, seed: int = 0, layers: int = 1, **how) -> Path:
    "A Llama of random weights with a tokenizer. `how`: of save_pretrained."
    from transformers import LlamaConfig, LlamaForCausalLM
    from maet.study.recipes import make_tokenizer
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, vocab_size=300,
                         bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder, **how)
    make_tokenizer(TEXTS, 300).save_pretrained(folder)
    return folder


def make_experts(folder: Path, hidden: int, layers: int, shard: str) -> Path:
    "A bfloat16 Llama in shards, an ability expert and a language expert as checkpoints, a sparse language pack, a merge file."
    from transformers import LlamaConfig, LlamaForCausalLM
    from maet.weights.checkpoints import Checkpoint
    from maet.weights.differences import Difference
    from maet.weights.deltas import Packed
    from maet.weights.packs import save_pack
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=3 * hidden,
                         vocab_size=8 * hidden, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for name in ("base", "ability", "es"):
        model.save_pretrained(folder/name, max_shard_size=shard)
        with torch.no_grad():
            for parameter in model.parameters(): parameter += .01 * torch.rand_like(parameter)
    base = Checkpoint(folder/"base")
    moved = Difference(Checkpoint(folder/"es"), base)
    save_pack(folder/"bn.safetensors", {name: Packed.of(part, torch.rand(part.shape) < .05) for name, part in moved.items()}, base)
    recipe = dict(merge_method="maet", base_model="base", ability={"model": "ability"},
                  languages=[{"model": "es", "weight": .5}, {"model": "bn.safetensors", "weight": .5}])
    (folder/"merge.yml").write_text(yaml.safe_dump(recipe))
    return folder


# ---- commands as processes ----

def _command(folder: Path, arguments: Sequence[str], log: str, began) -> None:
    "What a process does: one command in `folder`; it writes the time at which it began to work, and what it says to a file."
    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    began.value = time.monotonic()
    from maet.cli import main
    main(list(arguments))


def start(folder: Path, arguments: Sequence[str], log: str = "log"): # -> the process, and when it began to work
    "Start a command."
    began = processes.Value("d", 0.)
    process = processes.Process(target=_command, args=(folder, arguments, log, began))
    process.start()
    while not began.value and process.is_alive(): time.sleep(.0005)
    return process, began.value


def finish(folder: Path, arguments: Sequence[str], log: str = "log") -> float: # seconds
    "Run a command to its end, which must be a good one."
    process, began = start(folder, arguments, log)
    process.join()
    assert process.exitcode == 0, (folder/log).read_text()
    return time.monotonic() - began


def ended(folder: Path, arguments: Sequence[str], log: str = "log") -> tuple[int, str]: # exit code, what it said
    "Run a command to its end, whatever that is."
    process, _ = start(folder, arguments, log)
    process.join()
    return process.exitcode, (folder/log).read_text()


def kill_at(process, moment: float) -> bool: # was it still alive?
    "SIGKILL at a moment of the monotonic clock."
    time.sleep(max(0, moment - time.monotonic()))
    process.kill()
    process.join()
    return process.exitcode != 0


def content(path: Path) -> dict[str, str] | None:
    "A digest of every file; None if there is nothing at `path`."
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else None
    return files and {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def timeless(path: Path) -> dict | None:
    "The same, but rows without the seconds that they took, and without notes of time."
    def rows(file): return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in file.read_bytes().split(b"\n") if line]
    found = content(path)
    return found and {name: rows(path/name) if name.endswith(".jsonl") else digest for name, digest in found.items() if not name.endswith("seconds.txt")}


# ---- disks that fill up ----

CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE, MS_REMOUNT = 0x20000, 0x10000000, 0x4000, 0x40000, 0x20


def _mount(folder: Path, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", flags, options.encode()): raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def small_disk(folder: Path, options: str) -> None:
    "A tmpfs that only this process and its children see; OSError where the system does not permit it."
    libc = ctypes.CDLL(None, use_errno=True)
    def checked(result):
        if result: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    user, group = os.getuid(), os.getgid()
    if user:
        checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")): Path("/proc/self", file).write_text(text)
    else: checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _mount(folder, 0, options)


def larger_disk(folder: Path, options: str = "size=256m,nr_inodes=10000") -> None:
    "Somebody makes room."
    _mount(folder, MS_REMOUNT, options)


def short_files(folder: Path, most: str) -> None:
    "No file of this process may grow beyond so many bytes: what a quota does, for those who may not mount."
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), resource.RLIM_INFINITY))


def long_files(folder: Path) -> None: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def limited(folder: Path, limit, options: str, arguments: Sequence[str], answer, relief=None) -> None:
    """What a process does: a command whose output lies in `disk`, under a limit; what it says and leaves goes to `answer`. With `relief`
    the limit is lifted then, and the same command is given again."""
    os.chdir(folder)
    torch.set_num_threads(1)
    try: limit(folder/"disk", options)
    except OSError as error: return answer.send((None, f"{type(error).__name__}: {error}", []))
    answer.send(_said(arguments))
    if not relief: return None
    relief(folder/"disk")
    answer.send((*_said(arguments), timeless(folder/"disk")))


def _said(arguments: Sequence[str]) -> tuple[int, str, list[str]]:
    "Exit code, what was written to stderr, what is in `disk` then."
    from maet.cli import main
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try: main(list(arguments))
        except SystemExit as exit: code = exit.code
        sys.stderr.flush()
        os.dup2(before, 2), os.close(before)
        said = os.pread(file.fileno(), 1 << 20, 0).decode()
    return code, said, sorted(str(path) for path in Path("disk").rglob("*"))


def on_a_small_disk(folder: Path, limit, options: str, arguments: Sequence[str], relief=None) -> list[tuple]:
    "What `limited` answers; skips the test where no small disk may be mounted."
    import pytest
    (folder/"disk").mkdir()
    ours, theirs = processes.Pipe()
    process = processes.Process(target=limited, args=(folder, limit, options, arguments, theirs, relief))
    process.start()
    theirs.close()
    answers = []
    try:
        while True: answers.append(ours.recv())
    except EOFError: process.join()
    if answers[0][0] is None: pytest.skip(f"no small disk may be mounted here ({answers[0][1]}); the test with a limit to files runs everywhere")
    return answers
