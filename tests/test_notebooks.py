"Every notebook runs from top to bottom, each in a process of its own, in the folder nbs. nbdev's flags are respected."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split())
sys.exit(not passed)
"""


def failure(notebook: Path, done: subprocess.CompletedProcess) -> str:
    "The cell that failed, and what was written to stderr."
    cell = re.search(r"While Executing Cell #(\d+)", done.stderr)
    source = json.loads(notebook.read_text(encoding="utf-8"))["cells"][int(cell[1]) - 1]["source"] if cell else []
    return f"{notebook.name} ended with {done.returncode}\n{''.join(source)}\n{done.stderr}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook):
    done = subprocess.run([sys.executable, "-c", RUN, notebook], cwd=notebook.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    if done.returncode: pytest.fail(failure(notebook, done), pytrace=False)
