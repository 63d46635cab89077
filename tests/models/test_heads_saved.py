"""Layers converted in part on disk: adapters, and hybrids for the Auto classes."""

import copy
import json
import pickle

import pytest
import torch
from head_layers import ORDER, assert_close, full, pieces, text
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from dsla_hf.models import configuration

# --- files ------------------------------------------------------------------------------------------------------


def test_an_adapter_of_heads_is_saved_and_loaded(head_model, tiny_model, tmp_path):
    model, ids = head_model(level=3), text()
    expected = full(model, ids)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["conversion_order"] == ORDER and stored["conversion_unit"] == "head" and stored["format_version"] == 2
    base = copy.deepcopy(model.get_base_model())
    model.save_pretrained(tmp_path)  # over itself
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, level="kept:5")
    assert loaded.get_level() == 3 and torch.equal(full(loaded.eval(), ids), expected)
    assert base is not None and loaded.peft_config["default"].converted_heads == [(2, 0), (0, 1), (3, 0)]
    other = head_model(conversion_order=[[2, 0], [0, 1]])
    with pytest.raises(ValueError, match="holds another adapter"):
        other.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("level", [3, 8])
def test_a_hybrid_with_layers_in_part_is_merged_saved_and_loaded(head_model, kind, level, tmp_path):
    model, ids = head_model(kind, level=level), text()
    expected = full(model, ids)
    hybrid = model.merge_and_unload()
    assert_close(full(hybrid, ids), expected, 1e-5)
    hybrid.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=hybrid.config._attn_implementation
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(full(loaded.eval(), ids), full(hybrid, ids))
    assert loaded.get_level() == level == loaded.level_sizes()["min_level"]
    stored = json.loads((tmp_path / "config.json").read_text())["dsla_config"]
    assert stored["conversion_unit"] == "head"
    if level == 3:
        assert stored["converted_layers"] == [] and stored["converted_heads"] == [[2, 0], [0, 1], [3, 0]]
        core = loaded.model.layers[2].self_attn.dsla
        assert core.num_kv_heads == 1 and core.num_heads == 2, "nothing of kept heads is stored"
    else:
        assert stored["converted_layers"] == [2, 0, 3, 1] and stored["converted_heads"] == []
    assert_close(pieces(loaded, ids, [20, *[1] * 20], DynamicCache(config=loaded.config)), expected)
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(ids, past_key_values=cache)
    copied = copy.deepcopy(loaded)
    assert torch.equal(full(copied, ids), full(loaded, ids))


def test_a_hybrid_is_copied_and_pickled_with_its_choice_of_attention(head_model, tmp_path):
    head_model(level=3).merge_and_unload().save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), text()
    for model in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(full(model, ids), full(loaded, ids))
        attention = model.model.layers[2].self_attn
        assert attention.softmax_config is model.config and attention.config is not model.config


def test_a_release_that_reads_format_1_alone_refuses_heads(head_model, tmp_path, monkeypatch):
    model = head_model(level=3)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    monkeypatch.setattr(configuration, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="written in format 2, this release of dsla-hf reads up to 1"):
        configuration.DSLAConfig.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="written in format 2, this release of dsla-hf reads up to 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")


def test_a_hybrid_takes_over_the_cache_of_its_base(head_model, tiny_model):
    model, ids = head_model(base={"num_hidden_layers": 1}, conversion_order=[[0, 1]], level=0), text()
    cache = DynamicCache()
    pieces(model, ids[:, :20], [20], cache)
    model.set_level(1)
    expected = full(model, ids)
    hybrid = model.merge_and_unload()
    with torch.no_grad():
        found = hybrid(ids[:, 20:], past_key_values=cache).logits
    assert_close(found, expected[:, 20:])


def test_a_hybrid_of_heads_is_checked_when_it_is_read(head_model, tmp_path):
    head_model(level=3).merge_and_unload().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for entries, message in (
        ({"converted_heads": [[2, 2]]}, r"names a KV head that does not exist in \[\(2, 2\)\]: each KV head of this model is 0 to 1"),
        ({"converted_heads": [[4, 0]]}, r"names a layer that does not exist in \[\(4, 0\)\]"),
        ({"converted_heads": [[2, 0]], "converted_layers": [2]}, r"names heads of layers \[2\], which converted_layers names as a whole"),
        ({"conversion_unit": "row"}, r"conversion_unit must be one of \['layer', 'head'\], got 'row'"),
        ({"format_version": 3}, "written in format 3"),
    ):
        path.write_text(json.dumps({**stored, "dsla_config": {**stored["dsla_config"], **entries}}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
