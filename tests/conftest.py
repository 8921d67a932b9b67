"What the tests share: the project's folder, a copy of it, and Python in a process of its own."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for a model or a data set
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are tiny: threads that wait for each other are slower than one
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled; DeepSpeed would import the compiler in every rank
os.environ.pop("IN_TEST", None)  # nbdev_export does nothing where this is set
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of some hundred processes compiles the library again


# ---- two workers ----

# These start ranks, kill them or watch a clock: no two of them may run at once.
ONE_AT_A_TIME = {"test_run", "test_launch", "test_fuzz", "test_interrupted", "test_training_kill", "test_training_ranks", "test_written_ranks",
                 "test_gradient_ranks"}
EACH_BY_ITSELF = ["test_project", "test_notebooks"]  # nothing is shared between these tests


def file_of(nodeid: str) -> str: # tests/test_run.py::test_seeds[1] -> test_run
    return Path(nodeid.partition("::")[0]).stem


def turn(nodeid: str) -> int: # 0: first
    "The longer the piece, the earlier: what only one worker may do, whole files, single tests. So both workers end together."
    file = file_of(nodeid)
    if file in ONE_AT_A_TIME: return 0
    return 2 + EACH_BY_ITSELF.index(file) if file in EACH_BY_ITSELF else 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests stay together, for the sake of its fixtures."
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = file_of(nodeid)
            if file in ONE_AT_A_TIME: return "one at a time"
            return nodeid if file in EACH_BY_ITSELF else file

    return Scheduling(config, log)


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


@pytest.fixture(scope="session")
def two_ranks_did(request, tmp_path_factory) -> dict[str, Path]: # test file -> its folder
    "What two ranks left behind, in one launch for all files that are to be tested."
    from ranks import two_ranks
    folders = {}
    for module in dict.fromkeys(item.module for item in request.session.items):
        if not hasattr(module, "on_two_ranks"): continue
        folders[module.__name__] = tmp_path_factory.mktemp(module.__name__)
        module.prepare(folders[module.__name__])
    two_ranks(folders)
    return folders


@pytest.fixture
def python():
    "Run Python with these arguments in a fresh process, with the library of folder `library`; fail with what it printed."
    def run(*arguments, cwd: Path = ROOT, library: Path = ROOT, timeout: float = 900) -> str:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(library)},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        if done.returncode: pytest.fail(f"{' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
        return done.stdout
    return run
