"""What a user gets by installing: imports from anywhere, type hints, and modules whose imports point one way."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dsla_hf
import dsla_kernels

REPOSITORY = Path(__file__).resolve().parents[2]
HF_FOLDER, KERNELS_FOLDER = (Path(package.__file__).parent for package in (dsla_hf, dsla_kernels))


def run_python(code, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:dsla", "-c", code],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- imports ----------------------------------------------------------------------------------------------------


def test_import_from_the_repository_root_finds_the_package_and_not_a_folder():
    code = (
        "import dsla_hf, dsla_kernels, peft, transformers\n"
        "assert 'DSLA' in list(peft.PeftType)\n"
        "transformers.AutoConfig.for_model('dsla')\n"
        "assert all(hasattr(dsla_hf, name) for name in dsla_hf.__all__)\n"
        "print(dsla_hf.__file__, dsla_kernels.__file__, dsla_hf.__version__, sep='|')"
    )
    hf_file, kernels_file, release = run_python(code, cwd=REPOSITORY).strip().split("|")
    assert Path(hf_file).resolve() == HF_FOLDER.resolve() / "__init__.py"
    assert Path(kernels_file).resolve() == KERNELS_FOLDER.resolve() / "__init__.py"
    assert release == version("dsla-hf")


def test_kernels_import_and_run_without_transformers_and_peft(tmp_path):
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "dsla_hf", "accelerate", "huggingface_hub"):
            raise ImportError(f"dsla_kernels must not need {name}")

sys.meta_path.insert(0, Blocker())
import torch
from dsla_kernels import dual_state_attention
q, k, v = torch.randn(3, 1, 5, 2, 4)
o, state = dual_state_attention(q, k, v, torch.zeros(1, 5, 2, 2, 2), torch.full((2, 2), 0.5), output_final_state=True)
assert o.shape == (1, 5, 2, 4) and state.shape == (1, 2, 2, 4, 4)
print("ran")
"""
    assert run_python(code, cwd=tmp_path).strip() == "ran"


# What only some users need: modules of other packages, as they look to our modules when they have moved.
WITHOUT_WHAT_ONE_FEATURE_NEEDS = """
import builtins, sys
from pathlib import Path

ONE_FEATURE = (
    "accelerate", "huggingface_hub", "peft.utils.integrations", "safetensors", "torch._dynamo", "torch._inductor", "torch.distributed",
    "torch.nn.attention", "tqdm", "transformers.activations", "transformers.distributed", "transformers.generation",
    "transformers.initialization", "transformers.integrations", "transformers.masking_utils", "transformers.modeling_utils",
    "transformers.models", "transformers.quantizers", "triton",
)
original = builtins.__import__

def without(name, scope=None, names=None, fromlist=(), level=0):
    if not level and (scope or {}).get("__name__", "").startswith("dsla_") and any(f"{name}.".startswith(f"{x}.") for x in ONE_FEATURE):
        raise ImportError(f"{name} has moved", name=name)
    return original(name, scope, names, fromlist, level)

builtins.__import__ = without
import dsla_hf
heavy = ("graph", "decode_attention", "fused_steps", "head_sharding", "sharding", "distillation", "serving")
assert not {f"dsla_hf.{name}" for name in heavy} & sys.modules.keys()
assert set(dsla_hf.__all__) <= set(dir(dsla_hf))

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from dsla_hf.models.saving import push_folder

sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": None}
def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
def adapter(model):
    return get_peft_model(model, dsla_hf.DSLAConfig(task_type="CAUSAL_LM", conversion_order=[1, 0], window_size=8))
ids = torch.arange(1, 8)[None]
model = adapter(base())
model.set_level(1)
model(input_ids=ids, labels=ids).loss.backward()
model.generate(input_ids=ids, max_new_tokens=3, level_policy=2)
model.save_pretrained("adapter")
PeftModel.from_pretrained(base(), "adapter").generate(input_ids=ids, max_new_tokens=3)
hybrid = model.merge_and_unload()
hybrid.generate(input_ids=ids, max_new_tokens=3)
hybrid.save_pretrained("hybrid")

quantised, offloaded = base(), base()
weight = quantised.model.layers[1].self_attn.q_proj.weight
quantised.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
offloaded.model.layers[1].self_attn.q_proj._hf_hook = object()
features = {
    "GraphDecoder": lambda: dsla_hf.GraphDecoder,
    "tensor parallelism": lambda: AutoModelForCausalLM.from_pretrained("hybrid", tp_plan="auto"),
    "a hybrid": lambda: AutoModelForCausalLM.from_pretrained("hybrid"),
    "a quantised base": lambda: adapter(quantised),
    "a base with offloaded weights": lambda: adapter(offloaded),
    "generate with a static cache": lambda: adapter(base()).generate(input_ids=ids, max_new_tokens=3, cache_implementation="static"),
    "an upload to the hub": lambda: push_folder(Path("hybrid"), "me/hybrid"),
}
for feature, use in features.items():
    try:
        use()
        print(feature, "needs nothing")
    except ImportError as error:
        print(error)
"""


def test_what_one_feature_needs_breaks_neither_the_import_nor_other_features(tmp_path):
    lines = run_python(WITHOUT_WHAT_ONE_FEATURE_NEEDS, cwd=tmp_path).splitlines()
    moved = {
        "GraphDecoder": r"[\w.]+",
        "tensor parallelism": r"(transformers|torch)\.distributed[\w.]*",
        "a hybrid": "transformers.initialization",
        "a quantised base": "peft.utils.integrations",
        "a base with offloaded weights": "accelerate.utils",
        "generate with a static cache": "transformers.masking_utils",
        "an upload to the hub": "huggingface_hub",
    }
    assert len(lines) == len(moved)
    installed = re.escape(f"(torch {version('torch')}, transformers {version('transformers')}, ")
    for line, (feature, module) in zip(lines, moved.items(), strict=True):
        assert re.match(rf"{feature} cannot be used with the installed releases {installed}.*: {module} has moved\. Everything else", line)


@pytest.mark.parametrize("folder", [HF_FOLDER, KERNELS_FOLDER], ids=["dsla_hf", "dsla_kernels"])
def test_ships_type_hints(folder):
    assert (folder / "py.typed").is_file()


def test_public_names_are_sorted_and_exist():
    for package in (dsla_hf, dsla_kernels):
        missing = [name for name in package.__all__ if not hasattr(package, name)]
        assert not missing, f"{package.__name__}.__all__ names {missing}"
        assert len(set(package.__all__)) == len(package.__all__)
