"""The cache layer of DSLA inside a transformers cache, and the fold of a softmax layer's keys and values into it."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

import dsla_hf.core.cache
from dsla_hf import DSLACacheLayer, DualState, DualStateAttention, cache_bytes, fold
from dsla_hf.core.fold import dsla_cache_layer
from dsla_hf.core.layout import TokenLayout

windows = pytest.mark.parametrize("window_size", [0, 8])


def make_attention(window_size):
    attention = DualStateAttention(4, 2, 8, window_size=window_size, gate_rank=3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return attention.requires_grad_(False)


def make_kv(batch=3, tokens=37):
    """Keys and values as transformers caches them."""
    return torch.randn(batch, 2, tokens, 8), torch.randn(batch, 2, tokens, 8)


def left_mask(tokens=37):
    return torch.arange(tokens) >= torch.tensor([[0], [5], [20]])


def forward_state(attention, keys, values, mask=None):
    """What the DSLA layer itself leaves behind after these tokens (its queries are irrelevant to it)."""
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    return attention(torch.randn(k.shape[0], k.shape[1], 4, 8), k, v, padding_mask=mask, output_state=True)[1]


def next_output(attention, state):
    """Outputs of the next 20 tokens, which read everything of the state."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(state.lengths.shape[0], 20, heads, 8, generator=generator) for heads in (4, 2, 2))
    return attention(q, k, v, state=state)[0]


def assert_equivalent(attention, found, expected):
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.recurrent, expected.recurrent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_output(attention, found), next_output(attention, expected), rtol=1e-5, atol=1e-5)


def filled_layer(attention, tokens=37):
    layer = DSLACacheLayer()
    kv = make_kv(tokens=tokens)
    layer.advance(forward_state(attention, *kv), *(x.transpose(1, 2) for x in kv))
    return layer


# --- fold ---------------------------------------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("tokens", [1, 3, 8, 12, 16, 37, 150])
def test_fold_equals_the_layer_run_over_the_same_keys_and_values(window_size, tokens):
    attention = make_attention(window_size)
    keys, values = make_kv(tokens=tokens)
    layer = fold(attention, keys, values)
    assert isinstance(layer, DSLACacheLayer) and layer.get_seq_length() == tokens and layer.is_initialized
    assert_equivalent(attention, layer.state, forward_state(attention, keys, values))


@windows
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_fold_leaves_no_trace_of_padding(window_size, dtype):
    attention = make_attention(window_size)
    keys, values = make_kv()
    mask = left_mask()
    mask[0, 10:14], mask[1, -3:] = False, False
    poisoned = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (keys, values)]
    layer = fold(attention, *poisoned, attention_mask=mask.to(dtype))
    assert layer.get_seq_length() == 37 and layer.state.lengths.tolist() == mask.sum(1).tolist()
    for row in range(3):
        alone = forward_state(attention, *(x[row : row + 1, :, mask[row]] for x in (keys, values)))
        assert_equivalent(attention, DualState(*(x[row : row + 1] for x in layer.state)), alone)


@windows
def test_fold_keeps_a_graph_only_where_keys_or_values_require_a_gradient(window_size):
    attention = make_attention(window_size).requires_grad_(True)
    keys, values = make_kv()
    assert not any(x.requires_grad for x in fold(attention, keys, values).state)
    for x in (keys, values):
        x.requires_grad_()
        assert fold(attention, keys, values).state.recurrent.requires_grad
        with torch.no_grad():
            assert not any(x.requires_grad for x in fold(attention, keys, values).state)
        x.requires_grad_(False)


