"""Decoding that takes tokens back (assisted, prompt lookup) and decoding in compiled steps with a static cache."""

import copy

import pytest
import torch
from transformers import StaticCache

from dsla_hf.cache import DSLACacheLayer, StaticDSLACacheLayer, recording_cache

WINDOWS = [0, 8]
PROMPT = torch.tensor([[5, 17, 31, 5, 17, 44, 9, 5, 17, 31, 5, 60, 61, 62, 5, 17, 31]])


def greedy(model, **options):
    return model.generate(input_ids=PROMPT, max_new_tokens=40, do_sample=False, **options)


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("level", [2, 4])
def test_prompt_lookup_gives_the_greedy_text(tiny_model, adapter_model, base_kind, window_size, level):
    model = adapter_model(tiny_model(base_kind), window_size=window_size, level=level)
    assert torch.equal(greedy(model, prompt_lookup_num_tokens=3), greedy(model))


@pytest.mark.parametrize("window_size", WINDOWS)
def test_an_assistant_gives_the_greedy_text_of_adapters_and_hybrids(tiny_model, adapter_model, window_size):
    adapter = adapter_model(tiny_model("llama"), window_size=window_size, level=2)
    near = copy.deepcopy(adapter)
    near.set_level(4)
    hybrid = copy.deepcopy(adapter).merge_and_unload()
    expected = greedy(adapter)
    for model in (adapter, hybrid):
        for assistant in (near, copy.deepcopy(near).merge_and_unload(), tiny_model("llama"), hybrid):
            assert torch.equal(greedy(model, assistant_model=assistant), expected)


def test_the_level_can_rise_during_prompt_lookup(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=0)
    cache = recording_cache(model.config)
    ids = torch.cat([PROMPT, PROMPT], 1)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        model.set_level(4)
        model(ids[:, 20:26], past_key_values=cache)
        cache.crop(-4)
        assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)
        rest = model(ids[:, 22:], past_key_values=cache).logits
        model.set_level(0)
        plain = recording_cache(model.config)
        model(ids[:, :20], past_key_values=plain)
        model.set_level(4)
        model(ids[:, 20:22], past_key_values=plain)
        expected = model(ids[:, 22:], past_key_values=plain).logits
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("remove", [1, 5, 9, 12])
def test_tokens_taken_back_leave_no_trace(tiny_model, adapter_model, window_size, remove):
    model = adapter_model(tiny_model("llama"), window_size=window_size)
    ids = torch.randint(3, 97, (3, 60))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    wrong = torch.randint(3, 97, (3, remove))

    def run(cache, tokens, upto):
        tail = torch.ones(3, upto - 60, dtype=mask.dtype) if upto > 60 else mask[:, :0]
        return model(tokens, past_key_values=cache, attention_mask=torch.cat([mask[:, :upto], tail], 1)).logits

    with torch.no_grad():
        cache = recording_cache(model.config)
        run(cache, ids[:, :27], 27)
        cache.crop(0)
        run(cache, ids[:, 27:30], 30)
        run(cache, wrong, 30 + remove)
        cache.crop(-remove)
        assert cache.get_seq_length() == 30
        cache.reorder_cache(torch.tensor([0, 1, 2]))
        found = run(cache, ids[:, 30:], 60)
        plain = recording_cache(model.config)
        run(plain, ids[:, :30], 30)
        expected = run(plain, ids[:, 30:], 60)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_taking_back_what_was_not_recorded_is_refused(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"))
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match=r"forget 2 tokens, 0 are recorded: call generate\(\)"):
            cache.crop(-2)
        cache = recording_cache(model.config)
        model(PROMPT, past_key_values=cache)
        cache.crop(0)
        model(PROMPT[:, :3], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="forget 4 tokens, 3 are recorded"):
            cache.crop(-4)


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_compiled_step_with_a_static_cache_equals_the_eager_text(tiny_model, adapter_model, window_size, padded, merged):
    model = adapter_model(tiny_model("llama"), window_size=window_size, level=2)
    model = model.merge_and_unload().eval() if merged else model
    ids = torch.randint(3, 97, (2, 60))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    torch._dynamo.reset()

    class Compiled:
        def __init__(self):
            self.steps = 0

        def __call__(self, graph, inputs):
            self.steps += 1
            return graph.forward

    backend = Compiled()
    step = torch.compile(model, backend=backend, fullgraph=True)
    full = torch.cat([mask, torch.zeros(2, 4, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs = [
            model(ids[:, :20], attention_mask=static_mask(full, 0, 20), position_ids=positions[:, :20], past_key_values=cache).logits
        ]
        for t in range(20, 60):
            options = {"attention_mask": static_mask(full, t, 1), "position_ids": positions[:, t : t + 1]}
            outputs.append(step(ids[:, t : t + 1], past_key_values=cache, **options).logits)
    assert sum(isinstance(layer, StaticDSLACacheLayer) for layer in cache.layers) == 2
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=2e-5, rtol=0)
    assert backend.steps <= 2, "a step was compiled again and again"


def static_mask(mask, past, tokens):
    """The 4-D mask that `generate` prepares for a static cache: which of its places each query sees."""
    places = torch.arange(mask.shape[1])
    causal = places <= (past + torch.arange(tokens))[:, None]
    return (causal & mask.bool()[:, None])[:, None]


def test_generate_with_a_static_cache_keeps_the_addresses_of_the_states(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=4)
    cache = StaticCache(config=model.config, max_cache_len=80)
    out = model.generate(input_ids=PROMPT, max_new_tokens=10, do_sample=False, past_key_values=cache)
    addresses = [[x.data_ptr() for x in layer.state] for layer in cache.layers]
    out = model.generate(input_ids=out, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert addresses == [[x.data_ptr() for x in layer.state] for layer in cache.layers]
    assert torch.equal(out, model.generate(input_ids=PROMPT, max_new_tokens=30, do_sample=False))
    with pytest.raises(NotImplementedError, match="static cache cannot be rolled back"):
        cache.layers[0].activate_past_recording()


@pytest.mark.parametrize("window_size", WINDOWS)
def test_candidates_tried_side_by_side_and_one_kept(tiny_model, adapter_model, window_size):
    """What contrastive search does: repeat the cache for several next tokens, look at all, go on with one a row."""
    model = adapter_model(tiny_model("llama"), window_size=window_size)
    ids = torch.randint(3, 97, (2, 40))
    candidates = torch.randint(3, 97, (2, 3))
    kept = torch.tensor([2, 0])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        found = model(candidates.view(6, 1), past_key_values=cache).logits
        expected = model(torch.cat([ids.repeat_interleave(3, 0), candidates.view(6, 1)], 1)).logits[:, -1:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        cache.batch_select_indices(torch.arange(2) * 3 + kept)
        token = candidates.gather(1, kept[:, None])
        following = torch.randint(3, 97, (2, 10))
        found = model(following, past_key_values=cache).logits
        expected = model(torch.cat([ids, token, following], 1)).logits[:, -10:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
