"""Saving adapters and hybrids: nothing of another model is overwritten, nothing is left half-written, a card goes with it."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from ..compat import needed_for
from ..compat.attributes import carries_adapter
from ..compat.methods import around
from ..compat.peft_type import DSLA
from ..core.files import written_whole
from ..core.tensor_parallel import is_tensor_parallel, wait_for_first
from .cards import adapter_card, hybrid_card
from .configuration import DSLAConfig
from .fingerprint import same_base
from .multimodal import auto_class_of
from .quantised import quantised_weight

SHIM_NAME = "modeling_dsla_hf"
SHIM = '''"""Lets transformers load this checkpoint with trust_remote_code=True. Needs the package: pip install dsla-hf."""

from dsla_hf import DSLAForCausalLM, DSLAHybridConfig

__all__ = ["DSLAForCausalLM", "DSLAHybridConfig"]
'''

HUB_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr")

# Names that transformers gives to weights, whole or cut into shards.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_hybrid(model: Any, save: Callable[..., None], save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save a hybrid by `save` (transformers' own), with `auto_map`, the file it names and a model card. From then on its name is the
    directory, or the repository if it is pushed as well.

    Raises:
        ValueError: if the directory holds another model, or the weights were quantised in place.
    """
    if carries_adapter(model):  # transformers saves the adapter alone
        _warn_of_nameless_base(model, model.peft_config.values())
        return save(save_directory, *args, **kwargs)
    directory = Path(save_directory)
    dsla_config = model.config.get_dsla_config()
    check_hybrid_directory(directory, model.config)
    if getattr(model, "hf_quantizer", None) is None:
        _check_not_quantised(model, "save the hybrid")
    push_to_hub = kwargs.pop("push_to_hub", False)
    auto_class = auto_class_of(dsla_config.base_model_type)
    model.config.auto_map = {"AutoConfig": f"{SHIM_NAME}.DSLAHybridConfig", auto_class: f"{SHIM_NAME}.DSLAForCausalLM"}
    if is_tensor_parallel(model) and torch.distributed.get_rank():  # hands its part to the first process, which writes
        with tempfile.TemporaryDirectory() as unused:
            save(unused, *args, **kwargs)
        name_model(model, str(save_directory))
        return wait_for_first(model)
    if kwargs.get("is_main_process", args[0] if args else True):
        with written_whole(directory, WEIGHT_FILES) as temporary:
            save(temporary, *args, **kwargs)
            (temporary / f"{SHIM_NAME}.py").write_text(SHIM)
            (temporary / "README.md").write_text(hybrid_card(dsla_config, model))
    name_model(model, str(save_directory))
    wait_for_first(model)
    if push_to_hub:
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        _push(model, directory, kwargs.get("repo_id") or directory.name, options)


def name_model(model: Any, name: str) -> None:
    """Say where a hybrid lies (nowhere: ""). PEFT, TRL, lm-eval and others load a model and its tokenizer again by this name."""
    for module in model.modules():
        if "name_or_path" in vars(module):
            module.name_or_path = name
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            config.name_or_path = name


def _check_not_quantised(model: Any, what: str, part: str = "") -> None:
    if (name := quantised_weight(model, part)) is not None:
        raise ValueError(
            f"{name} was quantised in place, as by torchao's quantize_(), and files hold weights in full precision: {what} before "
            "quantize_(), or load it again"
        )


def _warn_of_nameless_base(base: Any, configs: Iterable[Any]) -> None:
    """An adapter of another method records its base by name."""
    nameless = getattr(getattr(base, "config", None), "model_type", None) == "dsla" and not base.config.name_or_path
    if nameless and not all(config.base_model_name_or_path for config in configs):
        warnings.warn(
            "this adapter's base is a DSLA hybrid that was never saved, so adapter_config.json cannot name it: save the hybrid by "
            "save_pretrained() before an adapter goes over it, or write its directory into base_model_name_or_path",
            stacklevel=4,
        )


