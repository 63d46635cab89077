"""Adapters over models that are no causal LM: bare decoders (`AutoModel`) and decoders with another head."""

import json

import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel

from dsla_hf import DSLAConfig

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


@torch.no_grad()
def hidden(model, **options):
    return model.eval()(IDS, attention_mask=MASK, output_hidden_states=True, **options).hidden_states[-1]


@pytest.fixture
def checkpoint(tiny_model, tmp_path, request):
    """A checkpoint and a model of it by Auto class."""
    tiny_model(getattr(request, "param", "llama")).save_pretrained(tmp_path / "base")

    def load(auto_class, **options):
        return auto_class.from_pretrained(tmp_path / "base", **options).eval()

    return load


@pytest.fixture
def causal(checkpoint, adapter_model):
    return adapter_model(checkpoint(AutoModelForCausalLM))


@pytest.mark.parametrize("checkpoint", ["llama", "qwen3", "gemma3_text", "phi3"], indirect=True)
def test_hidden_states_are_those_of_the_causal_lm_at_every_level(checkpoint, adapter_model):
    causal = adapter_model(checkpoint(AutoModelForCausalLM))
    torch.manual_seed(0)
    bare = adapter_model(checkpoint(AutoModel), task_type="FEATURE_EXTRACTION")
    weights = dict(causal.named_parameters())
    for name, p in bare.named_parameters():
        p.data.copy_(weights[name.replace("base_model.model.", "base_model.model.model.", 1)])
    for level in range(5):
        causal.set_level(level)
        bare.set_level(level)
        assert torch.equal(hidden(bare), hidden(causal)), level
    with torch.no_grad(), bare.disable_adapter():
        assert torch.equal(bare(IDS).last_hidden_state, checkpoint(AutoModel)(IDS).last_hidden_state)


def test_token_by_token_through_the_cache(checkpoint, adapter_model):
    bare = adapter_model(checkpoint(AutoModel), task_type="FEATURE_EXTRACTION", level=2)
    whole = hidden(bare)
    with torch.no_grad():
        past, steps = bare(IDS[:, :20], attention_mask=MASK[:, :20], use_cache=True).past_key_values, []
        for t in range(20, 40):
            out = bare(IDS[:, t : t + 1], attention_mask=MASK[:, : t + 1], past_key_values=past, use_cache=True)
            steps.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 20:], atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_and_merged_by_name(checkpoint, adapter_model, tmp_path):
    bare = adapter_model(checkpoint(AutoModel), task_type="FEATURE_EXTRACTION", level=3)
    expected = hidden(bare)
    bare.save_pretrained(tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    for loaded in (
        PeftModel.from_pretrained(checkpoint(AutoModel), tmp_path / "bare"),
        AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "bare"),
    ):
        assert loaded.get_level() == 3 and torch.equal(hidden(loaded), expected)
    with pytest.raises(ValueError, match="only a causal LM becomes a hybrid, not LlamaModel: load the adapter over AutoModelForCausalLM"):
        bare.merge_and_unload()
    assert torch.equal(hidden(bare), expected)
    merged = PeftModel.from_pretrained(checkpoint(AutoModelForCausalLM), tmp_path / "bare").merge_and_unload()
    assert torch.equal(hidden(merged), expected)
    bare.set_level(0)
    assert type(bare.merge_and_unload()) is LlamaModel


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True, "adapter_name": "other"}], ids=["default", "low-cpu"])
def test_an_adapter_of_the_causal_lm_fits(checkpoint, causal, auto_class, options, tmp_path):
    causal.set_level(3)
    causal.save_pretrained(tmp_path / "causal")
    base = checkpoint(auto_class)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=f'task_type="CAUSAL_LM" is for causal LMs, not for {type(base).__name__}.*FEATURE_EXTRACTION'):
        PeftModel.from_pretrained(base, tmp_path / "causal")
    assert [name for name, _ in base.named_modules()] == names
    loaded = PeftModel.from_pretrained(base, tmp_path / "causal", task_type="FEATURE_EXTRACTION", **options)
    assert loaded.get_level() == 3 and torch.equal(hidden(loaded), hidden(causal))


def test_an_adapter_put_in_by_transformers_fits_both_ways(checkpoint, causal, adapter_model, tmp_path):
    causal.save_pretrained(tmp_path / "causal")
    bare = checkpoint(AutoModel)
    bare.load_adapter(str(tmp_path / "causal"))
    assert torch.equal(hidden(bare), hidden(causal))
    bare = adapter_model(checkpoint(AutoModel), task_type="FEATURE_EXTRACTION")
    bare.save_pretrained(tmp_path / "bare")
    model = checkpoint(AutoModelForCausalLM)
    model.load_adapter(str(tmp_path / "bare"))
    assert torch.equal(hidden(model), hidden(bare))


def test_a_head_is_trained_and_saved_with_the_adapter(checkpoint, adapter_model, tmp_path):
    model = adapter_model(checkpoint(AutoModelForSequenceClassification, num_labels=1), task_type="SEQ_CLS", level=2).train()
    model(IDS, attention_mask=MASK, labels=torch.tensor([[0.0], [1.0]])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split("layers.")[1][0] for name in trained if "dsla_" in name} == {"0", "2"} and any("score" in name for name in trained)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.mul_(2)
        expected = model.eval()(IDS, attention_mask=MASK).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(checkpoint(AutoModelForSequenceClassification, num_labels=1), tmp_path / "adapter").eval()
        assert torch.equal(loaded(IDS, attention_mask=MASK).logits, expected)
    with pytest.raises(ValueError, match="only a causal LM becomes a hybrid, not LlamaForSequenceClassification"):
        model.merge_and_unload()


def test_a_plan_of_some_layers_and_excluded_modules(checkpoint):
    model = get_peft_model(checkpoint(AutoModel), DSLAConfig(conversion_order=[3, 1], task_type="FEATURE_EXTRACTION"))
    assert {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "dsla_" in name} == {"1", "3"}