@windows
@pytest.mark.parametrize("max_length", [None, 50])
def test_gradients_flow_through_a_fold_in_pieces(window_size, max_length, monkeypatch):
    attention, mask = make_attention(window_size).requires_grad_(True).double(), left_mask()
    leaves = [x.double().requires_grad_() for x in make_kv()]

    def gradients(state):
        q, k, v = (torch.randn(3, 20, heads, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for heads in (4, 2, 2))
        o = attention(q, k, v, state=state)[0].square().sum()
        return torch.autograd.grad(o, [*leaves, *attention.parameters()])

    expected = gradients(forward_state(attention, *leaves, mask))
    monkeypatch.setattr(dsla_hf.core.cache, "FOLDED_AT_ONCE", 30)
    layer = fold(attention, *leaves, attention_mask=mask, max_length=max_length)
    for x, y in zip(gradients(layer.current_state(attention)), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@windows
def test_fold_takes_bf16_caches_and_keeps_fp32_states(window_size):
    attention = make_attention(window_size)
    keys, values = (x.bfloat16() for x in make_kv())
    state = fold(attention, keys, values).state
    assert state.recurrent.dtype == torch.float32 and state.window_k.dtype == torch.bfloat16
    torch.testing.assert_close(state.recurrent, fold(attention, keys.float(), values.float()).state.recurrent)


def test_fold_refuses_positions_that_restart():
    attention, (keys, values) = make_attention(8), make_kv(batch=2, tokens=6)
    restart, running = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 9]])
    with pytest.raises(ValueError, match="position_ids restart"):
        fold(attention, keys, values, position_ids=restart)
    repeated = torch.tensor([[0, 1, 1, 2, 3, 4]] * 2)
    with pytest.raises(ValueError, match="position_ids restart"):
        fold(attention, keys, values, position_ids=repeated)
    fold(attention, keys, values, position_ids=running)
    # generate numbers padding 0 or 1: only real tokens count.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = torch.tensor([[1, 1, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    fold(attention, keys, values, attention_mask=mask, position_ids=padded)
    with pytest.raises(ValueError, match="position_ids restart"):
        fold(attention, keys, values, attention_mask=mask, position_ids=padded.flip(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda k, v: (k[0], v[0]),
        lambda k, v: (k[:, :1], v),
        lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
        lambda k, v: (k[..., :6], v),
        lambda k, v: (k, v[..., :6]),
        lambda k, v: (k.transpose(1, 2), v.transpose(1, 2)),
        lambda k, v: (k, v[:, :1]),
        lambda k, v: (k, v[:, :, :5]),
        lambda k, v: (k, v[:2]),
    ],
    ids=["3-D", "key heads", "query heads", "key size", "value size", "tokens first", "value heads", "value tokens", "value rows"],
)
def test_fold_refuses_shapes_that_do_not_fit(change):
    with pytest.raises(ValueError, match=r"cached keys .* values"):
        fold(make_attention(8), *change(*make_kv(tokens=9)))


@pytest.mark.parametrize("shape", [(3, 36), (3, 38), (2, 37), (3, 1, 37)])
def test_fold_refuses_masks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="attention_mask"):
        fold(make_attention(8), *make_kv(), attention_mask=torch.ones(shape))


# --- the layer in a cache -----------------------------------------------------------------------------------------


def test_update_is_for_softmax_layers_and_refused():
    with pytest.raises(RuntimeError, match="level was lowered"):
        DSLACacheLayer().update(*make_kv())


def test_an_empty_layer_knows_that_it_is_empty():
    layer = DSLACacheLayer()
    assert layer.get_seq_length() == 0 and layer.memory_bytes() == 0 and not layer.is_initialized
    assert layer.get_mask_sizes(5) == (5, 0) and layer.get_max_length() == -1
    for change in (layer.reset, lambda: layer.reorder_cache(torch.tensor([0])), lambda: layer.batch_repeat_interleave(2)):
        change()
    assert layer.state is None


@windows
def test_lengths_count_padding_as_other_layers_do(window_size):
    attention, (keys, values) = make_attention(window_size), make_kv()
    layer = fold(attention, keys, values, attention_mask=left_mask())
    assert layer.get_seq_length() == 37 and layer.get_mask_sizes(4) == (41, 0) and layer.batch_size == 3
    assert layer.state.lengths.tolist() == [37, 32, 17]
    layer.advance(layer.state, *(x.transpose(1, 2) for x in make_kv(tokens=2)))
    assert layer.get_seq_length() == 39


