"""What examples say where something is missing."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_adaptive_generation_without_the_quickstart_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adaptive_generation.py"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / "adaptive_generation.py"), run_name="__main__")
    message = left.value.code  # printed as it is, with exit status 1
    assert "quickstart-output/teacher" in message and "run `dsla quickstart`" in message and "\n" not in message
