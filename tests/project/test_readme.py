"""The figures of the README are those that the result files give, and those files are what commands write."""

import importlib
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "eval")
    yield importlib.import_module("readme")
    for name in ("readme", "recipe_page", "recipe_heads", "reporting"):
        sys.modules.pop(name, None)


def test_the_readme_holds_what_the_results_say(readme, tmp_path):
    shutil.copy(readme.README, tmp_path / "README.md")
    readme.fill(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == readme.README.read_text(), "README.md is not what `python eval/readme.py` writes"


def test_a_figure_that_changes_is_seen(readme, tmp_path):
    text, marks = readme.README.read_text(), re.compile(r"(<!-- (?!end)\w+ -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    assert len(marks.findall(text)) == 6
    other = marks.sub(lambda found: found[1] + re.sub(r"\d", "7", found[2]) + found[3], text)
    assert other != text
    (tmp_path / "README.md").write_text(other)
    readme.fill(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text


def test_every_table_of_the_readme_comes_from_a_file(readme):
    text = readme.README.read_text()
    kept, inside = [], False
    for line in text.splitlines():
        inside = line != "<!-- end -->" if inside else line.startswith("<!-- ")
        if line.startswith("|") and not inside:
            kept.append(line)
    assert not kept, "a table without a result file"


def test_the_readme_asks_for_the_versions_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    oldest = dict(re.match(r"([\w-]+)>=([\d.]+)", wanted).groups() for wanted in project["dependencies"])
    text = (REPOSITORY / "README.md").read_text()
    said = re.search(r"^Python ≥ ([\d.]+), torch ≥ ([\d.]+), transformers ≥ ([\d.]+), peft ≥ ([\d.]+)\.", text, re.MULTILINE)
    assert said.groups() == (project["requires-python"].removeprefix(">="), *(oldest[name] for name in ("torch", "transformers", "peft")))
