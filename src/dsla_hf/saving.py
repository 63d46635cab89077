"""Saving adapters and hybrids: nothing of another model is overwritten, nothing is left half-written, a card goes with it."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .cards import adapter_card, hybrid_card
from .compat import needed_for
from .configuration import DSLAConfig, same_magnitude
from .peft_type import DSLA
from .tensor_parallel import is_tensor_parallel, wait_for_first

SHIM_NAME = "modeling_dsla_hf"
SHIM = '''"""Lets transformers load this checkpoint with trust_remote_code=True. Needs the package: pip install dsla-hf."""

from dsla_hf import DSLAForCausalLM, DSLAHybridConfig

__all__ = ["DSLAForCausalLM", "DSLAHybridConfig"]
'''
AUTO_MAP = {"AutoConfig": f"{SHIM_NAME}.DSLAHybridConfig", "AutoModelForCausalLM": f"{SHIM_NAME}.DSLAForCausalLM"}

HUB_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr")

# Names that transformers gives to weights, whole or cut into shards.
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_hybrid(model: Any, save: Callable[..., None], save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save a hybrid by `save` (transformers' own), with `auto_map`, the file it names and a model card.

    Raises:
        ValueError: if the directory holds another model.
    """
    directory = Path(save_directory)
    dsla_config = model.config.get_dsla_config()
    _check_hybrid_directory(directory, model.config)
    push_to_hub = kwargs.pop("push_to_hub", False)
    model.config.auto_map = AUTO_MAP
    if is_tensor_parallel(model) and torch.distributed.get_rank():  # hands its part to the first process, which writes
        with tempfile.TemporaryDirectory() as unused:
            save(unused, *args, **kwargs)
        return wait_for_first(model)
    if kwargs.get("is_main_process", args[0] if args else True):
        with written_whole(directory, WEIGHT_FILES) as temporary:
            save(temporary, *args, **kwargs)
            (temporary / f"{SHIM_NAME}.py").write_text(SHIM)
            (temporary / "README.md").write_text(hybrid_card(model.config, dsla_config))
    wait_for_first(model)
    if push_to_hub:
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        push_folder(directory, kwargs.get("repo_id") or directory.name, **options)


def push_saved(model: Any, repo_id: str, **options: Any) -> Any:
    """What `save_pretrained` writes, to the hub. transformers' own `push_to_hub` replaces the model card by an empty one.

    Options: `commit_message`, `private`, `token`, `revision`, `create_pr`; others go to `save_pretrained`.
    """
    if is_tensor_parallel(model):
        raise ValueError("the model is shared among processes: save_pretrained it, and upload the folder from one of them")
    hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **{name: value for name, value in options.items() if value is not None})
        return push_folder(Path(folder), repo_id, **hub_options)


def push_folder(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a folder, making the repository if there is none."""
    with needed_for("an upload to the hub"):
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload model"
    return api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message, revision=revision, create_pr=create_pr)


def _check_hybrid_directory(directory: Path, config: Any) -> None:
    found = _read_json(directory / "config.json")
    if found is None:
        if (directory / "adapter_config.json").exists():
            raise ValueError(f"{directory} holds an adapter: save the hybrid into a directory of its own")
        return
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    same = found.get("model_type") == "dsla" and all(found.get(name) == getattr(config, name, None) for name in ("dsla_config", *sizes))
    if not same:
        raise ValueError(f"{directory} holds another model ({found.get('model_type')}): save into an empty directory")


def check_adapter_directory(directory: Path, config: DSLAConfig) -> None:
    """Raises ValueError if `directory` holds a model, or an adapter that is not another state of this one."""
    if (model := _read_json(directory / "config.json")) is not None:
        raise ValueError(f"{directory} holds a model ({model.get('model_type')}): save the adapter into a directory of its own")
    found = _read_json(directory / "adapter_config.json")
    if found is None:
        return
    prints, sizes = found.get("base_fingerprint") or {}, found.get("base_dimensions") or {}
    found = {"rotary_layout": "halves", "rotary_dim": sizes.get("head_dim"), **found}  # as all files of format 1
    same = (
        found.get("peft_type") == DSLA
        and found.get("base_model_type") == config.base_model_type
        and found.get("base_dimensions") == config.base_dimensions
        and set(found.get("conversion_order") or ()) == set(config.conversion_order or ())
        and list(found.get("trained_projections") or ()) == list(config.trained_projections)
        and all(found.get(name) == json.loads(json.dumps(value)) for name, value in config.mathematics().items())
        and all(same_magnitude(value, prints.get(name, value)) for name, value in (config.base_fingerprint or {}).items())
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


class written_whole:
    """A temporary directory whose files are renamed into `directory` at the end, or dropped after an error.

    Files of `directory` whose whole name matches `replaced` and that are not written anew are removed: an earlier save may have
    cut the weights into other files, which would be loaded first. Without it nothing is removed.
    """

    def __init__(self, directory: Path, replaced: re.Pattern[str] | None = None):
        self.directory, self.replaced = directory, replaced

    def __enter__(self) -> Path:
        if self.directory.is_file():
            raise ValueError(f"{self.directory} is a file: give a directory to save into")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(dir=self.directory, prefix=".saving-")
        return Path(self._temporary.name)

    def __exit__(self, error: Any, *_: Any) -> None:
        with self._temporary as name:
            if error is not None:
                return
            source = Path(name)
            # Weights first, configuration last: a directory with a configuration has its weights.
            files = sorted((f for f in source.rglob("*") if f.is_file()), key=lambda f: f.suffix == ".json")
            targets = [self.directory / file.relative_to(source) for file in files]
            for file, target in zip(files, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            for file in {*self.directory.iterdir()} - {*targets}:
                if self.replaced is not None and self.replaced.fullmatch(file.name):
                    file.unlink()


def _wrap_save_pretrained(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_pretrained(self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        selected = kwargs.get("selected_adapters") or list(self.peft_config)
        configs = {name: c for name, c in self.peft_config.items() if isinstance(c, DSLAConfig) and name in selected}
        if not configs:
            return original(self, save_directory, *args, **kwargs)
        if is_tensor_parallel(self):
            raise ValueError(
                "each process holds a part of this adapter, and nothing of it was trained: copy the folder that it was loaded from, or "
                "load base and adapter without tp_plan"
            )
        if not kwargs.get("safe_serialization", args[0] if args else True):
            raise ValueError("DSLA adapters are saved as safetensors only: leave safe_serialization out")
        directory = Path(save_directory)
        for name, config in configs.items():
            check_adapter_directory(directory if name == "default" else directory / name, config)
        if not kwargs.get("is_main_process", True):
            return original(self, save_directory, *args, **kwargs)
        with written_whole(directory) as temporary:
            original(self, str(temporary), *args, **kwargs)
            (temporary / "README.md").write_text(adapter_card(next(iter(configs.values())), getattr(self, "config", None)))

    return save_pretrained


def _wrap_push_to_hub(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if args or not any(isinstance(config, DSLAConfig) for config in self.peft_config.values()):
            return original(self, repo_id, *args, **kwargs)
        return push_saved(self, repo_id, **kwargs)

    return push_to_hub


# PEFT lets a method choose its layers and its state dict, but not how a directory is written; adapters of other methods
# are saved as before.
PeftModel.push_to_hub = _wrap_push_to_hub(PeftModel.push_to_hub)
PeftModel.save_pretrained = _wrap_save_pretrained(PeftModel.save_pretrained)
