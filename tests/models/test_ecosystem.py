"""What users do with a model around it: offloading, the hub, pipelines, other Auto classes."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub import HfApi, RepoUrl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import dsla_hf
from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.models.adapter_layer import _copy_linear

IDS = torch.arange(3, 63)[None]


@pytest.fixture
def hybrid_directory(tiny_model, adapter_model, tmp_path):
    hybrid = adapter_model(tiny_model("llama"), level=2).merge_and_unload().eval()
    hybrid.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid", hybrid


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_hybrid_with_offloaded_layers_gives_the_same_text(hybrid_directory, tmp_path, place):
    directory, hybrid = hybrid_directory
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": place if i in (1, 2) else "cpu" for i in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path / "offload")
    assert place == "cpu" or loaded.model.layers[2].self_attn.dsla.gate_down.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, hybrid(IDS).logits)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(loaded.generate(IDS[:, :30], **options), hybrid.generate(IDS[:, :30], **options))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_adapter_on_a_base_with_a_device_map(tiny_model, adapter_model, tmp_path, place):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_model(base, level=4)
    adapter.save_pretrained(tmp_path / "adapter")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": place if i > 1 else "cpu" for i in range(4)}
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload")
    if place == "disk":
        with pytest.raises(ValueError, match=r"layers on disk.*load the base in memory, or save a hybrid"):
            PeftModel.from_pretrained(mapped, tmp_path / "adapter")
        return
    loaded = PeftModel.from_pretrained(mapped, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, adapter(IDS).logits)


def test_offloaded_projections_are_copied_by_value(tiny_model):
    linear = tiny_model("llama").model.layers[0].self_attn.q_proj
    weight = linear.weight.detach().clone()
    cpu_offload(torch.nn.Sequential(linear), execution_device=torch.device("cpu"))
    assert linear.weight.device.type == "meta"
    assert torch.equal(_copy_linear(linear, slice(None)).weight, weight)


def test_an_adapter_over_a_base_on_meta_is_on_meta(tiny_model):
    base = tiny_model("llama").to("meta")
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.peft_config["default"].base_fingerprint is None


class Hub:
    """Stands for the hub: keeps what is pushed."""

    def __init__(self, monkeypatch):
        self.files = {}
        monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)

    def upload(self, *_, folder_path, **__):
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                self.files[str(file.relative_to(folder_path))] = file.read_bytes()


def test_adapters_and_hybrids_are_pushed_with_card_and_shim(tiny_model, adapter_model, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    model = adapter_model(tiny_model("llama"), level=2)
    model.push_to_hub("someone/adapter")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    assert json.loads(hub.files["adapter_config.json"])["level"] == 2 and b"import dsla_hf" in hub.files["README.md"]

    hub.files.clear()
    hybrid = model.merge_and_unload().eval()
    hybrid.push_to_hub("someone/hybrid")
    assert {"README.md", "config.json", "model.safetensors", "modeling_dsla_hf.py"} <= hub.files.keys()
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, hybrid(IDS).logits)

    hub.files.clear()
    hybrid.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/hybrid")
    assert "modeling_dsla_hf.py" in hub.files and (tmp_path / "saved" / "config.json").exists()


def test_a_pushed_hybrid_is_named_by_its_repository(hybrid_directory, tmp_path, monkeypatch):
    Hub(monkeypatch)
    directory, hybrid = hybrid_directory
    for elsewhere in ({"create_pr": True}, {"revision": "trial"}):  # what the repository's name leads to is another model
        hybrid.push_to_hub("someone/hybrid", **elsewhere)
        assert hybrid.name_or_path == hybrid.config.name_or_path == str(directory)
    hybrid.push_to_hub("someone/hybrid")
    assert hybrid.name_or_path == hybrid.config.name_or_path == "someone/hybrid"
    hybrid.save_pretrained(tmp_path / "again")
    assert hybrid.name_or_path == str(tmp_path / "again")
    hybrid.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="someone/other")
    assert hybrid.name_or_path == hybrid.model.name_or_path == "someone/other"


def test_text_generation_pipeline(tiny_model, adapter_model, tmp_path, caplog):
    tokenizer = train_tokenizer(["the answer is that a layer reads the state of the text " * 20], vocab_size=300)
    base = tiny_model("llama")
    base.resize_token_embeddings(len(tokenizer))
    adapter = adapter_model(base, level=2)
    options = {"max_new_tokens": 12, "do_sample": False}
    prompts = ["the answer is", "a layer reads the state of the text"]
    texts = pipeline("text-generation", model=adapter, tokenizer=tokenizer)(prompts, batch_size=2, **options)
    hybrid = adapter.merge_and_unload()
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    assert pipeline("text-generation", model=str(tmp_path / "hybrid"))(prompts, batch_size=2, **options) == texts
    assert "not supported" not in caplog.text
    inputs = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    alone = tokenizer.decode(hybrid.generate(**inputs, **options)[0], skip_special_tokens=True)
    assert texts[0][0]["generated_text"] == alone


@pytest.fixture
def unsaved(tiny_model, adapter_model, tmp_path):
    """A hybrid made in memory, its tokenizer, and the folder with base and tokenizer whose name it must not bear."""
    tokenizer = train_tokenizer(["the answer is that a layer reads the state of the text " * 20], vocab_size=300)
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hybrid = adapter_model(AutoModelForCausalLM.from_pretrained(tmp_path), level=2).merge_and_unload()
    return hybrid.eval(), tokenizer, tmp_path


def test_what_looks_up_a_tokenizer_by_name_is_given_it(unsaved):
    hybrid, tokenizer, folder = unsaved
    with pytest.raises(Exception, match="Impossible to guess which tokenizer to use"):
        pipeline("text-generation", model=hybrid)
    text = pipeline("text-generation", model=hybrid, tokenizer=tokenizer)("the answer", max_new_tokens=4, do_sample=False)
    hybrid.save_pretrained(folder / "hybrid")
    tokenizer.save_pretrained(folder / "hybrid")
    again = pipeline("text-generation", model=str(folder / "hybrid"))("the answer", max_new_tokens=4, do_sample=False)
    assert again == text


def test_lm_eval_is_given_the_tokenizer(unsaved):
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval: pip install 'dsla-hf[eval]'").HFLM
    hybrid, tokenizer, folder = unsaved
    with pytest.raises(OSError, match="Repo id must"):
        HFLM(hybrid)
    request = type("Request", (), {"args": ("the answer", " is that")})
    expected = HFLM(hybrid, tokenizer=tokenizer).loglikelihood([request], disable_tqdm=True)
    hybrid.save_pretrained(folder / "hybrid")
    tokenizer.save_pretrained(folder / "hybrid")
    assert HFLM(hybrid).loglikelihood([request], disable_tqdm=True) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of options that trl itself sets
def test_dpo_refers_to_the_hybrid_and_never_to_its_base(unsaved):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    datasets = pytest.importorskip("datasets")
    hybrid, tokenizer, folder = unsaved
    pairs = {"prompt": ["the answer"] * 2, "chosen": [" is that a layer"] * 2, "rejected": [" reads the text"] * 2}
    options = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}

    def first_loss(model, **references):
        args = trl.DPOConfig(output_dir=str(folder / "dpo"), **options)
        data = datasets.Dataset.from_dict(pairs)
        trainer = trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, **references)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    same = pytest.approx(math.log(2), abs=1e-5)  # where the reference is the model itself
    with pytest.raises(OSError, match="Repo id must"):
        first_loss(hybrid)
    assert first_loss(hybrid, ref_model=copy.deepcopy(hybrid)) == same
    hybrid.save_pretrained(folder / "hybrid")
    assert first_loss(hybrid) == same


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_other_auto_classes_refuse_in_one_line(hybrid_directory, auto_class):
    message = rf"load them with AutoModelForCausalLM, not {auto_class.__name__}$"
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(hybrid_directory[0])
    with pytest.raises(ValueError, match=message):
        auto_class.from_config(hybrid_directory[1].config)


@pytest.mark.parametrize("kind, targets", [("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]), ("phi3", "all-linear")])
def test_lora_over_a_hybrid(tiny_model, adapter_model, tmp_path, kind, targets):
    adapter_model(tiny_model(kind), level=2).merge_and_unload().save_pretrained(tmp_path / "hybrid")
    hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
    plain = hybrid(IDS).logits
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    model = get_peft_model(hybrid, config).eval()
    assert {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "proj.lora_A" in name} == {"0", "1", "2", "3"}
    with torch.no_grad():
        tuned = model(IDS).logits
        assert (tuned - plain).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain), "DSLA stays on"
        past = model(IDS[:, :40], use_cache=True).past_key_values
        torch.testing.assert_close(model(IDS[:, 40:], past_key_values=past).logits, tuned[:, 40:], atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "lora")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
        assert torch.equal(loaded(IDS).logits, tuned)
        merged = loaded.merge_and_unload()
        assert type(merged) is type(hybrid) and merged.config.get_dsla_config().converted_layers == [2, 0]
        torch.testing.assert_close(merged(IDS).logits, tuned, atol=1e-4, rtol=1e-4)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_offloaded_cache_needs_a_gpu_and_dsla_layers_stay_resident(tiny_model, adapter_model):
    layer = dsla_hf.DSLACacheLayer()
    layer.offload()
    layer.prefetch()
    assert layer.state is None


def test_no_file_of_the_checkpoint_is_a_pickle(hybrid_directory):
    assert {Path(file).suffix for file in hybrid_directory[0].iterdir()} <= {".json", ".safetensors", ".py", ".md"}


def test_the_paged_cache_of_continuous_batching_is_refused_by_adapters_too(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    with pytest.raises(NotImplementedError, match=r"continuous batching .* keeps keys and values only"):
        model(IDS, use_cache=False, cache=object())
    model.set_level(0)
    model(IDS, use_cache=False)
