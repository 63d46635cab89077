"""Every check of multimodal models, as eval/multimodal.py makes the table of them; here on some types."""

import json

import pytest
from multimodal_models import DAILY
from scripts import EVAL, loaded_script

from dsla_hf.models.multimodal import MULTIMODAL

CHECKS = (
    "images",
    "level 0",
    "converts",
    "caches",
    "generates",
    "padded",
    "packed",
    "shifted",
    "raised",
    "adapter",
    "merged",
    "gradients",
    "heads",
    "text",
)


@pytest.fixture(scope="module")
def checks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVAL))
        with loaded_script("multimodal.py") as module:
            yield module


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", DAILY)
def test_a_check_holds(checks, kind, name):
    found = checks.check(name, kind)
    assert checks.fine(found), found


def test_no_check_is_left_out_and_the_table_is_of_all_types(checks):
    assert tuple(checks.CHECKS) == CHECKS
    rows = json.loads((EVAL / "results" / "multimodal.json").read_text())["rows"]
    assert [row["type"] for row in rows] == list(MULTIMODAL) and all(set(CHECKS) <= set(row) for row in rows)


def test_what_does_not_hold_is_told(checks, monkeypatch):
    """Rotary pairs whose channels do not share a decay: what a state reads depends on absolute positions."""
    monkeypatch.setattr("dsla_hf.models.configuration.rotary_of", lambda config, kind: ("interleaved", 12))
    assert not checks.fine(checks.check("shifted", "qwen3_vl"))
    monkeypatch.setitem(checks.CHECKS, "broken", lambda make, folder: 1 / 0)
    assert checks.check("broken", "llava") == "ZeroDivisionError: division by zero" and not checks.fine(checks.check("broken", "llava"))
