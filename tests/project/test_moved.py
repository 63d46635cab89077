"""Modules keep their old names until 0.3."""

import importlib
import pickle
import runpy
import sys

import pytest

import dsla_hf
from dsla_hf.moved import MOVED

# What the README, the guides, task definitions and saved files have named.
NAMED = [
    "adapter",
    "attention",
    "cache",
    "configuration",
    "corpus",
    "data",
    "distillation",
    "generation",
    "lm_eval",
    "long_context",
    "modeling",
    "policies",
    "quickstart",
    "sensitivity",
    "tasks.documents",
    "tasks.truncation",
]


@pytest.mark.parametrize("old", [*MOVED])
def test_an_old_name_gives_the_module_itself_and_says_the_new_one(old):
    sys.modules.pop(f"dsla_hf.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"dsla_hf\.{old} is now dsla_hf\.{MOVED[old]}; the old name goes with 0\.3"):
        found = importlib.import_module(f"dsla_hf.{old}")
    new = importlib.import_module(f"dsla_hf.{MOVED[old]}")
    assert found is new and new.__name__ == new.__spec__.name == f"dsla_hf.{MOVED[old]}"


def test_everything_that_was_named_is_found():
    assert set(NAMED) <= MOVED.keys()
    from dsla_hf.evaluation import cache_bytes_per_sequence, evaluate_levels  # noqa: F401
    from dsla_hf.serving.engine import Engine  # noqa: F401
    from dsla_hf.serving.replay import replay  # noqa: F401

    for name in ("DSLATrainer", "DSLATrainingArguments", "distill", "rank_layers", "evaluate_levels"):
        assert name in dsla_hf.__all__ and callable(getattr(dsla_hf, name))


def test_what_was_pickled_by_an_old_name_is_read():
    content = pickle.dumps(dsla_hf.DSLAConfig, protocol=0)
    assert b"dsla_hf.models.configuration" in content
    sys.modules.pop("dsla_hf.configuration", None)
    with pytest.warns(DeprecationWarning, match=r"is now dsla_hf\.models\.configuration"):
        found = pickle.loads(content.replace(b"dsla_hf.models.configuration", b"dsla_hf.configuration"))
    assert found is dsla_hf.DSLAConfig


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"dsla_hf\.nothing"):
        importlib.import_module("dsla_hf.nothing")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_by_its_old_name_runs(monkeypatch, capsys):
    sys.modules.pop("dsla_hf.lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--help"])
    with pytest.warns(DeprecationWarning, match=r"is now dsla_hf\.evaluation\.lm_eval"), pytest.raises(SystemExit) as caught:
        runpy.run_module("dsla_hf.lm_eval", run_name="__main__", alter_sys=True)
    assert caught.value.code == 0 and "lm" in capsys.readouterr().out.lower()
