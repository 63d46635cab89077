"""Which tokens of a call are real, read from every kind of mask that transformers hands to a decoder."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from dsla_hf.core.layout import TokenLayout, read_layout
from dsla_hf.models.before_layers import install_layout_hook, remove_layout_hook


def left_padded(tokens=9):
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :1] = 0
    return mask


def causal_mask(model, mask, implementation, cache=None, queries=None):
    """The 4-D mask that transformers builds for a model with this attention implementation."""
    model.config._attn_implementation = implementation
    embeddings = torch.zeros(mask.shape[0], queries or mask.shape[1], 32)
    return create_causal_mask(model.config, embeddings, mask, cache)


def assert_padding(layout, mask):
    assert layout.cu_seqlens is None
    assert layout.padding_mask.dtype == torch.bool
    assert torch.equal(layout.padding_mask, mask.bool())


# --- masks --------------------------------------------------------------------------------------------------------


def test_no_mask_and_masks_without_padding_are_no_layout():
    assert read_layout() == TokenLayout(None, None)
    for mask in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)):
        assert read_layout(mask) == TokenLayout(None, None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padded_masks_of_any_dtype(dtype):
    mask = left_padded()
    mask[0, 3] = 0
    assert_padding(read_layout(mask.to(dtype)), mask)


@pytest.mark.parametrize("implementation, dtype", [("sdpa", torch.bool), ("eager", torch.float32)])
def test_masks_of_transformers_are_read(tiny_model, base_kind, implementation, dtype):
    mask = left_padded()
    full = causal_mask(tiny_model(base_kind), mask, implementation)
    assert full.dtype == dtype and full.shape == (3, 1, 9, 9)
    assert_padding(read_layout(full, tokens=9), mask)
    assert_padding(read_layout({"full_attention": full, "sliding_attention": full}, tokens=9), mask)


def test_additive_masks_in_low_precision_are_read(tiny_model):
    mask = left_padded()
    full = causal_mask(tiny_model("llama"), mask, "eager")
    for dtype in (torch.bfloat16, torch.float16):
        additive = torch.zeros(full.shape, dtype=dtype).masked_fill(full != 0, torch.finfo(dtype).min)
        assert_padding(read_layout(additive, tokens=9), mask)
        assert_padding(read_layout(torch.zeros(full.shape, dtype=dtype).masked_fill(full != 0, float("-inf")), tokens=9), mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 4])
def test_masks_after_cached_tokens_cover_past_and_new(tiny_model, implementation, queries):
    model, mask = tiny_model("llama"), left_padded()
    cache = DynamicCache(config=model.config)
    past = 9 - queries
    for layer in range(4):
        cache.update(torch.zeros(3, 2, past, 8), torch.zeros(3, 2, past, 8), layer)
    layout = read_layout(causal_mask(model, mask, implementation, cache, queries), past=past, tokens=queries)
    assert_padding(layout, mask)
    assert torch.equal(layout.past_mask(past, past), mask[:, :past].bool())
    assert torch.equal(layout.new_mask(past, queries), mask[:, past:].bool())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_static_caches_reach_past_the_text_and_are_cut(tiny_model, implementation):
    model, mask = tiny_model("llama"), left_padded()
    cache = StaticCache(config=model.config, max_cache_len=20)
    full = causal_mask(model, mask, implementation, cache)
    assert full.shape == (3, 1, 9, 20)
    layout = read_layout(full, tokens=9)
    assert_padding(layout, mask)
    assert torch.equal(layout.new_mask(0, 9), mask.bool())


def test_dicts_without_full_attention_are_no_layout():
    assert read_layout({"full_attention": None}) == TokenLayout(None, None)


@pytest.mark.parametrize("mask", [torch.ones(5), torch.ones(2, 5, 5), "flex", object()], ids=["1-D", "3-D", "text", "object"])
def test_masks_of_another_kind_are_refused_by_name(mask):
    with pytest.raises(ValueError, match="attention_mask"):
        read_layout(mask)


# --- cutting ------------------------------------------------------------------------------------------------------


def test_masks_that_end_too_early_are_refused():
    layout = TokenLayout(left_padded().bool())
    assert layout.new_mask(4, 5).shape == (3, 5)
    with pytest.raises(ValueError, match="covers 9 tokens, but 5 cached and 5 new"):
        layout.new_mask(5, 5)


def test_without_padding_there_is_nothing_to_cut():
    layout = TokenLayout()
    assert layout.past_mask(7, 7) is None and layout.new_mask(7, 3) is None


# --- packed sequences ---------------------------------------------------------------------------------------------


def test_positions_that_restart_mark_packed_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
    layout = read_layout(position_ids=positions)
    assert layout.padding_mask is None
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 8]
    jump = torch.tensor([[0, 1, 7, 8]])
    assert read_layout(position_ids=jump).cu_seqlens.tolist() == [0, 2, 4], "as in transformers, any step other than one"


@pytest.mark.parametrize("positions", [[[0, 1, 2, 3]], [[7, 8, 9, 10]], [[0, 1, 2, 3], [5, 6, 7, 8]], [[4]]])
def test_positions_that_run_on_are_one_text(positions):
    assert read_layout(position_ids=torch.tensor(positions)) == TokenLayout(None, None)


def test_positions_are_not_read_where_a_mask_explains_them():
    positions = torch.tensor([[1, 1, 0, 1]])
    assert read_layout(torch.ones(1, 4), positions) == TokenLayout(None, None)
    assert_padding(read_layout(torch.tensor([[0, 0, 1, 1]]), positions), torch.tensor([[0, 0, 1, 1]]))


def test_packed_texts_in_several_rows_are_joined_into_one_and_taken_apart():
    layout = read_layout(position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]))
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6] and layout.real is None
    x = torch.arange(6.0).view(2, 3, 1)
    assert torch.equal(layout.joined(x), x.view(1, 6, 1)) and torch.equal(layout.apart(layout.joined(x), (2, 3)), x)


def test_positions_given_once_are_those_of_all_rows():
    layout = read_layout(position_ids=torch.tensor([[0, 1, 0]]), rows=2)
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 5, 6]


# --- the hook -----------------------------------------------------------------------------------------------------


def seen_layouts(model, monkeypatch):
    """The `dsla_layout` that the first decoder layer of a model gets at each call, as if it were DSLA."""
    layouts = []
    layer = model.model.layers[0]
    forward = layer.forward
    layer.self_attn.converted_part = True

    def spy(*args, dsla_layout="none", **kwargs):
        layouts.append(dsla_layout)
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", spy)
    return layouts


def test_hook_hands_the_layout_to_the_layers_once_and_can_be_removed(tiny_model, base_kind, monkeypatch):
    model, mask = tiny_model(base_kind, use_cache=False), left_padded()
    layouts = seen_layouts(model, monkeypatch)
    tokens = torch.randint(1, 97, (3, 9))
    install_layout_hook(model.model)
    install_layout_hook(model.model)
    assert len(model.model._forward_pre_hooks) == 1
    model(tokens, attention_mask=mask)
    model.model(tokens, mask)
    for layout in layouts:
        assert_padding(layout, mask)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(tokens[:1], position_ids=positions)
    model(tokens[:1], position_ids=positions, cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32))
    assert [layout.cu_seqlens.tolist() for layout in layouts[2:]] == [[0, 4, 9]] * 2
    remove_layout_hook(model.model)
    remove_layout_hook(model.model)
    model(tokens, attention_mask=mask)
    assert layouts[4:] == ["none"]


def test_hook_reads_positions_only_without_a_past(tiny_model, monkeypatch):
    model = tiny_model("llama")
    layouts = seen_layouts(model, monkeypatch)
    install_layout_hook(model.model)
    cache, tokens = DynamicCache(config=model.config), torch.randint(1, 97, (1, 6))
    for positions in ([0, 1, 2, 3], [0, 1]):  # the second call goes on, at positions of the caller's choice
        model(tokens[:, : len(positions)], past_key_values=cache, position_ids=torch.tensor([positions]))
    assert layouts == [TokenLayout(), TokenLayout()]


def test_without_dsla_layers_the_base_gets_what_it_was_given(tiny_model, monkeypatch):
    model = tiny_model("llama")
    layouts = seen_layouts(model, monkeypatch)
    model.model.layers[0].self_attn.converted_part = False
    install_layout_hook(model.model)
    tokens = torch.randint(1, 97, (1, 6))
    model(tokens, attention_mask=torch.ones(1, 1, 6, 6), position_ids=torch.tensor([[0, 1, 0, 1, 0, 1]]))
    assert layouts == ["none"]
