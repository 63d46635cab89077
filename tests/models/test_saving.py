"""Writing a directory: nothing of another model is overwritten, nothing is left half-written."""

import copy
import hashlib
import inspect
import json

import peft.peft_model
import pytest
import torch
import transformers.modeling_utils
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsla_hf import DSLAConfig


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def adapter(llama, adapter_model):
    return adapter_model(llama)


@pytest.fixture
def hybrid(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"), level=2).merge_and_unload()


def fingerprints(directory):
    """Every file below `directory`, hidden ones too, and the hash of its content."""
    files = sorted(path for path in directory.rglob("*"))
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "directory" for f in files}


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))


def token_ids():
    return torch.randint(3, 97, (2, 37))


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


@torch.no_grad()
def change(model):
    """Train a bit, so to say: the same model with other DSLA weights."""
    for name, parameter in model.named_parameters():
        if "dsla" in name:
            parameter.mul_(1.25)
    return model


# --- what a directory holds -------------------------------------------------------------------------------------


def test_files_of_a_hybrid(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path / "deep" / "down")
    files = fingerprints(tmp_path / "deep" / "down")
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_dsla_hf.py"}
    config = json.loads((tmp_path / "deep" / "down" / "config.json").read_text())
    assert config["model_type"] == "dsla" and config["architectures"] == ["DSLALlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_dsla_hf.DSLAHybridConfig",
        "AutoModelForCausalLM": "modeling_dsla_hf.DSLAForCausalLM",
    }


