"""The PEFT adapter: levels, saving and loading, merging, and what it must leave alone."""

import copy
import json
import logging
import pickle
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import dsla_hf
from dsla_hf import DSLAConfig, DSLALayer, DualStateAttention
from dsla_hf.models.configuration import resolve_level
from dsla_hf.models.decoder import decoder_of

ORDER = [2, 0, 3, 1]  # the plan of the fixture `adapter_model`


def token_ids(batch=2, tokens=37):
    return torch.randint(3, 97, (batch, tokens))


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def layers_of(model):
    """Number of the layer -> the wrapped layer."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DSLALayer)}


def converted_layers(model):
    return sorted(index for index, layer in layers_of(model).items() if layer.converted)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_plain(model, base_class):
    """Nothing of an adapter is left in `model`."""
    assert type(model) is base_class
    assert not [name for name, module in model.named_modules() if isinstance(module, DSLALayer | DualStateAttention)]
    assert not [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not [name for name in (*vars(model), *vars(decoder_of(model))) if "dsla" in name]
    assert not hasattr(model, "peft_config")


def enable_checkpointing(model):
    # transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.fixture
def base(base_kind, tiny_model):
    return tiny_model(base_kind)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


# --- wrapping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
@pytest.mark.parametrize("write_gate", [True, False])
def test_only_dsla_parameters_are_trainable(base, window_size, write_gate):
    before = trainable(base)
    model = get_peft_model(base, DSLAConfig(conversion_order=ORDER, window_size=window_size, write_gate=write_gate))
    assert before and trainable(model)
    assert {name for name, _ in model.named_parameters() if "dsla_" in name} == trainable(model)
    per_layer = {name.split("self_attn.")[1] for name in trainable(model) if ".layers.2." in name}
    own = {"gate_down", "gate_up", "gate_bias", "mix_logits", "norm_weight"}
    own |= ({"state_gain", "state_bias"} if window_size else set()) | ({"write_weight", "write_bias"} if write_gate else set())
    assert per_layer == {f"dsla_core.default.{name}" for name in own} | {f"dsla_{p}_proj.default.weight" for p in "qo"}
    assert len(trainable(model)) == 4 * len(per_layer)


@pytest.mark.parametrize("projections", [("q_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ()])
def test_projections_start_as_exact_copies_of_the_base(base, projections):
    model = get_peft_model(base, DSLAConfig(conversion_order=ORDER, trained_projections=projections))
    for layer in layers_of(model).values():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            copies = getattr(layer, f"dsla_{name}")
            assert list(copies) == (["default"] if name in projections else [])
            if name in projections:
                original = getattr(layer.base_layer, name).weight
                assert torch.equal(copies["default"].weight, original)
                assert copies["default"].weight.data_ptr() != original.data_ptr()


def test_biases_of_projections_are_copied_and_trained(tiny_model, adapter_model):
    base = tiny_model("llama", attention_bias=True)
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model, ids = get_peft_model(base, DSLAConfig(conversion_order=ORDER)), token_ids()
    wrapped = layers_of(model)[2]
    assert torch.equal(wrapped.dsla_q_proj["default"].bias, wrapped.base_layer.q_proj.bias)
    assert wrapped.dsla_q_proj["default"].bias.requires_grad
    expected = logits(model, ids)
    assert torch.equal(logits(model.merge_and_unload(), ids), expected)


def test_a_new_adapter_plans_all_layers_and_changes_nothing(base, tmp_path):
    ids = token_ids()
    expected = logits(base, ids)
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].conversion_order == [0, 1, 2, 3]
    assert model.get_level() == 0 and not converted_layers(model) and torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.get_level() == 0 and sorted(layers_of(loaded)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "config, level", [({"conversion_order": [3, 1]}, 2), ({"conversion_order": [3, 1], "level": 1}, 1), ({"level": 3}, 3)]
)
def test_a_level_or_an_order_that_is_given_says_where_a_new_adapter_starts(llama, config, level):
    model = get_peft_model(llama, DSLAConfig(**config))
    assert model.get_level() == level and converted_layers(model) == sorted(config.get("conversion_order", [0, 1, 2, 3])[:level])


def test_layers_outside_the_plan_are_not_wrapped(base):
    model = get_peft_model(base, DSLAConfig(conversion_order=[3, 1]))
    assert sorted(layers_of(model)) == [1, 3]


def test_one_config_given_to_several_models(tiny_model):
    config = DSLAConfig(task_type="CAUSAL_LM", level=2)
    first, second = get_peft_model(tiny_model("llama"), config), get_peft_model(tiny_model("qwen3", num_hidden_layers=3), config)
    third = tiny_model("llama", num_hidden_layers=2)
    third.add_adapter(config, "third")
    assert [dsla_hf.get_level(model) for model in (first, second, third)] == [2, 2, 2]
    first.set_level(1)
    second.set_conversion_order([2, 1, 0])
    first.add_adapter("b", config)
    assert [dsla_hf.get_level(model) for model in (first, second, third)] == [1, 2, 2]
    assert [first.peft_config[name].level for name in ("default", "b")] == [1, 2]
    assert config == DSLAConfig(task_type="CAUSAL_LM", level=2, base_model_name_or_path=config.base_model_name_or_path)


def test_one_config_of_a_file_given_to_two_models(llama, adapter_model, tmp_path):
    untouched, other = copy.deepcopy(llama), copy.deepcopy(llama)
    adapter_model(llama, level=3).save_pretrained(tmp_path)
    config = DSLAConfig.from_pretrained(tmp_path)
    first, second = (PeftModel.from_pretrained(base, tmp_path, config=config) for base in (untouched, other))
    assert first.peft_config["default"] is config, "as PEFT has it"
    first.set_level(1)
    assert first.get_level() == 1 and second.get_level() == 3


def test_the_same_model_given_twice(llama, adapter_model):
    model, ids = adapter_model(llama, level=2), token_ids()
    expected, config = logits(model, ids), model.peft_config["default"]
    with pytest.raises(ValueError, match=r"has a DSLA adapter 'default' already: set_level\(\).* unload\(\) takes it off"):
        get_peft_model(llama, DSLAConfig(level=4))
    assert model.peft_config["default"] is config and torch.equal(logits(model, ids), expected)


# --- levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
def test_level_is_the_number_of_converted_layers(base, window_size, adapter_model):
    model, ids = adapter_model(base, window_size=window_size), token_ids()
    results = []
    for level in range(5):
        model.set_level(level)
        assert model.get_level() == dsla_hf.get_level(model) == level
        assert converted_layers(model) == sorted(ORDER[:level])
        results.append(logits(model, ids))
    for lower, higher in pairwise(results):
        assert (lower - higher).abs().max() > 1e-2, "every layer of the plan must have an effect"
    model.set_level(2)
    assert torch.equal(logits(model, ids), results[2]), "going down again is exact"


@pytest.mark.parametrize("level", ["1", " 3 ", "75%"])
def test_levels_as_text_are_read_as_everywhere(llama, level, adapter_model):
    """In commands, policies and `generate(draft_level=...)`, which read them by `resolve_level`."""
    model = adapter_model(llama, level=2)
    model.set_level(level)
    assert model.get_level() == resolve_level(level, model.peft_config["default"], 4)
    hybrid = model.merge_and_unload()
    hybrid.set_level(level)
    with pytest.raises(ValueError, match=f"has level {hybrid.get_level()} and no other, so not 0"):
        hybrid.set_level("0")


@pytest.mark.parametrize("level", [5, -1, True, 1.0, "5", "-1", "²", "one", "130%"])
def test_level_the_plan_does_not_have_is_refused_and_nothing_changes(llama, level, adapter_model):
    model = adapter_model(llama, level=2)
    with pytest.raises(ValueError, match=str(level)):
        model.set_level(level)
    assert model.get_level() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_level_0_and_disable_adapter_are_bit_equal_to_the_base(base, dtype, adapter_model):
    base, ids = base.to(dtype), token_ids()
    expected = logits(base, ids)
    model = adapter_model(base)
    assert not torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
        assert converted_layers(model) == []
    assert converted_layers(model) == [0, 1, 2, 3]
    model.set_level(0)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("trained", [None, [0, 3], []])
def test_disable_adapter_leaves_requires_grad_as_it_was(base, trained, adapter_model):
    model = adapter_model(base, modules_to_save=["model.norm"])
    model.set_trainable_layers(trained)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    in_layers = {int(name.split(".layers.")[1].split(".")[0]) for name in trainable(model) if "dsla_" in name}
    assert in_layers == set(ORDER if trained is None else trained)
    with model.disable_adapter():
        model(token_ids())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    model.set_adapter("default")
    assert {name for name in trainable(model) if "dsla_" in name} == {name for name, on in before.items() if on and "dsla_" in name}


def test_disable_adapter_thaws_neither_what_a_caller_froze_nor_an_adapter_loaded_for_inference(llama, adapter_model, tmp_path):
    untouched = copy.deepcopy(llama)
    model = adapter_model(llama)
    for layer in layers_of(model).values():
        layer.dsla_q_proj.requires_grad_(False)
    before = trainable(model)
    assert before and not [name for name in before if "q_proj" in name]
    with model.disable_adapter():
        assert trainable(model) == before, "also inside: a graph made before must stay whole"
    assert trainable(model) == before
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    with loaded.disable_adapter():
        pass
    assert not trainable(loaded)


def test_attention_that_runs_follows_train_and_eval(llama, adapter_model):
    model = adapter_model(llama)
    for mode in (True, False, True):
        model.train(mode)
        model(token_ids())
        assert layers_of(model)[2].dsla_attention().training is mode


def test_disabling_from_outside_the_context_freezes_nothing_for_good(llama, adapter_model):
    model = adapter_model(llama)
    before = trainable(model)
    model.base_model.disable_adapter_layers()
    assert converted_layers(model) == []
    model.base_model.enable_adapter_layers()
    assert converted_layers(model) == [0, 1, 2, 3] and trainable(model) == before


def test_converted_runs_exactly_the_layers_named(base, adapter_model):
    model, ids = adapter_model(base, level=1), token_ids()
    before = logits(model, ids)
    with model.converted([3, 1]):
        assert converted_layers(model) == [1, 3]
        inside = logits(model, ids)
    assert model.peft_config["default"].conversion_order == ORDER and model.get_level() == 1
    assert torch.equal(logits(model, ids), before)
    with model.converted([]):
        assert converted_layers(model) == []
    with pytest.raises(KeyError), model.converted([3]):
        raise KeyError
    assert converted_layers(model) == [2], "restored after an error too"
    model.set_conversion_order([1, 3, 0, 2])
    model.set_level(2)
    assert torch.equal(logits(model, ids), inside)


def test_converted_refuses_layers_without_weights(llama, adapter_model):
    model = adapter_model(llama, conversion_order=[2, 0])
    with pytest.raises(ValueError, match=r"\[1\] have no DSLA weights.*\[2, 0\]"):
        with model.converted([2, 1]):
            pass
    assert converted_layers(model) == [0, 2]


def test_another_order_of_the_same_layers(llama, adapter_model, tmp_path):
    model = adapter_model(llama, level=2)
    model.set_conversion_order([3, 1, 0, 2], scores={0: 0.3, 1: 0.2, 2: 0.4, 3: 0.1})
    assert model.get_level() == 2 and converted_layers(model) == [1, 3]
    model.save_pretrained(tmp_path)
    stored = DSLAConfig.from_pretrained(tmp_path)
    assert stored.conversion_order == [3, 1, 0, 2]
    assert stored.order_scores == {"3": 0.1, "1": 0.2, "0": 0.3, "2": 0.4}
    for order in ([3, 1, 0], [3, 1, 0, 0], [3, 1, 0, 2, 4]):
        with pytest.raises(ValueError, match="order"):
            model.set_conversion_order(order)
    assert model.peft_config["default"].conversion_order == [3, 1, 0, 2]


# --- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
@pytest.mark.parametrize("options", [{}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}], ids=["default", "name", "low-cpu"])
def test_saved_at_level_0_it_still_has_every_layer(base, window_size, options, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(base)
    model = adapter_model(base, window_size=window_size)
    expected = []
    for level in range(5):
        model.set_level(level)
        expected.append(logits(model, ids))
    model.set_level(0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in weights} == set(ORDER)
    assert all("dsla_" in name and "default" not in name for name in weights)
    loaded = PeftModel.from_pretrained(untouched, tmp_path, **options)
    assert loaded.get_level() == 0 and not [name for name, p in loaded.named_parameters() if p.device.type == "meta"]
    for level in range(5):
        loaded.set_level(level)
        assert torch.equal(logits(loaded, ids), expected[level]), f"level {level}"
    assert not trainable(loaded)


def test_saved_level_is_active_after_loading(llama, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(llama)
    model = adapter_model(llama, level=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path, is_trainable=True)
    assert converted_layers(loaded) == sorted(ORDER[:3])
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert trainable(loaded) == trainable(model)


def test_level_of_an_adapter_put_in_by_transformers(base, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(base)
    plain = logits(base, ids)
    model = adapter_model(base, level=3)
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    model.set_level(1)
    expected_at_1 = logits(model, ids)

    untouched.load_adapter(str(tmp_path))
    assert dsla_hf.get_level(untouched) == 3 and torch.equal(logits(untouched, ids), expected)
    dsla_hf.set_level(untouched, 1)
    assert torch.equal(logits(untouched, ids), expected_at_1)
    with pytest.raises(ValueError, match="level 5"):
        dsla_hf.set_level(untouched, 5)
    untouched.disable_adapters()
    assert torch.equal(logits(untouched, ids), plain)
    untouched.enable_adapters()
    assert torch.equal(logits(untouched, ids), expected_at_1)


def test_level_of_an_adapter_added_by_transformers(llama):
    ids = token_ids()
    plain = logits(llama, ids)
    llama.add_adapter(DSLAConfig(conversion_order=ORDER, window_size=8), adapter_name="mine")
    assert dsla_hf.get_level(llama) == 4
    dsla_hf.set_level(llama, 0)
    assert torch.equal(logits(llama, ids), plain)
    dsla_hf.set_level(llama, 2)
    assert converted_layers(llama) == [0, 2] and not torch.equal(logits(llama, ids), plain)


def test_level_of_a_model_without_adapter_is_refused(llama):
    with pytest.raises(ValueError, match="no active DSLA adapter"):
        dsla_hf.set_level(llama, 1)


def test_auto_classes_load_adapter_and_base(base, adapter_model, tmp_path):
    base.save_pretrained(tmp_path / "base")
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), token_ids()
    model = adapter_model(base, level=3)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, ids)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert by_peft.get_level() == 3 and torch.equal(logits(by_peft, ids), expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert dsla_hf.get_level(by_transformers) == 3 and torch.equal(logits(by_transformers, ids), expected)


def test_damaged_adapter_directories_give_errors_that_name_them(llama, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(llama)
    plain = logits(untouched, ids)
    adapter_model(llama).save_pretrained(tmp_path / "whole")

    def damaged(name):
        directory = tmp_path / name
        directory.mkdir()
        for file in (tmp_path / "whole").iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    no_config = damaged("no-config")
    (no_config / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json.*no-config"):
        PeftModel.from_pretrained(untouched, no_config)

    truncated = damaged("truncated")
    content = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|not fully covered"):
        PeftModel.from_pretrained(copy.deepcopy(untouched), truncated)

    no_weights = damaged("no-weights")
    (no_weights / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match=r"no-weights"):
        PeftModel.from_pretrained(copy.deepcopy(untouched), no_weights)
    assert torch.equal(logits(untouched, ids), plain)


def test_adapter_file_that_lacks_a_layer_is_noticed(llama, adapter_model, tmp_path):
    untouched = copy.deepcopy(llama)
    adapter_model(llama).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if ".layers.3." not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.3\."):
        PeftModel.from_pretrained(untouched, tmp_path)


# --- merging and unloading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("window_size", [0, 8])
def test_merged_model_at_every_level(base, level, window_size, adapter_model):
    ids, base_class, config = token_ids(), type(base), base.config
    values = copy.deepcopy(config.to_dict())
    pointers = {name: p.data_ptr() for name, p in base.named_parameters(remove_duplicate=False)}
    model = adapter_model(base, window_size=window_size, level=level)
    for index in ORDER[:level]:
        layer = layers_of(model)[index]
        name = f"model.layers.{index}.self_attn"
        pointers |= {f"{name}.{p}.weight": getattr(layer, f"dsla_{p}")["default"].weight.data_ptr() for p in ("q_proj", "o_proj")}
        pointers |= {f"{name}.dsla.{n}": p.data_ptr() for n, p in layer.dsla_core["default"].named_parameters()}
    expected = logits(model, ids)
    merged = model.merge_and_unload()

    assert torch.equal(logits(merged, ids), expected)
    assert config.to_dict() == values, "the base's config object must stay as it was"
    assert {name: p.data_ptr() for name, p in merged.named_parameters(remove_duplicate=False)} == pointers, "no copy, none lost"
    if level == 0:
        assert_plain(merged, base_class)
        assert merged.config is config
    else:
        assert type(merged).__name__ == f"DSLA{base_class.__name__}" and isinstance(merged, base_class)
        assert merged.config is not config and merged.model.config is merged.config
        assert merged.config.get_dsla_config().converted_layers == ORDER[:level]
        assert merged.generation_config is not None
        assert not [m for m in merged.modules() if isinstance(m, DSLALayer)]
        assert {type(m) for m in merged.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}


def test_merged_model_generates_as_the_adapter_does(base, adapter_model):
    ids = token_ids(2, 11)
    model = adapter_model(base, level=3)
    expected = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, max_new_tokens=20, do_sample=False), expected)


def test_unload_gives_the_base_back_and_it_can_be_wrapped_again(base, adapter_model):
    ids, base_class, names = token_ids(), type(base), list(base.state_dict())
    expected, modules = logits(base, ids), [type(m) for m in base.modules()]
    model = adapter_model(base)
    first = logits(model, ids)
    unloaded = model.unload()
    assert unloaded is base
    assert_plain(unloaded, base_class)
    assert torch.equal(logits(unloaded, ids), expected)
    assert [type(m) for m in unloaded.modules()] == modules and list(unloaded.state_dict()) == names
    again = adapter_model(unloaded, conversion_order=[1, 3], window_size=0)
    assert converted_layers(again) == [1, 3] and not torch.equal(logits(again, ids), first)
    again.set_level(0)
    assert torch.equal(logits(again, ids), expected)
    assert_plain(again.merge_and_unload(), base_class)


def test_merged_hybrid_takes_no_second_dsla_adapter(llama, adapter_model):
    merged, ids = adapter_model(llama, level=1).merge_and_unload(), token_ids()
    expected = logits(merged, ids)
    with pytest.raises(ValueError, match="hybrid already"):
        get_peft_model(merged, DSLAConfig())
    assert torch.equal(logits(merged, ids), expected)


def test_merge_in_place_is_refused_with_what_to_call(llama, adapter_model):
    model, ids = adapter_model(llama), token_ids()
    expected = logits(model, ids)
    with pytest.raises(NotImplementedError, match="merge_and_unload"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)


def test_merge_of_float32_masters_over_a_bfloat16_base(base, adapter_model):
    base = base.to(torch.bfloat16)
    keys = base.model.layers[2].self_attn.k_proj.weight
    model = adapter_model(base, level=2)
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data = parameter.data.float()
    expected = logits(model, ids := token_ids())
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.model.layers[2].self_attn.k_proj.weight is keys
    torch.testing.assert_close(logits(merged, ids).float(), expected.float(), atol=0.3, rtol=0.1)


# --- several adapters -------------------------------------------------------------------------------------------


def randomised(model, adapter):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_two_adapters_with_different_plans_and_windows(base, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(base)
    plain = logits(base, ids)
    model = adapter_model(base, conversion_order=[2, 0], window_size=8)
    first = logits(model, ids)
    model.add_adapter("b", DSLAConfig(conversion_order=[3, 2, 1], window_size=0, level=2, trained_projections=["o_proj"]))
    randomised(model, "b")
    assert torch.equal(logits(model, ids), first), "adding another adapter changes nothing"
    model.set_adapter("b")
    assert converted_layers(model) == [2, 3] and model.get_level() == 2
    second = logits(model, ids)
    assert all(".b." in name for name in trainable(model)) and trainable(model)
    model.set_level(3)
    assert converted_layers(model) == [1, 2, 3]
    model.set_adapter("default")
    assert model.get_level() == 2 and torch.equal(logits(model, ids), first)
    assert all(".default." in name for name in trainable(model)) and trainable(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)

    model.set_adapter("b")
    model.set_level(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    loaded.load_adapter(tmp_path / "b", "b")
    assert torch.equal(logits(loaded, ids), first)
    loaded.set_adapter("b")
    assert torch.equal(logits(loaded, ids), second)

    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert {tuple(layer.active_adapters) for layer in layers_of(model).values()} == {("default",)}
    assert not [name for name, _ in model.named_parameters() if ".b." in name]
    assert torch.equal(logits(model, ids), first)
    with pytest.raises(ValueError, match="one DSLA adapter is active"):
        model.base_model.set_adapter(["default", "b"])


def test_merging_takes_the_active_adapter(llama, adapter_model):
    ids = token_ids()
    model = adapter_model(llama, conversion_order=[2, 0], window_size=8)
    model.add_adapter("b", DSLAConfig(conversion_order=[3, 1], window_size=0))
    randomised(model, "b").set_adapter("b")
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert merged.config.get_dsla_config().converted_layers == [3, 1] and merged.config.get_dsla_config().window_size == 0
    assert torch.equal(logits(merged, ids), expected)


def test_modules_to_save_are_trained_saved_and_merged(base, adapter_model, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(base)
    plain = logits(base, ids)
    model = adapter_model(base, modules_to_save=["model.norm"], level=3)
    norm = model.base_model.model.model.norm.modules_to_save["default"]
    assert norm.weight.requires_grad
    with torch.no_grad():
        norm.weight.mul_(3)
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged, ids), expected)
    assert not [name for name in merged.state_dict() if "modules_to_save" in name]


def test_deepcopy_and_pickle(base, adapter_model):
    ids = token_ids()
    model = adapter_model(base, level=3)
    expected = logits(model, ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, ids), expected)
        copied.set_level(0)
        assert model.get_level() == 3 and torch.equal(logits(model, ids), expected)
        copied.set_level(3)
        with torch.no_grad():
            for layer in layers_of(copied).values():
                layer.base_layer.v_proj.weight.zero_()
        assert not torch.equal(logits(copied, ids), expected), "the copy runs its own base weights"
        assert torch.equal(logits(model, ids), expected), "and the original its own"
        assert_plain(copied.unload(), type(base))
    assert torch.equal(logits(model, ids), expected)


# --- training ---------------------------------------------------------------------------------------------------


def backward(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("window_size", [0, 8])
def test_gradients_reach_converted_layers_and_checkpointing_agrees(base, window_size, adapter_model):
    model, ids = adapter_model(base, window_size=window_size, level=3).train(), token_ids()
    loss, gradients = backward(model, ids)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in gradients} == set(ORDER[:3])
    assert set(gradients) == {name for name in trainable(model) if ".layers.1." not in name}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    enable_checkpointing(model)
    checkpointed_loss, checkpointed = backward(model, ids)
    assert torch.equal(checkpointed_loss, loss) and checkpointed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("level, trained", [(0, None), (1, [0, 3])])
def test_backward_says_that_nothing_can_be_trained(llama, adapter_model, checkpointing, level, trained):
    model, ids = adapter_model(llama, level=level).train(), token_ids()
    model.set_trainable_layers(trained)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=rf"can be trained at level {level}: .* \[2, 0, 3, 1\].* set_level\(\).* DSLATrainer"):
        model(ids, labels=ids)
    with model.disable_adapter():
        assert model(ids, labels=ids).loss.isfinite()
    with torch.no_grad():
        assert model(ids, labels=ids).loss.requires_grad is False
    assert model.eval()(ids, labels=ids).loss.isfinite()
    model.train().set_level(2)
    assert backward(model, ids)[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["loss of one's own", "transformers"])
def test_a_training_forward_at_level_0_is_refused_whatever_computes_the_loss(llama, how, checkpointing):
    """A loop over logits, and adapters that transformers put in: no loss passes the library there."""
    config, ids = DSLAConfig(task_type="CAUSAL_LM"), token_ids()
    if how == "transformers":
        llama.add_adapter(config)
        model = llama
    else:
        model = get_peft_model(llama, config)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"at level 0: .* set_level\(\).* DSLATrainer"):
        model.train()(ids)
    dsla_hf.set_level(model.get_base_model() if hasattr(model, "get_base_model") else model, 1)
    model(ids).logits.sum().backward()
    assert {name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None} == {"0"}


def test_the_trainer_of_transformers_is_refused_at_level_0_and_trains_above(llama, tmp_path):
    options = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5.18 renamed it
    options[next(name for name in names if name in TrainingArguments.__dataclass_fields__)] = True
    args = TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
    model = get_peft_model(llama, DSLAConfig(task_type="CAUSAL_LM", window_size=8))
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in token_ids()])
    with pytest.raises(RuntimeError, match="nothing of DSLA can be trained at level 0"):
        trainer.train()
    model.set_level(4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_other_weights_are_trained_at_level_0_when_those_of_dsla_are_frozen(llama, adapter_model):
    model, ids = adapter_model(llama, level=0, modules_to_save=["model.norm"]).train(), token_ids()
    with pytest.raises(RuntimeError, match=r"call set_trainable_layers\(\[\]\)"):
        model(ids, labels=ids)
    model.set_trainable_layers([])
    assert set(backward(model, ids)[1]) == {name for name in trainable(model) if "norm.modules_to_save" in name}
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    assert embeddings.grad.any(), "prompts of one's own are trained as over the base"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", ["lower", "raise", "disable", "order"])
def test_level_changed_between_forward_and_backward_is_an_error(llama, checkpointing, change, adapter_model):
    model, ids = adapter_model(llama, level=2).train(), token_ids()
    if checkpointing:
        enable_checkpointing(model)
    loss = model(ids, labels=ids).loss
    if change == "order":
        model.set_conversion_order([1, 3, 0, 2])
    elif change != "disable":
        model.set_level(1 if change == "lower" else 3)
    with model.disable_adapter() if change == "disable" else nullcontext():
        with pytest.raises(RuntimeError, match="level changed between forward and backward"):
            loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_level_may_change_after_backward_and_in_a_teacher_pass_before_it(llama, checkpointing, adapter_model):
    model, ids = adapter_model(llama, level=2).train(), token_ids()
    if checkpointing:
        enable_checkpointing(model)
    loss = model(ids, labels=ids).loss
    with torch.no_grad(), model.disable_adapter():
        model(ids)
    loss.backward()
    for level in (4, 1):
        model.set_level(level)
        _, gradients = backward(model, ids)
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in gradients} == set(ORDER[:level])


def test_float32_masters_over_a_bfloat16_base(base, adapter_model):
    base, ids = base.to(torch.bfloat16), token_ids()
    model = adapter_model(base, level=3)
    in_bfloat16 = logits(model, ids)
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            parameter.data = parameter.data.float()
    assert logits(model, ids).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, ids).float(), in_bfloat16.float(), atol=0.3, rtol=0.1)
    text = model.generate(input_ids=ids[:, :9], max_new_tokens=12, do_sample=False)
    assert text.shape == (2, 21)
    model.train()
    loss, gradients = backward(model, ids)
    assert loss.isfinite() and {g.dtype for g in gradients.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients.values()) and len(gradients) == 3 * len(trainable(model)) / 4


# --- trained keys and values ------------------------------------------------------------------------------------


class Records(logging.Handler):
    """All log records of transformers and of this package, whether or not they propagate."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def log_messages():
    handler = Records()
    loggers = [logging.getLogger(name) for name in ("transformers", "dsla_hf")]
    for logger in loggers:
        logger.addHandler(handler)
    if hasattr(logging.Logger.warning_once, "cache_clear"):
        logging.Logger.warning_once.cache_clear()  # "once" is per process
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


