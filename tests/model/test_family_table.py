"""docs/families.md names every causal language model of transformers."""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from supra.model import families


def test_every_family_is_in_the_table_once():
    assert not set(families.FAMILIES) & set(families.REFUSED)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {*families.FAMILIES, *families.REFUSED} - {"supra"} == known - {"supra"}


def test_the_page_is_the_table():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert page.read_text() == families.table() + "\n"
