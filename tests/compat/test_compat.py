"""Names of other packages that are not public: touched in `compat` alone, and still what they were."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
import torchao.quantization
import transformers
from accelerate import cpu_offload
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import LlamaConfig, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.auto import auto_factory

import dsla_hf
from dsla_hf import compat
from dsla_hf.compat import attributes, methods
from dsla_hf.compat.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from dsla_hf.compat.touches import ATTRIBUTES, CALLED, IMPORTED, OVERRIDDEN, WRAPPED
from dsla_hf.core.head_sharding import HeadParallel
from dsla_hf.core.tensor_parallel import HEADS

SOURCE = Path(dsla_hf.__file__).parent
FOREIGN = {"torch", "transformers", "peft", "accelerate"}
NAMES = {**WRAPPED, **OVERRIDDEN, **CALLED, **IMPORTED}


# --- each is what it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_and_takes_what_it_took(name):
    found = pkgutil.resolve_name(name)
    wanted = NAMES[name].parameters
    assert wanted is None or tuple(inspect.signature(found).parameters)[: len(wanted)] == wanted


def test_what_is_overridden_is_called_by_its_owner():
    """A name that stays while nobody calls it any more would pass by us in silence."""
    for name in OVERRIDDEN:
        module, _, path = name.partition(":")
        owner, method = path.split(".")
        files = [Path(inspect.getfile(pkgutil.resolve_name(f"{module}:{owner}"))), Path(auto_factory.__file__)]
        files += Path(peft.__file__).parent.glob("*.py")
        assert any(re.search(rf"[.]{method}\b", file.read_text(encoding="utf-8")) for file in files), name


@pytest.mark.parametrize("name", WRAPPED)
def test_methods_are_wrapped_once_and_look_as_before(name):
    wrapped = pkgutil.resolve_name(name)
    original = wrapped.__wrapped__
    assert original.__module__.split(".")[0] in FOREIGN and not hasattr(original, "__wrapped__"), "not ours, or wrapped twice"
    signature = inspect.signature(original)
    if inspect.ismethod(wrapped):  # of a class
        signature = signature.replace(parameters=[*signature.parameters.values()][1:])
    assert inspect.signature(wrapped) == signature and wrapped.__doc__ == original.__doc__ and wrapped.__name__ == original.__name__


def test_a_module_that_is_imported_anew_wraps_nothing_twice(monkeypatch):
    for cls, method in ((BaseTuner, "__init__"), (PeftModel, "load_adapter"), (PreTrainedConfig, "from_dict")):
        monkeypatch.setattr(cls, method, inspect.getattr_static(cls, method))  # as it was, afterwards
    refusals = importlib.import_module("dsla_hf.models.refusals")
    before = {name: pkgutil.resolve_name(name).__wrapped__ for name in WRAPPED}
    contents = dict(vars(refusals))
    importlib.reload(refusals)
    try:
        for name, original in before.items():
            assert pkgutil.resolve_name(name).__wrapped__ is original, name
    finally:
        vars(refusals).update(contents)


def test_a_callback_is_given_the_original_and_what_it_was_called_with(monkeypatch):
    class Owner:
        def method(self, a, b=2):
            """Of the owner."""
            return a, b

        @classmethod
        def of_class(cls, a):
            return cls, a

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "Owner", Owner, raising=False)
    for name in ("method", "of_class"):
        monkeypatch.setitem(methods.WRAPPED, f"{__name__}:Owner.{name}", None)

    def twice(original, self, *args, **kwargs):
        return original(self, *args, **kwargs), original(self, *args, **kwargs)

    for _ in range(2):
        methods.around(f"{__name__}:Owner.method", twice)
        methods.around(f"{__name__}:Owner.of_class", twice)
    assert Owner().method(1, b=3) == ((1, 3), (1, 3)) and Owner.method.__doc__ == "Of the owner."
    assert Owner.of_class(5) == ((Owner, 5), (Owner, 5)) == Owner().of_class(5)
    methods.around(f"{__name__}:Owner.method", lambda original, self, a: original(self, a)[0])
    assert Owner().method(7) == (7, 2), "another callback goes over the first one"


def test_only_what_the_table_has_is_wrapped():
    with pytest.raises(KeyError, match=r"Cache.reset is not in compat.touches.WRAPPED: put it there"):
        methods.around("transformers.cache_utils:Cache.reset", lambda original, self: original(self))
    assert not hasattr(Cache.reset, "__wrapped__")


# --- attributes of objects --------------------------------------------------------------------------------------


def test_a_config_chooses_attention_and_experts():
    config, other = LlamaConfig(attn_implementation="eager"), LlamaConfig()
    assert attributes.attention_implementation(config) == "eager"
    attributes.set_attention_implementation(config, "sdpa")
    config._experts_implementation = "eager"
    attributes.copy_implementations(config, other)
    assert attributes.attention_implementation(other) == "sdpa" and other._experts_implementation == "eager"


def test_a_model_chooses_by_the_config(tiny_model):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert attributes.attention_implementation(model.config) == "eager"


def test_a_model_into_which_transformers_puts_an_adapter(tiny_model):
    model = tiny_model("llama")
    assert not attributes.carries_adapter(model)
    model.add_adapter(dsla_hf.DSLAConfig())
    assert attributes.carries_adapter(model)


def test_parameters_that_were_loaded_are_marked(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    seen = {}

    class Watched(transformers.LlamaForCausalLM):
        def initialize_weights(self):
            seen.update({name: attributes.is_loaded(parameter) for name, parameter in self.named_parameters()})
            super().initialize_weights()

    Watched.from_pretrained(tmp_path)
    assert seen and all(seen.values())
    assert not attributes.is_loaded(torch.nn.Parameter(torch.ones(2)))


def test_initial_values_leave_loaded_weights_alone():
    loaded, missing = torch.full((2,), 3.0), torch.full((2,), 3.0)
    loaded._is_hf_initialized = True
    with compat.guard_torch_init_functions():
        torch.nn.init.zeros_(loaded)
        torch.nn.init.zeros_(missing)
    assert loaded.tolist() == [3, 3] and missing.tolist() == [0, 0]


def test_a_view_has_all_but_children_and_hooks():
    class View(torch.nn.Linear):
        def forward(self, x):
            return self.child(super().forward(x)) + self.extra

    linear = torch.nn.Linear(2, 3)
    linear.register_buffer("extra", torch.ones(3))
    linear.note = "kept"
    x, child = torch.randn(4, 2), torch.nn.ReLU()
    expected = linear(x).relu() + 1
    view = attributes.view_of(linear, View, {"child": child})
    torch.testing.assert_close(view(x), expected)
    assert view.note == "kept" and view.weight is linear.weight and not [*linear.children()]
    other = attributes.with_parameters(linear, {"weight": torch.zeros(3, 2), "bias": torch.ones(3)})
    assert (other(x) == 1).all() and linear.weight.any()
    attributes.parameters_of(linear)["weight"] = torch.nn.Parameter(torch.zeros(3, 2))
    assert view.weight is linear.weight and attributes.children_of(view) == {"child": child}


def test_a_view_of_offloaded_weights_runs_the_forward_of_its_class():
    linear = torch.nn.Linear(2, 3)
    cpu_offload(torch.nn.Sequential(linear), execution_device="cpu")
    assert {"forward", "_old_forward", "_hf_hook"} <= linear.__dict__.keys()
    view = attributes.view_of(linear, torch.nn.Linear, {})
    assert not {"forward", "_old_forward", "_hf_hook"} & view.__dict__.keys()


def test_offloaded_weights_are_brought_in():
    linear = torch.nn.Linear(2, 3)
    cpu_offload(torch.nn.Sequential(linear), execution_device="cpu")
    assert linear.weight.device.type == "meta"
    with compat.align_module_device(linear):
        assert linear.weight.device.type == "cpu"
    assert linear.weight.device.type == "meta"


def test_weights_are_dequantised():
    linear = torch.nn.Linear(64, 32)
    assert compat.dequantize_module_weight(linear) is linear.weight
    weight = linear.weight.detach().clone()
    torchao.quantization.quantize_(linear, torchao.quantization.Int8WeightOnlyConfig())
    assert type(linear.weight).__module__.startswith("torchao.")
    torch.testing.assert_close(compat.dequantize_module_weight(linear), weight, atol=0.01, rtol=0)


def test_addresses_are_promised():
    tensor = torch.ones(2)
    attributes.keep_address(tensor)
    assert tensor._dynamo_static_input_type == "unguarded"


def test_the_style_of_tensor_parallelism_is_one_of_transformers():
    assert isinstance(ALL_PARALLEL_STYLES[HEADS], HeadParallel)
    for name in ("validate_param", "shard_param", "install_forward"):
        ours, theirs = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (HeadParallel, TensorParallelLayer))
        assert ours == theirs


# --- nothing else touches them ----------------------------------------------------------------------------------


def foreign_touches(tree, defined, internal):
    """What a module touches of other packages that is not public.

    defined: names with an underscore that are our own. internal: modules of theirs that are not public."""
    imported = {}  # names that stand for something of theirs
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in FOREIGN:
            imported |= {alias.asname or alias.name: node.module for alias in node.names}
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
            if node.module in internal or any(part.startswith("_") for part in node.module.split(".")):
                yield node.module
        elif isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name.split(".")[0] in FOREIGN}
            yield from (alias.name for alias in node.names if alias.name in internal)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in imported:
                yield f"{node.value.id}.{node.attr} ="
            if re.fullmatch(r"_[a-z]\w*", node.attr) and node.attr not in {*defined, "_replace"}:
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            if isinstance(node.args[0], ast.Name) and node.args[0].id in imported:
                yield f"setattr({node.args[0].id})"
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_ATTRIBUTES:
            yield node.value


PRIVATE_ATTRIBUTES = {name for name in ATTRIBUTES if name.startswith("_")}
INTERNAL = {name.partition(":")[0] for name in IMPORTED} - {"accelerate.utils"}


def defined_in(trees):
    """Names with an underscore that these modules define: functions, classes, variables, attributes of `self`."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "decoder"):
                yield node.attr


