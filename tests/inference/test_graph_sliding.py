"""Recorded steps of bases whose layers, or some of them, see a sliding window alone."""

import pytest
import torch
from captured_texts import IDS, MASK, check_captured_text, rising, rising_texts
from tiny import SIZES, tiny_model_of
from transformers import AutoConfig, AutoModelForCausalLM

import dsla_hf.inference.graph
from dsla_hf.compat.attributes import attention_implementation
from dsla_hf.core.cache import RingStaticLayer, VisibleStaticLayer
from dsla_hf.inference.decode_attention import ATTENTION_FUNCTION
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.models.trial.checks import layer_order
from dsla_hf.models.trial.small_models import make_uneven

pytestmark = pytest.mark.usefixtures("small_views")

WINDOW = 12  # IDS is as long: texts pass it with the first token
KINDS = {
    "gemma2": {},
    "gemma3_text": {},
    "mistral": {"sliding_window": WINDOW},
    "olmo3": {},
    "cohere2": {},
    "exaone4": {},
    "cwm": {},
    "gpt_oss": {},
    "gemma4_text": {},  # whose layers have heads of different sizes, and not as many
}
IN_DEPTH = ("gemma2", "gemma3_text", "mistral", "gemma4_text")
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=[kind if kind in IN_DEPTH else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def kind(request):
    return request.param


def converted(adapter_model, kind, **config):
    base = tiny_model_of(kind, uneven=True, **KINDS[kind])
    return adapter_model(base, **{"conversion_order": layer_order(base), **config}).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_text_is_that_of_generate_and_the_next_one_uses_the_same_graphs(kind, adapter_model, recorder, padded):
    model = converted(adapter_model, kind, level=0)
    for decoder, _, _ in rising_texts(model, recorder, padded, **OPTIONS):
        assert decoder.workspace.windows


@pytest.fixture
def by_length(monkeypatch):
    """Attention takes lengths and windows in place of masks, as on a GPU."""

    def can(model):
        return attention_implementation(model.config) in ("sdpa", ATTENTION_FUNCTION)

    monkeypatch.setattr(dsla_hf.inference.graph, "can_attend_where_cached", can)
    monkeypatch.setattr(dsla_hf.inference.graph, "uses_triton", lambda *tensors, quietly=False: True)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_that_is_told_the_window_gives_the_same_text(kind, adapter_model, recorder, by_length, padded):
    model = converted(adapter_model, kind, level=0)
    options = {"attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": 30, "level_policy": rising, **OPTIONS}
    expected = model.generate(IDS, **options)
    decoder = recorder.decoder_of(model)
    assert torch.equal(decoder.generate(IDS, **options), expected)
    space, by_length = decoder.workspace, model.config._attn_implementation == "sdpa"
    assert space.by_length == by_length
    if by_length and kind != "gemma4_text":  # whose heads differ in size
        assert all(type(space.softmax[i]) is RingStaticLayer and space.softmax[i].keys.shape[2] == WINDOW for i in space.windows)


@pytest.mark.parametrize("by", ["masks", "lengths"])
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_levels_of_heads_hybrids_and_bases_alone(kind, adapter_model, recorder, by, request):
    if by == "lengths":
        request.getfixturevalue("by_length")
    base = tiny_model_of(kind, uneven=True, **KINDS[kind])
    plain = base.generate(IDS, max_new_tokens=20, **OPTIONS)
    assert torch.equal(recorder.decoder_of(base).generate(IDS, max_new_tokens=20, **OPTIONS), plain)
    order = [(0, 1), (1, 0), (2, 0), (1, 1), (3, 0), (2, 1), (0, 0), (3, 1)]
    model = adapter_model(base, conversion_unit="head", conversion_order=order, level=3).requires_grad_(False)
    expected = model.generate(IDS, max_new_tokens=20, **OPTIONS)
    assert not torch.equal(expected, plain)
    assert torch.equal(recorder.decoder_of(model).generate(IDS, max_new_tokens=20, **OPTIONS), expected)
    hybrid = model.merge_and_unload().eval()
    assert torch.equal(recorder.decoder_of(hybrid).generate(IDS, max_new_tokens=20, **OPTIONS), expected)


def test_bases_alone_whose_layers_have_heads_of_their_own_number_and_size(recorder):
    sizes = {"v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 2, "mlp_layer_types": ["dense"] * 4}
    config = AutoConfig.for_model("mimo_v2_flash", **SIZES, **sizes, **kinds, sliding_window=WINDOW)
    model = make_uneven(AutoModelForCausalLM.from_config(config).eval())
    expected = model.generate(IDS, attention_mask=MASK, max_new_tokens=20, **OPTIONS)
    decoder = recorder.decoder_of(model)
    for _ in range(2):
        assert torch.equal(decoder.generate(IDS, attention_mask=MASK, max_new_tokens=20, **OPTIONS), expected)


@pytest.mark.parametrize("by", ["masks", "lengths"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral"])
def test_a_text_goes_on_and_a_prompt_is_read_in_pieces(kind, adapter_model, recorder, padded, by, request):
    if by == "lengths":
        request.getfixturevalue("by_length")
    model = converted(adapter_model, kind, level=2)
    ids, mask = IDS.repeat(1, 3), MASK
    mask = torch.cat([MASK if padded else torch.ones_like(MASK), torch.ones_like(IDS.repeat(1, 2))], 1)
    options = {"return_dict_in_generate": True, "prefill_chunk_size": 5, **OPTIONS}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=24, **OPTIONS)
    decoder = recorder.decoder_of(model, max_length=70)
    decoder.prepare([2], max_length=70, rows=2, padded=padded)
    first = decoder.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    longer = torch.cat([mask, torch.ones(2, 10, dtype=torch.long)], 1)
    cache = first.past_key_values
    again = decoder.generate(first.sequences, attention_mask=longer, past_key_values=cache, max_new_tokens=14, **options)
    assert torch.equal(again.sequences, expected)


def test_pieces_of_prompts_are_shown_what_their_tokens_see(tiny_model):
    layer = VisibleStaticLayer(40, window=WINDOW)
    k = v = torch.randn(1, 2, 20, 4)
    layer.visible, layer.past = 20, 0
    assert layer.update(k, v)[0].shape[2] == 20
    layer.visible, layer.past = 25, 20
    assert layer.get_mask_sizes(5) == (16, 9)  # the first new token has 11 before it
    assert torch.equal(layer.update(k[:, :, :5], v[:, :, :5])[0], torch.cat([k[:, :, 9:], k[:, :, :5]], 2))


@pytest.mark.parametrize("kind, by", [("gemma2", "masks"), ("mistral", "masks"), ("gemma3_text", "lengths")])
def test_drafts_give_the_text_of_the_checking_level(kind, adapter_model, recorder, by, request):
    if by == "lengths":
        request.getfixturevalue("by_length")
    model = converted(adapter_model, kind, level=1)
    expected = model.generate(IDS[:1], max_new_tokens=30, **OPTIONS)
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=3)
    for _ in range(2):
        assert torch.equal(decoder.generate(IDS[:1], max_new_tokens=30, **OPTIONS), expected)


def test_drafts_behind_a_raise_know_where_states_of_sliding_layers_begin(adapter_model, recorder):
    """With the first token that such a layer still has, from which places in its window are counted."""
    model = converted(adapter_model, "gemma3_text", level=0, conversion_order=[2, 0, 3, 1], states=False)
    ids, how = torch.randint(3, 97, (1, 40)), {"return_dict_in_generate": True, **OPTIONS}
    first = model.generate(ids, max_new_tokens=8, **how)
    decoder = recorder.decoder_of(model, draft_level=3, draft_tokens=2, max_length=80)
    drafted = decoder.generate(ids, max_new_tokens=8, **how)
    model.set_level(2)
    expected = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=24, **OPTIONS)
    found = decoder.generate(first.sequences, past_key_values=drafted.past_key_values, max_new_tokens=24, **OPTIONS)
    assert torch.equal(found, expected)


def test_a_recorded_step_never_waits_for_a_value(kind, adapter_model, watched_recording):
    model = converted(adapter_model, kind, level=2)
    options = {"attention_mask": MASK, "max_new_tokens": 24, **OPTIONS}
    expected = model.generate(IDS, **options)
    assert torch.equal(GraphDecoder(model, record=watched_recording).generate(IDS, **options), expected)


def test_a_step_in_rings_never_waits_for_a_value_either(adapter_model, watched_recording, by_length):
    model = converted(adapter_model, "gemma3_text", level=0)
    options = {"attention_mask": MASK, "max_new_tokens": 24, **OPTIONS}
    expected = model.generate(IDS, **options)
    assert torch.equal(GraphDecoder(model, record=watched_recording).generate(IDS, **options), expected)


def test_keys_and_values_of_raised_layers_are_freed_if_asked(adapter_model, recorder, by_length):
    model = converted(adapter_model, "gemma3_text", level=0)
    options = {"max_new_tokens": 30, "level_policy": rising, **OPTIONS}
    expected = model.generate(IDS, **options)
    decoder = recorder.decoder_of(model, keep=False)
    assert torch.equal(decoder.generate(IDS, **options), expected) and not decoder.workspace.softmax


def test_another_attention_is_noticed(adapter_model, recorder, by_length):
    """Rings are in no order that masks know."""
    model = converted(adapter_model, "gemma3_text", level=2)
    decoder = recorder.decoder_of(model, max_length=60)
    first = decoder.generate(IDS, max_new_tokens=10, return_dict_in_generate=True, **OPTIONS)
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention implementation has changed within a text"):
        decoder.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2, **OPTIONS)
    expected = model.generate(IDS, max_new_tokens=20, **OPTIONS)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=20, **OPTIONS), expected)


def test_a_draft_that_begins_within_a_text_is_noticed(adapter_model, recorder, by_length):
    """Drafts have no rings, and a text of a base without sliding layers may go on with or without them."""
    model = converted(adapter_model, "gemma3_text", level=1)
    decoder = recorder.decoder_of(model, max_length=60)
    first = decoder.generate(IDS[:1], max_new_tokens=10, return_dict_in_generate=True, **OPTIONS)
    decoder.draft_level = 3
    goes_on = {"past_key_values": first.past_key_values, "max_new_tokens": 2, **OPTIONS}
    with pytest.raises(ValueError, match="draft_level has changed within a text"):
        decoder.generate(first.sequences, **goes_on)
    decoder.draft_level = None
    expected = model.generate(IDS[:1], max_new_tokens=12, **OPTIONS)
    assert torch.equal(decoder.generate(first.sequences, **goes_on), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral"])
def test_captured_graphs_give_the_text_of_generate(kind, adapter_model, padded):
    check_captured_text(converted(adapter_model, kind, level=0).cuda(), padded=padded, highest=4)
