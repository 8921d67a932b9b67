"Every notebook runs from top to bottom, each in a process of its own, in the folder nbs. nbdev's flags are respected."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))

# What most notebooks import costs more than what they do, so it is imported once; each notebook is a process forked from the
# one that did. The library itself is not among it: every notebook imports it anew, and only what it asks for.
PACKAGES = """torch pandas matplotlib.pyplot matplotlib_inline.backend_inline scipy.stats seaborn datasets peft transformers.trainer
              transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 lm_eval.models.huggingface"""
SERVER = """
import gc, importlib, os, signal, sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb

for name in sys.argv[1].split(): importlib.import_module(name)
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if not child: break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else: sys.exit()

notebook, log, seconds = line.split("\\t")
signal.alarm(int(seconds))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for stream in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
os.chdir(Path(notebook).parent)
passed, _ = test_nb(Path(notebook), skip_flags=get_config().tst_flags.split())
sys.exit(not passed)
"""


@pytest.fixture(scope="session")
def server():
    "A process that has imported the packages and forks one for each notebook that it is told."
    process = subprocess.Popen([sys.executable, "-c", SERVER, PACKAGES], cwd=ROOT/"nbs", env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.stdin.close()


def failure(notebook: Path, code: int, said: str) -> str:
    "The cell that failed, and what was written."
    cell = re.search(r"While Executing Cell #(\d+)", said)
    source = json.loads(notebook.read_text(encoding="utf-8"))["cells"][int(cell[1]) - 1]["source"] if cell else []
    return f"{notebook.name} ended with {code}\n{''.join(source)}\n{said}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(server, notebook, tmp_path):
    log = tmp_path/"log"
    print(notebook, log, 900, sep="\t", file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    if code: pytest.fail(failure(notebook, code, log.read_text(errors="replace")), pytrace=False)