def test_the_reader_sees_every_kind_of_touch():
    code = """
from torch.nn import _reduction
from transformers.masking_utils import create_masks_for_generate
from peft import PeftModel
import torch
PeftModel.generate = None
setattr(torch, "x", 1)
getattr(config, "_attn_implementation")
config._name_or_path
state._replace()
self._mine
"""
    found = set(foreign_touches(ast.parse(code), {"_mine"}, INTERNAL))
    assert found == {
        "_reduction",
        "transformers.masking_utils",
        "PeftModel.generate =",
        "setattr(torch)",
        "_attn_implementation",
        "_name_or_path",
    }
    assert set(defined_in([ast.parse("def _a():\n    self._b = _c = 1\n    other._d = 1")])) == {"_a", "_b", "_c"}


# Two of argparse, and the documented os._exit and sys._current_frames.
PYTHONS_OWN = {"_actions", "_format_args", "_exit", "_current_frames"}


def test_names_that_are_not_public_are_touched_in_compat_alone():
    trees = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    defined = set(defined_in(tree for name, tree in trees.items() if not name.startswith("compat/")))
    defined |= {name.rpartition(".")[2] for name in (*OVERRIDDEN, *CALLED)} | PYTHONS_OWN
    touches = {
        name: set(foreign_touches(tree, defined - PRIVATE_ATTRIBUTES, INTERNAL))
        for name, tree in trees.items()
        if not name.startswith("compat/")
    }
    new = {name: sorted(found) for name, found in touches.items() if found}
    assert not new, f"move these to dsla_hf.compat, and into the table of touches: {new}"


def test_the_page_lists_every_touch():
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = {f"| `{name.replace(':', '.')}` | {touch.why} |" for name, touch in {**NAMES, **ATTRIBUTES}.items()}
    listed = {line for line in page.partition("## Names that are not public")[2].partition("## ")[0].splitlines() if line.startswith("| `")}
    assert listed == rows, "\n".join(sorted(rows))
