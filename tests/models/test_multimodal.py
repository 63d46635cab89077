"""Multimodal models: what of them is converted, what is refused, hybrids of them, and their text model alone."""

import copy
import inspect
import json

import pytest
import torch
from multimodal_models import DAILY, IMAGE, KINDS, SIGLIP, prompt_with_images, tiny_multimodal, without_images
from peft import PeftModel, get_peft_model
from tiny import tiny_config
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    StaticCache,
)
from transformers.utils import logging as transformers_logging

import dsla_hf
from dsla_hf import DSLAConfig, DSLALayer, GraphDecoder, cache_bytes, text_model
from dsla_hf.models.architectures import SUPPORTED_BASES, text_base_of, why_unsupported
from dsla_hf.models.decoder import decoder_of
from dsla_hf.models.image_blocks import install_image_guard
from dsla_hf.models.multimodal import MULTIMODAL

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": list(range(IMAGE, 97))}
IN_BOTH_WAYS = "reads the tokens of an image in both directions, and a state cannot look ahead"


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# --- what is converted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_text_model_alone_are_wrapped(kind):
    """Those of what reads images have the same names and numbers, of LLaVA and Gemma 3."""
    base = tiny_multimodal(kind)
    before = hooks(base)
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    wrapped = [name for name, module in base.named_modules() if isinstance(module, DSLALayer)]
    slides = kind == "gemma3"
    place = "text_model" if kind in ("smolvlm", "idefics3") else "language_model"
    assert wrapped == [f"model.{place}.layers.{i}.self_attn" for i in ((1, 3) if slides else range(4))]
    if kind in ("llava", "gemma3", "smolvlm"):
        assert any(name.endswith("encoder.layers.1.self_attn") for name, _ in base.named_modules())
    assert all(place in name for name, p in model.named_parameters() if p.requires_grad)
    config = model.peft_config["default"]
    assert config.base_model_type in SUPPORTED_BASES and config.base_dimensions["num_hidden_layers"] == 4
    assert model.unload() is base and hooks(base) == before and not any(isinstance(x, DSLALayer) for x in base.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", DAILY)
def test_parts_of_a_multimodal_model_are_converted_too(kind, adapter_model, tmp_path):
    """Without its head, and its decoder alone: an adapter of one fits the others, with the same hidden states."""
    whole = tiny_multimodal(kind)
    inputs = prompt_with_images(whole)
    inputs = without_images(inputs) if kind == "gemma3" else inputs
    model = adapter_model(copy.deepcopy(whole), level=3)
    model.save_pretrained(tmp_path)
    options = {"task_type": "FEATURE_EXTRACTION"}
    bare = PeftModel.from_pretrained(copy.deepcopy(whole.model), tmp_path, **options).eval()
    assert torch.equal(whole.lm_head(bare(**inputs).last_hidden_state), model(**inputs).logits)
    decoder = PeftModel.from_pretrained(copy.deepcopy(decoder_of(whole)), tmp_path, **options).eval()
    text = without_images(inputs)
    assert torch.equal(whole.lm_head(decoder(**text).last_hidden_state), model(**text).logits)
    for one in (bare, decoder):
        with pytest.raises(ValueError, match="only a causal LM becomes a hybrid"):
            one.merge_and_unload()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_memory_does_not_grow_with_images(kind, adapter_model):
    model = adapter_model(tiny_multimodal(kind), level=4)
    sizes = []
    for rows, after in ((1, 3), (1, 60)):
        inputs = prompt_with_images(model.get_base_model(), rows=rows, after=after)
        found = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        sizes.append(cache_bytes(found.past_key_values))
    assert sizes[0] == sizes[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_an_image_and_a_video(kind, adapter_model):
    model = adapter_model(tiny_multimodal(kind), level=3)
    ids, types = torch.randint(2, 90, (1, 40)), torch.zeros(1, 40, dtype=torch.long)
    frames = [slice(12, 16), slice(18, 22)] if kind == "qwen3_vl" else [slice(12, 20)]  # Qwen3 writes times between frames
    for places, token, number in ([slice(3, 7)], IMAGE, 1), (frames, IMAGE + 1, 2):
        for place in places:
            ids[:, place], types[:, place] = token, number
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    inputs |= {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"pixel_values_videos": torch.randn(32, 96), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    expected = model.generate(**inputs, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **GREEDY), expected)
    other = {**inputs, "pixel_values_videos": torch.randn(32, 96)}
    assert not torch.allclose(model(**other).logits, model(**inputs).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_another_image_later_in_the_text(kind, adapter_model):
    """Over the cache of what came before, as if all had been read at once."""
    model = adapter_model(tiny_multimodal(kind), level=3)
    first, second = (prompt_with_images(model.get_base_model(), rows=1) for _ in range(2))
    found = model.generate(**first, return_dict_in_generate=True, **GREEDY)
    text = {"input_ids": torch.cat([found.sequences, second["input_ids"]], 1)}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    images = torch.cat([first["pixel_values"], second["pixel_values"]], 1 if kind == "smolvlm" else 0)
    expected = model.generate(**text, pixel_values=images, **GREEDY)
    goes_on = {"past_key_values": found.past_key_values, "pixel_values": second["pixel_values"]}
    assert torch.equal(model.generate(**text, **goes_on, **GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_beams_with_a_cache_equal_beams_without(kind, adapter_model):
    model = adapter_model(tiny_multimodal(kind), level=3)
    inputs = prompt_with_images(model.get_base_model())
    found, expected = (model.generate(**inputs, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_prompts_are_read_in_chunks(adapter_model):
    """Transformers from 5.23 reads images once, and the prompt in parts."""
    for kind in ("llava", "qwen3_vl"):
        model = adapter_model(tiny_multimodal(kind), level=3)
        inputs = prompt_with_images(model.get_base_model())
        if "mm_encoder_outputs" not in inspect.signature(type(model.get_base_model()).forward).parameters:
            pytest.skip("this release of transformers reads prompts with images at once")
        found = model.generate(**inputs, prefill_chunk_size=7, **GREEDY)
        assert torch.equal(found, model.generate(**inputs, **GREEDY)), kind


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_a_step_over_a_static_cache_compiles_once(kind, adapter_model):
    """As a whole, with what looks at its inputs before the decoder does."""
    types = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3" else {}
    model = adapter_model(tiny_multimodal(kind, num_hidden_layers=2, **types), conversion_order=[0, 1], level=1)
    base = model.get_base_model()
    inputs = without_images(prompt_with_images(base))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = model(**inputs, position_ids=positions).logits
    torch._dynamo.reset()
    graphs = CompileCounter()
    step = torch.compile(model, backend=graphs, fullgraph=True)
    cache, start = StaticCache(config=base.config, max_cache_len=48), ids.shape[1] - 8
    prompt = {"input_ids": ids[:, :start], "attention_mask": mask[:, :start], "position_ids": positions[:, :start]}
    found = [model(**prompt, past_key_values=cache).logits]
    for t in range(start, ids.shape[1]):
        new = {"past_key_values": cache, "position_ids": positions[:, t : t + 1]}
        masks = base.create_masks_for_generate(
            config=base.config, inputs_embeds=torch.empty(2, 1, 0), attention_mask=mask[:, : t + 1], **new
        )
        found.append(step(input_ids=ids[:, t : t + 1], attention_mask=masks, **new).logits)
    assert graphs.frame_count == 1
    torch.testing.assert_close(torch.cat(found, 1)[:, 3:], expected[:, 3:], atol=2e-5, rtol=0)


def test_an_adapter_in_the_model_by_transformers_own_methods(adapter_model, tmp_path):
    model = adapter_model(tiny_multimodal("qwen3_vl", uneven=True), level=2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = tiny_multimodal("qwen3_vl", uneven=True)
    again.load_adapter(str(tmp_path))
    inputs = prompt_with_images(again)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits) and dsla_hf.get_level(again) == 2
        dsla_hf.set_level(again, 0)
        model.set_level(0)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_the_card_loads_what_reads_images(adapter_model, tmp_path):
    model = adapter_model(tiny_multimodal("llava"), level=2)
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    card = (tmp_path / "hybrid" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "AutoModelForCausalLM" not in card
    adapter_model(text_model(tiny_multimodal("llava"))).save_pretrained(tmp_path / "of text")
    assert "AutoModelForImageTextToText" in (tmp_path / "of text" / "README.md").read_text()


def test_batches_with_images_are_trained_on(adapter_model, tmp_path):
    base = tiny_multimodal("qwen3_vl")
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8))
    rows = [prompt_with_images(base, rows=1, after=30) for _ in range(4)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    for stage in ("alignment", "logits"):
        args = dsla_hf.DSLATrainingArguments(
            output_dir=str(tmp_path / stage),
            stage=stage,
            max_steps=2,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        dsla_hf.DSLATrainer(
            model, args, train_dataset=rows, data_collator=lambda rows: {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        ).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "dsla_" in name}


# --- images that are read in blocks -----------------------------------------------------------------------------


@torch.no_grad()
def test_image_blocks_are_refused_above_level_0_before_anything_changes(adapter_model):
    base = tiny_multimodal("gemma3")
    inputs = prompt_with_images(base)
    expected = base(**inputs).logits
    model = adapter_model(base, level=1)
    with pytest.raises(ValueError, match=f"Gemma3Model {IN_BOTH_WAYS}: prompts with images are read at level 0"):
        model(**inputs)
    with pytest.raises(ValueError, match=IN_BOTH_WAYS):
        model.generate(**inputs, max_new_tokens=2)
    text = without_images(inputs)
    cache = model(**text, use_cache=True).past_key_values
    tokens, held = text["input_ids"].shape[1], [getattr(layer, "tokens", None) for layer in cache.layers]
    mask = torch.cat([text["attention_mask"], inputs["attention_mask"]], 1)
    with pytest.raises(ValueError, match=IN_BOTH_WAYS):  # later in the text
        model(**{**inputs, "attention_mask": mask}, past_key_values=cache)
    assert cache.get_seq_length() == tokens and held == [getattr(layer, "tokens", None) for layer in cache.layers]
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.set_level(0)
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.unload()(**inputs).logits, expected)


@torch.no_grad()
def test_places_of_images_without_images_are_refused_above_level_0(adapter_model):
    """Transformers reads them as text, causally, whatever is missing: so does level 0, and no other level in silence."""
    base = tiny_multimodal("gemma3")
    whole = prompt_with_images(base)
    inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
    expected = base(**inputs).logits
    model = adapter_model(base, level=1)
    refused = r"^32 tokens of the prompt stand for parts of an image \(image_token_id 90\), and Gemma3Model was given no pixel_values"
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=refused):
            call(**inputs)
    cache = model(**without_images(inputs)).past_key_values
    tokens = cache.get_seq_length()
    with pytest.raises(ValueError, match=refused):
        model(inputs["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == tokens
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.set_level(0)
    assert torch.equal(model(**inputs).logits, expected)
    model.set_level(2)
    hybrid = model.merge_and_unload()
    with pytest.raises(ValueError, match=refused):
        hybrid(**inputs)


@torch.no_grad()
def test_a_hybrid_whose_images_are_blocks_takes_text_alone(adapter_model, tmp_path):
    hybrid = adapter_model(tiny_multimodal("gemma3"), level=2).merge_and_unload()
    hybrid.save_pretrained(tmp_path)
    inputs = prompt_with_images(hybrid)
    for one in (hybrid, AutoModelForImageTextToText.from_pretrained(tmp_path), copy.deepcopy(hybrid)):
        with pytest.raises(ValueError, match="A hybrid has one level and takes text alone"):
            one(**inputs)
        assert torch.isfinite(one(**without_images(inputs)).logits).all()


@torch.no_grad()
def test_the_advice_of_the_refusal_works(adapter_model):
    """The image at level 0, and a higher level from the first token behind the prompt on; in chunks of the prompt too."""
    model = adapter_model(tiny_multimodal("gemma3"), level=4)
    inputs = prompt_with_images(model.get_base_model(), rows=1)
    for options in ({}, {"cache_implementation": "static"}):
        found = model.generate(
            **inputs,
            max_new_tokens=5,
            eos_token_id=None,
            do_sample=False,
            level_policy=lambda stats: 0 if stats.tokens == stats.prompt_tokens else 4,
            **options,
        )
        assert found.shape[1] == inputs["input_ids"].shape[1] + 5 and model.get_level() == 4


@torch.no_grad()
def test_padded_text_over_masks_that_are_made_before_the_decoder(adapter_model):
    """Gemma 3 makes its masks outside of the decoder, which gets the 2-D mask beside them: the values of others are not looked at."""
    model = adapter_model(tiny_multimodal("gemma3"), level=4)
    inputs = without_images(prompt_with_images(model.get_base_model()))
    inputs["attention_mask"][0, :7] = 0
    seen = []
    decoder = decoder_of(model.get_base_model())
    handle = decoder.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["dsla_layout"]), with_kwargs=True)
    logits = model(**inputs).logits
    handle.remove()
    assert torch.equal(seen[0].padding_mask, inputs["attention_mask"].bool())
    alone = model(input_ids=inputs["input_ids"][:1, 7:]).logits
    torch.testing.assert_close(logits[:1, 7:], alone, rtol=1e-4, atol=1e-4)
    model.set_level(0)
    model(**inputs)  # nothing of ours reaches layers that take no such argument


def test_other_types_get_no_guard():
    model = tiny_multimodal("llava")
    install_image_guard(model, "llava")
    assert hooks(model) == hooks(tiny_multimodal("llava"))


# --- hybrids ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_hybrid_is_loaded_by_its_own_auto_class_alone(adapter_model, tmp_path):
    hybrid = adapter_model(tiny_multimodal("llava"), level=2).merge_and_unload()
    hybrid.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dsla_config"]["base_model_type"] == "llava" and set(config["auto_map"]) == {"AutoConfig", "AutoModelForImageTextToText"}
    inputs = prompt_with_images(hybrid)
    for options in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **options).eval()
        assert torch.equal(loaded(**inputs).logits, hybrid(**inputs).logits)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match="multimodal models read images, too: load them with AutoModelForImageTextToText"):
            auto_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would make a softmax model with other outputs: load it with AutoModelForImageTextToText"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dsla_config"] == config["dsla_config"]


@torch.no_grad()
def test_configs_in_a_hybrid_are_those_of_its_modules(adapter_model):
    """So `set_attn_implementation` reaches every layer, and the base's config stays what it was."""
    base = tiny_multimodal("qwen3_vl")
    before, config = base.config.to_dict(), base.config
    hybrid = adapter_model(base, level=2).merge_and_unload()
    assert config.to_dict() == before and hybrid.config is not config
    assert decoder_of(hybrid).config is hybrid.config.text_config and hybrid.model.visual.config is hybrid.config.vision_config
    inputs = prompt_with_images(hybrid)
    expected = hybrid(**inputs).logits
    hybrid.set_attn_implementation("eager")
    kinds = [layer.self_attn.config._attn_implementation for layer in decoder_of(hybrid).layers]
    assert sorted(kinds) == ["dsla", "dsla", "eager", "eager"]
    torch.testing.assert_close(hybrid(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", ["layer", "head"])
def test_settings_of_a_hybrid_are_checked_by_the_sizes_of_its_text_model(adapter_model, tmp_path, unit):
    options = {} if unit == "layer" else {"conversion_unit": "head", "conversion_order": [[0, 1], [1, 0]]}
    adapter_model(tiny_multimodal("llava"), level=2, **options).merge_and_unload().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.get_dsla_config().kv_heads == 2 if unit == "head" else config.layers_block_type.count("linear_attention") == 2
    stored = json.loads((tmp_path / "config.json").read_text())
    wrong = {"converted_layers": [7]} if unit == "layer" else {"converted_heads": [[0, 5]]}
    (tmp_path / "config.json").write_text(json.dumps({**stored, "dsla_config": {**stored["dsla_config"], **wrong}}))
    with pytest.raises(ValueError, match=r"does not exist|do not exist"):
        AutoConfig.from_pretrained(tmp_path)


# --- the text model alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAILY)
@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_shares_every_weight(kind, tied):
    whole = tiny_multimodal(kind, tied=tied)
    text = text_model(whole.bfloat16())
    known = {p.data_ptr() for p in whole.parameters()}
    assert all(p.data_ptr() in known for p in text.parameters()) and {p.dtype for p in text.parameters()} == {torch.bfloat16}
    assert (text.lm_head.weight.data_ptr() == text.get_input_embeddings().weight.data_ptr()) is tied
    assert text.config.model_type == text_base_of(whole.config) and text.training == whole.training
    inputs = without_images(prompt_with_images(whole))
    with torch.no_grad():
        assert torch.equal(text(**inputs).logits, whole(**inputs).logits)


def test_what_has_no_text_model_to_take_out(tiny_model, adapter_model):
    with pytest.raises(ValueError, match="LlamaForCausalLM is no multimodal model"):
        text_model(tiny_model("llama"))
    whole = tiny_multimodal("llava")
    with pytest.raises(ValueError, match="has no output embeddings: load it by AutoModelForImageTextToText"):
        text_model(whole.model)
    with pytest.raises(ValueError, match="has DSLA layers: take the text model of the original one"):
        text_model(adapter_model(whole).get_base_model())
    with pytest.raises(ValueError, match="PeftModelForCausalLM is no multimodal model"):
        text_model(adapter_model(tiny_multimodal("llava")))
    with pytest.raises(ValueError, match="has DSLA layers"):
        text_model(adapter_model(tiny_multimodal("llava"), level=1).merge_and_unload())


def test_a_text_model_that_gives_other_logits_is_refused():
    """Of a type that is not tested, whose head does not do what that of the causal LM does: Cohere 2 scales its logits."""
    config = AutoConfig.for_model(
        "cohere2_vision",
        text_config=tiny_config("cohere2", logit_scale=0.25).to_dict(),
        vision_config=SIGLIP,
        tie_word_embeddings=True,
    )
    with pytest.raises(ValueError, match="as a Cohere2ForCausalLM gives other logits"):
        text_model(AutoModelForImageTextToText.from_config(config))
    assert text_model(tiny_multimodal("aya_vision", logit_scale=0.25)).config.logit_scale == 1.0


def test_a_text_model_with_other_weights_than_its_causal_lm_is_refused():
    with pytest.raises(ValueError, match=r"does not make a Ernie4_5_MoeForCausalLM: .* Missing key"):
        text_model(tiny_multimodal("llava", over="ernie4_5_moe"))


def test_a_model_on_several_devices_has_no_text_model_alone():
    whole = tiny_multimodal("llava")
    whole.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(ValueError, match="spread over"):
        text_model(whole)


def test_an_adapter_of_another_text_model_is_refused(adapter_model, tiny_model, tmp_path):
    adapter_model(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another base model: its model type llama, this model's qwen3"):
        PeftModel.from_pretrained(tiny_multimodal("qwen3_vl"), tmp_path)
    with pytest.raises(ValueError, match="weights"):
        PeftModel.from_pretrained(tiny_multimodal("llava", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), tmp_path)


# --- what cannot work -------------------------------------------------------------------------------------------

NOT_TESTED = f"of such models {', '.join(MULTIMODAL)} are tested: convert the text model alone"
REASONS = {
    "cohere2_vision": f"holds a text model of type 'cohere2' .* {NOT_TESTED}",
    "paligemma": f"holds a text model of type 'gemma' .* {NOT_TESTED}",
    "vipllava": f"holds a text model of type 'llama' .* {NOT_TESTED}",
    "llama4": "holds a text model of type 'llama4_text' .*: model type 'llama4_text' has layers of types that DSLA does not know: chunked",
    "gemma3n": "holds a text model of type 'gemma3n_text' .*num_kv_shared_layers",
}


@pytest.mark.parametrize("kind", REASONS)
def test_other_types_are_told_what_works(kind):
    config = AutoConfig.for_model(kind)
    assert text_base_of(config) is None
    with pytest.raises(ValueError, match=REASONS[kind]):
        raise ValueError(why_unsupported(config))


def test_a_text_model_of_another_type_inside_a_type_that_is_tested():
    config = AutoConfig.for_model("llava", text_config={"model_type": "gpt2"})
    assert text_base_of(config) is None and "'gpt2' is not supported" in why_unsupported(config)


def test_a_multimodal_type_of_tomorrow_is_told_apart_by_its_structure():
    class Tomorrow(PreTrainedConfig):
        model_type = "tomorrow"
        sub_configs = {"text_config": AutoConfig}

    config = Tomorrow(text_config=AutoConfig.for_model("llama"))
    assert text_base_of(config) is None and "text_model(model) gives" in why_unsupported(config)


def test_drafts_would_leave_images_out(adapter_model):
    model = adapter_model(tiny_multimodal("llava"), level=0)
    inputs = prompt_with_images(model.get_base_model(), rows=1)
    with pytest.raises(ValueError, match=r"draft_level with LlavaForConditionalGeneration: .* text_model\(model\) gives"):
        model.generate(**inputs, max_new_tokens=3, draft_level=2)


@torch.no_grad()
def test_graphs_do_not_read_images(adapter_model, caplog):
    model = adapter_model(tiny_multimodal("llava"), level=2)
    inputs = prompt_with_images(model.get_base_model(), rows=1)
    decoder = GraphDecoder(model)
    assert "give GraphDecoder its text model, text_model(model)" in decoder.obstacle()
    transformers_logging.enable_propagation()
    try:
        found = decoder.generate(**inputs, max_new_tokens=3, do_sample=False)
    finally:
        transformers_logging.disable_propagation()
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=3, do_sample=False))


def test_tensor_parallel_is_refused(monkeypatch):
    base = tiny_multimodal("qwen3_vl")
    monkeypatch.setattr(type(base), "tp_size", 2, raising=False)
    with pytest.raises(NotImplementedError, match="tensor parallel of multimodal models"):
        get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    assert not any(isinstance(module, DSLALayer) for module in base.modules())
