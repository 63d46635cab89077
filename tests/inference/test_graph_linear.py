"""Recorded steps of bases some of whose layers are linear already: their states are changed in place, as transformers does it."""

import pytest
import torch
from captured_texts import IDS, MASK, check_captured_text, rising_texts
from tiny import tiny_model_of

from dsla_hf import cache_bytes
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.models.trial.checks import HEADS, layer_order

pytestmark = pytest.mark.usefixtures("small_views")

# The last has a state-space model beside attention in every layer.
KINDS = ("qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "nemotron_h", "olmo_hybrid", "falcon_h1")
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def converted(adapter_model, kind, **config):
    base = tiny_model_of(kind, uneven=True)
    return adapter_model(base, **{"conversion_order": layer_order(base), **config}).requires_grad_(False)


@pytest.mark.parametrize("padded", [False, True])
def test_the_text_is_that_of_generate_and_the_next_one_uses_the_same_graphs(kind, adapter_model, recorder, padded):
    """A level is raised twice in mid-text; states of linear layers stay where they are."""
    model = converted(adapter_model, kind, level=0)
    for _, found, expected in rising_texts(model, recorder, padded, **OPTIONS):
        assert cache_bytes(found.past_key_values) == cache_bytes(expected.past_key_values)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_levels_of_heads_hybrids_and_bases_alone(kind, adapter_model, recorder):
    base = tiny_model_of(kind, uneven=True)
    order = [(layer_order(base)[place], head) for place, head in HEADS]
    plain = base.generate(IDS, max_new_tokens=20, **OPTIONS)
    assert torch.equal(recorder.decoder_of(base).generate(IDS, max_new_tokens=20, **OPTIONS), plain)
    model = adapter_model(base, conversion_unit="head", conversion_order=order, level=3).requires_grad_(False)
    expected = model.generate(IDS, max_new_tokens=20, **OPTIONS)
    assert not torch.equal(expected, plain)
    assert torch.equal(recorder.decoder_of(model).generate(IDS, max_new_tokens=20, **OPTIONS), expected)
    hybrid = model.merge_and_unload().eval()
    assert torch.equal(recorder.decoder_of(hybrid).generate(IDS, max_new_tokens=20, **OPTIONS), expected)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "granitemoehybrid", "falcon_h1"])
def test_a_text_goes_on_and_a_prompt_is_read_in_pieces(kind, adapter_model, recorder):
    model = converted(adapter_model, kind, level=2)
    options = {"return_dict_in_generate": True, "prefill_chunk_size": 5, **OPTIONS}
    expected = model.generate(IDS, max_new_tokens=24, **{**options, "return_dict_in_generate": False})
    decoder = recorder.decoder_of(model, max_length=60)
    decoder.prepare([2], max_length=60, rows=2)
    first = decoder.generate(IDS, max_new_tokens=10, **options)
    again = decoder.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=14, **options)
    assert torch.equal(again.sequences, expected)


def test_a_recorded_step_never_waits_for_a_value(kind, adapter_model, watched_recording):
    model = converted(adapter_model, kind, level=2)
    options = {"attention_mask": MASK, "max_new_tokens": 24, **OPTIONS}
    expected = model.generate(IDS, **options)
    assert torch.equal(GraphDecoder(model, record=watched_recording).generate(IDS, **options), expected)


def test_drafts_are_refused(adapter_model, recorder):
    model = converted(adapter_model, "lfm2", level=2)
    with pytest.raises(ValueError, match="draft_level=4: this base has linear layers, which cannot take guesses back"):
        recorder.decoder_of(model, draft_level=4).generate(IDS[:1], max_new_tokens=4, **OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_captured_graphs_give_the_text_of_generate(kind, adapter_model):
    check_captured_text(converted(adapter_model, kind, level=0).cuda(), padded=True, highest=4)