def push_saved(model: Any, repo_id: str, **options: Any) -> Any:
    """What `save_pretrained` writes, to the hub. transformers' own `push_to_hub` replaces the model card by an empty one.

    Options: `commit_message`, `private`, `token`, `revision`, `create_pr`; others go to `save_pretrained`.
    """
    if is_tensor_parallel(model):
        raise ValueError("the model is shared among processes: save_pretrained it, and upload the folder from one of them")
    hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    name = getattr(model, "name_or_path", "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, **{name: value for name, value in options.items() if value is not None})
        finally:
            if not isinstance(model, PeftModel):
                name_model(model, name)  # not that of a folder which is gone soon
        return _push(model, Path(folder), repo_id, hub_options)


def _push(model: Any, folder: Path, repo_id: str, options: dict[str, Any]) -> Any:
    """Upload a folder; a hybrid is named by the repository then, unless it lies in a branch or a pull request of it."""
    repo_id, uploaded = push_folder(folder, repo_id, **options)
    if not (isinstance(model, PeftModel) or options.get("create_pr") or options.get("revision")):
        name_model(model, repo_id)
    return uploaded


def push_folder(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> tuple[str, Any]:
    """Upload a folder, making the repository if there is none. Returns the repository's full name and what the hub says."""
    with needed_for("an upload to the hub"):
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload model"
    uploaded = api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message, revision=revision, create_pr=create_pr)
    return repo_id, uploaded


def check_hybrid_directory(directory: Path, config: Any) -> None:
    found = _read_json(directory / "config.json")
    if found is None:
        if (directory / "adapter_config.json").exists():
            raise ValueError(f"{directory} holds an adapter: save the hybrid into a directory of its own")
        return
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    conversions = (_without_name(found.get("dsla_config")), _without_name(config.dsla_config))
    same = found.get("model_type") == "dsla" and all(found.get(name) == getattr(config, name, None) for name in sizes)
    same = same and conversions[0] == conversions[1]
    if not same:
        raise ValueError(f"{directory} holds another model ({found.get('model_type')}): save into an empty directory")


def _without_name(hybrid: Any) -> Any:
    """A `dsla_config` but for where its base lies, which may have moved."""
    return {name: value for name, value in hybrid.items() if name != "base_model_name_or_path"} if isinstance(hybrid, dict) else hybrid


def check_adapter_directory(directory: Path, config: DSLAConfig) -> None:
    """Raises ValueError if `directory` holds a model, or an adapter that is not another state of this one."""
    if (model := _read_json(directory / "config.json")) is not None:
        raise ValueError(f"{directory} holds a model ({model.get('model_type')}): save the adapter into a directory of its own")
    found = _read_json(directory / "adapter_config.json")
    if found is None:
        return
    sizes = found.get("base_dimensions") or {}
    found = {"rotary_layout": "halves", "rotary_dim": sizes.get("head_dim"), **found}  # as all files of format 1
    same = (
        found.get("peft_type") == DSLA
        and found.get("base_model_type") == config.base_model_type
        and found.get("base_dimensions") == config.base_dimensions
        and found.get("conversion_unit", "layer") == config.conversion_unit
        and {str(x) for x in found.get("conversion_order") or ()} == {str(x) for x in json.loads(json.dumps(config.conversion_order or ()))}
        and list(found.get("trained_projections") or ()) == list(config.trained_projections)
        and all(found.get(name) == json.loads(json.dumps(value)) for name, value in config.mathematics().items())
        and same_base(found.get("base_fingerprint"), config.base_fingerprint)
    )
    if not same:
        raise ValueError(f"{directory} holds another adapter ({found.get('peft_type')}): save into an empty directory")


def _read_json(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


# --- what PEFT writes -------------------------------------------------------------------------------------------

# PEFT lets a method choose its layers and its state dict, but not how a directory is written. Others' adapters are saved as before.


def _save_adapter(original: Callable[..., None], self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `PeftModel.save_pretrained`."""
    selected = kwargs.get("selected_adapters") or list(self.peft_config)
    configs = {name: c for name, c in self.peft_config.items() if isinstance(c, DSLAConfig) and name in selected}
    if not configs:
        _warn_of_nameless_base(self.get_base_model(), [self.peft_config[name] for name in selected if name in self.peft_config])
        return original(self, save_directory, *args, **kwargs)
    if is_tensor_parallel(self):
        raise ValueError(
            "each process holds a part of this adapter, and nothing of it was trained: copy the folder that it was loaded from, or "
            "load base and adapter without tp_plan"
        )
    if not kwargs.get("safe_serialization", args[0] if args else True):
        raise ValueError("DSLA adapters are saved as safetensors only: leave safe_serialization out")
    _check_not_quantised(self, "save the adapter", part="dsla_")
    directory = Path(save_directory)
    for name, config in configs.items():
        check_adapter_directory(directory if name == "default" else directory / name, config)
    if not kwargs.get("is_main_process", True):
        return original(self, save_directory, *args, **kwargs)
    with written_whole(directory) as temporary:
        original(self, str(temporary), *args, **kwargs)
        (temporary / "README.md").write_text(adapter_card(next(iter(configs.values())), self.get_base_model()))


def _push_adapter(original: Callable[..., Any], self: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """In place of `PeftModel.push_to_hub`."""
    if args or not any(isinstance(config, DSLAConfig) for config in self.peft_config.values()):
        return original(self, repo_id, *args, **kwargs)
    return push_saved(self, repo_id, **kwargs)


around("peft:PeftModel.push_to_hub", _push_adapter)
around("peft:PeftModel.save_pretrained", _save_adapter)
