"""Which base an adapter belongs to: same weights, rounded, quantised, tuned, another checkpoint."""

import copy
import json
import math
import re
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model

from dsla_hf import DSLAConfig
from dsla_hf.models.adapter import DSLALayer
from dsla_hf.models.fingerprint import DIRECTIONS, _figures, distance, fingerprint_of, same_base

IDS = torch.randint(3, 97, (1, 29), generator=torch.Generator().manual_seed(0))
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)


def attention_of(model):
    return {i: layer.self_attn for i, layer in enumerate(model.model.layers)}


def nf4(weight):
    blocks = weight.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize((blocks / scale).contiguous(), (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[nearest] * scale).reshape(weight.shape).to(weight.dtype)


def steps(bits):
    def quantise(weight):
        blocks = weight.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((blocks / scale).round() * scale).reshape(weight.shape)

    return quantise


def tuned(relative, rank=4):
    def tune(weight):
        change = torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
        return weight + change * (relative * weight.norm() / change.norm())

    return tune


def pruned(weight):
    return weight * (weight.abs() > weight.abs().median())


@torch.no_grad()
def changed(base, change, parts=("q_proj", "k_proj", "v_proj", "o_proj"), layers=range(4)):
    """The base with `change` applied to some of its weights, in place."""
    for i in layers:
        for part in parts:
            parameter = base.model.layers[i].self_attn.get_submodule(part).weight
            parameter.copy_(change(parameter))
    return base


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama", hidden_size=64)


@pytest.fixture
def saved(base, adapter_model, tmp_path):
    adapter_model(copy.deepcopy(base)).save_pretrained(tmp_path)
    return tmp_path


def loaded(base, folder):
    """What loading says: the adapter's model and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    return model, [str(entry.message) for entry in caught if "DSLA adapter" in str(entry.message)]


# --- the figures ------------------------------------------------------------------------------------------------


def test_figures_are_those_of_all_releases():
    """Files hold them: neither signs nor order may change."""
    matrix = _figures("3.q_proj.weight", torch.arange(12.0).reshape(3, 4) / 8)
    assert matrix[:DIRECTIONS] == [8.25, -1.5, -0.25, -0.5, 4.5, 5.25, -0.75, -8.25]
    assert matrix[DIRECTIONS] == pytest.approx(math.sqrt(506) / 8)


@pytest.mark.parametrize("relative", [1e-3, 0.02, 0.3])
def test_distance_is_that_of_the_weights(base, relative):
    before = copy.deepcopy(base)
    changed(base, tuned(relative))
    off = distance(fingerprint_of(attention_of(before)), fingerprint_of(attention_of(base)))
    assert 0.75 * relative < off.of_kind < 1.5 * relative and off.of_kind < off.of_one < 2.5 * relative
    assert off.kind in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight") and off.kind in off.one


def test_dtype_pieces_and_layout_do_not_matter():
    weight = torch.randn(1100, 300).bfloat16()
    expected = _figures("w", weight)
    for same in (weight.float(), weight.double(), weight.T.contiguous().T):
        assert _figures("w", same) == pytest.approx(expected, rel=1e-12)
    pieces = torch.tensor(_figures("w", torch.cat([weight[:500], torch.zeros(600, 300)])))
    rest = torch.tensor(_figures("w", torch.cat([torch.zeros(500, 300), weight[500:]])))
    torch.testing.assert_close((pieces + rest)[:DIRECTIONS], torch.tensor(expected)[:DIRECTIONS])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt_oss"])
def test_every_parameter_of_attention_counts(tiny_model, kind):
    base = tiny_model(kind)
    before = fingerprint_of(attention_of(base))
    attention = base.model.layers[1].self_attn
    names = [name for name, _ in attention.named_parameters()]
    assert before["weights"] == sorted(names)
    for name in names:
        parameter = attention.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
        off = distance(before, fingerprint_of(attention_of(base)))
        assert off.one == f"layers.1.{name}" and 0.005 < off.of_one < 0.8, "also of zeros, as fresh biases are"
        with torch.no_grad():
            parameter.copy_(kept)


def test_offloaded_weights_are_brought_in(base):
    expected = fingerprint_of(attention_of(base))
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert fingerprint_of(attention_of(base)) == expected


def test_a_second_adapter_sees_the_base_below_the_first(base, adapter_model):
    model = adapter_model(base)
    model.add_adapter("b", DSLAConfig(conversion_order=[2, 0, 3, 1], window_size=8))
    assert model.peft_config["b"].base_fingerprint == model.peft_config["default"].base_fingerprint


# --- loading over a base ----------------------------------------------------------------------------------------

SILENT, WARNS, COPY, REFUSED = "silent", r"differs a little .* differs by [\d.]+%", "looks like a copy in a few bits", "other weights"


@pytest.mark.parametrize(
    "change, dtype, expected",
    [
        (None, torch.bfloat16, SILENT),
        (None, torch.float16, SILENT),
        (None, torch.float64, SILENT),
        (lambda weight: weight.bfloat16().float(), torch.float32, SILENT),
        (tuned(1e-4), torch.float32, WARNS),
        (tuned(0.01), torch.float32, WARNS),
        (tuned(0.01), torch.bfloat16, WARNS),
        (steps(8), torch.float32, WARNS),
        (nf4, torch.float32, COPY),
        (nf4, torch.bfloat16, COPY),
        (steps(4), torch.float32, COPY),
        (steps(3), torch.float32, COPY),
        (tuned(0.1), torch.float32, REFUSED),
        (lambda weight: tuned(0.1)(nf4(weight)), torch.float32, REFUSED),
        (lambda weight: nf4(tuned(0.3)(weight)), torch.float32, REFUSED),
        (pruned, torch.float32, REFUSED),
        (lambda weight: weight * torch.nan, torch.float32, REFUSED),
        (torch.neg, torch.float32, REFUSED),
        (lambda weight: weight.flip(0), torch.float32, REFUSED),
        (lambda weight: 0.2 * torch.randn_like(weight), torch.float32, REFUSED),
    ],
)
def test_what_a_base_is_taken_for(base, saved, change, dtype, expected):
    other = base if change is None else changed(base, change)
    other = other.to(dtype)
    if expected == REFUSED:
        plain = other(IDS).logits
        with pytest.raises(ValueError, match=r"other weights.*differs by (\d+|inf)%.*Load the base .*remove base_fingerprint"):
            PeftModel.from_pretrained(other, saved)
        assert not [module for module in other.modules() if isinstance(module, DSLALayer)]
        assert torch.equal(other(IDS).logits.nan_to_num(), plain.nan_to_num())
        return
    told = loaded(other, saved)[1]
    if expected == SILENT:
        assert not told
    else:
        (message,) = told
        assert re.search(expected, message), message


def test_an_adapter_made_over_rounded_weights_knows_what_they_were(base, adapter_model, tmp_path):
    adapter_model(copy.deepcopy(base).bfloat16()).save_pretrained(tmp_path)
    assert not loaded(copy.deepcopy(base), tmp_path)[1]
    (message,) = loaded(changed(base, tuned(1e-3)), tmp_path)[1]
    assert re.search(WARNS, message)


def lora_merged(base, targets):
    model = get_peft_model(base, LoraConfig(target_modules=targets, r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.merge_and_unload()


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["q_proj"], ["o_proj"], ["k_proj"], ["v_proj"]])
def test_a_base_with_a_merged_lora_in_its_attention_is_refused(base, saved, targets):
    with pytest.raises(ValueError, match=rf"{targets[0]}.*differs by|o_proj.*differs by") as caught:
        PeftModel.from_pretrained(lora_merged(base, targets), saved)
    assert "converted layers lose what was tuned in q_proj, o_proj" in str(caught.value)


def test_what_was_tuned_outside_attention_is_kept_at_every_level(base, saved):
    plain = PeftModel.from_pretrained(copy.deepcopy(base), saved).eval()
    model, told = loaded(lora_merged(base, ["up_proj", "down_proj"]), saved)
    assert not told
    for level in (0, 2, 4):
        plain.set_level(level)
        model.set_level(level)
        with torch.no_grad():
            assert (model.eval()(IDS).logits - plain(IDS).logits).abs().max() > 0.1


def test_one_tuned_layer_is_told_and_one_that_is_much_so_refused(base, saved):
    (message,) = loaded(changed(copy.deepcopy(base), tuned(0.05), ["q_proj"], [3]), saved)[1]
    assert "most in layers.3.q_proj.weight" in message
    with pytest.raises(ValueError, match=r"most in layers\.3\.o_proj\.weight \(\d+%\)"):
        PeftModel.from_pretrained(changed(base, tuned(0.4), ["o_proj"], [3]), saved)


def test_layers_outside_the_plan_do_not_count(base, adapter_model, tmp_path):
    adapter_model(copy.deepcopy(base), conversion_order=[2, 0]).save_pretrained(tmp_path)
    assert not loaded(changed(base, torch.neg, layers=[1, 3]), tmp_path)[1]


def test_tuned_norms_of_queries_are_refused(tiny_model, adapter_model, tmp_path):
    base = tiny_model("qwen3")
    adapter_model(copy.deepcopy(base)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_norm\.weight differs by"):
        PeftModel.from_pretrained(changed(base, lambda weight: 1.3 * weight, ["q_norm"]), tmp_path)


def test_transformers_own_loading_checks_as_well(base, saved):
    with pytest.raises(ValueError, match="other weights"):
        changed(base, torch.neg).load_adapter(str(saved))


def test_an_adapter_made_over_a_copy_in_4_bits_runs_over_the_original(base, adapter_model, tmp_path):
    adapter_model(changed(copy.deepcopy(base), nf4)).save_pretrained(tmp_path)
    assert not loaded(changed(copy.deepcopy(base), nf4), tmp_path)[1]
    (message,) = loaded(copy.deepcopy(base), tmp_path)[1]
    assert "made over (see its model card) looks like a copy in a few bits of this base" in message
    with pytest.raises(ValueError, match="other weights"):
        PeftModel.from_pretrained(changed(base, tuned(0.3)), tmp_path)


def test_a_directory_is_saved_over_from_a_rounded_base_and_not_from_a_tuned_one(base, adapter_model, saved):
    adapter_model(copy.deepcopy(base).bfloat16()).save_pretrained(saved)
    with pytest.raises(ValueError, match="holds another adapter"):
        adapter_model(changed(base, tuned(0.02), ["q_proj"])).save_pretrained(saved)


# --- what a file holds ------------------------------------------------------------------------------------------


def test_a_config_is_printed_without_figures_and_stored_with_few(base, adapter_model, tmp_path):
    model = adapter_model(base)
    config = model.peft_config["default"]
    assert "base_fingerprint" not in repr(config) and len(repr(config)) < 1000
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert len(text) < 3000 and DSLAConfig.from_pretrained(tmp_path).base_fingerprint == config.base_fingerprint
    assert {len(layer) for layer in config.base_fingerprint["layers"].values()} == {192}, "of 4 weights"


def rewritten(folder, change):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", [{"0": "no base64"}, {"0": "AAAA"}, {"0": 1}, ["0"]])
def test_a_damaged_fingerprint_is_told(base, saved, adapter_model, damage):
    rewritten(saved, lambda values: values["base_fingerprint"].update(layers=damage))
    with pytest.raises(ValueError, match="base_fingerprint cannot be read"):
        PeftModel.from_pretrained(copy.deepcopy(base), saved)
    with pytest.raises(ValueError, match="holds another adapter"):
        adapter_model(base).save_pretrained(saved)


def test_fingerprints_of_earlier_releases_check_what_they_have(base, saved, adapter_model):
    """Mean magnitudes of keys and values."""
    magnitudes = {
        f"layers.{i}.{part}": getattr(attention, part).weight.abs().mean().item()
        for i, attention in attention_of(base).items()
        for part in ("k_proj", "v_proj")
    }
    rewritten(saved, lambda values: values.update(base_fingerprint=magnitudes))
    model, told = loaded(copy.deepcopy(base).bfloat16(), saved)
    assert not told and model.peft_config["default"].base_fingerprint == magnitudes
    loaded(changed(copy.deepcopy(base), torch.neg, ["q_proj"]), saved)
    with pytest.raises(ValueError, match=r"mean \|layers\.\d\.v_proj\| was .* remove base_fingerprint"):
        PeftModel.from_pretrained(changed(copy.deepcopy(base), tuned(0.5), ["v_proj"]), saved)
    adapter_model(base).save_pretrained(saved)  # nothing tells that it is another base
    assert same_base(magnitudes, None) and not same_base(magnitudes, {**magnitudes, "layers.1.k_proj": 1.0})