@windows
def test_rows_are_reordered_repeated_and_selected(window_size):
    attention = make_attention(window_size)
    layer = filled_layer(attention)
    before = copy.deepcopy(layer.state)
    for change, index in (
        (lambda x: x.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda x: x.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda x: x.batch_select_indices(torch.tensor([False, True, False])), [1]),
    ):
        changed = copy.deepcopy(layer)
        change(changed)
        assert changed.batch_size == len(index) and changed.get_seq_length() == 37
        for x, y in zip(changed.state, before, strict=True):
            assert torch.equal(x, y[index])


def test_reset_forgets_everything():
    layer = filled_layer(make_attention(8))
    layer.reset()
    assert layer.state is None and layer.get_seq_length() == 0 and not layer.is_initialized and layer.memory_bytes() == 0


def test_crop_is_refused_unless_it_removes_nothing():
    layer = filled_layer(make_attention(8))
    before = layer.state
    layer.crop(0)
    layer.crop(torch.tensor(0))
    layer.crop(100)  # a positive number is what shall remain, as older releases of transformers have it
    for tokens in (-3, 5, torch.tensor(-1)):
        with pytest.raises(NotImplementedError, match=r"cannot forget .* tokens, 0 are recorded"):
            layer.crop(tokens)
    assert layer.state is before and not layer.is_croppable


@windows
def test_memory_does_not_grow_with_the_text(window_size):
    attention = make_attention(window_size)
    sizes = {filled_layer(attention, tokens).memory_bytes() for tokens in (1, 37, 500)}
    slots = window_size + 4 if window_size else 0  # the window and its sinks
    states, window, count = 3 * 2 * 2 * 8 * 8 * 4, 3 * 2 * slots * 2 * 8 * 4, 3 * 8
    assert sizes == {states + window + count}


# --- key-value layers become DSLA layers --------------------------------------------------------------------------


def dynamic_cache(keys, values, layers=2):
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(keys, values, layer)
    return cache


@windows
def test_a_dynamic_layer_is_folded_with_its_padding_and_replaced(window_size):
    attention, (keys, values), mask = make_attention(window_size), make_kv(), left_mask()
    cache = dynamic_cache(keys, values)
    # The mask of the call reaches to its new tokens.
    layout = TokenLayout(torch.cat([mask, torch.ones(3, 4, dtype=torch.bool)], 1))
    layer = dsla_cache_layer(cache, 1, attention, layout)
    assert cache.layers[1] is layer and type(cache.layers[0]) is DynamicLayer
    assert_equivalent(attention, layer.state, forward_state(attention, keys, values, mask))
    assert cache.get_seq_length() == 37 and layer.get_seq_length() == 37
    assert dsla_cache_layer(cache, 1, attention, layout) is layer, "a DSLA layer stays"


@windows
def test_a_static_layer_is_folded_up_to_its_length(window_size):
    """The zeros behind the text are no tokens."""
    attention, (keys, values) = make_attention(window_size), make_kv()
    layer = StaticLayer(64)
    layer.update(keys, values, {"cache_position": torch.arange(37)})
    assert layer.keys.shape[2] == 64
    cache = DynamicCache()
    cache.layers = [layer]
    folded = dsla_cache_layer(cache, 0, attention, TokenLayout())
    assert_equivalent(attention, folded.state, forward_state(attention, keys, values))
    assert folded.get_seq_length() == 37 and folded.get_max_length() == 64 and folded.get_mask_sizes(3) == (64, 0)


def test_empty_caches_get_an_empty_layer(tiny_model):
    attention = make_attention(8)
    lazy = DynamicCache()
    layer = dsla_cache_layer(lazy, 2, attention, TokenLayout())
    assert lazy.layers[2] is layer and len(lazy.layers) == 3 and layer.get_seq_length() == 0
    assert lazy.batch_size == -1, "as transformers says of a cache before its first token"
    config = tiny_model("llama").config
    made = DynamicCache(config=config)
    assert dsla_cache_layer(made, 1, attention, TokenLayout()) is made.layers[1]
    static = StaticCache(config=config, max_cache_len=50)
    assert dsla_cache_layer(static, 0, attention, TokenLayout()).get_mask_sizes(7) == (50, 0)


