"""What a fresh installation must be able to do, run with its Python outside the tree: `python smoke.py`."""

import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dsla_cli
import dsla_hf
import dsla_kernels


def same(a, b, ids):
    with torch.no_grad():
        torch.testing.assert_close(a(input_ids=ids).logits, b(input_ids=ids).logits, rtol=0, atol=0)


def main():
    for package in (dsla_cli, dsla_hf, dsla_kernels):
        place = Path(package.__file__)
        assert place.is_relative_to(sys.prefix), f"{package.__name__} comes from {place}, not from this installation"
        assert (place.parent / "py.typed").exists() or package is dsla_cli, f"{package.__name__} has no type hints"
    assert list(files("dsla_hf").rglob("*.yaml")), "the tasks for lm-eval are missing"
    assert list(files("dsla_hf").rglob("*.jinja")), "the page of dsla report is missing"

    said = subprocess.run([Path(sys.prefix) / "bin" / "dsla", "--version"], check=True, capture_output=True, text=True).stdout
    assert version("dsla-hf") in said, said

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(99, (1, 40))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(f"{folder}/base")

        def loaded():
            return AutoModelForCausalLM.from_pretrained(f"{folder}/base").eval()

        model = get_peft_model(loaded(), dsla_hf.DSLAConfig(task_type="CAUSAL_LM", window_size=8)).eval()
        model.set_level(0)
        same(model, base, ids)
        model.set_level(1)
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        model.save_pretrained(f"{folder}/adapter")
        same(PeftModel.from_pretrained(loaded(), f"{folder}/adapter").eval(), model, ids)
        hybrid = model.merge_and_unload()
        hybrid.save_pretrained(f"{folder}/hybrid")
        same(AutoModelForCausalLM.from_pretrained(f"{folder}/hybrid").eval(), hybrid, ids)
    print(f"{said.strip()}: converts, generates, saves and loads")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
