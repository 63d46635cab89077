"""Hybrids inside transformers: saved and loaded by the Auto classes, in this process and in fresh ones."""

import copy
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import dsla_hf
from dsla_hf import DSLAConfig, DSLAForCausalLM, DSLAHybridConfig, DualStateAttention
from dsla_hf.core.attention import half_life_to_logit
from dsla_hf.models.configuration import FORMAT_VERSION
from dsla_hf.models.decoder import decoder_layers
from dsla_hf.models.hybrid import hybrid_classes

CONVERTED = [2, 0]  # of four layers


@pytest.fixture
def hybrid(tiny_model, adapter_model):
    """Factory of hybrids with DSLA in layers 2 and 0: `hybrid("llama", window_size=0)`."""

    def make(kind, window_size=8, **config):
        return adapter_model(tiny_model(kind, **config), window_size=window_size, level=2).merge_and_unload()

    return make


@pytest.fixture
def saved(hybrid, tmp_path):
    """A saved Llama hybrid: its directory and its config.json."""
    hybrid("llama").save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid", json.loads((tmp_path / "hybrid" / "config.json").read_text())


def token_ids(batch=2, tokens=37):
    return torch.randint(3, 97, (batch, tokens))


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


def write_config(directory, values):
    (directory / "config.json").write_text(json.dumps(values))


# --- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
def test_saved_hybrid_loads_bit_equal(base_kind, window_size, hybrid, tmp_path):
    model, ids = hybrid(base_kind, window_size), token_ids()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(model) is hybrid_classes(base_kind)[1]
    assert torch.equal(logits(loaded, ids), expected)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not loaded.training and loaded.config.get_dsla_config().window_size == window_size


def test_sinks_write_gate_and_half_lives_survive_saving(tiny_model, adapter_model, tmp_path):
    options = {"window_size": 10, "sink_tokens": 5, "write_gate": False, "half_lives": ((16.0, 128.0), (4.0, 4.0))}
    adapter, ids = adapter_model(tiny_model("llama"), level=2, **options), token_ids()
    model = adapter.merge_and_unload().eval()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    config = loaded.config.get_dsla_config()
    assert {name: getattr(config, name) for name in options} == options
    core = loaded.model.layers[2].self_attn.dsla
    assert {name: getattr(core, name) for name in options} == options
    assert not any("write" in name for name in loaded.state_dict())
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_auto_config_gives_the_hybrid_config_and_the_conversion(base_kind, hybrid, tmp_path):
    model = hybrid(base_kind)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config_class = hybrid_classes(base_kind)[0]
    assert type(config) is config_class is type(model.config)
    assert isinstance(config, DSLAHybridConfig) and config.model_type == "dsla" and config.base_model_type == base_kind
    conversion = config.get_dsla_config()
    assert isinstance(conversion, DSLAConfig)
    assert conversion.converted_layers == CONVERTED and conversion.base_model_type == base_kind
    assert config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert DSLAHybridConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_config_alone_round_trips(hybrid, tmp_path):
    config = hybrid("qwen3").config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.dsla_config == config.dsla_config


def test_class_for_auto_map_loads_what_the_config_names(base_kind, hybrid, tmp_path):
    model, ids = hybrid(base_kind), token_ids()
    model.save_pretrained(tmp_path)
    loaded = DSLAForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("window_size", [0, 8])
def test_bfloat16_hybrid_saves_and_loads_bit_equal(base_kind, window_size, hybrid, tmp_path):
    ids = token_ids()
    hybrid(base_kind, window_size).save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = logits(model, ids)
    assert expected.dtype == torch.bfloat16 and expected.isfinite().all()
    model.save_pretrained(tmp_path / "bfloat16")
    assert {x.dtype for x in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded, ids), expected)


