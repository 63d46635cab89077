"""Modules, and members of modules that were divided, keep their old names until 0.3."""

import importlib
import importlib.util
import pickle
import runpy
import sys

import pytest

import dsla_hf
from dsla_hf.moved import MEMBERS, MOVED
from dsla_kernels.moved import MOVED as KERNELS

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


PACKAGES = {"dsla_hf": MOVED, "dsla_kernels": KERNELS}
MODULES = [(package, old) for package, modules in PACKAGES.items() for old in modules]


@pytest.mark.parametrize("package, old", MODULES)
def test_an_old_name_gives_the_module_itself_and_says_the_new_one(package, old):
    if package == "dsla_kernels":
        pytest.importorskip("triton")
    sys.modules.pop(f"{package}.{old}", None)
    name = f"{package}.{PACKAGES[package][old]}"
    with pytest.warns(DeprecationWarning, match=rf"{package}\.{old} is now {name}; the old name goes with 0\.3"):
        found = importlib.import_module(f"{package}.{old}")
    new = importlib.import_module(name)
    assert found is new and new.__name__ == new.__spec__.name == name


@pytest.mark.parametrize("module, member", [(module, member) for module, members in MEMBERS.items() for member in members])
def test_what_went_to_another_module_is_found_in_its_own(module, member):
    found = importlib.import_module(f"dsla_hf.{module}")
    place, _, name = MEMBERS[module][member].partition(":")
    place, name = importlib.util.resolve_name(place, "dsla_hf"), name or member
    assert member not in vars(found), "it has not moved"
    with pytest.warns(DeprecationWarning, match=rf"dsla_hf\.{module}\.{member} is now {place}\.{name}; the old name goes with 0\.3"):
        assert getattr(found, member) is getattr(importlib.import_module(place), name)


@pytest.mark.filterwarnings("ignore:.*the old name goes with 0.3:DeprecationWarning")
def test_imports_that_users_have_written_go_on():
    from dsla_hf.cache import cache_bytes, fold
    from dsla_hf.distillation import DSLATrainer, DSLATrainingArguments, distill

    from dsla_hf.training import trainer

    assert (cache_bytes, fold) == (dsla_hf.cache_bytes, dsla_hf.fold)
    assert (DSLATrainer, DSLATrainingArguments, distill) == (trainer.DSLATrainer, trainer.DSLATrainingArguments, trainer.distill)
    with pytest.raises(AttributeError, match=r"module 'dsla_hf\.training\.trainer' has no attribute 'nothing'"):
        trainer.nothing  # noqa: B018
    assert importlib.import_module("dsla_hf.modeling").DSLALlamaForCausalLM.__name__ == "DSLALlamaForCausalLM"


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
