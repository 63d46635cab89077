"""Every supported architecture: converted, it agrees with itself in all ways through it, and with its base where it must."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURE_OPTIONS, IN_DEPTH, OTHER_ARCHITECTURE_OPTIONS, tiny_config, tiny_model_of
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dsla_hf import DSLAConfig, cache_bytes
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.architectures import (
    ARCHITECTURES,
    SHORT_WINDOW,
    SUPPORTED_BASES,
    projection,
    sliding_window_of,
    why_impossible,
    why_unsupported,
)
from dsla_hf.models.loading import check_convertible
from dsla_hf.models.trial.checks import layer_order
from dsla_hf.serving.engine.levels import check_served

ORDER = [2, 0, 3, 1]
MOST = 3  # where layers take turns, of those that slide and of those that see all some are converted, and softmax layers are left


IN_SHORT = tuple(kind for kind in SUPPORTED_BASES if kind not in IN_DEPTH)


@pytest.fixture(params=IN_DEPTH)
def kind(request):
    return request.param


@pytest.fixture
def base(tiny_model, kind):
    return tiny_model(kind).requires_grad_(False)


@pytest.fixture
def model(base, adapter_model):
    return adapter_model(base, level=4).requires_grad_(False)


def text(batch=2, tokens=40):
    return torch.randint(2, 97, (batch, tokens))


def close(found, expected, atol=2e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(1.0, expected.abs().max().item()))


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options})


def test_all_architectures_are_tested():
    assert set(ARCHITECTURE_OPTIONS) | set(OTHER_ARCHITECTURE_OPTIONS) == set(ARCHITECTURES)
    assert not set(ARCHITECTURE_OPTIONS) & set(OTHER_ARCHITECTURE_OPTIONS)


# --- in short (in full: eval/architectures.py) ------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", IN_SHORT)
def test_is_the_base_at_level_zero_and_inside_its_window_and_decodes_as_it_reads(adapter_model, kind):
    """With norms, biases and sink logits moved from where they start."""
    base, ids = tiny_model_of(kind, uneven=True), text()
    order = layer_order(base)
    expected, short = base(ids).logits, base(ids[:, :12]).logits
    fresh = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=order, window_size=16)).eval()
    close(fresh(ids[:, :12]).logits, short, atol=1e-5)
    model = adapter_model(fresh.unload(), level=MOST, conversion_order=order)
    found = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max(), "the adapter does nothing"
    cache = DynamicCache(config=model.config)
    close(torch.cat([model(part, past_key_values=cache).logits for part in ids.split([33, 1, 1, 1, 1, 1, 1, 1], 1)], 1), found)
    model.set_level(0)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [kind for kind in IN_SHORT if ARCHITECTURES[kind].rotary_layout != "halves" or ARCHITECTURES[kind].partial_rotary]
)
def test_channels_that_rotate_together_share_a_decay(adapter_model, kind):
    """Else states would change when all positions are shifted."""
    base = tiny_model_of(kind)
    base.set_experts_implementation("eager")  # others take no fp64
    model = adapter_model(base, conversion_order=layer_order(base), half_lives=((4.0, 60.0), (2.0, 9.0))).double()
    for name, parameter in model.named_parameters():
        if name.endswith("state_bias"):
            parameter.fill_(3.0)  # states that are heard
    ids, positions = text(1, 60), torch.arange(60)[None]
    near, far = (model(input_ids=ids, position_ids=positions + shift, use_cache=False).logits for shift in (0, 1000))
    close(far, near, atol=1e-4)


# --- like the base ----------------------------------------------------------------------------------------------


def test_level_zero_and_disabled_are_the_base_bit_for_bit(base, adapter_model):
    ids = text()
    expected = base(ids).logits
    model = adapter_model(base, level=4)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3), "the adapter does nothing"
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)
        model.set_level(0)
        assert torch.equal(model(ids).logits, expected)


def test_new_layers_are_the_softmax_attention_of_the_base_inside_their_window(base):
    """With nothing outside the window a fresh layer is the base's own attention: its scaling, score cap and sink logit are kept."""
    ids = text(2, 12)  # no longer than a sliding window of the base either
    expected = base(ids).logits
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=ORDER, window_size=16)).eval()
    with torch.no_grad():
        close(model(ids).logits, expected, atol=1e-5)
        cache = DynamicCache(config=base.config)
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
        close(torch.cat(steps, 1), expected, atol=1e-5)
        assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)


# --- all ways agree ---------------------------------------------------------------------------------------------


