"""Two ranks of DeepSpeed on this machine's CPU. Most of a launch is imports, so one launch does what all test files ask of two ranks: a file
that has `prepare(folder)` and `on_two_ranks(folder)` finds its folder in the fixture `two_ranks_did`. This file is also the ranks' program."""
import gc, importlib, os, socket, subprocess, sys
from functools import cache
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(folders: dict[str, Path], timeout: float = 600) -> None:
    "Let two ranks do `on_two_ranks(folder)` of each of these test files; fail with what they printed."
    told = [str(part) for file_and_folder in folders.items() for part in file_and_folder]
    command = ["deepspeed", "--num_accelerators", "2", "--no_local_rank", "--master_port", str(free_port()), __file__, *told]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PATH=path, PYTHONPATH=str(Path(__file__).parents[1]))
    at = next(iter(folders.values()))
    ended = subprocess.run(command, env=env, cwd=at, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


@cache
def settle() -> None:
    """To be called after a first run: by now all is imported, and none of it is garbage.
    Accelerate and DeepSpeed search everything for garbage in each run, which takes as long as the run."""
    gc.collect()
    gc.freeze()


def leave() -> None:
    "End a rank as the library's own ranks end: all is written, and what torch's threads do at exit could only spoil it."
    import torch
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    for file, folder in zip(sys.argv[1::2], sys.argv[2::2]): importlib.import_module(file).on_two_ranks(Path(folder))
    leave()
