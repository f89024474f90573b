"""make docs: the site has every document, no dead link, search, and nothing from another machine."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

DOCUMENTS = [path.relative_to(ROOT) for folder in (".", "docs", "demo") for path in (ROOT / folder).glob("*.md")]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}  # without a click


class Page(HTMLParser):
    """The addresses in a page: of links, of what is loaded with it; and the names that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.names = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if found.get(LOADED.get(tag)):
            self.loaded.append(found[LOADED[tag]])


def build(source, target):
    """As `make docs` does: warnings are errors."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", source / "docs", source, target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_document_is_a_page(site):
    """And the first page is the README."""
    for document in DOCUMENTS:
        assert (site / document).with_suffix(".html").is_file()
    assert (site / "index.html").read_text() == (site / "README.html").read_text()


def test_no_link_of_the_site_is_dead(site, pages):
    count = 0
    for path, page in pages.items():
        for address in page.links + page.loaded:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and target.is_relative_to(site), (path.name, address)
            assert not url.fragment or unquote(url.fragment) in pages[target].names, (path.name, address)
            count += 1
    assert count > 500


def test_nothing_comes_from_another_machine(site, pages):
    """No script, font, style or picture; a link may lead elsewhere."""
    for page in pages.values():
        assert not [address for address in page.loaded if urlsplit(address).netloc]
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)\s]*", path.read_text()), path.name


def test_search_knows_the_options(site):
    index = (site / "searchindex.js").read_text()
    assert "num_ddim_timestep" in index and "docs/options" in index


def test_a_dead_link_fails_the_build(tmp_path):
    """A link to a page, and one to a heading, in a site whose other pages are empty."""
    for document in DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text("# A page\n")
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    for link in ("docs/nowhere.md", "docs/data.md#nothing"):
        (tmp_path / "README.md").write_text(f"# A page\n\n[there]({link})\n")
        done = build(tmp_path, tmp_path / "site")
        assert done.returncode and link.rpartition("#")[2] in done.stderr