def test_token_by_token_equals_the_full_forward(model):
    model.set_level(MOST)
    ids = text()
    expected = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, :17], past_key_values=cache).logits]
    pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17, 40)]
    close(torch.cat(pieces, 1), expected)


def test_left_padded_rows_answer_as_alone(model):
    model.set_level(MOST)
    ids = text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    together = generate(model, ids * mask, mask)
    assert torch.equal(together[:1, 30:], generate(model, ids[:1, 11:])[:, 19:])
    assert torch.equal(together[1:], generate(model, ids[1:]))


def test_beams_with_a_cache_equal_beams_without(model):
    model.set_level(MOST)
    ids = text(2, 25)
    assert torch.equal(generate(model, ids, num_beams=3), generate(model, ids, num_beams=3, use_cache=False))


@pytest.mark.parametrize("level", [1, 4])
def test_static_cache_gives_the_text_of_a_dynamic_one(model, level):
    model.set_level(level)
    ids = text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    assert torch.equal(generate(model, ids * mask, mask, cache_implementation="static"), generate(model, ids * mask, mask))


def test_level_raised_twice_in_mid_text(model):
    """Raised at the same places by `generate` and by hand; and where all keys are cached, near the level from the start."""
    ids = text(1, 20)

    def policy(stats):
        return 0 if stats.tokens < 23 else 2 if stats.tokens < 28 else 4

    found = generate(model, ids, level_policy=policy, max_new_tokens=14, return_dict_in_generate=True)
    assert model.get_level() == 4 and all(isinstance(layer, DSLACacheLayer) for layer in found.past_key_values.layers)
    cache, out = DynamicCache(config=model.config), ids
    fresh = ids
    for _ in range(14):
        model.set_level(0 if out.shape[1] < 23 else 2 if out.shape[1] < 28 else 4)
        fresh = model(fresh, past_key_values=cache).logits[:, -1:].argmax(-1)
        out = torch.cat([out, fresh], 1)
    assert torch.equal(found.sequences, out)
    static = generate(model, ids, level_policy=policy, max_new_tokens=14, cache_implementation="static")
    model.set_level(0)
    assert torch.equal(static, found.sequences)


