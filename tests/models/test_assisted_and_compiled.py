"""Decoding that takes tokens back (assisted, prompt lookup) and decoding in compiled steps with a static cache."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from dsla_hf.core.cache import DSLACacheLayer, StaticDSLACacheLayer, cache_bytes

WINDOWS = [0, 8]
KINDS = ["adapter", "hybrid", "load_adapter"]
PROMPT = torch.tensor([[5, 17, 31, 5, 17, 44, 9, 5, 17, 31, 5, 60, 61, 62, 5, 17, 31]])


def greedy(model, **options):
    return model.generate(**{"input_ids": PROMPT, "max_new_tokens": 40, "do_sample": False, **options})


def few_guesses(model):
    """As an assistant, or by early exit, it guesses four tokens at a time: by default 20, of which a random model guesses most wrong."""
    model.generation_config.num_assistant_tokens = 4
    return model


def recording_cache(config):
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


@pytest.fixture
def model_from(tiny_model, adapter_model, tmp_path):
    """The same model at level 2 whose `generate` is that of the adapter, of the hybrid, or after `load_adapter` that of transformers."""

    def make(kind):
        torch.manual_seed(0)
        model = adapter_model(tiny_model("llama"), level=2)
        if kind == "hybrid":
            return model.merge_and_unload().eval()
        if kind == "load_adapter":
            model.save_pretrained(tmp_path / "adapter")
            torch.manual_seed(0)
            model = tiny_model("llama")
            model.load_adapter(str(tmp_path / "adapter"))
        return model

    return make


@pytest.mark.parametrize("base_kind, window_size, level", [("llama", 0, 2), ("llama", 8, 4), ("qwen3", 0, 4), ("qwen3", 8, 2)])
def test_prompt_lookup_gives_the_greedy_text(tiny_model, adapter_model, base_kind, window_size, level):
    model = adapter_model(tiny_model(base_kind), window_size=window_size, level=level)
    assert torch.equal(greedy(model, prompt_lookup_num_tokens=3), greedy(model))


@pytest.mark.parametrize("window_size", WINDOWS)
def test_an_assistant_gives_the_greedy_text_of_adapters_and_hybrids(tiny_model, adapter_model, window_size):
    adapter = few_guesses(adapter_model(tiny_model("llama"), window_size=window_size, level=2))
    near = copy.deepcopy(adapter)
    near.set_level(4)
    hybrid = copy.deepcopy(adapter).merge_and_unload()
    expected = greedy(adapter, max_new_tokens=24)
    assistants = (near, copy.deepcopy(near).merge_and_unload(), few_guesses(tiny_model("llama")), hybrid)
    for number, assistant in enumerate(assistants):  # each helps adapters and hybrids, of one window size each
        model = (adapter, hybrid)[(number + WINDOWS.index(window_size)) % 2]
        assert torch.equal(greedy(model, max_new_tokens=24, assistant_model=assistant), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_text_is_the_greedy_one_wherever_generate_comes_from(tiny_model, model_from, kind):
    model, base = few_guesses(model_from(kind)), few_guesses(tiny_model("llama"))
    expected = greedy(model, max_new_tokens=16)
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    for way in (
        {"prompt_lookup_num_tokens": 3, **padded},
        {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 1},
        {"assistant_model": base},
        {"assistant_early_exit": 3},
    ):
        assert torch.equal(greedy(model, max_new_tokens=16, **way)[:, -16:], expected[:, -16:]), way
    assert model.config.num_hidden_layers == 4
    text = greedy(base, max_new_tokens=16)
    assert torch.equal(greedy(base, max_new_tokens=16, assistant_model=model), text)


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_goes_on_from_a_cache_that_did_not_record(model_from, kind):
    model = model_from(kind)
    expected = greedy(model)
    first = greedy(model, max_new_tokens=20, return_dict_in_generate=True)
    cache, mask = first.past_key_values, torch.ones_like(first.sequences)
    if kind != "load_adapter":
        with pytest.raises(ValueError, match="reads all 37 tokens given, though past_key_values holds 36 of them"):
            greedy(model, input_ids=first.sequences, past_key_values=cache, prompt_lookup_num_tokens=3)
    if Version(transformers.__version__) >= Version("5.23"):  # older ones count the tokens wrong there, with any model
        rest = {"input_ids": first.sequences[:, 36:], "attention_mask": mask, "past_key_values": cache}
        text = greedy(model, **rest, max_new_tokens=20, prompt_lookup_num_tokens=3)
        assert torch.equal(text[:, 1:], expected[:, 37:])


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


@pytest.mark.parametrize("config", [True, False])
def test_a_cache_asked_to_record_does_so_whatever_its_layers_become(tiny_model, adapter_model, config):
    model = adapter_model(tiny_model("llama"), level=2)
    with torch.no_grad():
        expected = model(PROMPT[:, :10]).logits[:, -1:]
        cache = DynamicCache(config=model.config) if config else DynamicCache()
        cache.activate_past_recording()
        model(PROMPT, past_key_values=copy.deepcopy(cache))
        model(PROMPT, past_key_values=cache)
        cache.crop(-8)
        assert cache.get_seq_length() == 9
        torch.testing.assert_close(model(PROMPT[:, 9:10], past_key_values=cache).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [[0, 2], [1, 3]])
def test_a_refused_crop_leaves_all_layers_as_they_were(tiny_model, adapter_model, order):
    model = adapter_model(tiny_model("llama"), conversion_order=order, level=2)
    with torch.no_grad():
        expected = model(PROMPT).logits[:, -3:]
        cache = model(PROMPT[:, :-3], use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="forget 2 tokens, 0 are recorded: call activate_past_recording"):
            cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == [14] * 4
        # A softmax layer refuses, after DSLA layers have cropped.
        cache.activate_past_recording()
        recorded = copy.deepcopy(cache)
        model(PROMPT[:, -3:], past_key_values=recorded)
        recorded.layers[4 - order[0] - 1].crop = refuse
        with pytest.raises(RuntimeError, match="not this one"):
            recorded.crop(-3)
        assert [layer.get_seq_length() for layer in recorded.layers] == [17] * 4
        torch.testing.assert_close(model(PROMPT[:, -3:], past_key_values=cache).logits, expected, atol=1e-5, rtol=0)


def refuse(tokens):
    raise RuntimeError("not this one")


def test_taking_back_more_than_was_recorded_is_refused(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"))
    with torch.no_grad():
        cache = recording_cache(model.config)
        model(PROMPT, past_key_values=cache)
        cache.crop(0)
        model(PROMPT[:, :3], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="forget 4 tokens, 3 are recorded"):
            cache.crop(-4)
        for layer in cache.layers:  # as transformers ends a recording
            layer.record_past = False
        model(PROMPT[:, :1], past_key_values=cache)
        cache.activate_past_recording()
        model(PROMPT[:, :2], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="forget 3 tokens, 2 are recorded"):
            cache.crop(-3)


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("piece", [1, 60])
def test_what_is_recorded_has_a_bound(tiny_model, adapter_model, monkeypatch, window_size, piece):
    monkeypatch.setattr("dsla_hf.core.cache.RECORDED_TOKENS", 10)
    model = adapter_model(tiny_model("llama"), window_size=window_size)
    ids = torch.randint(3, 97, (2, 61))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    sizes = []
    with torch.no_grad():
        expected = model(ids[:, :52], attention_mask=mask[:, :52]).logits[:, -1:]
        cache = recording_cache(model.config)
        for start in range(0, 60, piece):
            model(ids[:, start : start + piece], past_key_values=cache, attention_mask=mask[:, : start + piece])
            sizes.append(cache_bytes(cache))
        with pytest.raises(NotImplementedError, match=r"forget 21 tokens, [0-9]+ are recorded, the last 10 of a longer text"):
            cache.crop(-21)
        cache.crop(-9)
        found = model(ids[:, 51:52], past_key_values=cache, attention_mask=mask[:, :52]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert sizes[-1] <= max(sizes[:31])


def test_a_static_cache_refuses_to_be_cropped(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=4)
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.activate_past_recording()  # as transformers has it: nothing records, and nothing is said
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="static cache cannot be rolled back: use a dynamic one"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="not supported with Static cache"):
        greedy(model, prompt_lookup_num_tokens=3, cache_implementation="static")


def test_an_adapter_is_compiled_before_its_first_forward_in_one_graph_a_level(tiny_model, adapter_model):
    """A copy, to which no layer's DSLA attention comes from the original. Its attentions alone: the rest of a model takes long."""
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), conversion_order=[1, 0], window_size=0)
    copied, x = copy.deepcopy(model), torch.randn(1, 4, 32)
    rotary = model.get_decoder().rotary_emb(x, torch.arange(4)[None])
    torch._dynamo.reset()
    graphs = CompileCounter()

    def attend(model, x):
        for layer in model.get_decoder().layers:
            x = layer.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
        return x

    with torch.no_grad():
        compiled = torch.compile(attend, backend=graphs, fullgraph=True)
        for level, count in ((1, 1), (2, 2), (1, 2)):
            copied.set_level(level)
            model.set_level(level)
            torch.testing.assert_close(compiled(copied, x), attend(model, x))
            assert graphs.frame_count == count


@pytest.mark.parametrize("window_size, padded, merged", [(0, False, False), (0, True, True), (8, False, True), (8, True, False)])
def test_a_compiled_step_with_a_static_cache_equals_the_eager_text(tiny_model, adapter_model, window_size, padded, merged):
    base = tiny_model("llama", num_hidden_layers=2)  # compiling takes seconds a layer
    model = adapter_model(base, conversion_order=[1, 0], window_size=window_size, level=1)
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
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    make_masks = (model if merged else model.get_base_model()).create_masks_for_generate  # as `generate` does
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs = [model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=cache).logits]
        for t in range(20, 60):
            masks = make_masks(
                config=model.config, inputs_embeds=torch.empty(2, 1, 0), attention_mask=mask[:, : t + 1], past_key_values=cache
            )
            options = {"attention_mask": masks, "position_ids": positions[:, t : t + 1]}
            outputs.append(step(ids[:, t : t + 1], past_key_values=cache, **options).logits)
    assert sum(isinstance(layer, StaticDSLACacheLayer) for layer in cache.layers) == 1
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=2e-5, rtol=0)
    assert backend.steps <= 2, "a step was compiled again and again"


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
