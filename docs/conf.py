"Sphinx: notebooks as they are stored, a theme that fits a phone, mathematics without a network."
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
# The whole of MathJax in one file that needs no fonts. The package's own extension copies 24 MB.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent/"static/mathjax/tex-svg-full.js"

project = "maet"
author = "maet contributors"
copyright = "maet contributors"
extensions = ["myst_nb"]
root_doc = "index"
suppress_warnings = [
    "myst.header",           # a notebook may begin a section at any level
    "misc.highlighting_failure",  # a cell with a shell command is no Python
    "mystnb.unknown_mime_type",
]

nb_execution_mode = "off"    # outputs are those that the notebooks were committed with
nb_ipywidgets_js = {}        # a page has no kernel to move a slider
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]

html_theme = "sphinx_book_theme"
html_title = "maet"
html_static_path = [str(HERE/"theme.css"), str(MATHJAX)]
html_css_files = ["theme.css"]
html_copy_source = False
html_show_sphinx = False
mathjax_path = MATHJAX.name
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "home_page_in_toc": True,
}
