"""The test suites that transformers and peft run on their own classes, run on ours.

Their wheels hold no tests, so they come from copies of the sources, of the versions that are installed:

    UPSTREAM_SRC=folder python -m pytest tests/compat/test_upstream.py

where `folder` holds trees such as `transformers-5.23.0` and `peft-0.21.2`, a release from PyPI (sdist) or a checkout of the tag.
docs/compatibility.md has the counts, and what the releases leave out of their tests.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
import unittest
import unittest.mock
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from tiny import ARCHITECTURE_OPTIONS
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from dsla_hf import DSLAConfig
from dsla_hf.models.adapter import DSLALayer
from dsla_hf.models.hybrid import hybrid_classes

# Their warnings are not ours to fix.
pytestmark = [pytest.mark.filterwarnings("default")]


# --- finding and importing their tests ----------------------------------------------------------------------------


def find_tests(package):
    """The folder `tests` of the sources of the installed version, and if there is none, why."""
    if "UPSTREAM_SRC" not in os.environ:
        return None, "needs UPSTREAM_SRC=folder, with copies of the sources of transformers and peft: their wheels hold no tests"
    wanted, found = version(package), []
    for folder in sorted(Path(os.environ["UPSTREAM_SRC"]).glob(f"{package}*")):
        init = folder / "src" / package / "__init__.py"
        match = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE) if init.exists() else None
        if match and match[1] == wanted:
            return folder / "tests", None
        found.append(f"{folder.name} ({match[1] if match else 'no version'})")
    return None, f"UPSTREAM_SRC holds no sources of {package} {wanted}, which is installed; it holds {', '.join(found) or 'none at all'}"


def open_package(name, tests):
    """Make a folder of tests importable as a package, whose own name is `tests` in both projects."""
    package = types.ModuleType(name)
    package.__path__ = [str(tests)]
    sys.modules[name] = package


def stand_in(name, tests, **contents):
    """A module that a release leaves out of its tests, with nothing but these names in it. Does nothing where it is there."""
    package, _, path = name.partition(".")
    if (tests / (path.replace(".", "/") + ".py")).exists():
        return
    for i in range(1, path.count(".") + 2):
        full = ".".join([package, *path.split(".")[:i]])
        if full not in sys.modules:
            open_package(full, tests / "/".join(path.split(".")[:i]))
    vars(sys.modules[name]).update(contents)


def import_tests(name):
    """A module of theirs; their marks are not in our list of known ones."""
    with unittest.mock.patch.object(pytest.mark, "_config", None):
        return importlib.import_module(name)


def load_suites(package, load):
    """What `load` imports from the tests of a package, and if that cannot be, why."""
    tests, why_not = find_tests(package)
    if tests is None:
        return None, why_not
    try:
        return load(f"upstream_{package}_tests", tests), None
    except ModuleNotFoundError as error:
        return None, f"the tests of {package} need a package that is not installed: {error.name}"


# --- transformers -------------------------------------------------------------------------------------------------

# Tests of transformers that do not apply to hybrids, or not in one of the suites.
NOT_FOR_HYBRIDS = {
    "test_attention_outputs": "a DSLA layer has no attention matrix: output_attentions gives those of the softmax layers only",
    "TestLlamaConvertedThroughout.test_retain_grad_hidden_states_attentions": "there is no attention matrix whose gradient could be kept",
    "TestGptOss.test_keep_in_fp32_modules": "transformers keeps every name with 'norm' in it in fp32, so dsla.norm_weight too; "
    "the test expects whole names",
    "TestPhi3.test_model_rope_with_partial_rotation": "a hybrid is of one rotary layout: its config with another is refused",
}


def load_transformers(package, tests):
    """(mixins, config tester) of transformers' tests of a causal LM."""
    open_package(package, tests)
    stand_in(f"{package}.exporters.test_export", tests, ExportTesterMixin=object)
    stand_in(f"{package}.generation.test_utils", tests, GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    common = {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 5}
    common |= {"architectures": ["A"], "id2label": {0: "a"}, "label2id": {"a": 0}, "problem_type": "regression"}
    stand_in(f"{package}.utils.test_configuration_utils", tests, config_common_kwargs=common)
    modeling = import_tests(f"{package}.test_modeling_common")
    training = import_tests(f"{package}.test_training_mixin")
    with unittest.mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        configuration = import_tests(f"{package}.test_configuration_common")
    return (modeling.ModelTesterMixin, modeling.GenerationTesterMixin, training.TrainingTesterMixin), configuration.ConfigTester


TRANSFORMERS, NO_TRANSFORMERS = load_suites("transformers", load_transformers)


@pytest.mark.skipif(TRANSFORMERS is None, reason=str(NO_TRANSFORMERS))
def test_transformers_is_there():
    """Says why not, where its tests cannot run."""


class HybridTester:
    """What transformers' suites ask for: a config, a model class and inputs, longer than the window."""

    is_training = True
    batch_size, seq_length = 5, 14
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, base, converted):
        self.base, self.converted = base, converted
        self.config_class, self.causal_lm_class = hybrid_classes(base)

    def get_config(self):
        dsla = DSLAConfig(conversion_order=self.converted, base_model_type=self.base, window_size=8, sink_tokens=2)
        sizes = {"vocab_size": 99, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
        sizes |= {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | ({} if self.base == "phi3" else {"head_dim": 8})
        particulars = dict(ARCHITECTURE_OPTIONS[self.base])
        if self.base == "cohere2":
            particulars["logit_scale"] = 1.0  # else its own logits are too small to learn in the steps of the training test
        for per_layer in particulars.keys() & {"layer_types", "no_rope_layers"}:
            particulars[per_layer] = particulars[per_layer][: self.num_hidden_layers]
        return self.config_class(**sizes, **particulars, dsla_config=dsla.to_hybrid_dict())

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decoder_forward(self, input_ids=None):
    return self.model(input_ids)


class BarePaths(unittest.TestCase):
    """Compares configs without the path they were loaded from, which ours keep for their error messages."""

    def assertEqual(self, first, second, msg=None):
        first, second = ({**x, "_name_or_path": ""} if isinstance(x, dict) else x for x in (first, second))
        super().assertEqual(first, second, msg)  # noqa: PT009


if TRANSFORMERS:
    MIXINS, ConfigTester = TRANSFORMERS

    class HybridSuite(*MIXINS):
        model_tester = None
        test_can_init_all_missing_weights_before_2023 = True

        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            for test, why in NOT_FOR_HYBRIDS.items():
                suite, _, name = test.rpartition(".")
                if suite in ("", cls.__name__):
                    setattr(cls, name, unittest.skip(why)(getattr(cls, name)))

        def setUp(self):
            self.model_tester = HybridTester(self.base, self.converted)
            model_class = self.model_tester.causal_lm_class
            self.all_model_classes = (model_class,)
            # Some tests look for a class by its name among those of transformers, and those of rotary embeddings for a decoder.
            mapping = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            if "rope" in self._testMethodName:
                mapping = MODEL_MAPPING_NAMES
                self.all_model_classes = (type(f"{model_class.__name__}Decoder", (model_class,), {"forward": decoder_forward}),)
            if "router_logits" in self._testMethodName:  # looks for experts in the module of the class
                module = sys.modules[model_class.base_model_class.__module__]
                self.enterContext(unittest.mock.patch.object(inspect, "getmodule", return_value=module))
            self.enterContext(unittest.mock.patch.dict(mapping, {"dsla": self.all_model_classes[0].__name__}))

        def test_config(self):
            config = self.model_tester.get_config()
            # The test's configs have heads of other sizes, from which the rotary layout follows anew.
            conversion = {name: value for name, value in config.dsla_config.items() if name not in ("rotary_layout", "rotary_dim")}
            conversion = type(config)(hidden_size=32, dsla_config=conversion).dsla_config
            tester = ConfigTester(BarePaths(), config_class=type(config), hidden_size=32, dsla_config=conversion)
            tester.parent.model_tester = self.model_tester
            tester.run_common_tests()

    # One of two layers converted in each architecture, and all of them in one.
    for kind in ARCHITECTURE_OPTIONS:
        name = "Test" + kind.title().replace("_", "")
        globals()[name] = type(name, (HybridSuite, unittest.TestCase), {"base": kind, "converted": [1], "__module__": __name__})

    class TestLlamaConvertedThroughout(HybridSuite, unittest.TestCase):
        base, converted = "llama", [1, 0]


# --- peft ---------------------------------------------------------------------------------------------------------

# Tests of peft that do not apply to DSLA adapters.
NOT_FOR_ADAPTERS = {
    "merge_layers_is_idempotent": "a DSLA adapter is not merged in place: it replaces a module, merge_and_unload() makes a hybrid",
    "merge_layers_multi": "two DSLA adapters are two replacements of one layer, so there is no sum of them to merge",
    "save_pretrained-safe_serialization=False": "DSLA adapters are saved as safetensors only, no pickles",
    "save_pretrained_selected_adapters-safe_serialization=False": "DSLA adapters are saved as safetensors only, no pickles",
}


def load_peft(package, tests):
    open_package(package, tests)
    missing = {} if importlib.util.find_spec("diffusers") else {"diffusers": types.ModuleType("diffusers")}
    for module in missing.values():
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    with unittest.mock.patch.dict(sys.modules, missing):
        return import_tests(f"{package}.testing_common").PeftCommonTester


PEFT, NO_PEFT = load_suites("peft", load_peft)


@pytest.mark.skipif(PEFT is None, reason=str(NO_PEFT))
def test_peft_is_there():
    """Says why not, where its tests cannot run."""


if PEFT:

    class AdapterSuite(PEFT):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self):
            mask = torch.ones(2, 12, dtype=torch.long)
            mask[1, 2] = 0
            return {"input_ids": torch.arange(24).view(2, 12) + 3, "attention_mask": mask}

    ARGUMENTS = {"use_reentrant": [True, False], "dtype": [torch.float16, torch.bfloat16], "raises_err": [False], "test_name": [""]}
    ARGUMENTS["safe_serialization"] = [True, False]

    def peft_tests():
        """Every test of the suite, with each of the arguments that it takes."""
        for name in sorted(name for name in dir(AdapterSuite) if name.startswith("_test_")):
            parameters = inspect.signature(getattr(AdapterSuite, name)).parameters
            if "config_cls" not in parameters:
                continue  # a part of another test
            options = [{}]
            for parameter in sorted(parameters.keys() & ARGUMENTS.keys()):
                options = [{**some, parameter: value} for some in options for value in ARGUMENTS[parameter]]
            for some in options:
                label = "-".join([name.removeprefix("_test_"), *(f"{k}={v}" for k, v in some.items() if v != "")])
                marks = [pytest.mark.skip(reason=NOT_FOR_ADAPTERS[label])] if label in NOT_FOR_ADAPTERS else []
                yield pytest.param(name, some, id=label, marks=marks)

    class PlanConfig(DSLAConfig):
        """Knows the plan by the name that other methods of peft have for it."""

        def __init__(self, layers_to_transform=None, **options):
            super().__init__(conversion_order=layers_to_transform, **options)

    @pytest.fixture(scope="module", params=["llama", "qwen3"])
    def checkpoint(request, tmp_path_factory):
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}
        folder = tmp_path_factory.mktemp(request.param)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes)).save_pretrained(folder)
        return str(folder)

    @pytest.mark.parametrize("window", [0, 4])
    @pytest.mark.parametrize("name, options", list(peft_tests()))
    def test_peft(name, options, window, checkpoint, monkeypatch):
        if name == "_test_merge_layers":  # that merging in place is refused has a test of its own; the rest applies
            monkeypatch.setattr(DSLALayer, "merge", lambda *args, **kwargs: None)
        config = {"task_type": "CAUSAL_LM", "window_size": window, "sink_tokens": 0}
        getattr(AdapterSuite(), name)(model_id=checkpoint, config_cls=PlanConfig, config_kwargs=config, **options)
