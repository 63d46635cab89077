"""The `DSLA` member of PEFT's enum of methods: made by enum internals, so everything a real member does is checked here."""

import copy
import importlib
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
)

from dsla_hf import DSLAConfig, DSLAModel
from dsla_hf.compat import peft_type
from dsla_hf.compat.peft_type import DSLA


def test_lookups_find_the_one_member():
    assert PeftType("DSLA") is PeftType["DSLA"] is PeftType.DSLA is DSLA
    assert DSLA in PeftType and "DSLA" in PeftType.__members__
    assert list(PeftType).count(DSLA) == 1
    assert [member.name for member in PeftType].count("DSLA") == 1


def test_member_has_the_nature_of_the_others():
    lora = PeftType.LORA
    assert type(DSLA) is type(lora)
    assert (DSLA.name, DSLA.value) == ("DSLA", "DSLA")
    assert repr(DSLA) == repr(lora).replace("LORA", "DSLA")
    assert str(DSLA) == str(lora).replace("LORA", "DSLA")
    assert f"{DSLA}" == f"{lora}".replace("LORA", "DSLA")
    assert DSLA == "DSLA" and lora != DSLA and hash(DSLA) == hash("DSLA")
    assert {DSLA: 1}["DSLA"] == 1


def test_json_pickle_and_copies():
    assert json.loads(json.dumps({"peft_type": DSLA})) == {"peft_type": "DSLA"}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(DSLA, protocol)) is DSLA
    assert copy.copy(DSLA) is DSLA and copy.deepcopy([DSLA])[0] is DSLA


def test_making_it_again_changes_nothing():
    before = list(PeftType)
    reloaded = importlib.reload(peft_type)
    assert reloaded.DSLA is DSLA
    assert list(PeftType) == before
    # Should a release of PEFT bring the name itself, that member is taken.
    assert peft_type._add_member("LORA") is PeftType.LORA
    assert list(PeftType) == before


def test_unknown_names_are_still_refused():
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")


def test_registered_in_pefts_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[DSLA] is DSLAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[DSLA] is DSLAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[DSLA] == "dsla_"
    assert DSLA not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DSLA"] is DSLAConfig, "transformers looks it up by the string"
    assert isinstance(get_peft_config({"peft_type": "DSLA", "conversion_order": [1]}), DSLAConfig)