def test_layers_whose_keys_cannot_be_read_in_full_are_refused_by_name():
    class CompressedLayer(DynamicLayer):
        pass

    attention, (keys, values) = make_attention(8), make_kv()
    cache = DynamicCache()
    cache.layers = [CompressedLayer()]
    dsla_cache_layer(copy.deepcopy(cache), 0, attention, TokenLayout())  # nothing to read yet
    cache.layers[0].update(keys, values)
    with pytest.raises(ValueError, match="layer 0 cannot become DSLA in mid-text: its cache is a CompressedLayer"):
        dsla_cache_layer(cache, 0, attention, TokenLayout())
    assert type(cache.layers[0]) is CompressedLayer


@pytest.mark.parametrize("tokens", [5, 9, 10, 11, 30])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fold_of_a_sliding_window_begins_at_the_oldest_cached_key(tokens, static, padded, monkeypatch):
    said = []
    monkeypatch.setattr(dsla_hf.core.fold.logger, "warning_once", said.append)
    attention, (keys, values) = make_attention(8), make_kv(tokens=tokens)
    layer = StaticSlidingWindowLayer(max_cache_len=50, sliding_window=10) if static else DynamicSlidingWindowLayer(sliding_window=10)
    cache = DynamicCache()
    cache.layers = [layer]
    for t in range(tokens):  # as decoding fills it
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    mask = None
    if padded:
        mask = torch.ones(len(keys), tokens + 1, dtype=torch.bool)
        mask[0, : tokens - 3] = False
    new = dsla_cache_layer(cache, 0, attention, TokenLayout(padding_mask=mask))
    kept = tokens if tokens < 10 else 9
    past = None if mask is None else mask[:, :-1][:, -kept:]
    expected = fold(attention, keys[:, :, -kept:], values[:, :, -kept:], attention_mask=past).state
    assert all(torch.equal(x, y) for x, y in zip(new.state, expected, strict=True))
    assert int(new.get_seq_length()) == tokens, "the other layers count on it"
    assert len(said) == (tokens >= 10) and all(f"of its {tokens} tokens the last 9 are cached" in message for message in said)


@pytest.mark.parametrize("exact, tokens, warnings", [(True, 37, 0), (False, 37, 1), (False, 0, 0)])
def test_a_fold_of_keys_that_are_not_the_layers_own_says_that_it_is_approximate(monkeypatch, exact, tokens, warnings):
    said = []
    monkeypatch.setattr(dsla_hf.core.fold.logger, "warning_once", said.append)
    cache = dynamic_cache(*make_kv(tokens=tokens)) if tokens else DynamicCache()
    dsla_cache_layer(cache, 0, make_attention(8), TokenLayout(), exact)
    assert len(said) == warnings and all("approximate" in message for message in said)


def test_a_fold_that_fails_leaves_the_cache_as_it_was():
    cache = dynamic_cache(*make_kv())
    wrong = DualStateAttention(4, 4, 8)
    with pytest.raises(ValueError, match="cached keys"):
        dsla_cache_layer(cache, 0, wrong, TokenLayout())
    assert type(cache.layers[0]) is DynamicLayer and cache.layers[0].get_seq_length() == 37


@windows
def test_cache_bytes_counts_both_kinds(window_size):
    attention, (keys, values) = make_attention(window_size), make_kv()
    cache = dynamic_cache(keys, values)
    key_value_bytes = 2 * 3 * 2 * 37 * 8 * 4
    assert cache_bytes(DynamicCache()) == 0
    assert cache_bytes(cache) == 2 * key_value_bytes
    layer = dsla_cache_layer(cache, 0, attention, TokenLayout())
    assert cache_bytes(cache) == key_value_bytes + layer.memory_bytes()


