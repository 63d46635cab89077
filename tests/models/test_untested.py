"""Types that are not in the table: tried on small models when asked, converted if the checks hold, and known again by their record."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_config, tiny_model_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dsla_hf import DSLAConfig
from dsla_hf.models.architectures import ARCHITECTURES, TRIED, find_architecture
from dsla_hf.models.loading import check_convertible
from dsla_hf.models.trial import untested
from dsla_hf.models.trial.checks import apart, text
from dsla_hf.models.trial.records import forget
from dsla_hf.models.trial.small_models import small_config
from dsla_hf.models.trial.structure import read_structure
from dsla_hf.models.trial.verdict import holds


class TomorrowConfig(LlamaConfig):
    model_type = "tomorrow"


class TomorrowForCausalLM(LlamaForCausalLM):
    config_class = TomorrowConfig


class NextWeekConfig(CohereConfig):
    model_type = "next_week"


class NextWeekForCausalLM(CohereForCausalLM):
    config_class = NextWeekConfig


for config_class, model_class in ((TomorrowConfig, TomorrowForCausalLM), (NextWeekConfig, NextWeekForCausalLM)):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)

ASKED = {"task_type": "CAUSAL_LM", "window_size": 8, "allow_untested": True}


@pytest.fixture(autouse=True)
def nothing_known():
    yield
    for kind in list(TRIED):
        forget(kind)


@pytest.fixture
def counted(monkeypatch):
    """The names of the checks that ran."""
    ran = []

    def counting(name, check):
        return lambda *args: ran.append(name) or check(*args)

    monkeypatch.setattr(untested, "CHECKS", {name: counting(name, check) for name, check in untested.CHECKS.items()})
    return ran


@pytest.fixture
def few(monkeypatch):
    """Tests of the record need no more checks than these."""
    monkeypatch.setattr(untested, "CHECKS", {name: untested.CHECKS[name] for name in ("converts", "heads")})


def tomorrow(kind="tomorrow"):
    torch.manual_seed(0)
    values = {
        name: x for name, x in tiny_config({"tomorrow": "llama", "next_week": "cohere"}[kind]).to_dict().items() if name != "model_type"
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval().requires_grad_(False)


# --- reading the structure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ("phi3", "gemma4_text")])
def test_the_structure_that_is_read_is_that_of_the_table(kind):
    config = tiny_config(kind)
    known, found = ARCHITECTURES[kind], read_structure(tiny_model_of(kind))
    assert (found.attention, found.names) == (known.attention, known.names)
    if kind != "nemotron_h":  # without a rotary embedding there is nothing to read
        partly = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) < 1
        assert (found.rotary_layout, found.partial_rotary) == (known.rotary_layout, known.partial_rotary and partly)


@pytest.mark.parametrize(
    "kind, reason",
    [("phi3", "no attention with q_proj, k_proj and v_proj of their own"), ("biogpt", "turn with their position in a way that no known")],
)
def test_another_structure_is_told(kind, reason):
    model = tiny_model_of(kind) if kind in ARCHITECTURES else AutoModelForCausalLM.from_config(small_config(AutoConfig.for_model(kind)))
    with pytest.raises(ValueError, match=reason):
        read_structure(model.eval())


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_next", "nemotron_h", "mixtral"])
def test_a_small_config_has_each_kind_of_layer_and_four_with_attention(kind):
    config = AutoConfig.for_model(kind)
    small = small_config(config)
    kinds, before = (getattr(x, "layer_types", None) or ["full_attention"] * x.num_hidden_layers for x in (small, config))
    assert set(kinds) == set(before) and sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds) == 4
    assert small.hidden_size == 32 and small.num_hidden_layers == len(kinds) and type(small) is type(config)


# --- trying a type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tomorrow", "next_week"])
def test_a_type_that_passes_is_converted_and_says_what_it_passed(kind, counted, tmp_path):
    base, ids = tomorrow(kind), text()
    with torch.no_grad():
        expected = base(ids).logits
    state = torch.get_rng_state()
    untested.try_untested(base, DSLAConfig(**ASKED))
    assert counted == list(untested.CHECKS) and torch.equal(state, torch.get_rng_state())
    model = get_peft_model(base, DSLAConfig(**ASKED)).eval()
    config = model.peft_config["default"]
    assert config.rotary_layout == ARCHITECTURES[{"tomorrow": "llama", "next_week": "cohere"}[kind]].rotary_layout
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        model.set_level(4)
        assert apart(model(ids).logits, expected) > 1e-4
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "allow_untested" not in saved
    assert saved["checked_base"]["model_type"] == kind and saved["checked_base"]["checks"].keys() == untested.CHECKS.keys()
    assert all(map(holds, saved["checked_base"]["checks"].values()))


def test_without_being_asked_it_is_refused_with_the_way():
    message = r"'tomorrow' .* has not been tested. DSLAConfig\(allow_untested=True\) runs the checks"
    with pytest.raises(ValueError, match=message):
        get_peft_model(tomorrow(), DSLAConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=f"^there: model type {message}"):
        check_convertible("there", TomorrowConfig())
    check_convertible("there", TomorrowConfig(), allow_untested=True)


@pytest.mark.parametrize("value", ["false", 1, None])
def test_to_ask_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"allow_untested must be True or False, got {value!r}"):
        DSLAConfig(task_type="CAUSAL_LM", allow_untested=value)


def test_each_call_must_ask(few, counted):
    get_peft_model(tomorrow(), DSLAConfig(**ASKED))
    ran = len(counted)
    with pytest.raises(ValueError, match="has not been tested"):
        get_peft_model(tomorrow(), DSLAConfig(task_type="CAUSAL_LM"))
    get_peft_model(tomorrow(), DSLAConfig(**ASKED))
    assert len(counted) == ran  # they passed in this process


def test_a_type_that_fails_is_refused_by_the_names_of_its_checks():
    """The differential attention of DiffLlama runs its attention function twice."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(small_config(AutoConfig.for_model("diffllama")))
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=r"'diffllama' has not been tested, and \d+ of 11 checks on a small model do not hold: converts: "):
        get_peft_model(base, DSLAConfig(**ASKED))
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert find_architecture("diffllama") is None and not hasattr(base, "peft_config")


