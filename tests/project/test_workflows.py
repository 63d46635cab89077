"""What runs elsewhere, and so fails late: workflows call targets of the Makefile that exist, pins agree, forms ask for what is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FORGE = REPOSITORY / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def steps(workflow):
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def called(text):
    """Targets of make in lines of a shell."""
    return re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE)


def pinned(name):
    return re.search(rf"^{re.escape(name)}==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist_and_have_few_rights(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}, "more only where a job needs it"
    assert all("timeout-minutes" in job or "deployment" in str(job) for job in content["jobs"].values())
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert {target for command in commands for target in called(command)} <= TARGETS
    for command in commands:
        for path in re.findall(r"(?<![\w./])\.ci/[\w.]+", command):
            assert (REPOSITORY / path).exists(), path


def test_every_check_of_ci_run_is_one_of_the_forge_too():
    here = set(called((REPOSITORY / ".ci" / "run").read_text()))
    assert {"lint", "types", "resolve", "test", "docs", "package"} <= here <= TARGETS
    ci = FORGE / "workflows" / "ci.yml"
    assert here <= {target for step in steps(ci) for target in called(step.get("run", ""))}


def test_the_versions_of_python_are_the_same_everywhere():
    ci = yaml.safe_load((FORGE / "workflows" / "ci.yml").read_text())
    tested = ci["jobs"]["tests"]["strategy"]["matrix"]["python"]
    said = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", name)]
    resolved = re.findall(r"(3\.\d+):constraints\.txt", (REPOSITORY / "Makefile").read_text())
    assert tested == said == resolved and PROJECT["requires-python"] == f">={tested[0]}"


def test_ruff_before_a_commit_is_the_ruff_of_make_lint():
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert hook["rev"] == f"v{pinned('ruff')}" and [entry["id"] for entry in hook["hooks"]] == ["ruff-check", "ruff-format"]


def test_forms_and_citation_can_be_read():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (FORGE / "ISSUE_TEMPLATE").glob("*.yml")}
    assert {"bug", "feature", "config"} == set(forms)
    assert "dsla env" in str(forms["bug"]) and all(forms[name]["body"] for name in ("bug", "feature"))
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] and citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert "2506.09316" in str(citation["references"])


def test_the_release_is_the_same_everywhere():
    versions = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    if ".dev" not in PROJECT["version"]:
        assert (PROJECT["version"], str(citation["date-released"])) == versions[0] and citation["version"] == PROJECT["version"]
    links = re.findall(r"^\[(.+)\]: ", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert links == ["Unreleased", *(version for version, _ in versions)]


def test_the_manifest_names_what_is_there():
    for line in (REPOSITORY / "MANIFEST.in").read_text().splitlines():
        if line.startswith(("graft", "include")):
            for pattern in line.split()[1:]:
                assert list(REPOSITORY.glob(pattern)), f"MANIFEST.in: {pattern} matches nothing"