def test_a_whole_cache_of_dsla_layers_can_be_reordered_reset_and_copied():
    attention = make_attention(8)
    cache = dynamic_cache(*make_kv())
    for index in range(2):
        dsla_cache_layer(cache, index, attention, TokenLayout())
        assert cache.batch_size == 3
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    assert torch.equal(cache.layers[1].state.recurrent, twin.layers[1].state.recurrent[[1, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].batch_size == 6 and twin.layers[0].batch_size == 3
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].batch_size == 1
    assert cache.get_seq_length() == 37
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


# --- training through a cache -------------------------------------------------------------------------------------


def slope(function, x, step=3e-3):
    """How the gradient of `function` at `x` compares with what it gains along it: 1."""
    (gradient,) = torch.autograd.grad(function(), x)
    along = gradient / gradient.norm()
    with torch.no_grad():
        x += step * along
        ahead = function()
        x -= 2 * step * along
        behind = function()
        x += step * along
    return float((ahead - behind) / (2 * step) / gradient.norm())


TEXT = torch.arange(3, 33)[None]


@windows
@pytest.mark.parametrize("static", [False, True])
def test_gradients_of_pieces_are_those_of_the_whole_text(tiny_model, adapter_model, window_size, static):
    model = adapter_model(tiny_model("llama"), level=4, window_size=window_size).double()
    embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
    trained = [embedded, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(*cuts):
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
        pieces = embedded.split([b - a for a, b in zip((0, *cuts), (*cuts, 30), strict=True)], 1)
        logits = torch.cat([model(inputs_embeds=x, past_key_values=cache).logits for x in pieces], 1)
        found = torch.autograd.grad(logits[:, -10:].square().mean(), trained)
        cache.reset()  # what a text has left behind is no part of the next one's gradient
        model(inputs_embeds=embedded, past_key_values=cache).logits.mean().backward()
        return found

    for x, y in zip(gradients(9, 25, 26, 27, 28, 29), gradients(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_without_gradients_a_text_is_cut_off_from_what_came_before(tiny_model, adapter_model):
    for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)):
        model = adapter_model(tiny_model("llama"), level=4)
        embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
        cache = make(config=model.config)
        model(inputs_embeds=embedded[:, :9], past_key_values=cache)
        with torch.no_grad():
            model(inputs_embeds=embedded[:, 9:10], past_key_values=cache)
        model(inputs_embeds=embedded[:, 10:], past_key_values=cache).logits.square().mean().backward()
        assert not embedded.grad[:, :10].any() and embedded.grad[:, 10:].any()


@windows
def test_gradients_flow_through_a_raise(tiny_model, adapter_model, window_size):
    model = adapter_model(tiny_model("llama"), window_size=window_size).double()
    embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
    direction = torch.randn(1, 10, 97, dtype=torch.float64)

    def score():
        model.set_level(1)
        cache = model(inputs_embeds=embedded[:, :20].clone()).past_key_values
        model.set_level(4)
        return (model(TEXT[:, 20:], past_key_values=cache).logits * direction).sum()

    assert slope(score, embedded) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("level", [0, 2, 4])
def test_prefixes_of_every_layer_are_trained(tiny_model, adapter_model, level):
    """PEFT's prefix tuning puts trained keys and values into a cache, which converted layers fold."""
    model = adapter_model(tiny_model("llama"), level=level)
    model = get_peft_model(
        model.merge_and_unload().double() if level else model.unload().double(),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    )
    prefix = model.eval().prompt_encoder["default"].embedding
    prefix.weight = torch.nn.Parameter(torch.randn_like(prefix.weight, dtype=torch.float64))
    mask = torch.ones_like(TEXT)
    mask[:, :4] = 0
    direction = torch.randn(1, 30, 97, dtype=torch.float64)

    def score():
        return (model(TEXT, attention_mask=mask).logits * direction).sum()

    (gradient,) = torch.autograd.grad(score(), prefix.weight)
    assert gradient.view(5, 4, -1).abs().amax((0, 2)).min() > 1e-3, "each of the four layers"
    assert slope(score, prefix.weight) == pytest.approx(1, abs=2e-3)
