"""Commands over multimodal checkpoints: they run the text model, and merge makes a hybrid of the whole."""

import json
from types import SimpleNamespace

import pytest
import torch
from engine_texts import ask, run
from multimodal_models import IMAGE, save_llava, tiny_multimodal
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from dsla_cli import main
from dsla_hf.cli.generate import generate
from dsla_hf.cli.merge import merge
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.models.loading import check_convertible, load_config, load_model, load_processor
from dsla_hf.serving.command import ServeOptions, load

TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`whole`, a LLaVA with its processor, `text.txt`, and `adapter`, distilled by the command on text."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    save_llava(folder / "whole", LlamaConfig(**SIZES, **ends, vocab_size=300, initializer_range=0.2), tokenizer)
    (folder / "text.txt").write_text(TEXT)
    options = ["--model", str(folder / "whole"), "--data", str(folder / "text.txt"), "--output-dir", str(folder / "adapter")]
    options += ["--unit", "layer", "--window-size", "8", "--length", "64", "--tokens", "500", "--ranking-sequences", "2"]
    main(["distill", *options, "--eval-sequences", "1", "--per-device-train-batch-size", "2", "--dtype", "float32", "--use-cpu"])
    return SimpleNamespace(whole=str(folder / "whole"), adapter=str(folder / "adapter"), tokenizer=tokenizer)


def test_the_adapter_of_the_command_is_that_of_the_whole(made):
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(made.whole), made.adapter).eval()
    config = model.peft_config["default"]
    assert (config.base_model_type, config.base_model_name_or_path) == ("llama", made.whole) and config.order_scores
    model.set_level(2)
    prompt = made.tokenizer("99 green bottles", return_tensors="pt")
    ids = model.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=6, do_sample=False)
    expected = made.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(made.whole, made.adapter, 2, prompt="99 green bottles", max_new_tokens=6, dtype="float32") == expected


def test_merged_it_reads_images(made, tmp_path, capsys):
    merge(made.whole, made.adapter, "50%", str(tmp_path / "hybrid"))
    assert "of 4 are DSLA (level 2)" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "hybrid")
    hybrid = AutoModelForImageTextToText.from_pretrained(tmp_path / "hybrid")
    inputs = processor(images=Image.new("RGB", (9, 9), (200, 30, 30)), text="<image> green bottles", return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(made.whole), made.adapter).eval()
    model.set_level(2)
    with torch.no_grad():
        assert torch.equal(hybrid(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="hybrid is a hybrid that reads images, too, and commands run text models: use it from Python"):
        load_config(str(tmp_path / "hybrid"))


def test_the_server_serves_its_text_model(made):
    engine, tokenizer, _ = load(ServeOptions(model=made.whole, adapter=made.adapter, policy="2", slots=1, max_tokens=64, dtype="float32"))
    prompt = tokenizer("99 green bottles")["input_ids"]
    ear = ask(engine, [(prompt, 6)])[0]
    run(engine)
    found = tokenizer.decode(ear.tokens, skip_special_tokens=True)
    assert found == generate(made.whole, made.adapter, 2, prompt="99 green bottles", max_new_tokens=6, dtype="float32")


@pytest.mark.parametrize("kind, text", [("gemma3", "gemma3_text"), ("qwen3_vl", "qwen3"), ("qwen2_5_vl", "qwen2")])
def test_config_and_model_of_a_checkpoint_are_those_of_its_text_model(kind, text, tmp_path):
    tiny_multimodal(kind).save_pretrained(tmp_path)
    config, model = load_config(str(tmp_path)), load_model(str(tmp_path), "auto")
    check_convertible(str(tmp_path), config)
    assert (config.model_type, config.num_hidden_layers, config.name_or_path) == (text, 4, str(tmp_path))
    assert type(model.config) is type(config) and model.config.name_or_path == str(tmp_path)


def test_a_checkpoint_without_a_processor_is_told(made, tmp_path, caplog):
    tiny_multimodal("llava").save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="dsla_hf"):
        assert type(load_processor(str(tmp_path))) is type(made.tokenizer)
    assert "has no processor of images that can be read, so its tokenizer alone is taken" in caplog.text


def test_a_text_model_that_is_not_supported_is_refused_by_every_command(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4", "image_token_index": IMAGE}))
    with pytest.raises(ValueError, match=r"'llama4' holds a text model of type 'llama4_text' .* chunked_attention"):
        load_config(str(tmp_path))
