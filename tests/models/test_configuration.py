"""DSLAConfig: what it accepts, what it refuses and with which words, and the two files it is written to."""

import json
import re

import pytest
from peft import PeftConfig

from dsla_hf import DSLAConfig, DualStateAttention
from dsla_hf.models.configuration import FORMAT_VERSION, check_order

# What a complete conversion looks like in a hybrid's config.json.
HYBRID = {
    "format_version": FORMAT_VERSION,
    "base_model_type": "llama",
    "converted_layers": [3, 1],
    "window_size": 8,
    "sink_tokens": 3,
    "gate_rank": 4,
    "gate_normalizer": 8.0,
    "gate_lower_bound": -0.5,
    "half_lives": [[64.0, 512.0], [4.0, 4.0]],
    "write_gate": False,
    "rotary_layout": "interleaved",
    "rotary_dim": 6,
}
FROM_THE_BASE = {"rotary_layout", "rotary_dim"}


def test_defaults():
    config = DSLAConfig()
    assert config.peft_type == "DSLA"
    assert config.target_modules == ["self_attn"]
    assert config.conversion_order is None and config.level is None and config.converted_layers == []
    assert (config.window_size, config.gate_rank, config.gate_normalizer, config.gate_lower_bound) == (128, 16, 16.0, -1.25)
    assert config.sink_tokens == 4 and config.write_gate is True
    assert config.half_lives == ((64.0, 4096.0), (8.0, 256.0))
    assert config.trained_projections == ("q_proj", "o_proj") and config.exact_fold
    assert config.format_version == FORMAT_VERSION


def test_level_is_a_prefix_of_the_order():
    order = [3, 1, 2]
    config = DSLAConfig(conversion_order=order, level=2)
    assert config.converted_layers == [3, 1]
    assert config.layers_to_transform == [3, 1, 2]
    order.append(0)
    assert config.conversion_order == [3, 1, 2], "the config must not follow the caller's list"


@pytest.mark.parametrize("level, converted", [(0, []), (1, [3]), (3, [3, 1, 2]), (None, [3, 1, 2])])
def test_converted_layers_at_every_level(level, converted):
    config = DSLAConfig(conversion_order=[3, 1, 2], level=level)
    assert config.converted_layers == converted
    assert config.level == len(converted)


def test_mathematics_are_the_keyword_arguments_of_the_layer():
    values = {"window_size": 8, "sink_tokens": 2, "gate_rank": 4, "gate_normalizer": 8.0, "gate_lower_bound": -0.5, "write_gate": False}
    config = DSLAConfig(**values, half_lives=[64, [4, 8]])
    assert config.mathematics() == {**values, "states": True, "half_lives": ((64, 64), (4, 8))}
    attention = DualStateAttention(4, 2, 8, **config.mathematics())
    for name in config.mathematics().keys() - {"gate_rank"}:
        assert getattr(attention, name) == config.mathematics()[name], name
    assert attention.gate_down.shape[-1] == 4


@pytest.mark.parametrize(
    "half_lives, stored",
    [
        ((64.0, 4.0), ((64.0, 64.0), (4.0, 4.0))),
        ([[64, 4096], (8, 256)], ((64, 4096), (8, 256))),
        (((4096.0, 64.0), 8.0), ((4096.0, 64.0), (8.0, 8.0))),
    ],
)
def test_half_lives_are_pairs_and_a_number_stands_for_a_pair_of_it(half_lives, stored):
    assert DSLAConfig(half_lives=half_lives).half_lives == stored


def test_sinks_fit_into_half_a_window_and_need_none_without_one():
    assert DSLAConfig(window_size=8, sink_tokens=4).sink_tokens == 4
    assert DSLAConfig(window_size=2, sink_tokens=0).sink_tokens == 0
    assert DSLAConfig(window_size=0).window_size == 0
    with pytest.raises(ValueError, match="sink_tokens must be from 0 to half the window of 6, got 4"):
        DSLAConfig(window_size=6)


