"""The site of docs/: every page has its place, public names are on the API page, links lead to the same things as on the forge."""

import importlib.util
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dsla_hf
import dsla_kernels

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
SITE = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
LISTED = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
FORGE = "https://github.com/dsla-hf/dsla-hf"


def pages_in(nav):
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_in(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(pages_in(SITE["nav"])) == sorted([*pages, "index.md"]), "mkdocs.yml: nav must list each page of docs/ once"


def test_the_api_page_lists_every_public_name():
    public = [f"{package.__name__}.{name}" for package in (dsla_hf, dsla_kernels) for name in package.__all__]
    missing = set(public) - set(LISTED)
    assert not missing, f"docs/api.md lacks {sorted(missing)}"
    assert len(set(LISTED)) == len(LISTED)


def test_the_api_page_lists_what_the_guides_import():
    text = "\n".join(path.read_text() for path in [REPOSITORY / "README.md", *DOCS.rglob("*.md")])
    used = {
        f"{module}.{name.strip()}"
        for module, names in re.findall(r"^from (dsla_\w+[\w.]*) import (.+)$", text, re.MULTILINE)
        for name in names.split(",")
    }
    assert "dsla_hf.DSLAConfig" in used
    assert used <= set(LISTED), f"docs/api.md lacks {sorted(used - set(LISTED))}"


@pytest.mark.parametrize("name", LISTED)
def test_what_the_api_page_lists_exists_and_has_a_docstring(name):
    found = pydoc.locate(name)
    assert found is not None, f"docs/api.md lists {name}, which is not there"
    assert found.__doc__ or not callable(found)


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page, link, expected",
    [
        ("README.md", "docs/recipe.md", "recipe.md"),
        ("README.md", "docs/images/quickstart.png", "images/quickstart.png"),
        ("README.md", "CONTRIBUTING.md", f"{FORGE}/blob/main/CONTRIBUTING.md"),
        ("docs/recipe.md", "evaluate.md", "evaluate.md"),
        ("docs/recipe.md", "../eval/results/recipe.md", f"{FORGE}/blob/main/eval/results/recipe.md"),
        ("docs/scale.md", "../examples", f"{FORGE}/tree/main/examples"),
        ("docs/measured/serving.md", "../serve.md", "../serve.md"),
        ("docs/measured/serving.md", "../../README.md", "../index.md"),
    ],
)
def test_links_lead_to_the_same_on_the_site(hooks, page, link, expected):
    assert hooks.site_link(link, page, FORGE) == expected
    assert hooks.site_text(f"a [b]({link}#c), [d](https://e.f)", page, FORGE) == f"a [b]({expected}#c), [d](https://e.f)"


def test_the_page_of_modules_is_that_of_the_code():
    done = subprocess.run([sys.executable, ".ci/modules.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