def test_fold_of_full_attention_is_exact(model):
    """States of a layer that becomes DSLA in mid-text are those it would have had: its inputs are the same at both levels if it is the
    only one that changes."""
    first_global = next(i for i, layer in dsla_layers(model).items() if sliding_window_of(layer) is None)
    model.base_model.set_conversion_order([first_global, *(i for i in ORDER if i != first_global)])
    ids = text()
    states = []
    for levels in ((0, 1), (1, 1)):
        cache = DynamicCache(config=model.config)
        for level, piece in zip(levels, (ids[:, :33], ids[:, 33:]), strict=True):
            model.set_level(level)
            model(piece, past_key_values=cache)
        states.append(cache.layers[first_global].state)
    if first_global == 0:
        for x, y in zip(*states, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    else:  # later tokens' keys depend on nothing that changed, because the converted layer comes after them
        assert torch.equal(states[0].lengths, states[1].lengths)
        torch.testing.assert_close(states[0].recurrent, states[1].recurrent, rtol=1e-4, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------------


def test_hybrid_saved_and_loaded_is_bit_equal(model, tmp_path):
    ids = text()
    model.set_level(MOST)
    expected = model(ids).logits
    hybrid = model.merge_and_unload()
    assert torch.equal(hybrid(ids).logits, expected)
    hybrid.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "dsla"
    attention = hybrid.config._attn_implementation
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation=attention)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    loaded.eval()
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(generate(loaded, ids), generate(hybrid, ids))


@torch.no_grad()
@pytest.mark.parametrize("other", [kind for kind, entry in ARCHITECTURES.items() if "mixture of experts" in entry.notes])
def test_hybrid_over_a_loaded_base_whose_checkpoint_stacks_weights_otherwise(adapter_model, other, tmp_path):
    """transformers stacks experts as it loads them and saves them apart again: a hybrid's class knows of neither."""
    tiny_model_of(other).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapter_model(base, level=MOST, conversion_order=layer_order(base))
    ids = text()
    expected = model(ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(ids).logits, expected)


def test_adapter_saved_and_loaded_has_every_level(tiny_model, model, kind, tmp_path):
    ids = text()
    model.set_level(1)
    model.save_pretrained(tmp_path)
    expected = {}
    for level in range(5):
        model.set_level(level)
        expected[level] = model(ids).logits
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert loaded.get_level() == 1
    for level, logits in expected.items():
        loaded.set_level(level)
        assert torch.equal(loaded(ids).logits, logits), level


# --- gradients --------------------------------------------------------------------------------------------------


def test_gradients_reach_every_weight_of_the_adapter_and_none_of_the_base(base, adapter_model):
    model = adapter_model(base, level=4).train()
    model(text()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "dsla_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


# --- particulars ------------------------------------------------------------------------------------------------


def test_fused_projection_is_split_and_put_together_again(tiny_model, adapter_model):
    base = tiny_model("phi3")
    attention = base.model.layers[0].self_attn
    fused = attention.qkv_proj.weight.detach().clone()
    parts = [projection(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat([linear.weight[rows] for linear, rows in parts]), fused) and len({id(linear) for linear, _ in parts}) == 1
    for trained in (["q_proj", "o_proj"], ["k_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]):
        model = adapter_model(base, trained_projections=trained, level=4)
        assert ("dsla_q_proj.default.weight" in dict(dsla_layers(model)[0].named_parameters())) == ("q_proj" in trained)
        ids = text()
        with torch.no_grad():
            expected = model(ids).logits
            base = model.merge_and_unload()
            assert torch.equal(base(ids).logits, expected)
        base = tiny_model("phi3")


# EXAONE 4 writes the window on all of its layers.
@pytest.mark.parametrize(
    "kind, expected", [("gemma3_text", [1, 3]), ("gpt_oss", [1, 3]), ("exaone4", [1, 3]), ("cohere2", [1, 3]), ("llama", [0, 1, 2, 3])]
)
def test_short_sliding_layers_are_left_out_of_the_plan_by_default(tiny_model, kind, expected):
    model = get_peft_model(tiny_model(kind), DSLAConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].conversion_order == expected


def test_long_sliding_layers_are_in_the_plan(tiny_model):
    for window, layers in ((SHORT_WINDOW, 0), (SHORT_WINDOW + 1, 4)):
        base = tiny_model("mistral", sliding_window=window)
        if layers:
            assert len(get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM")).peft_config["default"].conversion_order) == layers
        else:
            with pytest.raises(ValueError, match="sliding window of 1024 tokens or fewer in every layer"):
                get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "phi3"])
def test_models_that_slide_in_every_layer(kind, tiny_model, adapter_model):
    model = adapter_model(tiny_model(kind, sliding_window=12), level=2).requires_grad_(False)
    ids = text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    together = generate(model, ids * mask, mask)
    assert torch.equal(together[:1, 30:], generate(model, ids[:1, 9:])[:, 21:])
    assert torch.equal(generate(model, ids * mask, mask, cache_implementation="static"), together)
    found = generate(model, ids, level_policy=lambda stats: 2 if stats.tokens < 35 else 4)
    model.set_level(2)
    assert found.shape == (2, 38) and torch.equal(found[:, :35], generate(model, ids)[:, :35])


def test_memory_is_constant_in_every_architecture(model):
    sizes = []
    for tokens in (20, 60):
        out = generate(model, text(1, tokens), max_new_tokens=2, return_dict_in_generate=True)
        sizes.append(cache_bytes(out.past_key_values))
    assert sizes[0] == sizes[1]


# --- what cannot work -------------------------------------------------------------------------------------------


def refused(model, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, DSLAConfig(conversion_order=[0]))


def test_what_cannot_work_is_refused_with_the_reason():
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}
    refused(MambaForCausalLM(MambaConfig(**sizes, state_size=4)), "'mamba' has no softmax attention: all its layers are linear already")
    refused(BertModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=16)), "is an encoder: its attention looks ahead")
    t5 = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    refused(T5ForConditionalGeneration(t5), "encoder-decoder, whose cross-attention has no recurrent form")
    refused(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=30)),
        "'gpt2' is not supported",
    )


NOT_TESTED = "is not supported by DSLA: its attention has not been tested"
ITS_TEXT_MODEL = "takes text models alone: text_model\\(model\\) gives it, as docs/multimodal.md says"
REASONS = {
    **dict.fromkeys(
        ("rwkv", "mamba2", "falcon_mamba", "xlstm", "granitemoehybrid"),  # the last one has no attention layer unless it is told where
        "has no softmax attention: all its layers are linear already",
    ),
    "minimax": "linear already \\(linear_attention\\) beside its attention, which has not been tested",
    "jamba": "linear already \\(a state-space model\\) beside its attention",
    "recurrent_gemma": "linear already \\(recurrent\\) beside its attention",
    **dict.fromkeys(("deepseek_v3", "youtu", "minicpm3", "kimi_linear"), "has latent attention \\(MLA, kv_lora_rank\\)"),
    "gemma3n_text": "read the keys and values of another \\(num_kv_shared_layers\\)",
    "llama4_text": "layers of types that DSLA does not know: chunked_attention",
    "gemma3": f"holds a text model of type 'gemma3_text' .*{ITS_TEXT_MODEL}",
    "llava": f"holds a text model of type 'llama' .*{ITS_TEXT_MODEL}",
    "qwen3_vl": f"holds a text model of type 'qwen3_vl_text' .*{ITS_TEXT_MODEL}",
    "qwen3_5": "holds a text model of type 'qwen3_5_text' .*convert the text model alone, which text_model\\(model\\) gives",
    **dict.fromkeys(("bert", "roberta", "electra"), "is an encoder: its attention looks ahead"),
    **dict.fromkeys(("bart", "t5", "whisper"), "is an encoder-decoder"),
    **dict.fromkeys(("gpt_neox", "gpt2", "falcon", "phi"), NOT_TESTED),
}


