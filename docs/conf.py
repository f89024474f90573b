"""How Sphinx builds a site of the Markdown files of the repository: make docs."""

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The order in the side bar.
PAGES = [
    *("demo/README", "docs/data", "docs/targets", "docs/options", "docs/simpletuner", "docs/evaluation"),
    "docs/playground",
    *("docs/resuming", "docs/memory", "docs/performance", "docs/inference", "docs/differences", "docs/faults"),
    *("docs/house", "CONTRIBUTING", "CHANGELOG"),
]

project = html_title = "Latent consistency distillation"
extensions = ["myst_parser"]
include_patterns = ["README.md", *(f"{page}.md" for page in PAGES)]
root_doc = "README"
html_theme = "furo"
html_show_copyright = html_show_sphinx = html_copy_source = False
myst_heading_anchors = 4  # by the names that GitHub gives to headings


def for_the_site(app, page, source):
    """Add the side bar's list to the first page. A link to a folder of the repository becomes its text; one to another
    file stays, and the file becomes a download."""

    def without_folder(link):
        return link[1] if os.path.isdir(ROOT / os.path.dirname(page) / link[2]) else link[0]

    source[0] = re.sub(r"\[([^]\[]+)\]\((?!https?:)([^)#]+)\)", without_folder, source[0])
    if page == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"


def first_page(app, error):
    """The name under which a browser looks for it."""
    if error is None:
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", for_the_site)
    app.connect("build-finished", first_page)
