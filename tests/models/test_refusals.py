"""What PEFT and transformers would do wrong with DSLA without a word is refused, by every way to it, and nothing is changed."""

import copy
import json
import shutil

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    LoraModel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
)

from dsla_hf import DSLAConfig, DSLALayer

IDS = torch.arange(3, 43)[None]
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"])


@pytest.fixture
def adapter(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"), level=2)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


class unchanged:
    """That a model is what it was: modules, weights that are trained, adapters and what it computes."""

    def __init__(self, *models):
        self.models = models

    def state(self):
        for model in self.models:
            yield [name for name, _ in model.named_modules()]
            yield [name for name, p in model.named_parameters() if p.requires_grad]
            yield {name: id(config) for name, config in (getattr(model, "peft_config", None) or {}).items()}

    def __enter__(self):
        self.before, self.logits = list(self.state()), [logits(model) for model in self.models]

    def __exit__(self, *error):
        if error[0] is None:
            assert list(self.state()) == self.before
            assert all(torch.equal(logits(model), x) for model, x in zip(self.models, self.logits, strict=True))


# --- other PEFT methods over DSLA layers ------------------------------------------------------------------------

REFUSED = r"over which [A-Z0-9_]+ is not supported: merge_and_unload\(\) makes a hybrid"


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),  # those of planned layers cannot be found
        IA3Config(task_type="CAUSAL_LM", target_modules=["up_proj"], feedforward_modules=["up_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]),
        AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], total_step=2),
        VeraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_peft_methods_over_dsla_layers(adapter, config):
    base = adapter.get_base_model()
    with unchanged(adapter, base):
        for model in (adapter, base):
            with pytest.raises(ValueError, match=REFUSED):
                get_peft_model(model, config, adapter_name="style")
        with pytest.raises(ValueError, match=REFUSED):
            adapter.add_adapter("style", config)


def test_lora_over_dsla_layers_by_other_ways(adapter, tiny_model, tmp_path):
    get_peft_model(tiny_model("llama"), LORA).save_pretrained(tmp_path)
    base = adapter.get_base_model()
    ways = [
        lambda: get_peft_model(adapter, LORA, mixed=True),
        lambda: inject_adapter_in_model(LORA, base, adapter_name="style"),
        lambda: LoraModel(base, LORA, "style"),
        lambda: base.add_adapter(LORA, "style"),
        lambda: PeftModel.from_pretrained(adapter, tmp_path),
        lambda: adapter.load_adapter(tmp_path, "style"),
    ]
    with unchanged(adapter, base):
        for way in ways:
            with pytest.raises(ValueError, match=REFUSED):
                way()


def test_transformers_puts_neither_lora_over_dsla_nor_dsla_over_lora(adapter, tiny_model, tmp_path):
    get_peft_model(tiny_model("llama"), LORA).save_pretrained(tmp_path / "lora")
    adapter.save_pretrained(tmp_path / "dsla")
    for first, second, message in (("dsla", "lora", REFUSED), ("lora", "dsla", "carries another PEFT adapter")):
        model = adapter.unload() if first == "dsla" else tiny_model("llama")
        model.load_adapter(str(tmp_path / first), adapter_name="first")
        with unchanged(model):
            with pytest.raises(ValueError, match=message):
                model.load_adapter(str(tmp_path / second), adapter_name="second")
            with pytest.raises(ValueError, match=message):
                model.add_adapter(LORA if second == "lora" else DSLAConfig(), adapter_name="second")


def test_dsla_over_models_of_peft(adapter, tiny_model):
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    mixed = get_peft_model(tiny_model("llama"), LORA, mixed=True)
    for model in (prompt, mixed, adapter):
        with pytest.raises(ValueError, match=r"is a Peft\w+ already: a second DSLA adapter is added by model.add_adapter"):
            get_peft_model(model, DSLAConfig(), adapter_name="b")
    assert not any(isinstance(module, DSLALayer) for model in (prompt, mixed) for module in model.modules())


def test_other_models_take_other_methods_as_before(tiny_model):
    for config in (LORA, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)):
        model = get_peft_model(tiny_model("llama"), config)
        assert model(IDS, labels=IDS).loss.requires_grad
    model = get_peft_model(tiny_model("llama"), LORA)
    model.add_adapter("b", LoraConfig(target_modules=["down_proj"]))
    assert list(model.peft_config) == ["default", "b"]


# --- levels where PEFT would pass over them ---------------------------------------------------------------------


