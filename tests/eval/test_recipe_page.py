"""The tables of the recipe's pages are those that the result files give."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def recipe_page(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    yield importlib.import_module("recipe_page")
    for name in ("recipe_page", "recipe_heads", "reporting"):
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


def test_a_figure_that_is_not_in_the_results_is_seen(recipe_page, tmp_path):
    """Every figure between marks is written anew from the results, whatever stood there."""
    text, marks = recipe_page.SUMMARY_PAGE.read_text(), re.compile(r"(<!-- (?!end)\w+ -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    assert len(marks.findall(text)) == 6
    (tmp_path / "summary.md").write_text(marks.sub(lambda found: found[1] + re.sub(r"\d", "7", found[2]) + found[3], text))
    shutil.copy(recipe_page.PAGE, tmp_path / "all.md")
    recipe_page.fill_pages(tmp_path / "all.md", tmp_path / "summary.md")
    assert (tmp_path / "summary.md").read_text() == text
    outside = marks.sub("", text)
    assert not [line for line in outside.splitlines() if line.startswith("|")], "a table of the page is copied by hand"


def test_a_new_way_to_train_has_a_line(recipe_page, tmp_path):
    parts, name = recipe_page.recipe_heads.parts, "heads-recipes.json"
    for file in ("heads.json", name, "smollm2.json"):
        shutil.copy(recipe_page.RESULTS / file, tmp_path)
    found = json.loads((tmp_path / name).read_text())
    more = [row | {"planted": 1 / 3} for row in found["rows"] if row.get("data") == "self"]
    (tmp_path / name).write_text(json.dumps(found | {"rows": found["rows"] + more}))
    before, after = (parts(folder)["texts"].splitlines() for folder in (recipe_page.RESULTS, tmp_path))
    assert len(more) == 3 and [line for line in after if line not in before] == [line for line in after if "| self | a third |" in line]
    assert len(after) == len(before) + 1
    (tmp_path / name).write_text(json.dumps(found | {"rows": [row for row in found["rows"] if row["arm"] != "heads-one"]}))
    with pytest.raises(ValueError, match="0 rows have"):
        parts(tmp_path)


def test_findings_are_figures_of_the_results(recipe_page):
    """Each number with a fraction in the page's findings is the mean over seeds of some arm, or an error of its alignment."""
    text = recipe_page.SUMMARY_PAGE.read_text()
    findings = text[text.index("## Five findings") : text.index("## What this does not say")]
    rows = recipe_page.load("distillation")["rows"]
    known = {f"{row[kind]:.3f}" for row in recipe_page.load("distillation-layers")["rows"] for kind in ("novels", "code")}
    for key, digits in (("novels", 2), ("novels_far_bigrams", 3), ("needle_1984", 2)):
        for arm, level in {(row["arm"], row["level"]) for row in rows}:
            if values := recipe_page.over_seeds(rows, arm, level, key):
                known.add(f"{sum(values) / len(values):.{digits}f}")
    figures = re.findall(r"\d+\.\d+", findings)
    assert len(figures) > 15 and not set(figures) - known
