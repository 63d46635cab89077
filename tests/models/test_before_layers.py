"""A refused call has changed nothing; what cannot be looked at in compiled code is known otherwise, or refused there."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dsla_hf import DSLACacheLayer

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["adapter", "hybrid"])
def model(request, tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    return (model if request.param == "adapter" else model.merge_and_unload()).requires_grad_(False).eval()


def counts(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


def contents(cache):
    return [copy.deepcopy(layer.state if isinstance(layer, DSLACacheLayer) else (layer.keys, layer.values)) for layer in cache.layers]


def assert_unchanged(cache, before):
    for now, then in zip(contents(cache), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", ["set_level", "disable_adapter", "order"])
@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=44)], ids=["dynamic", "static"])
def test_a_level_lowered_within_a_text_is_refused_and_the_text_can_go_on(tiny_model, adapter_model, make, lower):
    model = adapter_model(tiny_model("llama"), level=2).requires_grad_(False)
    cache = make(config=model.config)
    model(IDS[:, :30], past_key_values=cache)
    before = contents(cache)

    def call():
        with pytest.raises(RuntimeError, match="level was lowered"):
            model(IDS[:, 30:31], past_key_values=cache)

    if lower == "disable_adapter":
        with model.disable_adapter():
            call()
    elif lower == "order":
        order = model.peft_config["default"].conversion_order
        model.set_conversion_order(order[1:] + order[:1])
        call()
        model.set_conversion_order(order)
    else:
        model.set_level(0)
        call()
        model.set_level(2)
    assert counts(cache) == [30] * 4
    assert_unchanged(cache, before)
    found = model(IDS[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(IDS).logits[:, 30:], atol=2e-5, rtol=0)


def test_a_call_that_failed_midway_is_noticed(model):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :20], past_key_values=cache)
    broken = [layer for layer in model.modules() if type(layer).__name__ == "LlamaMLP"][2]

    def fail(*_):
        raise torch.OutOfMemoryError("simulated")

    handle = broken.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(IDS[:, 20:21], past_key_values=cache)
    handle.remove()
    assert len(set(counts(cache))) == 2
    with pytest.raises(RuntimeError, match=r"different numbers of tokens, \[21, 21, 21, 20\]"):
        model(IDS[:, 20:21], past_key_values=cache)
    if hasattr(model, "disable_adapter"):
        model.set_level(0)
        with pytest.raises(RuntimeError, match="level was lowered"):
            model(IDS[:, 20:21], past_key_values=cache)


def test_other_rows_and_full_static_caches_are_refused(model):
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(IDS[:, :20], past_key_values=cache)
    for ids, message in ((IDS[:1, 20:21], "holds 2 rows, the call has 1"), (IDS[:, 20:25], "room for 24 tokens; 20 are there, and 5 come")):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache)
        assert counts(cache) == [20] * 4
    found = model(IDS[:, 20:24], past_key_values=cache).logits
    torch.testing.assert_close(found, model(IDS[:, :24]).logits[:, 20:], atol=2e-5, rtol=0)


# --- static caches and sliding windows ----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [10, 40])
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_static_caches_beyond_twice_every_window(tiny_model, adapter_model, kind, prompt):
    base = tiny_model(kind, **({"sliding_window": 12} if kind == "mistral" else {}))
    model = adapter_model(base, conversion_order=[1, 0, 3, 2]).requires_grad_(False)
    ids, mask = IDS[:, :prompt].clone(), torch.ones(2, prompt, dtype=torch.long)
    mask[0, :4], ids[0, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    for level in (2, 4):
        model.set_level(level)
        dynamic = model.generate(input_ids=ids, **options)
        assert torch.equal(dynamic, model.generate(input_ids=ids, cache_implementation="static", **options))


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny_model, adapter_model):
    """Two layers, one of them DSLA: compiling takes seconds a layer."""
    return adapter_model(tiny_model("llama", num_hidden_layers=2), conversion_order=[1, 0], level=1).requires_grad_(False)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", **options)


def test_compiled_code_reads_packed_texts_apart_or_refuses(small):
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)
    with torch.no_grad():
        expected = torch.cat([small(IDS[:, :25], use_cache=False).logits, small(IDS[:, 25:], use_cache=False).logits], 1)
        found = compiled(small)(IDS, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        with pytest.raises(Exception, match="position_ids mark packed texts"):
            compiled(small, fullgraph=True)(IDS, position_ids=positions, use_cache=False)
        ones = torch.ones_like(IDS)
        found = compiled(small, fullgraph=True)(IDS, attention_mask=ones, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, small(IDS, attention_mask=ones, position_ids=positions, use_cache=False).logits)


def test_compiled_code_refuses_masks_whose_values_it_cannot_see(small):
    ahead = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    with torch.no_grad():
        for mask in (ahead, ahead.tril()):
            with pytest.raises(Exception, match="4-D mask cannot be looked at in compiled"):
                compiled(small, fullgraph=True)(IDS, attention_mask=mask, use_cache=False)
        with pytest.raises(ValueError, match="attention_mask"):
            compiled(small)(IDS, attention_mask=ahead, use_cache=False)


def test_models_with_the_mask_hand_over_are_copied_and_pickled(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2).requires_grad_(False)
    expected = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, cache_implementation="static")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        base = other.get_base_model()
        assert base.create_masks_for_generate.args[1] is base.model
        found = other.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, cache_implementation="static")
        assert torch.equal(found, expected)
    assert "create_masks_for_generate" not in model.unload().__dict__