def test_level_at_loading(adapter_model, tiny_model, tmp_path):
    base = tiny_model("llama")
    fresh, adapter = copy.deepcopy(base), adapter_model(base)
    adapter.save_pretrained(tmp_path)
    with unchanged(fresh), pytest.raises(ValueError, match="level 5 is above the plan"):
        PeftModel.from_pretrained(fresh, tmp_path, level=5)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, level="75%")
    assert loaded.get_level() == 3
    adapter.set_level(3)
    assert torch.equal(logits(loaded), logits(adapter))
    with unchanged(loaded), pytest.raises(ValueError, match=r"load_adapter takes no level: set_adapter\('b'\) and set_level\(\) after"):
        loaded.load_adapter(tmp_path, "b", level=1)


# --- classes of the base over a hybrid --------------------------------------------------------------------------


def test_classes_of_the_base_do_not_read_a_hybrid(adapter, tmp_path):
    hybrid = adapter.merge_and_unload()
    hybrid.save_pretrained(tmp_path)
    ways = [
        lambda: LlamaForCausalLM.from_pretrained(tmp_path),
        lambda: LlamaModel.from_pretrained(tmp_path),
        lambda: LlamaForSequenceClassification.from_pretrained(tmp_path),
        lambda: LlamaConfig.from_pretrained(tmp_path),
        lambda: LlamaForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path)),
        lambda: LlamaForCausalLM(hybrid.config),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"this is a DSLA hybrid, of which .* load it with AutoModelForCausalLM"):
            way()
    assert PreTrainedConfig.from_pretrained(tmp_path).hidden_size == 32  # who only looks
    assert type(hybrid).from_pretrained(tmp_path).config.get_dsla_config().converted_layers == [2, 0]


# --- attn_implementation="dsla" ---------------------------------------------------------------------------------


def test_dsla_is_no_attn_implementation(adapter, tiny_model, tmp_path):
    base, hybrid = tiny_model("llama"), adapter.merge_and_unload()
    hybrid.save_pretrained(tmp_path / "hybrid")
    base.save_pretrained(tmp_path / "base")
    ways = [
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="dsla"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", attn_implementation="dsla"),
        lambda: AutoModelForCausalLM.from_config(LlamaConfig(**base.config.to_dict()), attn_implementation="dsla"),
        lambda: base.set_attn_implementation("dsla"),
        lambda: hybrid.set_attn_implementation("dsla"),
        lambda: get_peft_model(base, DSLAConfig()).set_attn_implementation("dsla"),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r'attn_implementation="dsla" .* use get_peft_model\(model, DSLAConfig'):
            way()
    expected = logits(hybrid)
    hybrid.set_attn_implementation("eager")
    torch.testing.assert_close(logits(hybrid), expected, atol=1e-4, rtol=1e-4)
    plain = tiny_model("llama")
    plain.config._attn_implementation = "dsla"  # past every check of transformers
    with pytest.raises(ValueError, match=r'attn_implementation="dsla" .* use get_peft_model'):
        plain(IDS)


# --- an adapter whose config has less than its weights -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversion_order": [2, 0], "level": 1}, r"dsla_core.gate_bias, .*dsla_q_proj of layers \[1, 3\]"),
        ({"states": False}, r"dsla_core.gate_bias, .* of layers \[0, 1, 2, 3\]"),
        ({"window_size": 0}, r"dsla_core.state_bias, dsla_core.state_gain of layers \[0, 1, 2, 3\]"),
    ],
)
def test_a_config_that_lacks_what_the_weights_have_is_refused(tiny_model, adapter_model, tmp_path, change, words):
    bases = [tiny_model("llama") for _ in range(3)]
    for base in bases[1:]:
        base.load_state_dict(bases[0].state_dict())
    adapter_model(bases[0]).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "edited")
    file = tmp_path / "edited" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refusal = rf"edited holds weights for which its adapter_config.json has no place: {words}\. Put back"
    with pytest.raises(ValueError, match=refusal):
        PeftModel.from_pretrained(bases[1], tmp_path / "edited")
    # Beside another one: that stays, and is what it was.
    loaded = PeftModel.from_pretrained(bases[2], tmp_path / "whole")
    with torch.no_grad():
        before = loaded(IDS).logits
    with pytest.raises(ValueError, match=refusal):
        loaded.load_adapter(tmp_path / "edited", "second")
    assert list(loaded.peft_config) == ["default"] and not [name for name in loaded.state_dict() if ".second" in name]
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, before)