def test_what_cannot_work_is_not_tried(counted):
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "deepseek_v3",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=30,
            intermediate_size=16,
        )
    )
    with pytest.raises(ValueError, match=r"latent attention \(MLA"):
        get_peft_model(base, DSLAConfig(**ASKED))
    assert not counted


def test_where_places_of_heads_matter_they_are_not_reordered():
    """BitNet has a norm behind its attention with a weight for each channel of each head."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(small_config(AutoConfig.for_model("bitnet")))
    model = get_peft_model(base, DSLAConfig(**ASKED, conversion_unit="head"))
    assert not find_architecture("bitnet").ordered
    assert model.peft_config["default"].checked_base["checks"]["heads"] < 1e-4


def test_a_plan_of_layers_does_without_the_check_of_heads(monkeypatch):
    monkeypatch.setattr(untested, "CHECKS", {"converts": untested.CHECKS["converts"], "heads": lambda *_: 0.5})
    with pytest.raises(ValueError, match=r"heads: 0\.5\. conversion_unit='layer' takes it"):
        get_peft_model(tomorrow(), DSLAConfig(**ASKED, conversion_unit="head"))
    assert get_peft_model(tomorrow(), DSLAConfig(**ASKED)).peft_config["default"].checked_base["checks"]["heads"] == 0.5


# --- the record -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved_adapter(few, tmp_path):
    model = get_peft_model(tomorrow(), DSLAConfig(**ASKED, level=3, conversion_order=[2, 0, 3, 1]))
    model.save_pretrained(tmp_path / "adapter")
    forget("tomorrow")
    return tmp_path / "adapter"


def changed(folder, **entries):
    """The adapter's record with other entries."""
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    saved["checked_base"] |= entries
    path.write_text(json.dumps(saved))


def test_a_saved_adapter_is_loaded_by_its_record(saved_adapter, counted):
    model = PeftModel.from_pretrained(tomorrow(), saved_adapter)
    assert model.get_level() == 3 and not counted


