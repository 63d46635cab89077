"""Decoding by replay where levels count heads: the text of `generate`, caches and weights at addresses that stay."""

import copy
import re

import pytest
import torch
from captured_texts import IDS, MASK, check_captured_text
from head_layers import ORDER, assert_close, kinds

from dsla_hf import LevelProcessor, cache_bytes
from dsla_hf.core.partial_cache import PartialCacheLayer
from dsla_hf.inference.fusion import fused
from dsla_hf.inference.graph import GraphDecoder, PlainRecording, Workspace, includes

pytestmark = pytest.mark.usefixtures("small_views")


def options_of(padded, tokens=30):
    return {"attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": tokens, "do_sample": False}


@pytest.mark.parametrize(
    "kind, level, window_size, padded",
    [
        ("llama", 1, 8, False),
        ("llama", 5, 8, True),
        ("llama", 6, 0, True),
        ("qwen3", 3, 8, False),
        ("phi3", 3, 8, True),
        ("olmo2", 5, 8, False),
    ],
)
def test_the_text_is_that_of_generate(head_model, recorder, kind, level, window_size, padded):
    model, options = head_model(kind, level=level, window_size=window_size), options_of(padded)
    expected = model.generate(IDS, **options)
    decoder = recorder.decoder_of(model)
    assert decoder.obstacle(**options) is None
    for _ in range(2):
        assert torch.equal(decoder.generate(IDS, **options), expected)
    assert recorder.recorded == 3, "views of 16, 32 and all places"
    assert "PartialCacheLayer" in kinds(decoder.workspace.cache)


def rising(stats):
    """From none to some heads of a layer, to more of the same, to all."""
    return 0 if stats.tokens < 16 else 1 if stats.tokens < 22 else 4 if stats.tokens < 28 else 7 if stats.tokens < 34 else 8