@pytest.mark.parametrize(
    "projections, stored, exact",
    [
        (["o_proj", "q_proj"], ("q_proj", "o_proj"), True),
        ([], (), True),
        (("k_proj",), ("k_proj",), False),
        ({"v_proj", "q_proj"}, ("q_proj", "v_proj"), False),
    ],
)
def test_trained_projections_decide_whether_a_fold_is_exact(projections, stored, exact):
    config = DSLAConfig(trained_projections=projections)
    assert config.trained_projections == stored
    assert config.exact_fold is exact


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [DSLAConfig, PeftConfig])
def test_adapter_config_json_round_trip(tmp_path, loader):
    config = DSLAConfig(
        conversion_order=[3, 1, 2],
        level=1,
        window_size=0,
        gate_rank=4,
        gate_normalizer=8.0,
        gate_lower_bound=-0.5,
        half_lives=((128.0, 1024.0), 4.0),
        sink_tokens=2,
        write_gate=False,
        trained_projections=("q_proj", "k_proj"),
        modules_to_save=["lm_head"],
        order_scores={"3": 0.1, "1": 0.2, "2": 0.3},
        level_metrics={"1": {"perplexity": 23.7}},
        base_model_type="llama",
        base_dimensions={"hidden_size": 32},
        base_fingerprint={"layers.1.k_proj": 0.25},
        base_model_name_or_path="some/base",
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is DSLAConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.half_lives == config.half_lives == ((128.0, 1024.0), (4.0, 4.0))
    assert isinstance(loaded.half_lives, tuple) and isinstance(loaded.trained_projections, tuple)
    assert loaded.converted_layers == [3]


def test_adapter_config_json_holds_the_whole_plan_at_level_0(tmp_path):
    DSLAConfig(conversion_order=[3, 1, 2], level=0).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["conversion_order"] == [3, 1, 2]
    assert stored["level"] == 0
    assert stored["peft_type"] == "DSLA"
    assert stored["format_version"] == FORMAT_VERSION
    assert DSLAConfig.from_pretrained(tmp_path).check_level(3) == 3


def test_adapter_config_json_of_a_newer_release_says_which_release_reads_it(tmp_path):
    DSLAConfig(conversion_order=[1]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored.update(format_version=FORMAT_VERSION + 1, entry_of_the_future=1)
    path.write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="entry_of_the_future"):  # PEFT's own, before the config is made
        with pytest.raises(ValueError, match=rf"format {FORMAT_VERSION + 1}.*install a release .*format {FORMAT_VERSION + 1} or newer"):
            PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("level, expected", [(0, 0), ("3", 3), ("50%", 4), (None, 2)])
def test_level_given_at_loading_takes_the_place_of_the_stored_one(level, expected, tmp_path):
    stored = DSLAConfig(conversion_order=[3, 1, 2, 0, 5], level=2, base_dimensions={"num_hidden_layers": 8}, task_type="CAUSAL_LM")
    stored.save_pretrained(tmp_path)
    assert DSLAConfig.from_pretrained(tmp_path, level=level).level == expected
    with pytest.raises(ValueError, match=r"level 100%, 8 of 8 layers, is above the plan"):
        DSLAConfig.from_pretrained(tmp_path, level="100%")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"window_size": 64, "level": 1}, "window_size of a saved DSLA adapter cannot be changed"),
        ({"conversion_order": [1]}, "conversion_order of a saved DSLA adapter cannot be changed"),
        ({"task_type": "SEQ_CLS"}, "holds no head for it"),
        ({"level": True}, "level must be a whole number"),
    ],
)
def test_what_cannot_be_given_at_loading_is_refused(given, message, tmp_path):
    DSLAConfig(conversion_order=[3, 1, 2]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DSLAConfig.from_pretrained(tmp_path, **given)
    assert DSLAConfig.from_pretrained(tmp_path, task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


def test_hybrid_dict_round_trip():
    config = DSLAConfig.from_hybrid_dict(HYBRID)
    assert config.conversion_order == config.converted_layers == [3, 1]
    assert config.half_lives == ((64.0, 512.0), (4.0, 4.0))
    assert config.sink_tokens == 3 and config.write_gate is False
    assert config.base_model_type == "llama"
    written = config.to_hybrid_dict()
    assert written == HYBRID
    assert json.loads(json.dumps(written)) == written, "must be plain JSON"


def test_hybrid_dict_names_states_where_there_are_none():
    """So that older releases read what they can run, and nothing else."""
    assert "states" not in HYBRID and DSLAConfig.from_hybrid_dict(HYBRID).states is True
    alone = {**HYBRID, "states": False}
    config = DSLAConfig.from_hybrid_dict(alone)
    assert config.states is False and config.to_hybrid_dict() == alone


def test_hybrid_dict_names_the_base_where_that_has_a_name():
    named = {**HYBRID, "base_model_name_or_path": "some/base"}
    config = DSLAConfig.from_hybrid_dict(named)
    assert config.base_model_name_or_path == "some/base" and config.to_hybrid_dict() == named
    assert DSLAConfig.from_hybrid_dict(HYBRID).base_model_name_or_path is None, "as files of earlier releases"


def test_hybrid_dict_holds_the_converted_layers_only_and_nothing_of_peft():
    config = DSLAConfig(conversion_order=[3, 1, 2], level=2, base_model_type="qwen3", modules_to_save=["lm_head"])
    hybrid = config.to_hybrid_dict()
    assert set(hybrid) == set(HYBRID) - FROM_THE_BASE
    assert hybrid["converted_layers"] == [3, 1]
    hybrid["converted_layers"].append(2)
    assert config.converted_layers == [3, 1], "the dict must not share its list with the config"
    assert DSLAConfig.from_hybrid_dict(config.to_hybrid_dict()).mathematics() == config.mathematics()


@pytest.mark.parametrize("missing", sorted(HYBRID.keys() - FROM_THE_BASE))
def test_partial_hybrid_dict_is_refused(missing):
    partial = {name: value for name, value in HYBRID.items() if name != missing}
    with pytest.raises(ValueError, match=rf"here/config.json.*{missing}"):
        DSLAConfig.from_hybrid_dict(partial, "here/config.json")


@pytest.mark.parametrize(
    "entry, value",
    [
        ("surprise", 1),
        ("format_version", FORMAT_VERSION + 1),
        ("format_version", "1"),
        ("converted_layers", [1, 1]),
        ("converted_layers", [-1]),
        ("converted_layers", []),
        ("window_size", -1),
        ("window_size", 9),
        ("sink_tokens", 5),
        ("gate_lower_bound", -2.0),
        ("half_lives", [16.0]),
        ("write_gate", 1),
        ("rotary_layout", "thirds"),
        ("rotary_dim", 7),
        ("base_model_name_or_path", 1),
    ],
)
def test_bad_entry_of_a_hybrid_dict_is_refused_with_the_file(entry, value):
    with pytest.raises(ValueError, match=r"here/config\.json") as caught:
        DSLAConfig.from_hybrid_dict({**HYBRID, entry: value}, "here/config.json")
    assert entry in str(caught.value) or entry == "format_version"


def test_hybrid_dict_that_is_no_dict_is_refused():
    with pytest.raises(ValueError, match=r"dsla_config.*must be a dict.*got None"):
        DSLAConfig.from_hybrid_dict(None)


# --- values that do not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("conversion_order", [0, -1], r"\[-1\]"),
        ("conversion_order", [2, 0, 2], r"more than once: \[2\]"),
        ("conversion_order", [0, True], "True"),
        ("conversion_order", [0, "1"], "'1'"),
        ("conversion_order", [0, 1.0], r"1\.0"),
        ("conversion_order", "12", "1.*2"),
        ("conversion_order", [], r"\[\]"),
        ("conversion_order", 3, "3"),
        ("level", -1, "-1"),
        ("level", True, "True"),
        ("level", 1.0, r"1\.0"),
        ("level", "1", "'1'"),
        ("window_size", -1, "-1"),
        ("window_size", 8.0, r"8\.0"),
        ("window_size", True, "True"),
        ("window_size", None, "None"),
        ("window_size", 7, "even number.*7"),
        ("sink_tokens", -1, "-1"),
        ("sink_tokens", 65, "half the window of 128, got 65"),
        ("sink_tokens", 4.0, r"4\.0"),
        ("sink_tokens", True, "True"),
        ("sink_tokens", None, "None"),
        ("write_gate", 1, "1"),
        ("write_gate", None, "None"),
        ("write_gate", "yes", "yes"),
        ("gate_rank", 0, "0"),
        ("gate_rank", 2.5, r"2\.5"),
        ("gate_rank", True, "True"),
        ("gate_normalizer", 0, "0"),
        ("gate_normalizer", -16.0, r"-16\.0"),
        ("gate_normalizer", float("nan"), "nan"),
        ("gate_normalizer", float("inf"), "inf"),
        ("gate_normalizer", "16", "16"),
        ("gate_lower_bound", -1.26, r"-1\.26"),
        ("gate_lower_bound", 0.0, r"got 0\.0"),
        ("gate_lower_bound", float("nan"), "nan"),
        ("gate_lower_bound", "-1", "-1"),
        ("half_lives", (16.0,), r"16\.0"),
        ("half_lives", (16.0, 16.0, 16.0), r"16\.0"),
        ("half_lives", (16.0, 0.0), r"0\.0"),
        ("half_lives", (-4.0, 16.0), r"-4\.0"),
        ("half_lives", (16.0, float("inf")), "inf"),
        ("half_lives", (16.0, "x"), "x"),
        ("half_lives", 16.0, r"16\.0"),
        ("half_lives", ((16.0,), 16.0), r"16\.0"),
        ("half_lives", ((16.0, 17.0, 18.0), 16.0), r"18\.0"),
        ("half_lives", ((16.0, "x"), 16.0), "x"),
        ("half_lives", ((16.0, True), 16.0), "True"),
        ("half_lives", ((0.0, 16.0), 16.0), r"0\.0"),
        ("half_lives", (16.0, (8.0, -3.0)), r"-3\.0"),
        ("half_lives", (16.0, (float("nan"), 8.0)), "nan"),
        ("half_lives", "16", "16"),
        ("rotary_layout", "halves", "None"),
        ("rotary_dim", 8, "None and 8"),
        ("trained_projections", ["q_proj", "gate_proj"], "gate_proj"),
        ("trained_projections", "q_proj", "'q_proj'"),
        ("target_modules", r".*\.self_attn", r"self_attn"),
        ("target_modules", 3, "3"),
        ("format_version", 0, "0"),
        ("format_version", "1", "'1'"),
        ("format_version", FORMAT_VERSION + 1, str(FORMAT_VERSION + 1)),
    ],
)
def test_bad_value_is_refused_by_field_and_value(field, value, named):
    with pytest.raises(ValueError, match=named) as caught:
        DSLAConfig(**{field: value})
    assert re.search({"half_lives": "half[-_]li", "format_version": "format"}.get(field, field), str(caught.value))


def test_level_above_the_plan_is_refused_with_the_plan():
    with pytest.raises(ValueError, match=r"level 3 is above the plan.*2 layers \[1, 0\]"):
        DSLAConfig(conversion_order=[1, 0], level=3)


@pytest.mark.parametrize("order", [[0, 4], [7]])
def test_layers_the_model_does_not_have_are_refused_with_those_it_has(order):
    with pytest.raises(ValueError, match=rf"\[{order[-1]}\].*0 to 3"):
        check_order(order, 4)
    assert check_order([0, 3], 4) == [0, 3]