def test_over_code_that_has_changed_the_checks_run_again(saved_adapter, counted):
    changed(saved_adapter, code="of another release")
    PeftModel.from_pretrained(tomorrow(), saved_adapter)
    assert counted == ["converts", "heads"]


@pytest.mark.parametrize("missing", ["converts", "heads"])
def test_checks_that_a_record_lacks_run(saved_adapter, counted, missing):
    changed(saved_adapter, checks={name: 0.0 for name in ("converts", "heads") if name != missing})
    PeftModel.from_pretrained(tomorrow(), saved_adapter)
    assert counted == ["converts", "heads"]


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "llama"},
        {"architecture": {"shape": 1}},
        {"architecture": None},
        {"architecture": {"attention": 5}},
        {"architecture": {"names": {"q_proj": ["q"]}}},
        {"architecture": {"ordered": "no"}},
        {"checks": {}},
        {"checks": ["converts"]},
    ],
)
def test_a_broken_record_is_refused(saved_adapter, entries):
    changed(saved_adapter, **entries)
    with pytest.raises(ValueError, match=r"adapter_config.json: 'checked_base' is no record of the checks of model type 'tomorrow'"):
        PeftModel.from_pretrained(tomorrow(), saved_adapter)


def test_a_hybrid_has_the_record_and_is_loaded_by_it(saved_adapter, tmp_path, counted, caplog):
    ids = text()
    with torch.no_grad():
        hybrid = PeftModel.from_pretrained(tomorrow(), saved_adapter).merge_and_unload()
        expected = hybrid(ids).logits
        hybrid.save_pretrained(tmp_path / "hybrid")
        forget("tomorrow")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
        assert torch.equal(loaded(ids).logits, expected) and not counted
    assert loaded.config.get_dsla_config().checked_base["model_type"] == "tomorrow"
    path = tmp_path / "hybrid" / "config.json"
    config = json.loads(path.read_text())
    config["dsla_config"]["checked_base"]["code"] = "of another release"
    path.write_text(json.dumps(config))
    AutoConfig.from_pretrained(tmp_path / "hybrid")
    assert "the code of 'tomorrow' is not the one that passed the checks" in caplog.text
    del config["dsla_config"]["checked_base"]
    path.write_text(json.dumps(config))
    forget("tomorrow")
    with pytest.raises(ValueError, match="names the base_model_type 'tomorrow'; supported are"):
        AutoConfig.from_pretrained(tmp_path / "hybrid")


@pytest.mark.parametrize("unit, failed", [("layer", "converts"), ("head", "heads")])
def test_a_hybrid_whose_record_has_a_check_that_failed_is_refused_as_an_adapter_is(few, tmp_path, unit, failed):
    model = get_peft_model(tomorrow(), DSLAConfig(**ASKED, conversion_unit=unit, level=2))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for name, place in (("adapter", ()), ("hybrid", ("dsla_config",))):
        path = tmp_path / name / ("adapter_config.json" if name == "adapter" else "config.json")
        saved = json.loads(path.read_text())
        (saved[place[0]] if place else saved)["checked_base"]["checks"][failed] = 0.5
        path.write_text(json.dumps(saved))
    forget("tomorrow")
    message = rf"'tomorrow' has not been tested, and 1 of {1 if unit == 'layer' else 2} checks on a small model do not hold: {failed}: 0\.5"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tomorrow(), tmp_path / "adapter")
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"hybrid/config.json: model type {message}"):
            load(tmp_path / "hybrid")
    assert find_architecture("tomorrow") is None


def test_a_hybrid_of_layers_is_loaded_whatever_its_record_says_of_heads(monkeypatch, tmp_path):
    monkeypatch.setattr(untested, "CHECKS", {"converts": untested.CHECKS["converts"], "heads": lambda *_: 0.5})
    get_peft_model(tomorrow(), DSLAConfig(**ASKED, level=2)).merge_and_unload().save_pretrained(tmp_path)
    forget("tomorrow")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_level() == 2
