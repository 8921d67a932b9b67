"The script for the day with a GPU, at tiny shapes on the CPU: nothing but what it may ask for, and rows that the notebook reads."
import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "pandas matplotlib seaborn scipy datasets lm_eval optuna deepspeed trl markdown_it IPython nbdev sklearn".split()
WITHOUT = "import sys\nsys.modules.update(dict.fromkeys(sys.argv[1].split()))\nsys.path.insert(0, 'benchmarks')\nsys.argv = ['gpu', *sys.argv[2:]]\n" \
          "import gpu\ngpu.main()"


def script(*words, **more) -> subprocess.CompletedProcess:
    environment = os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1") | more
    return subprocess.run(["bash", "benchmarks/gpu.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("part, methods", [("train", ["key-neuron 5% row", "shira 5%"]), ("gradient", ["gradient bfloat16"])])
def test_it_asks_for_no_more_than_the_card_has(part, methods, tmp_path):
    ways = ["--ways", *methods] if part == "train" else []
    command = [sys.executable, "-c", WITHOUT, " ".join(ABSENT), part, "--tiny", "--steps", "1", "--ledger", tmp_path/"gpu.jsonl", *ways]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path/"gpu.jsonl").read_text().splitlines()]
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    for method in methods:
        assert f"{method:24} step_s" in done.stdout
        assert found[method, "step_s"] > 0 and found[method, "tokens_per_s"] > 0
        if method == "shira 5%": continue  # of which the plan knows nothing
        assert found[method, "predicted_peak_gb"] > 0
    if part == "train": assert 1 <= found["shira 5%", "device_batch_80gb"] <= 8


def test_parts_are_skipped_and_time_ends():
    done = script("--tiny", "--skip", "a,b,d,e")
    assert done.returncode == 0 and done.stdout.count("skipped") == 4, done.stderr
    done = script("--tiny", MINUTES="0")
    assert done.stdout.count("no time is left") == 4 and done.returncode == 0
    done = script("--timy")
    assert done.returncode == 2 and "--skip d,e" in done.stdout


def test_a_real_model_is_not_tiny():
    done = script("--tiny", "--skip", "a,b,e")
    assert done.returncode == 0 and "real: it has one size, which is not tiny" in done.stdout, done.stderr
