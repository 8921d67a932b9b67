"What the tests share: the project's folder, a copy of it, and Python in a process of its own."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for a model or a data set
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are tiny: threads that wait for each other are slower than one
os.environ.pop("IN_TEST", None)  # nbdev_export does nothing where this is set


@pytest.fixture
def tell(record_property):
    "Say something after the tests; what a worker prints meanwhile is not seen."
    def told(text: str) -> None: record_property("told", text)
    return told


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "told": terminalreporter.write_line(text)


def project_files() -> list[Path]:
    "What a clone would hold, with what is not yet committed; without git, everything but environments, runs and caches."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0: names = listed.stdout.split("\0")
    else: names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    names = [name for name in names if not {".venv", "runs", "build", "__pycache__"} & set(Path(name).parts)]
    return [Path(name) for name in names if name and (ROOT/name).is_file()]


@pytest.fixture
def checkout(tmp_path) -> Path:
    "A copy of the project that a test may change."
    for name in project_files():
        (tmp_path/"project"/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, tmp_path/"project"/name)
    return tmp_path/"project"


@pytest.fixture
def python():
    "Run Python with these arguments in a fresh process, with the library of folder `library`; fail with what it printed."
    def run(*arguments, cwd: Path = ROOT, library: Path = ROOT, timeout: float = 900) -> str:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(library)},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        if done.returncode: pytest.fail(f"{' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
        return done.stdout
    return run