def test_generating_with_weights_that_were_never_trained_is_said_once(llama, log_messages, tmp_path):
    def said(model, **options):
        model.eval().generate(input_ids=token_ids(1, 5), max_new_tokens=2, pad_token_id=0, **options)
        found = [m for m in log_messages if "never trained" in m]
        log_messages.clear()
        return found

    model = get_peft_model(llama, DSLAConfig(task_type="CAUSAL_LM", window_size=8))
    assert not said(model), "level 0 is the original model"
    model.set_level(1)
    (message,) = said(model)
    assert "layers [0] were never trained" in message and "dsla distill" in message and "PeftModel.from_pretrained" in message
    assert not said(model), "once"
    fresh = get_peft_model(model.unload(), DSLAConfig(task_type="CAUSAL_LM", window_size=8))
    assert "layers [0, 1, 2, 3]" in said(fresh, level_policy=2)[0]
    fresh._modules["base_model"].warned_of_untrained = False
    fresh.set_level(2)
    fresh.set_trainable_layers([0])
    fresh.train()(token_ids(), labels=token_ids()).loss.backward()
    torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-3).step()
    assert "layers [1] were" in said(fresh)[0], "one step is training"
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh.unload(), tmp_path, level=1)
    assert not said(loaded)


@torch.no_grad()
def raise_in_mid_text(model, ids, at=20):
    """Logits of the tokens after `at`, which was read at level 0, at the full level."""
    model.set_level(0)
    cache = model(ids[:, :at], use_cache=True).past_key_values
    model.set_level(4)
    return model(ids[:, at:], past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("projections", [["q_proj", "k_proj", "v_proj", "o_proj"], ["k_proj"], ["v_proj"]])
def test_trained_keys_or_values_work_and_a_live_fold_says_that_it_is_approximate(base, projections, adapter_model, log_messages, tmp_path):
    ids, untouched = token_ids(), copy.deepcopy(base)
    model = adapter_model(base, trained_projections=projections)
    assert not model.peft_config["default"].exact_fold
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert not [m for m in log_messages if "approximate" in m], "nothing was folded yet"
    raise_in_mid_text(model, ids)
    raise_in_mid_text(model, ids)
    warnings = [m for m in log_messages if "approximate" in m]
    assert len(set(warnings)) == len(warnings) == 1, log_messages
    assert torch.equal(logits(loaded.merge_and_unload(), ids), expected)


def test_a_fold_of_the_base_s_keys_and_values_is_exact_and_says_nothing(llama, adapter_model, log_messages):
    model, ids = adapter_model(llama), token_ids()
    assert model.peft_config["default"].exact_fold
    assert raise_in_mid_text(model, ids).isfinite().all()
    assert not [m for m in log_messages if "approximate" in m]


# --- what is refused, and leaves no trace -----------------------------------------------------------------------


def test_other_peft_adapters_must_be_merged_first(llama):
    ids = token_ids()
    lora = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(lora, ids)
    for wrapped in (lora, llama):
        with pytest.raises(ValueError, match="merge_and_unload"):
            get_peft_model(wrapped, DSLAConfig())
    assert torch.equal(logits(lora, ids), expected)
    merged = lora.merge_and_unload()
    expected = logits(merged, ids)
    model = get_peft_model(merged, DSLAConfig(level=0))
    assert torch.equal(logits(model, ids), expected)


def test_mixed_models_are_refused(llama):
    ids = token_ids()
    expected = logits(llama, ids)
    with pytest.raises(ValueError, match="DSLA"):
        get_peft_model(llama, DSLAConfig(task_type="CAUSAL_LM"), mixed=True)
    assert torch.equal(logits(llama, ids), expected)
    assert not layers_of(llama)


def test_unsupported_model_is_refused_with_the_supported_ones():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=97, n_positions=64)).eval()
    expected = logits(model, ids := token_ids())
    with pytest.raises(ValueError, match=r"'gpt2' is not supported.*llama.*qwen3"):
        get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM"))
    assert_plain(model, GPT2LMHeadModel)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"conversion_order": [0, 4]}, id="layer out of range"),
        pytest.param({"level": 5}, id="level above the plan"),
        pytest.param({"target_modules": ["no_such_module"]}, id="no such module"),
        pytest.param({"target_modules": ["mlp"]}, id="not an attention module"),
    ],
)
def test_config_that_does_not_fit_the_model_leaves_it_untouched(base, bad):
    ids, base_class, before = token_ids(), type(base), trainable(base)
    expected = logits(base, ids)
    with pytest.raises((ValueError, TypeError), match=r"4|5|no_such_module|mlp"):
        get_peft_model(base, DSLAConfig(**bad))
    assert_plain(base, base_class)
    assert torch.equal(logits(base, ids), expected)
    assert trainable(base) == before