def test_the_shim_defines_what_auto_map_names(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    namespace: dict = {}
    exec((tmp_path / "modeling_dsla_hf.py").read_text(), namespace)
    for entry in json.loads((tmp_path / "config.json").read_text())["auto_map"].values():
        module, _, name = entry.partition(".")
        assert (tmp_path / f"{module}.py").is_file() and callable(namespace[name].from_pretrained)


def test_files_of_an_adapter(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    assert set(fingerprints(tmp_path)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_files_of_several_adapters(adapter, tmp_path):
    adapter.add_adapter("b", DSLAConfig(conversion_order=[1], window_size=0))
    adapter.save_pretrained(tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(fingerprints(tmp_path)) == {"README.md", "b", *names, *(f"b/{name}" for name in names)}
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["conversion_order"] == [1]


def test_only_selected_adapters_are_written(adapter, tmp_path):
    adapter.add_adapter("b", DSLAConfig(conversion_order=[1], window_size=0))
    adapter.save_pretrained(tmp_path, selected_adapters=["b"])
    assert set(fingerprints(tmp_path)) == {"README.md", "b", "b/adapter_config.json", "b/adapter_model.safetensors"}


@pytest.mark.parametrize("as_text", [True, False])
def test_paths_may_be_text_or_path(adapter, hybrid, as_text, tmp_path):
    for model, name in ((adapter, "adapter"), (hybrid, "hybrid")):
        directory = tmp_path / name
        model.save_pretrained(str(directory) if as_text else directory)
        assert (directory / "README.md").is_file()


@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_only_the_main_process_writes(kind, request, tmp_path):
    request.getfixturevalue(kind).save_pretrained(tmp_path / "here", is_main_process=False)
    assert not (tmp_path / "here").exists() or not fingerprints(tmp_path / "here")


# --- directories of others --------------------------------------------------------------------------------------


def others():
    """Directories that hold something else: name -> what saves it, given the factories `tiny_model` and `adapter_model`."""
    return {
        "plain base": lambda tiny, wrap: tiny("llama"),
        "lora": lambda tiny, wrap: lora(tiny("llama")),
        "adapter with another plan": lambda tiny, wrap: wrap(tiny("llama"), conversion_order=[2, 0]),
        "adapter with another window": lambda tiny, wrap: wrap(tiny("llama"), window_size=0),
        "adapter with other projections": lambda tiny, wrap: wrap(tiny("llama"), trained_projections=["o_proj"]),
        "adapter of another kind": lambda tiny, wrap: wrap(tiny("qwen3")),
        "adapter of another size": lambda tiny, wrap: wrap(tiny("llama", hidden_size=40)),
        "adapter of other weights": lambda tiny, wrap: wrap(tiny("llama")),
        "hybrid of another level": lambda tiny, wrap: wrap(tiny("llama"), level=3).merge_and_unload(),
        "hybrid of another window": lambda tiny, wrap: wrap(tiny("llama"), level=2, window_size=0).merge_and_unload(),
        "hybrid of another kind": lambda tiny, wrap: wrap(tiny("qwen3"), level=2).merge_and_unload(),
        "hybrid of another size": lambda tiny, wrap: wrap(tiny("llama", hidden_size=40), level=2).merge_and_unload(),
    }


@pytest.mark.parametrize("there", others())
@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_directory_of_another_model_is_refused_and_untouched(kind, there, request, tiny_model, adapter_model, tmp_path):
    others()[there](tiny_model, adapter_model).save_pretrained(tmp_path)
    before = fingerprints(tmp_path)
    assert before
    with pytest.raises(ValueError, match=r"holds an(other)? (model|adapter)|holds a model") as caught:
        request.getfixturevalue(kind).save_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "directory" in str(caught.value)
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize(
    "entry, value",
    [("window_size", 10), ("sink_tokens", 3), ("write_gate", False), ("half_lives", [[64.0, 4096.0], [8.0, 8.0]])],
)
@pytest.mark.parametrize("kind, file", [("adapter", "adapter_config.json"), ("hybrid", "config.json")])
def test_directory_of_the_same_model_with_other_mathematics_is_refused(kind, file, entry, value, request, tmp_path):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / file).read_text())
    mathematics = stored if kind == "adapter" else stored["dsla_config"]
    assert mathematics[entry] != value
    mathematics[entry] = value
    (tmp_path / file).write_text(json.dumps(stored))
    before = fingerprints(tmp_path)
    with pytest.raises(ValueError, match="holds another"):
        model.save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize("kind, file", [("adapter", "adapter_config.json"), ("adapter", "config.json"), ("hybrid", "config.json")])
def test_directory_with_an_unreadable_config_is_refused_and_untouched(kind, file, request, tmp_path):
    (tmp_path / file).write_text('{"model_type": ')
    before = fingerprints(tmp_path)
    with pytest.raises(ValueError, match="holds a"):
        request.getfixturevalue(kind).save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_file_instead_of_a_directory_is_refused_and_untouched(kind, request, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises((ValueError, AssertionError), match="file"):
        request.getfixturevalue(kind).save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_files_that_belong_to_nobody_s_model_are_kept(adapter, hybrid, tmp_path):
    for model, name in ((adapter, "adapter"), (hybrid, "hybrid")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        model.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_text() == "{}"


# --- saving again -----------------------------------------------------------------------------------------------


def test_adapter_is_saved_again_over_itself(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    before = fingerprints(tmp_path)
    change(adapter).set_level(1)
    adapter.set_conversion_order([0, 1, 2, 3])
    adapter.save_pretrained(tmp_path)
    after = fingerprints(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"))
    stored = DSLAConfig.from_pretrained(tmp_path)
    assert (stored.level, stored.conversion_order) == (1, [0, 1, 2, 3])


def test_loaded_adapter_is_saved_again_over_itself(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    before = fingerprints(tmp_path)
    loaded = PeftModel.from_pretrained(adapter.unload(), tmp_path)
    loaded.save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == before


@pytest.mark.parametrize("sizes", [(None, "20KB"), ("20KB", None), ("20KB", "10KB"), ("10KB", "20KB"), (None, None)])
def test_hybrid_saved_again_is_what_loads_whatever_the_shards(hybrid, sizes, tmp_path):
    ids = token_ids()
    for size in sizes:
        change(hybrid).save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(hybrid, ids)), "weights of the earlier save were loaded"
    weights = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert len(weights) == len(set(weights)), "files of the earlier save are left"


@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_failure_while_saving_leaves_the_earlier_files(kind, request, tmp_path, monkeypatch):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path)
    before = fingerprints(tmp_path)

    def fail(tensors, filename, *args, **kwargs):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fail)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        change(model).save_pretrained(tmp_path)
    assert fingerprints(tmp_path) == before
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists() or not fingerprints(tmp_path / "new")
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert fingerprints(tmp_path).keys() - {"new"} == before.keys(), "saving works again"


@pytest.mark.parametrize("positional", [True, False])
def test_pickled_weights_are_refused(adapter, positional, tmp_path):
    with pytest.raises(ValueError, match="safetensors"):
        adapter.save_pretrained(tmp_path, *([False] if positional else []), **({} if positional else {"safe_serialization": False}))
    assert not fingerprints(tmp_path)


# --- adapters of other methods ----------------------------------------------------------------------------------


def test_lora_is_saved_as_before(llama, tmp_path):
    model, ids = lora(llama), token_ids()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert set(fingerprints(tmp_path)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "dsla" not in (tmp_path / "README.md").read_text().lower()
    assert torch.equal(logits(PeftModel.from_pretrained(model.unload(), tmp_path), ids), expected)
    # Even where DSLA would refuse: over a model, and as a pickle.
    again = lora(model.unload())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()


def test_saving_is_wrapped_once_and_looks_as_before():
    installed = PeftModel.save_pretrained
    original = installed.__wrapped__
    assert installed.__module__ == original.__module__ == "peft.peft_model"
    assert not hasattr(original, "__wrapped__"), "wrapped twice"
    assert inspect.signature(installed) == inspect.signature(original) and installed.__doc__ == original.__doc__


def test_saving_removes_no_file_that_is_not_its_own(tiny_model, adapter_model, tmp_path):
    model = adapter_model(tiny_model("llama"), level=2)
    for folder in ("adapter", "hybrid"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_backup.safetensors").write_text("mine")
    (tmp_path / "adapter" / "model.safetensors").write_text("mine")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    assert (tmp_path / "adapter" / "model.safetensors").read_text() == "mine"
    assert all((tmp_path / folder / "model_backup.safetensors").read_text() == "mine" for folder in ("adapter", "hybrid"))


# --- who a hybrid says it is ------------------------------------------------------------------------------------


@pytest.fixture
def named(tiny_model, adapter_model, tmp_path):
    """A hybrid made in memory over a base that lies in a folder, and that folder."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return adapter_model(base, level=2).merge_and_unload(), str(tmp_path / "base")


def names_of(model):
    """Every name that is written on a model and on its parts."""
    attributes = [vars(module) for module in model.modules()]
    configs = [values["config"] for values in attributes if "config" in values] + [model.generation_config]
    found = {values["name_or_path"] for values in attributes if "name_or_path" in values}
    return found | {value for config in configs for name, value in config.to_dict().items() if "name_or_path" in name}


def test_a_hybrid_made_in_memory_has_no_name_and_knows_its_base(named):
    hybrid, base = named
    assert names_of(hybrid) == names_of(copy.deepcopy(hybrid)) == {""}
    assert hybrid.config.dsla_config["base_model_name_or_path"] == base
    assert hybrid.config.get_dsla_config().base_model_name_or_path == base


def test_a_hybrid_is_named_by_where_it_was_saved_last(named, tmp_path):
    hybrid, base = named
    for folder in (tmp_path / "first", str(tmp_path / "second")):
        hybrid.save_pretrained(folder)
        assert names_of(hybrid) == {str(folder)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert names_of(loaded) == {str(tmp_path / "first")}
    assert loaded.config.dsla_config == hybrid.config.dsla_config
    card = (tmp_path / "first" / "README.md").read_text()
    assert f"base_model: {base}\n" in card
    loaded.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "README.md").read_text() == card, "of the base, not of the folder it was loaded from"


def test_a_hybrid_keeps_its_name_where_saving_fails(named, tmp_path, monkeypatch):
    hybrid = named[0]
    hybrid.save_pretrained(tmp_path / "here")
    with pytest.raises(ValueError, match="holds another model"):
        hybrid.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hybrid.save_pretrained(tmp_path / "there")
    with pytest.raises(ZeroDivisionError):
        hybrid.push_to_hub("someone/hybrid")
    assert names_of(hybrid) == {str(tmp_path / "here")}


def test_a_folder_is_saved_over_wherever_the_base_lay(named, tmp_path):
    hybrid = named[0]
    hybrid.save_pretrained(tmp_path / "hybrid")
    for name in ("moved/base", None):
        conversion = {k: v for k, v in hybrid.config.dsla_config.items() if k != "base_model_name_or_path"}
        hybrid.config.dsla_config = conversion | ({"base_model_name_or_path": name} if name else {})
        hybrid.save_pretrained(tmp_path / "hybrid")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").config.get_dsla_config().base_model_name_or_path == name


def test_the_base_that_level_0_gives_back_keeps_its_name(tiny_model, adapter_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = adapter_model(AutoModelForCausalLM.from_pretrained(tmp_path), level=0)
    assert model.merge_and_unload().name_or_path == str(tmp_path)


def test_lora_over_a_saved_hybrid_finds_the_hybrid_again(named, tmp_path):
    hybrid, ids = named[0], token_ids()
    hybrid.save_pretrained(tmp_path / "hybrid")
    model = lora(hybrid)
    model.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "hybrid")
    expected = logits(model, ids)
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path / "lora")
        assert [m for m in loaded.modules() if type(m).__name__ == "DSLALlamaForCausalLM"]
        assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_lora_over_an_unsaved_hybrid_names_no_base_and_says_so(named, by, tmp_path):
    hybrid = named[0]
    if by == "peft":
        model = lora(hybrid)
    else:
        model = hybrid
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"a DSLA hybrid that was never saved.*save the hybrid by save_pretrained\(\) before"):
        model.save_pretrained(tmp_path / "lora")
    assert not json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert {"config.json", "modeling_dsla_hf.py"}.isdisjoint(fingerprints(tmp_path / "lora")) and names_of(hybrid) == {""}


def test_weights_quantised_in_place_are_not_saved(adapter, hybrid, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    for model, what in ((adapter, "adapter"), (hybrid, "hybrid")):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match=rf"was quantised in place.*save the {what} before quantize_\(\)"):
            model.save_pretrained(tmp_path)
        assert not fingerprints(tmp_path)
