"""Rotary layouts: channels that a base rotates together share a decay, so that positions may be shifted as in the base."""

import inspect
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURE_OPTIONS
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_as_glm

from dsla_hf import DSLAConfig, DualStateAttention
from dsla_hf.inference.graph import GraphDecoder, PlainRecording
from dsla_hf.models.architectures import rotary_of

PART = {"partial_rotary_factor": 0.75}  # as in Phi-4-mini: 6 of the 8 channels
BASES = {**{kind: (kind, {}) for kind in ARCHITECTURE_OPTIONS}, "phi3, a part": ("phi3", PART)}
EVERY_LAYER = {"layer_types": ["sliding_attention"] * 4}  # of Cohere 2, whose global layers do not rotate
# Bases whose channels are not pairs (i, i + K/2), in all of whose layers keys can be read from the cache.
OTHER_LAYOUTS = {"interleaved": ("cohere2", {"layer_types": ["full_attention"] * 4}), "a part": ("phi3", PART)}
LAYOUTS = [("interleaved", 12), ("interleaved", 8), ("halves", 8), ("halves", 2)]

other_layouts = pytest.mark.parametrize("kind, config", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
affected = pytest.mark.parametrize("kind, config", [("cohere2", {}), ("phi3", PART)], ids=["cohere2", "phi3, a part"])


def ids_of(batch=2, tokens=40):
    return torch.randint(2, 97, (batch, tokens))


def pairs(layer):
    """The channels that share a decay, as the layer puts them together."""
    first, second = layer.in_halves(torch.arange(layer.key_dim)).chunk(2)
    return list(zip(first.tolist(), second.tolist(), strict=True))


# --- what a base rotates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, config", BASES.values(), ids=BASES)
def test_pairs_are_those_that_the_base_rotates(kind, config, tiny_model):
    """By the base's own function: a vector along one channel is turned towards the other one of its pair."""
    base = tiny_model(kind, **config)
    embedding, modeling = base.model.rotary_emb, inspect.getmodule(type(base.model))
    options = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(embedding.forward).parameters else {}
    cos, sin = embedding(torch.zeros(1), torch.ones(1, 1, dtype=torch.long), **options)
    turned, _ = modeling.apply_rotary_pos_emb(*[torch.eye(8)[None, :, None]] * 2, cos, sin, unsqueeze_dim=1)
    layout, rotated = rotary_of(base.config, kind)
    layer = DualStateAttention(1, 1, 8, rotary_layout=layout, rotary_dim=rotated)
    together = {frozenset(row.nonzero().flatten().tolist()) for row in turned[0, :, 0]}
    still = {frozenset([channel]) for channel in range(rotated, 8)}
    assert together == {frozenset(pair) for pair in pairs(layer)[: rotated // 2]} | still
    # The fastest pair first: half-lives are spread from there.
    angles = [torch.atan2(turned[0, a, 0, b].abs(), turned[0, a, 0, a]).item() for a, b in pairs(layer)[: rotated // 2]]
    assert angles == sorted(angles, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_channel_is_in_one_pair_and_the_unrotated_are_the_last(layout):
    layer = DualStateAttention(2, 1, 12, rotary_layout=layout[0], rotary_dim=layout[1])
    found = pairs(layer)
    assert sorted(channel for pair in found for channel in pair) == list(range(12))
    assert {channel for pair in found[layout[1] // 2 :] for channel in pair} == set(range(layout[1], 12))


def test_channels_in_halves_are_left_alone():
    x = torch.randn(2, 3, 1, 12)
    assert DualStateAttention(1, 1, 12).in_halves(x) is x
    assert DualStateAttention(1, 1, 12, rotary_dim=12).in_halves(x) is x


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rotary_layout": "thirds"}, "rotary_layout must be one of.*'thirds'"),
        ({"rotary_dim": 5}, "rotary_dim must be an even number of channels, got 5"),
        ({"rotary_dim": -2}, "got -2"),
        ({"rotary_dim": 14}, "at most the 12 channels of a head, got 14"),
    ],
)
def test_layouts_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DualStateAttention(1, 1, 12, **options)


# --- positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, config", [*BASES.values(), ("cohere2", EVERY_LAYER)], ids=[*BASES, "cohere2, all layers rotate"])
def test_shifting_all_positions_changes_nothing(kind, config, tiny_model, adapter_model):
    """Layers that slide, that see everything and that do not rotate, with and without a window. Angles are fp32, as in the base."""
    ids, positions = ids_of(1, 60), torch.arange(60)[None]
    for window_size in (0, 8):
        base = tiny_model(kind, **config)
        if "num_experts_per_tok" in ARCHITECTURE_OPTIONS[kind]:
            base.set_experts_implementation("eager")  # others take no fp64
        model = adapter_model(base, window_size=window_size, half_lives=((4.0, 60.0), (2.0, 9.0)))
        with torch.no_grad():
            for name, parameter in model.double().named_parameters():
                if name.endswith("state_bias"):
                    parameter.fill_(3.0)  # states that are heard
            near, far = (model(input_ids=ids, position_ids=positions + shift, use_cache=False).logits for shift in (0, 1000))
        assert (far - near).abs().max() <= 1e-4 * near.abs().max()


@pytest.mark.parametrize("window_size", [0, 8])
def test_a_part_that_is_interleaved(window_size):
    """As GLM rotates, by its own function."""
    layer = DualStateAttention(4, 2, 12, window_size=window_size, rotary_layout="interleaved", rotary_dim=8, half_lives=((4, 40), (2, 9)))
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    q, k, v = (torch.randn(1, 50, heads, 12, dtype=torch.float64) for heads in (4, 2, 2))

    def rotated(shift):
        angles = (torch.arange(50) + shift)[:, None] * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
        angles = torch.cat([angles, angles], -1)[None]
        return layer(*rotate_as_glm(q, k, angles.cos(), angles.sin(), unsqueeze_dim=2), v)[0]

    torch.testing.assert_close(rotated(1000), rotated(0), rtol=1e-9, atol=1e-9)
    layer.rotary_layout = "halves"
    assert (rotated(1000) - rotated(0)).abs().max() > 1e-3, "positions have no effect here: the line above would prove nothing"


# --- every way through the layer --------------------------------------------------------------------------------


def in_pairs(layout, rotated, x):
    """Channels `[..., 12]` of x in halves, by their numbers."""
    still = 12 - rotated
    if layout == "interleaved":
        order = [*range(0, 12, 2), *range(1, 12, 2)]
    else:
        half, rest = rotated // 2, rotated + still // 2
        order = [*range(half), *range(rotated, rest), *range(half, rotated), *range(rest, 12)]
    return x[..., order]


def two_layers(layout, rotated, **options):
    """With the same weights: one of the layout, and one in halves."""
    options = {"sink_tokens": 3, "gate_rank": 3, "half_lives": ((4.0, 40.0), (2.0, 9.0)), **options}
    layer = DualStateAttention(4, 2, 12, 6, rotary_layout=layout, rotary_dim=rotated, **options)
    for parameter in layer.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    plain = DualStateAttention(4, 2, 12, 6, **options)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("window_size", [0, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_layout_is_another_order_of_channels(layout, window_size):
    """Whole rows, pieces, single tokens, packed texts and folds: as in halves, of channels in that order."""
    layer, plain = two_layers(*layout, window_size=window_size)
    q, k, v = (torch.randn(2, 45, *size) for size in ((4, 12), (2, 12), (2, 6)))
    q2, k2 = in_pairs(*layout, q), in_pairs(*layout, k)
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[0, :7] = False
    assert torch.equal(layer(q, k, v, padding_mask=mask)[0], plain(q2, k2, v, padding_mask=mask)[0])
    bounds = torch.tensor([0, 13, 45])
    assert torch.equal(layer(q[:1], k[:1], v[:1], cu_seqlens=bounds)[0], plain(q2[:1], k2[:1], v[:1], cu_seqlens=bounds)[0])
    state = other = None
    for a, b in ((0, 19), (19, 20), (20, 33), *((t, t + 1) for t in range(33, 45))):
        o, state = layer(q[:, a:b], k[:, a:b], v[:, a:b], padding_mask=mask[:, a:b], state=state, output_state=True)
        expected, other = plain(q2[:, a:b], k2[:, a:b], v[:, a:b], padding_mask=mask[:, a:b], state=other, output_state=True)
        assert torch.equal(o, expected)
    assert_same(state, other)
    folded, other = layer.fold(k[:, :30], v[:, :30], mask[:, :30]), plain.fold(k2[:, :30], v[:, :30], mask[:, :30])
    assert_same(folded, other)
    assert_same(layer.fold(k[:, 30:], v[:, 30:], mask[:, 30:], folded), plain.fold(k2[:, 30:], v[:, 30:], mask[:, 30:], other))


@torch.no_grad()
def test_a_layout_in_the_step_of_a_kernel(interpreted_kernels, monkeypatch):
    layer, plain = two_layers("interleaved", 8, window_size=8)
    q, k, v = (torch.randn(1, 20, *size) for size in ((4, 12), (2, 12), (2, 6)))
    state = layer.fold(k, v)
    new = [x[:, :1] for x in (q, k, v)]
    o, found = layer(*new, state=state)
    expected, other = plain(in_pairs("interleaved", 8, new[0]), in_pairs("interleaved", 8, new[1]), new[2], state=state)
    assert torch.equal(o, expected)
    assert_same(found, other)
    monkeypatch.undo()
    torch.testing.assert_close(o, layer(*new, state=state)[0], rtol=1e-4, atol=1e-5)


# --- models -----------------------------------------------------------------------------------------------------


@other_layouts
@torch.no_grad()
def test_all_ways_through_a_model_agree(kind, config, tiny_model, adapter_model):
    """Steps and the full forward; a static cache, padding and steps that are recorded; a raise in mid-text, a crop."""
    model, ids = adapter_model(tiny_model(kind, **config), level=4), ids_of()
    expected, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    cache.activate_past_recording()
    pieces = [model(ids[:, :17], past_key_values=cache).logits]
    for layer in cache.layers:
        layer.activate_past_recording()
    model(ids[:, 17:29] + 1, past_key_values=cache)  # read and forgotten
    cache.crop(-12)
    pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17, 40)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=2e-4)

    mask = torch.ones_like(ids)
    mask[0, :11] = 0

    def policy(stats):
        return 0 if stats.tokens < 44 else 2 if stats.tokens < 48 else 4

    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "level_policy": policy}
    text = model.generate(ids * mask, **options)
    assert torch.equal(model.generate(ids * mask, cache_implementation="static", **options), text)
    assert torch.equal(GraphDecoder(model, record=PlainRecording).generate(ids * mask, **options), text)
    model.set_level(4)
    alone = model(ids[:1, 11:], use_cache=False).logits
    torch.testing.assert_close(model(ids * mask, attention_mask=mask, use_cache=False).logits[:1, 11:], alone, rtol=0, atol=2e-4)


@other_layouts
@torch.no_grad()
def test_fold_of_cached_keys_is_what_the_layer_would_have_built(kind, config, tiny_model, adapter_model):
    model, ids = adapter_model(tiny_model(kind, **config), conversion_order=[0, 1, 2, 3], level=1), ids_of()
    states = []
    for first in (0, 1):
        cache = DynamicCache(config=model.config)
        for level, piece in ((first, ids[:, :33]), (1, ids[:, 33:])):
            model.set_level(level)
            model(piece, past_key_values=cache)
        states.append(cache.layers[0].state)
    for x, y in zip(*states, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# --- files ------------------------------------------------------------------------------------------------------


def as_format_1(path):
    """Make a saved adapter or hybrid one of format 1, which knows no layouts."""
    file = next(path / name for name in ("adapter_config.json", "config.json") if (path / name).exists())
    content = json.loads(file.read_text())
    entries = content if file.name == "adapter_config.json" else content["dsla_config"]
    assert entries["format_version"] == 2 and entries.pop("rotary_layout") and entries.pop("rotary_dim")
    entries["format_version"] = 1
    file.write_text(json.dumps(content))


@affected
def test_files_hold_the_layout(kind, config, tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model(kind, **config), level=2)
    expected = {"cohere2": ("interleaved", 8), "phi3": ("halves", 6)}[kind]
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (stored["rotary_layout"], stored["rotary_dim"]) == expected
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(tmp_path / "hybrid")
    stored = json.loads((tmp_path / "hybrid/config.json").read_text())["dsla_config"]
    assert (stored["rotary_layout"], stored["rotary_dim"]) == expected
    core = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").model.layers[2].self_attn.dsla
    assert (core.rotary_layout, core.rotary_dim) == expected


@affected
def test_format_1_of_a_base_whose_layout_it_did_not_heed_is_refused(kind, config, tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model(kind, **config), level=2)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for name in ("adapter", "hybrid"):
        as_format_1(tmp_path / name)
    base = tiny_model(kind, **config)
    message = f"(?s)config.json: written in format 1.*a {kind} base rotates .* distil them again"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not any("dsla" in name for name, _ in base.named_modules()), "nothing may have changed"
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match="holds another adapter"):  # nor is it taken for a state of a new one
        get_peft_model(base, DSLAConfig(conversion_order=[2, 0, 3, 1], window_size=8)).save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@torch.no_grad()
def test_format_1_of_other_bases_loads_as_before(kind, tiny_model, adapter_model, tmp_path):
    model, ids = adapter_model(tiny_model(kind), level=2), ids_of()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for name in ("adapter", "hybrid"):
        as_format_1(tmp_path / name)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, expected)
    loaded.save_pretrained(tmp_path / "adapter")  # the same adapter, in the format of today
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (stored["format_version"], stored["rotary_layout"], stored["rotary_dim"]) == (2, "halves", 8)
    hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
    assert torch.equal(hybrid(ids).logits, expected)
    assert hybrid.config.dsla_config["format_version"] == 2 and hybrid.config.dsla_config["rotary_dim"] == 8


def test_an_adapter_for_a_base_that_rotates_otherwise_is_refused(tiny_model, adapter_model, tmp_path):
    """Weights and sizes of the base are the same; only its config says how many channels rotate."""
    adapter_model(tiny_model("phi3", **PART)).save_pretrained(tmp_path)
    base = tiny_model("phi3")
    with pytest.raises(ValueError, match="rotates 6 channels of a head in the layout 'halves', and this one rotates 8"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"'interleaved', and this one .*leave rotary_layout and rotary_dim out"):
        get_peft_model(base, DSLAConfig(rotary_layout="interleaved", rotary_dim=8))


@affected
def test_a_conversion_without_its_layout_gets_that_of_the_base(kind, config, tiny_model, adapter_model):
    """A dict for a hybrid written by hand, before there is a base."""
    hybrid = adapter_model(tiny_model(kind, **config), level=2).merge_and_unload()
    values = {name: value for name, value in hybrid.config.to_dict().items() if name not in ("model_type", "architectures")}
    layout = {name: values["dsla_config"].pop(name) for name in ("rotary_layout", "rotary_dim")}
    assert layout.items() <= type(hybrid.config)(**values).dsla_config.items()
