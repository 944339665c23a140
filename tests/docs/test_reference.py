"""The reference has every public name, and every name in it has a docstring."""

import re
from pathlib import Path

import pytest

from docs._build import public
from tests.docs import examples

OWN_PAGES = [x for x in examples.PAGES if not examples.name(x).startswith("docs/")]


def test_every_public_name_is_explained():
    assert public.gaps() == []


def test_gaps_are_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(public, "REFERENCE", tmp_path)
    (tmp_path / "page.md").write_text("::: tests.docs.test_reference.Unexplained\n")
    found = public.gaps()
    for name in ("Unexplained has", "Unexplained.run has", "supra.parallel.solve is public"):
        assert any(name in gap for gap in found), name


class Unexplained:
    def run(self):
        pass


@pytest.mark.parametrize("page", OWN_PAGES, ids=examples.name)
def test_links_of_pages_outside_docs_arrive(page):
    """mkdocs checks those of docs/."""
    for target in re.findall(r"\]\((?!\w+:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in headings}
