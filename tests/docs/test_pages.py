"""What pages promise to list completely, they do."""

import re

from supra.mixers import MIXERS, PRESETS
from tests.docs.examples import PAGES, ROOT, blocks


def test_the_map_names_every_folder():
    """And no other."""
    (text,) = (x.text for x in blocks(ROOT / "README.md") if x.text.startswith("supra/"))
    named, path = set(), []
    for line in text.splitlines():
        path = [*path[: (len(line) - len(line.lstrip())) // 2], line.split()[0]]
        named.add("".join(path))
    rooms = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("supra/**/__init__.py")}
    assert named == {f"{room}/" for room in {*rooms, "kernels", "recipes", "docs", "tests"}}


def test_files_that_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:supra|recipes|docs|tests)/[a-z_/\d]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_what_differs_from_a_paper_stands_in_one_place():
    """Every recipe and every mixer with a paper's name has a row there, and recipes point to it."""
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    for name in ("supra_paper", "t2r", "hedgehog", "lolcats", "radlads", "mohawk"):
        recipe = (ROOT / "recipes" / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        assert "docs/published.md" in recipe, name
        assert f"| `{name}.yaml` |" in page, name
    for name in {*MIXERS, *PRESETS} - {"softmax", "supra", "window", "gated", "nonlinear_gated"}:
        assert f"| `{name}` |" in page, name


def test_every_mixer_is_explained():
    """In the guide, and its options in the reference."""
    guide = (ROOT / "docs" / "guides" / "mixers.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "reference" / "mixers.md").read_text(encoding="utf-8")
    for name in {*MIXERS, *PRESETS}:
        assert f"| `{name}` |" in guide, name
    for name, mixer in MIXERS.items():
        options = f"{mixer.Options.__module__}.{mixer.Options.__name__}"
        assert f"::: {options}\n" in reference or name == "softmax", name
