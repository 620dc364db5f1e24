"""The documents say what the code does."""

import re

import pytest

from craft_jax import errors
from scripts import write_configuration
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_tables_of_the_configuration_page_are_those_of_the_code():
    expected = write_configuration.page()
    assert write_configuration.PAGE.read_text(encoding="utf-8") == expected, (
        "docs/configuration.md is behind the code: python scripts/write_configuration.py"
    )


def test_every_exit_code_is_in_the_architecture_page():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Exit codes") :]
    codes = {v for k, v in vars(errors).items() if k.isupper() and isinstance(v, int)}
    assert codes == set(map(int, re.findall(r"(?:^|· )(\d+) ", table, re.M)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:craft_jax|configs|scripts|tests|docs)/[\w/.]+\.\w+)`", text)
    for link in links:
        assert (page.parent / link).exists(), link
    for name in named:
        assert (ROOT / name).exists(), name