@pytest.mark.parametrize("padded, keep", [(True, True), (False, False)])
def test_heads_go_over_in_mid_text_and_the_next_text_uses_the_same_graphs(head_model, recorder, padded, keep):
    """Of layers of four KV heads, so that one is converted in part at several levels, out of the order of their numbers."""
    order = [[1, 2], [1, 0], [3, 1], [0, 3], [1, 3], [0, 0], [2, 2], [1, 1]]
    model = head_model(base={"num_key_value_heads": 4}, conversion_order=order, level=0)
    options = {**options_of(padded), "return_dict_in_generate": True}
    expected = model.generate(IDS, level_policy=rising, **options)
    decoder = recorder.decoder_of(model, keep=keep)
    for number in range(3):
        processor = LevelProcessor(model, rising)
        found = decoder.generate(IDS, level_policy=processor, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert [level for _, level in processor.history] == [0, 1, 4, 7, 8]
        assert kinds(found.past_key_values) == ["PartialCacheLayer", "StaticDSLACacheLayer", "PartialCacheLayer", "PartialCacheLayer"]
        if number == 1:  # a level that sees a size for one step is recorded in the second text
            recorded = recorder.recorded
    assert (recorder.recorded == recorded) == keep
    space = decoder.workspace
    if not keep:
        assert cache_bytes(space.cache) == sum(layer.memory_bytes() for layer in space.cache.layers)
        assert {index: layer.num_heads for index, layer in space.softmax.items()} == {0: 2, 2: 3, 3: 3}


def test_all_levels_share_the_memory_of_the_lowest(head_model, recorder):
    order = [[1, 2], [1, 0], [1, 3]]
    model = head_model(base={"num_key_value_heads": 4}, conversion_order=order, level=0)
    decoder = recorder.decoder_of(model, max_length=40)
    places = []
    for level in (0, 1, 2, 3):
        model.set_level(level)
        decoder.generate(IDS, **options_of(False, 8))
        layer = decoder.workspace.cache.layers[1]
        places.append((layer.keys.shape[1], layer.keys.data_ptr()))
    per_head = layer.keys.stride(1) * layer.keys.element_size()
    assert places == [(4 - level, places[0][1] + level * per_head) for level in range(4)]
    assert layer.kept == (1,) and layer.heads == (2, 0, 3)


def test_a_text_that_keeps_more_heads_than_those_before_makes_room(head_model, recorder):
    """At lower and lower levels, and back: what was recorded over fewer heads is recorded anew, once."""
    model = head_model(base={"num_key_value_heads": 4}, conversion_order=[[1, 2], [1, 0], [1, 3], [0, 1]], level=3)
    decoder, options = recorder.decoder_of(model), options_of(True, 12)
    texts, counts = {}, []
    for level in (3, 1, 0, 3, 1, 0):
        model.set_level(level)
        if level not in texts:
            texts[level] = model.generate(IDS, **options)
        assert torch.equal(decoder.generate(IDS, **options), texts[level])
        counts.append(recorder.recorded)
    assert counts[3] - counts[2] and counts[4] - counts[3], "recorded anew"
    assert counts[5] == counts[4]
    for level in (3, 1, 0):
        model.set_level(level)
        assert torch.equal(decoder.generate(IDS, **options), texts[level])
    assert recorder.recorded == counts[5]


def test_weights_that_change_are_read_by_what_was_recorded(head_model, recorder):
    """In place, by another training, or because they are others."""
    model = head_model(level=3)
    decoder, options = recorder.decoder_of(model), options_of(False, 12)
    decoder.generate(IDS, **options)
    recorded = recorder.recorded
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.mul_(1.3)
    assert torch.equal(decoder.generate(IDS, **options), model.generate(IDS, **options)) and recorder.recorded == recorded
    model.train()
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert model.base_model.model.model.layers[2].self_attn._ordered is None, "training has the memory"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    model.eval()
    assert torch.equal(decoder.generate(IDS, **options), model.generate(IDS, **options)) and recorder.recorded > recorded
    model.base_model.set_conversion_order([*reversed(ORDER[:3]), *ORDER[3:]])
    assert torch.equal(decoder.generate(IDS, **options), model.generate(IDS, **options))


def test_a_text_goes_on_from_the_cache_that_was_returned(head_model, recorder):
    model = head_model(level=1)
    decoder = recorder.decoder_of(model, max_length=80)

    def run(generate):
        model.set_level(1)
        first = generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
        model.set_level(6)
        mask = torch.cat([MASK, torch.ones(2, first.sequences.shape[1] - MASK.shape[1], dtype=MASK.dtype)], 1)
        cache = first.past_key_values
        return generate(input_ids=first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False)

    assert torch.equal(run(decoder.generate), run(model.generate))
    cache = decoder.workspace.cache
    model.set_level(2)
    with pytest.raises(RuntimeError, match="level was lowered"):
        decoder.generate(input_ids=torch.cat([IDS] * 4, 1), past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_prepared_levels_need_no_recording_in_the_text(head_model, recorder, monkeypatch):
    model = head_model(level=1)
    decoder = recorder.decoder_of(model)
    decoder.prepare([0, 3, 6], max_length=40, rows=2, padded=True)
    assert model.get_level() == 1 and recorder.recorded == 3
    options = {**options_of(True, 20), "level_policy": lambda stats: 0 if stats.tokens < 18 else 3 if stats.tokens < 25 else 6}
    monkeypatch.setattr(Workspace, "view", lambda self: self.length)  # as with attention that knows lengths
    found = decoder.generate(IDS, **options)
    assert recorder.recorded == 3 and torch.equal(found, model.generate(IDS, **options))


def test_hybrids_with_layers_in_part(head_model, recorder):
    model, options = head_model(level=3), options_of(True)
    hybrid = copy.deepcopy(model).merge_and_unload().eval()
    expected = hybrid.generate(IDS, **options)
    decoder = recorder.decoder_of(hybrid)
    for _ in range(2):
        assert torch.equal(decoder.generate(IDS, **options), expected)
    assert recorder.recorded == 3


def test_where_a_level_picks_weights_generate_runs_as_usual(head_model):
    model = head_model(level=3, trained_projections=["q_proj", "k_proj", "v_proj", "o_proj"])
    decoder = GraphDecoder(model, record=PlainRecording)
    assert re.search(r"levels count heads, and the weights of layer 0 .*: k_proj is trained, too", decoder.obstacle())
    assert torch.equal(decoder.generate(IDS, **options_of(False, 5)), model.generate(IDS, **options_of(False, 5)))


def test_kernels_read_kept_heads_as_far_as_the_cache_is_filled(head_model, recorder, interpreted_kernels, monkeypatch):
    model = head_model(level=1, base={"num_hidden_layers": 2, "num_key_value_heads": 4}, conversion_order=[[1, 2], [1, 0], [0, 1], [1, 3]])
    options = {"max_new_tokens": 7, "do_sample": False, "level_policy": lambda stats: 1 if stats.tokens < 15 else 3}
    decoder = recorder.decoder_of(model, max_length=40)
    found = decoder.generate(IDS[:1], **options)
    monkeypatch.undo()
    assert torch.equal(found, model.generate(IDS[:1], **options))
    assert recorder.recorded == 2, "one a level, for every length"


def test_a_recorded_step_never_waits_for_a_value(head_model, watched_recording):
    model, options = head_model(level=5), options_of(True)
    expected = model.generate(IDS, **options)
    assert torch.equal(GraphDecoder(model, record=watched_recording).generate(IDS, **options), expected)


def test_queries_keys_and_values_of_a_layer_in_part_are_one_launch(head_model, monkeypatch):
    from dsla_hf.inference import fusion

    model, launches = head_model(level=3), []
    ids = IDS[:1, :1]
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(fusion, "takes_few_rows", lambda x, *weights: all(weight.is_contiguous() for weight in weights))
        monkeypatch.setattr(
            fusion,
            "linears",
            lambda x, weights, biases=None, overlap=False: (
                launches.append(len(weights)),
                [torch.nn.functional.linear(x, weight) for weight in weights],
            )[1],
        )
        monkeypatch.setattr(fusion, "_gated_forward", lambda module, form, otherwise, *how: otherwise)
        with fused(model, lambda function: function):
            found = model(ids).logits
        assert not any("forward" in x.__dict__ for x in model.model.model.layers[2].self_attn.dsla_attention((0,)).modules())
    assert_close(found, expected, 1e-5)
    assert launches.count(3) == 4, "one a layer, converted or not"


def test_what_includes_what():
    part, more = ((1,), (0, 2)), ((2, 1), (0,))
    assert includes(more, part) and includes(True, more) and includes(part, False) and includes(part, part)
    assert not includes(part, more) and not includes(more, True) and not includes(False, part)
    assert not includes(((0,), (1, 2)), part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_captured_graphs_give_the_text_of_generate(head_model, padded):
    model = head_model(base={"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4}, level=0).cuda()
    decoder = check_captured_text(model, padded, highest=6)
    assert any(isinstance(layer, PartialCacheLayer) for layer in decoder.workspace.cache.layers)