def test_tied_embeddings_stay_tied_and_are_saved_once(base_kind, hybrid, tmp_path):
    model = hybrid(base_kind, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_separate_embeddings_stay_separate(hybrid, tmp_path):
    model, ids = hybrid("llama", tie_word_embeddings=False), token_ids()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_sharded_checkpoint_loads_bit_equal(base_kind, hybrid, tmp_path):
    model, ids = hybrid(base_kind), token_ids()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_converted_layers_have_the_parameters_of_the_base_and_dsla_s_own(base_kind, tiny_model, hybrid, tmp_path):
    base_names = {name for name, _ in tiny_model(base_kind).named_parameters(remove_duplicate=False)}
    hybrid(base_kind, window_size=8).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = {name for name, _ in loaded.named_parameters(remove_duplicate=False)}
    own = {name for name, _ in loaded.model.layers[2].self_attn.dsla.named_parameters()}
    gates = {"gate_down", "gate_up", "gate_bias", "write_weight", "write_bias"}
    assert own == gates | {"mix_logits", "norm_weight", "state_gain", "state_bias"}
    assert names == base_names | {f"model.layers.{layer}.self_attn.dsla.{name}" for layer in CONVERTED for name in own}
    assert not list(loaded.model.layers[2].self_attn.named_buffers())


def test_checkpoint_without_some_dsla_weights_is_not_filled_with_garbage(tiny_model, adapter_model, tmp_path):
    directory = tmp_path / "hybrid"
    adapter_model(tiny_model("llama"), level=2, half_lives=((8.0, 64.0), 4.0)).merge_and_unload().save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    dropped = {
        name: weights.pop(f"model.layers.2.self_attn.dsla.{name}") for name in ("gate_bias", "norm_weight", "gate_down", "write_bias")
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert {name.rpartition(".")[2] for name in report["missing_keys"]} == set(dropped)
    core = loaded.model.layers[2].self_attn.dsla
    for state, half_lives in enumerate(((8.0, 16.0, 32.0, 64.0), (4.0, 4.0, 4.0, 4.0))):
        expected = torch.tensor([half_life_to_logit(half_life) for half_life in half_lives])
        torch.testing.assert_close(core.gate_bias[:, state], expected.expand(2, -1))
    assert not core.write_bias.any()
    assert torch.equal(core.write_weight, weights["model.layers.2.self_attn.dsla.write_weight"])
    assert torch.equal(core.norm_weight, torch.ones_like(core.norm_weight))
    assert 0.5 < core.gate_down.std() * core.value_dim**0.5 < 2
    assert torch.equal(core.gate_up, weights["model.layers.2.self_attn.dsla.gate_up"]), "weights of the file must stay"


# --- fresh processes --------------------------------------------------------------------------------------------


def run_python(code, tmp_path, *arguments):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


WITHOUT_IMPORT = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
source, target = sys.argv[1:]
for kind in ("llama", "phi3", "qwen3", "qwen3_moe"):
    for directory in (kind + source, kind + source + "-without-auto-map"):
        for auto_class in (AutoConfig, AutoModelForCausalLM):
            try:
                auto_class.from_pretrained(directory)
            except ValueError as error:
                assert "trust_remote_code" in str(error) or "dsla" in str(error), error
            else:
                raise SystemExit(f"{directory} loaded without the package")
assert "dsla_hf" not in sys.modules
for kind in ("llama", "phi3", "qwen3", "qwen3_moe"):
    model = AutoModelForCausalLM.from_pretrained(kind + source, trust_remote_code=True).eval()
    assert type(model).__module__ == "dsla_hf.models.hybrid", type(model)
    with torch.no_grad():
        assert torch.equal(model(torch.load(f"{kind}.ids")).logits, torch.load(f"{kind}.logits")), kind
    model.save_pretrained(kind + target)
print("equal")
"""


FRESH_KINDS = ("llama", "phi3", "qwen3", "qwen3_moe")  # as in the script


def test_hybrids_load_in_a_fresh_process(hybrid, tmp_path):
    """With trust_remote_code instead of the import, and not without either; what is saved then is what was loaded."""

    def without_auto_map(directory):
        copied = shutil.copytree(directory, f"{directory}-without-auto-map")
        values = json.loads((directory / "config.json").read_text())
        del values["auto_map"]
        write_config(tmp_path / copied, values)

    for kind in FRESH_KINDS:
        model, ids = hybrid(kind), token_ids()
        torch.save(ids, tmp_path / f"{kind}.ids")
        torch.save(logits(model, ids), tmp_path / f"{kind}.logits")
        model.save_pretrained(tmp_path / kind)
        without_auto_map(tmp_path / kind)
    assert run_python(WITHOUT_IMPORT, tmp_path, "", "-second").endswith("equal\n")
    for kind in FRESH_KINDS:
        first, second = (tmp_path / name for name in (kind, f"{kind}-second"))
        assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in second.iterdir())
        assert all((first / file).read_text() == (second / file).read_text() for file in ("config.json", "modeling_dsla_hf.py"))


# --- configs that do not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        pytest.param({"dsla_config": None}, "llama.*qwen3", id="no dsla_config"),
        pytest.param({"base_model_type": "gpt2"}, "'gpt2'.*llama.*qwen3", id="unknown base"),
        pytest.param({"base_model_type": None}, "llama.*qwen3", id="no base"),
        pytest.param({"converted_layers": [0, 4]}, r"\[4\].*0 to 3", id="layer out of range"),
        pytest.param({"converted_layers": [-1]}, r"\[-1\]", id="negative layer"),
        pytest.param({"converted_layers": [1, 1]}, r"more than once: \[1\]", id="repeated layer"),
        pytest.param({"window_size": -8}, "window_size.*-8", id="bad window"),
        pytest.param({"window_size": 9}, "window_size.*even.*9", id="odd window"),
        pytest.param({"sink_tokens": 5}, "sink_tokens.*half the window of 8.*5", id="too many sinks"),
        pytest.param({"format_version": FORMAT_VERSION + 1}, f"format {FORMAT_VERSION + 1}.*install a release", id="newer format"),
        pytest.param({"new_feature": 1}, "new_feature", id="unknown entry"),
    ],
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
def test_config_that_does_not_fit_is_refused_with_the_file(auto_class, change, named, saved):
    directory, values = saved
    if change == {"dsla_config": None}:
        del values["dsla_config"]
    else:
        values["dsla_config"].update(change)
    write_config(directory, values)
    with pytest.raises(ValueError, match=f"(?s){named}") as caught:
        auto_class.from_pretrained(directory)
    assert f"{directory}/config.json" in str(caught.value), "the message must name the file"


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModelForCausalLM])
@pytest.mark.parametrize("kept", [["window_size"], None])
def test_partial_dsla_config_as_keyword_is_refused(auto_class, kept, saved):
    directory, values = saved
    kept = kept or sorted(values["dsla_config"].keys() - {"gate_rank"})
    with pytest.raises(ValueError, match=r"dsla_config.*gate_rank"):
        auto_class.from_pretrained(directory, dsla_config={name: values["dsla_config"][name] for name in kept})


def test_complete_dsla_config_as_keyword_is_used(saved):
    directory, values = saved
    changed = {**values["dsla_config"], "gate_lower_bound": -0.5}
    assert AutoConfig.from_pretrained(directory, dsla_config=changed).get_dsla_config().gate_lower_bound == -0.5
    model = AutoModelForCausalLM.from_pretrained(directory, dsla_config=changed)
    assert model.model.layers[2].self_attn.dsla.gate_lower_bound == -0.5


def test_unsupported_base_has_no_hybrid_class():
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*qwen3"):
        hybrid_classes("gpt2")
    with pytest.raises(AttributeError, match="DSLAGPT2LMHeadModel"):
        dsla_hf.models.hybrid.DSLAGPT2LMHeadModel  # noqa: B018


# --- inside transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
def test_random_init_from_config(base_kind, window_size, hybrid):
    config = copy.deepcopy(hybrid(base_kind, window_size).config)
    config.dsla_config["half_lives"] = [[64.0, 64.0], 64.0]
    model = AutoModelForCausalLM.from_config(config)
    assert logits(model, token_ids()).isfinite().all()
    for index, layer in enumerate(decoder_layers(model)):
        core = getattr(layer.self_attn, "dsla", None)
        assert (core is not None) == (index in CONVERTED)
        if core is not None:
            assert isinstance(core, DualStateAttention) and core.window_size == window_size
            torch.testing.assert_close(core.gate_bias, torch.full_like(core.gate_bias, half_life_to_logit(64.0)))
            assert torch.equal(core.norm_weight, torch.ones_like(core.norm_weight))
            assert not core.mix_logits.any()
            assert core.gate_down.std() > 0
    projection = model.model.layers[2].self_attn.q_proj.weight
    assert 0.15 < projection.std() < 0.25, "converted layers are initialised as the base's others (0.2)"


def test_only_converted_layers_select_the_dsla_function(base_kind, hybrid, tmp_path):
    model, ids = hybrid(base_kind), token_ids()
    model.save_pretrained(tmp_path)
    for candidate in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert candidate.config._attn_implementation == "sdpa"
        chosen = [layer.self_attn.config._attn_implementation for layer in candidate.model.layers]
        assert chosen == ["dsla", "sdpa", "dsla", "sdpa"]
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    chosen = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    assert chosen == ["dsla", "eager", "dsla", "eager"]
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert [layer.self_attn.config._attn_implementation for layer in eager.model.layers] == chosen
    assert torch.equal(logits(eager, ids), logits(model, ids))


def test_hybrid_and_config_survive_pickle_and_deepcopy(base_kind, hybrid):
    model, ids = hybrid(base_kind), token_ids()
    expected = logits(model, ids)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied) is type(model) and copied is not model
        assert type(copied.model.layers[2].self_attn) is type(model.model.layers[2].self_attn)
        assert torch.equal(logits(copied, ids), expected)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        with torch.no_grad():
            copied.model.layers[2].self_attn.dsla.norm_weight.zero_()
        assert not torch.equal(logits(copied, ids), expected), "the copy runs its own weights"
    assert torch.equal(logits(model, ids), expected), "and the original its own"
    for copied in (pickle.loads(pickle.dumps(model.config)), copy.deepcopy(model.config)):
        assert type(copied) is type(model.config) and copied.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("window_size", [0, 8])
def test_gradient_checkpointing_gives_the_same_gradients(base_kind, window_size, hybrid):
    model, ids = hybrid(base_kind, window_size).train(), token_ids()

    def gradients():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    plain_loss, plain = gradients()
    # transformers 5.23 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    loss, checkpointed = gradients()
    assert torch.equal(loss, plain_loss)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert plain["model.layers.2.self_attn.dsla.gate_up"].abs().max() > 0


def test_trainer_keeps_the_labels(base_kind, hybrid, tiny_model, tmp_path):
    model, ids = hybrid(base_kind), token_ids(4, 20)
    assert inspect.signature(model.forward) == inspect.signature(tiny_model(base_kind).forward)
    expected = model(ids, labels=ids).loss.item()
    model.train()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    assert Trainer(model, arguments, train_dataset=rows).train().training_loss == pytest.approx(expected, rel=1e-4)


def test_lora_on_a_hybrid_trains_saves_and_merges(base_kind, hybrid, tmp_path):
    model, ids = hybrid(base_kind), token_ids()
    model.save_pretrained(tmp_path / "hybrid")
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    expected = logits(lora, ids)
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid"), tmp_path / "lora")
    assert torch.equal(logits(again, ids), expected)
    torch.testing.assert_close(logits(again.merge_and_unload(), ids), expected, atol=1e-4, rtol=1e-4)


def test_continuous_batching_is_refused(hybrid):
    """It would run, and give wrong text: its paged cache never reaches the DSLA layers."""
    model = hybrid("llama")
    with pytest.raises((AttributeError, NotImplementedError, RuntimeError, ValueError), match=r"(?i)continuous batching"):
        model.init_continuous_batching()
