"""Adapters over bases with quantised weights, as transformers loads them."""

import copy
import json
import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer

from dsla_hf import DSLAConfig
from dsla_hf.inference.bench.costs import costs_of
from dsla_hf.inference.graph import GraphDecoder, PlainRecording
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.trainer import DSLATrainer

IDS = torch.tensor([[5, 17, 31, 44, 9, 60, 61, 62, 3, 8, 12, 77]])
# Worst relative error of logits against the base in full precision.
TOLERANCE = {"int8": 0.05, "int4": 0.6}


def quantisation(kind):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    # Int4WeightOnlyConfig needs a GPU.
    return TorchAoConfig(
        Int8WeightOnlyConfig() if kind == "int8" else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )


@pytest.fixture
def saved(tiny_model, adapter_model, tmp_path):
    """Folders of a base, an adapter on it and a hybrid; and the adapter in full precision."""
    base = tiny_model("llama", hidden_size=64, intermediate_size=64, initializer_range=0.1)
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_model(base)
    adapter.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged.set_level(2)
    merged.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    return tmp_path, adapter


def load(folder, kind, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantisation(kind)).eval()


def off(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_run_over_quantised_bases(saved, kind, dtype):
    folder, exact = saved
    base = load(folder / "base", kind, dtype)
    with torch.no_grad():
        plain = base(IDS).logits
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert {p.dtype for name, p in model.named_parameters() if "dsla_" in name} == {dtype}
    for level in (0, 2, 4):
        model.set_level(level)
        exact.set_level(level)
        with torch.no_grad():
            logits = model(IDS).logits
            assert off(logits, exact(IDS).logits) < TOLERANCE[kind]
        if level == 0:
            torch.testing.assert_close(logits, plain)
    model.set_level(1)
    first = model.generate(IDS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    model.set_level(4)
    text = model.generate(input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False)
    assert text.shape == (1, 24)
    replayed = GraphDecoder(model, record=PlainRecording).generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(replayed, model.generate(IDS, max_new_tokens=12, do_sample=False))


def test_a_new_adapter_starts_from_the_weights_that_the_base_stands_for(saved):
    base = load(saved[0] / "base", "int8", torch.float32)
    full = costs_of(saved[1].get_base_model()).weight_bytes
    assert costs_of(base).weight_bytes < full / 2
    weight = base.model.layers[0].self_attn.q_proj.weight.dequantize()
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8, level=4))
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.dsla_q_proj["default"].weight, weight)
    assert model.peft_config["default"].base_fingerprint["quantised"]
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "dsla_" in name)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_hybrids_are_quantised_as_they_are_loaded(saved, kind):
    folder, exact = saved
    exact.set_level(2)
    with torch.no_grad():
        assert off(load(folder / "hybrid", kind, torch.float32)(IDS).logits, exact(IDS).logits) < TOLERANCE[kind]


def test_a_merge_into_quantised_weights_is_refused(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    model.get_base_model().hf_quantizer = object()  # how transformers marks such models
    with pytest.raises(ValueError, match=r"base is quantised.*load the base without quantization_config, merge and save"):
        model.merge_and_unload()
    model.set_level(0)
    model.merge_and_unload()


# --- quantised in place, and as files hold it -------------------------------------------------------------------


def in_place(model, kind="int8", **options):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    if kind == "int4":
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(model, config, **options)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_go_over_a_base_quantised_in_place(saved, kind):
    folder, exact = saved
    base = in_place(AutoModelForCausalLM.from_pretrained(folder / "base"), kind)
    with torch.no_grad():
        plain = base(IDS).logits
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for level in (0, 2, 4):
        model.set_level(level)
        exact.set_level(level)
        with torch.no_grad():
            logits = model(IDS).logits
            assert off(logits, exact(IDS).logits) < TOLERANCE[kind]
        if level == 0:
            torch.testing.assert_close(logits, plain)
    with pytest.raises(ValueError, match=r"base is quantised \(model\.layers\.0\.self_attn\.\w+\.weight\).*or quantize_\(\) it"):
        model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    model.save_pretrained(folder / "again")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "again").eval()
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, exact(IDS).logits)


