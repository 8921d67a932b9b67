"What lies in figures/mini is what the ledgers say, and a figure that lacks a row says which."
import json, shutil
from pathlib import Path

import pytest

from maet.record.claim_figures import all_figures
from maet.record.figures import catalogue, figures

ROOT = Path(__file__).resolve().parent.parent
LEDGERS, PAPERS, COMMITTED = ROOT/"data/results", ROOT/"data/paper", ROOT/"figures/mini"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    paths, lacking = all_figures(folder, LEDGERS, papers=PAPERS)
    return {path.name: path for path in paths}, lacking


def test_committed_figures_are_those_of_the_ledgers(drawn):
    paths, lacking = drawn
    for committed in COMMITTED.glob("*"):
        assert committed.name in paths, f"run `make figures`: {committed.name}; {'; '.join(lacking)}"
        if committed.suffix in (".csv", ".md"):  # pictures depend on the version of matplotlib too
            assert committed.read_bytes() == paths[committed.name].read_bytes(), f"run `make figures`: {committed.name}"


def test_the_same_rows_give_the_same_bytes(drawn, tmp_path):
    paths, _ = drawn
    again, _ = figures(tmp_path, LEDGERS, ["levels"], PAPERS)
    assert len(again) == 3 and all(path.read_bytes() == paths[path.name].read_bytes() for path in again)


def test_a_removed_row_is_named_for_its_figure(tmp_path):
    ledgers = shutil.copytree(LEDGERS, tmp_path/"results")
    lines = (ledgers/"world.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not (json.loads(line)["setting"] == {"level": 3} and json.loads(line)["language"] == "bn")]
    (ledgers/"world.jsonl").write_text("".join(kept), encoding="utf-8")
    paths, lacking = figures(tmp_path/"figures", ledgers, ["levels"], PAPERS)
    assert not paths and lacking == [f"levels: no row for method base, task mathematics, language bn, level 3 in {ledgers/'world.jsonl'}"]


def test_every_entry_draws_rows_that_its_study_can_write():
    for name, entry in catalogue().items():
        axes = {field for block in entry.rows for field in block}
        assert {"method", "language", "task", "seed"} <= axes or name == "levels", f"{name}: what is not listed is not checked"