@pytest.mark.parametrize("kind, reason", REASONS.items(), ids=REASONS)
def test_refused_types_are_told_why(kind, reason):
    with pytest.raises(ValueError, match=f"^my-model: model type '{kind}' .*{reason}"):
        check_convertible("my-model", AutoConfig.for_model(kind))


OWN = [config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.__module__.startswith("transformers.")]  # not what tests register
OTHERS = sorted({config.model_type for config in OWN} - {*SUPPORTED_BASES})


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_type_of_transformers_is_refused_by_name_with_a_reason_and_a_way(kind):
    try:
        config = AutoConfig.for_model(kind)
    except Exception as error:
        pytest.skip(f"no config of this type without arguments: {error}")
    with pytest.raises(ValueError, match=f"^there: model type '{kind}' ") as refused:
        check_convertible("there", config)
    told = str(refused.value)
    assert "DSLAConfig(allow_untested=True)" in told or f"supported are {', '.join(SUPPORTED_BASES)}" in told or "text_model(model)" in told


def test_a_supported_type_without_attention_layers_is_refused_before_anything_else():
    with pytest.raises(ValueError, match="'granitemoehybrid' has no softmax attention: all its layers are linear already"):
        get_peft_model(tiny_model_of("granitemoehybrid", layer_types=["linear_attention"] * 6), DSLAConfig())


def test_layers_that_read_keys_of_others_are_refused_in_a_supported_type_too():
    """Gemma 4 has models with such layers (E2B) and without (31B)."""
    check_convertible("31b", tiny_config("gemma4_text"))
    shared = tiny_config("gemma4_text", num_kv_shared_layers=2)
    with pytest.raises(ValueError, match=r"read the keys and values of another \(num_kv_shared_layers\)"):
        check_convertible("e2b", shared)
    with pytest.raises(ValueError, match="num_kv_shared_layers"):
        get_peft_model(AutoModelForCausalLM.from_config(shared), DSLAConfig(conversion_order=[1]))


@pytest.mark.parametrize("kind", SUPPORTED_BASES)
def test_nothing_speaks_against_a_supported_type(kind):
    assert why_impossible(tiny_config(kind)) is None


@torch.no_grad()
def test_layers_of_gemma_4_whose_heads_are_smaller_are_refused_by_number():
    """Global layers have heads of another size and number than local ones, and values that are their keys."""
    base = tiny_model_of("gemma4_text")
    with pytest.raises(ValueError, match=r"names layers \[0\], which are no attention that DSLA could replace \(sliding_attention\)"):
        get_peft_model(base, DSLAConfig(conversion_order=[0]))
    with pytest.raises(ValueError, match="of layer 1 has no v_proj: leave it out of trained_projections"):
        get_peft_model(base, DSLAConfig(conversion_order=[1], trained_projections=["v_proj"]))
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    config = model.peft_config["default"]
    assert config.conversion_order == [1, 2, 4, 5] and config.base_fingerprint is not None
    assert (config.kv_heads, config.base_dimensions["head_dim"], config.rotary_dim) == (2, 12, 12)
    with pytest.raises(ValueError, match="layers whose heads differ in size or number, for which the server has no blocks"):
        check_served(model.config)


def test_convolutions_beside_attention_are_linear_layers():
    config = AutoConfig.for_model("lfm3", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    assert "linear already (conv) beside its attention" in why_unsupported(config)


def test_a_type_of_tomorrow_is_told_apart_by_its_structure():
    class Tomorrow(PreTrainedConfig):
        model_type = "tomorrow"

    for values, reason in (({}, NOT_TESTED), ({"layer_types": ["linear_attention"]}, "linear already"), ({"kv_lora_rank": 8}, "MLA")):
        assert reason in why_unsupported(Tomorrow(**values)), values