def test_second_adapter_that_does_not_fit_leaves_the_first_as_it_was(llama, adapter_model):
    model, ids = adapter_model(llama, level=3), token_ids()
    expected, names, before = logits(model, ids), list(model.state_dict()), trainable(model)
    for bad in (DSLAConfig(conversion_order=[0, 9]), DSLAConfig(target_modules=["no_such_module"])):
        with pytest.raises(ValueError, match=r"9|no_such_module"):
            model.add_adapter("b", bad)
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model, ids), expected)
        assert list(model.state_dict()) == names and trainable(model) == before


@pytest.mark.parametrize(
    "other, message",
    [
        pytest.param({"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}, "sizes", id="sizes"),
        pytest.param({"num_hidden_layers": 5}, "sizes", id="depth"),
        pytest.param({}, "other weights of the same shape", id="weights"),
        pytest.param(None, "model type", id="kind"),
    ],
)
def test_adapter_of_another_base_is_refused_and_changes_nothing(base_kind, other, message, tiny_model, adapter_model, tmp_path):
    adapter_model(tiny_model(base_kind)).save_pretrained(tmp_path)
    other_kind = {"llama": "qwen3", "qwen3": "llama"}[base_kind] if other is None else base_kind
    base, ids = tiny_model(other_kind, **(other or {})), token_ids()
    expected, base_class, before = logits(base, ids), type(base), trainable(base)
    with pytest.raises(ValueError, match=f"another base model.*{message}|{message}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_plain(base, base_class)
    assert torch.equal(logits(base, ids), expected)
    assert trainable(base) == before
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(tmp_path))
    assert not layers_of(base) and torch.equal(logits(base, ids), expected)


@pytest.mark.parametrize("trained_in, used_in", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_adapter_fits_its_base_in_another_dtype(base, trained_in, used_in, adapter_model, tmp_path):
    copied = copy.deepcopy(base.to(torch.bfloat16)).to(used_in) if trained_in == torch.bfloat16 else copy.deepcopy(base).to(used_in)
    adapter_model(base.to(trained_in)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copied, tmp_path)
    assert logits(loaded, token_ids()).isfinite().all()


def test_fingerprint_can_be_removed_on_purpose(tiny_model, adapter_model, tmp_path):
    adapter_model(tiny_model("llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert set(values["base_fingerprint"]["layers"]) == {"0", "1", "2", "3"}
    other = tiny_model("llama")
    with pytest.raises(ValueError, match="remove base_fingerprint"):
        PeftModel.from_pretrained(other, tmp_path)
    del values["base_fingerprint"]
    path.write_text(json.dumps(values))
    assert converted_layers(PeftModel.from_pretrained(other, tmp_path)) == [0, 1, 2, 3]


def test_generation_without_a_task_knows_levels_too(tiny_model):
    """PEFT's class for no task in particular asks the base itself."""
    model = get_peft_model(tiny_model("llama"), DSLAConfig(window_size=8))
    assert type(model) is PeftModel
    ids = torch.arange(3, 30)[None]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, level_policy=3)
    assert model.get_level() == 3
    model.set_level(0)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
