"""The set-up by make, with a stand-in for Python: which torch is asked for, and that a set-up which ended early is gone on with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
# Writes down how it is called. Makes environments with itself as their Python; the rest is up to the variables.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    *" index versions "*) exit "$INDEX_STATUS" ;;
    "-m pip install"*"$PIP_TROUBLE_AT"*) eval "$PIP_TROUBLE" ;;
esac
"""
# A shell in the background ignores interrupts, and so does what it starts, such as these tests.
MAKE = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('make', sys.argv[1:])"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path):
    """`make(target)` in a folder of its own: whether it ended well, its output and the calls of Python, pip's without what is common."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls"

    def run(target="setup", driver=False, index=True, trouble="", at="", shell="/bin/sh"):
        for name, text in {"python3.11": PYTHON, "nvidia-smi": f"#!/bin/sh\nexit {int(not driver)}\n"}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        calls.write_text("")
        own = {"CALLS": str(calls), "INDEX_STATUS": str(int(not index)), "PIP_TROUBLE": trouble, "PIP_TROUBLE_AT": at}
        environment = {name: value for name, value in os.environ.items() if name not in ("CI", "MAKEFLAGS", "MAKELEVEL")}
        done = subprocess.run(
            [sys.executable, "-S", "-c", MAKE, "make", target, "PYTHON=python3.11", f"SHELL={shell}"],
            cwd=tmp_path,
            env={**environment, **own, "PATH": f"{programs}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        common = "-m pip install --constraint constraints.txt "
        said = [line.removeprefix(common) for line in calls.read_text().splitlines() if line.startswith((common, "-m venv"))]
        return done.returncode == 0, done.stdout, said

    return run


NEW = "-m venv --clear .venv"


def test_without_a_driver_a_cpu_build_comes_first(make):
    ended_well, _, calls = make()
    assert ended_well and calls == [NEW, f"--no-deps {INDEX} torch", "--editable .[dev]"]
    assert make()[2] == []  # nothing is left to do


def test_an_index_that_does_not_answer_is_left_out(make):
    ended_well, said, calls = make("setup", index=False)
    assert ended_well and calls == [NEW, "--no-deps torch", "--editable .[dev]"]
    assert "https://download.pytorch.org/whl/cpu does not answer" in said


def test_beside_a_driver_torch_comes_with_the_rest(make):
    ended_well, said, calls = make("setup", driver=True)
    assert ended_well and calls == [NEW, "--editable .[dev]"]
    assert "NVIDIA driver found" in said


@pytest.mark.parametrize("at, again", [("--no-deps", [f"--no-deps {INDEX} torch"]), ("--editable", [])])
def test_an_error_of_pip_leaves_a_whole_environment_as_it_is(make, at, again):
    assert not make(trouble="exit 1", at=at)[0]
    ended_well, _, calls = make()
    assert ended_well and calls == [*([NEW] if again else []), *again, "--editable .[dev]"]


CAUGHT = "trap : INT; kill -INT 0; exit 1"  # as pip does; Bash then goes on


@pytest.mark.parametrize(
    "at, trouble, shell",
    [
        ("--no-deps", "kill -INT 0", "/bin/sh"),
        ("--no-deps", CAUGHT, "/bin/bash"),
        ("--editable", CAUGHT, "/bin/sh"),
        ("--editable", CAUGHT, "/bin/bash"),
        ("--editable", "kill -KILL 0", "/bin/sh"),
    ],
)
def test_an_environment_in_which_pip_was_interrupted_is_made_anew(make, at, trouble, shell):
    if not Path(shell).exists():
        pytest.skip(f"needs {shell}")
    assert not make(trouble=trouble, at=at, shell=shell)[0]
    ended_well, _, calls = make(shell=shell)
    assert ended_well and calls == [NEW, f"--no-deps {INDEX} torch", "--editable .[dev]"]