def test_a_new_adapter_over_a_base_quantised_in_place_is_merged_over_the_whole_one(saved, recwarn):
    folder = saved[0]
    base = in_place(AutoModelForCausalLM.from_pretrained(folder / "base"))
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8, level=4))
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "dsla_" in name)
    model.save_pretrained(folder / "new")
    hybrid = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "new").merge_and_unload()
    assert not [w for w in recwarn if "DSLA adapter" in str(w.message)]
    hybrid.save_pretrained(folder / "new-hybrid")


def test_an_adapter_quantised_in_place_with_its_base_runs_and_is_neither_merged_nor_saved(saved):
    folder, exact = saved
    model = in_place(copy.deepcopy(exact))
    with torch.no_grad():
        logits = model(IDS).logits
        assert off(logits, exact(IDS).logits) < TOLERANCE["int8"]
    with pytest.raises(ValueError, match=r"base is quantised"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"dsla_q_proj\.default\.weight was quantised in place.*save the adapter before quantize_"):
        model.save_pretrained(folder / "there")
    assert not (folder / "there").exists()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_a_base_that_is_quantised_under_an_adapter_alone(saved):
    folder, exact = saved
    linear = torch.nn.Linear
    model = in_place(copy.deepcopy(exact), filter_fn=lambda module, name: isinstance(module, linear) and "dsla_" not in name)
    with torch.no_grad():
        assert off(model(IDS).logits, exact(IDS).logits) < TOLERANCE["int8"]
    model.save_pretrained(folder / "there")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "there").eval()
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, exact(IDS).logits)


def test_another_base_held_quantised_is_refused(saved, tiny_model):
    other = in_place(tiny_model("llama", hidden_size=64, intermediate_size=64, initializer_range=0.1))
    with pytest.raises(ValueError, match="other weights"):
        PeftModel.from_pretrained(other, saved[0] / "adapter")


def test_a_base_from_a_gguf_file_is_merged_and_saved(saved, tmp_path):
    """transformers dequantises it as it loads, and marks it nevertheless."""
    folder, exact = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    marks = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="gguf"), is_trainable=False)
    marks.remove_quantization_config = lambda model: HfQuantizer.remove_quantization_config(marks, model)
    base.hf_quantizer, base.is_quantized, base.quantization_method = marks, True, "gguf"
    base.config.quantization_config = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    with pytest.raises(ValueError, match=r"quantised by gguf.*hf_quantizer\.remove_quantization_config\(base\) first"):
        DSLATrainer(model, DSLATrainingArguments(output_dir=str(folder / "run"), report_to=[]))
    hybrid = model.merge_and_unload().eval()
    hybrid.save_pretrained(folder / "from-gguf")
    assert "quantization_config" not in json.loads((folder / "from-gguf" / "config.json").read_text())
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "from-gguf")(IDS).logits
        assert torch.equal(logits, hybrid(IDS).logits) and torch.equal(logits, exact(IDS).logits)


class PackedLinear(torch.nn.Linear):
    """Holds blocks of bytes, as modules for GGUF, GPTQ and others do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = torch.nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False)


def test_weights_of_which_no_copy_can_be_made_are_refused_by_name(saved):
    base = AutoModelForCausalLM.from_pretrained(saved[0] / "base")
    attention = base.model.layers[2].self_attn
    attention.o_proj = PackedLinear(attention.o_proj)
    modules = [type(module) for module in base.modules()]
    for wrap in (lambda: PeftModel.from_pretrained(base, saved[0] / "adapter"), lambda: get_peft_model(base, DSLAConfig())):
        with pytest.raises(ValueError, match=r"o_proj of layer 2 is a PackedLinear.*GgufConfig\(dequantize=True\)"):
            wrap()
        assert [type(module) for module in base.modules()] == modules
