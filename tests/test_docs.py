"The site that `make docs` builds: nothing in it asks the network, its links lead somewhere, and what a reader looks for is there."
import json, re, sys
from pathlib import Path

import pytest

pytest.importorskip("myst_nb", reason="the site is built by CPython 3.11 or newer")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"docs"))
import build, check, stage  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The whole site; building it ends the test where a warning, a dead link or a call to the network is found."
    return build.build(tmp_path_factory.mktemp("docs"))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_notebook_is_a_page(site):
    names = {page.name for page in stage.pages()}
    assert names <= {path.stem for path in site.glob("*.html")}
    assert len(names) > 90


def test_mathematics_search_and_outputs_are_there(site):
    transfer = text(site/"35_method.transfer.html")
    assert re.search(r'<script[^>]* src="_static/tex-svg-full\.js', transfer) and (site/"_static/tex-svg-full.js").stat().st_size > 10**6
    assert "\\tag{5}" in transfer and "begin{split}" not in transfer  # of which MathJax would make an error
    assert "math notranslate" in transfer and "tag_export" in transfer and "#| export" not in transfer
    assert "<img" in text(site/"71_findings.main_results.html")
    assert '"35_method.transfer"' in text(site/"searchindex.js")


def test_the_reference_is_that_of_the_library(site):
    import typer
    import maet
    from maet.cli import app
    commands, api = text(site/"commands.html"), text(site/"api.html")
    for name, command in typer.main.get_command(app).commands.items():
        assert f'id="maet-{name}"' in commands
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option == "--help" or f">{option}<" in commands, (name, option)
    assert [name for name in maet.__all__ if name != "__version__" and f"<h3>{name}<" not in api] == []
    schema = json.loads(text(site/"recipe.schema.json"))
    keys = text(site/"recipes.html")
    assert [key for key in schema["$defs"]["Recipe"]["properties"] if f">{key}<" not in keys] == []
    known = {key for definition in schema["$defs"].values() for key in definition.get("properties", {})}
    assert [key for key in known if not re.search(rf"[>.]{key}<", keys)] == [] and "transfer" in known


def test_a_call_to_the_network_is_found(tmp_path):
    (tmp_path/"here.html").write_text('<script src="a.js"></script><a href="https://example.org">x</a><link rel="canonical" href="https://b.org">')
    assert check.network_loads(tmp_path) == []
    (tmp_path/"there.html").write_text('<link rel="stylesheet" href="//c.org/s.css"><img src="https://d.org/i.png">'
                                       '<style>@import "https://e.org/f.css"; p {background: url(http://g.org/h.png)}</style>')
    (tmp_path/"a.css").write_text("@font-face {src: url('https://i.org/j.woff2')}")
    found = [line.partition("://")[2] or line for line in check.network_loads(tmp_path)]
    assert found == ["there.html: //c.org/s.css", "d.org/i.png", "e.org/f.css", "g.org/h.png", "i.org/j.woff2"]


def test_a_dead_link_is_found(tmp_path):
    (tmp_path/"a.html").write_text('<p id="here"></p><a href="#here">1</a><a href="b%20c.html#there">2</a><a href="mailto:a@b.org">3</a>')
    (tmp_path/"b c.html").write_text('<p id="there"></p><a href="a.html">4</a><img src="none.png"><a href="a.html#nowhere">5</a><a href="d.html">6</a>')
    assert check.dead_links(tmp_path) == ["b c.html: a.html#nowhere", "b c.html: d.html", "b c.html: none.png"]
