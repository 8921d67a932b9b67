"Two ranks of DeepSpeed on this machine's CPU, that run a file."
import os, socket, subprocess, sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(program: str, folder: Path, timeout: float = 400) -> None:
    "Run `program folder` as two ranks; fail with what they printed."
    command = ["deepspeed", "--num_accelerators", "2", "--no_local_rank", "--master_port", str(free_port()), program, str(folder)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PATH=path, PYTHONPATH=str(Path(__file__).parents[1]))
    ended = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def leave() -> None:
    "End a rank as the library's own ranks end: all is written, and what torch's threads do at exit could only spoil it."
    import torch
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
