"build.py FOLDER: the site in FOLDER/html, from the notebooks with the outputs they were committed with. Nothing is run, nothing is fetched."
import shutil, subprocess, sys
from pathlib import Path

import check, reference, stage

HERE = Path(__file__).parent


def rooms(house: list[stage.Page]) -> dict[str, str]: # module -> notebook
    found = {page.name.partition("_")[2]: page.name for page in house}
    return found | {"verbs": "89_verbs"}


def write_source(folder: Path, schemas: Path) -> None:
    "What Sphinx reads."
    for place in (folder, schemas):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    stage.stage(folder)
    made = {
        "commands": reference.commands(),
        "recipes": reference.recipe_keys(schemas),
        "api": reference.api(rooms(stage.pages())),
    }
    for name, text in made.items(): (folder/f"{name}.md").write_text(text, encoding="utf-8")


def build(folder: Path) -> Path: # of the pages
    "Raises SystemExit for a link that leads nowhere, or a page that would ask the network."
    source, site, schemas = folder/"source", folder/"html", folder/"schemas"
    write_source(source, schemas)
    shutil.rmtree(site, ignore_errors=True)

    strict = ["-q", "-W", "--keep-going"]  # a warning is a fault: a link between notebooks that leads nowhere is one
    settings = ["-c", HERE, "-d", folder/"doctrees", "-D", f"html_extra_path={schemas.resolve()}"]
    command = [sys.executable, "-m", "sphinx", *strict, "-j", "auto", *settings, source, site]
    done = subprocess.run(list(map(str, command)))
    if done.returncode: sys.exit("the site is not whole: see the warnings above")
    faults = check.network_loads(site) + check.dead_links(site)
    if faults: sys.exit("\n".join(faults))
    return site


if __name__ == "__main__":
    site = build(Path(sys.argv[1]))
    print(f"{len(check.pages(site))} pages; open {site/'index.html'}")
