"""The tables of the recipe's pages are those that the result files give."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def recipe_page(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    yield importlib.import_module("recipe_page")
    for name in ("recipe_page", "reporting"):
        sys.modules.pop(name, None)


def test_pages_hold_what_the_results_say(recipe_page, tmp_path):
    pages = recipe_page.PAGE, recipe_page.SUMMARY_PAGE
    copies = tmp_path / "all.md", tmp_path / "summary.md"
    for page, copy in zip(pages, copies, strict=True):
        shutil.copy(page, copy)
    recipe_page.fill_pages(*copies)
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_text() == page.read_text(), f"{page.name} is not what `python eval/recipe_page.py` writes"


def test_the_page_of_the_recipe_is_short(recipe_page):
    lines = recipe_page.SUMMARY_PAGE.read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) < len(lines) / 4
