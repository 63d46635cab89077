"""What the names of a checkpoint and an adapter stand for, found from folder contents and config files before anything heavy is imported.

Errors name what is there and the next step. What only transformers can judge, such as an architecture nobody has tried, is judged when the
model's config is read.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "sentencepiece.bpe.model")
# Model types that one meets most often; others are judged when transformers has read their config.
ENCODER_DECODERS = {"bart", "mbart", "t5", "mt5", "umt5", "longt5", "pegasus", "marian", "led", "prophetnet", "whisper"}
ENCODERS = {
    "albert",
    "bert",
    "big_bird",
    "camembert",
    "clip",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "eurobert",
    "fnet",
    "longformer",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "siglip",
    "vit",
    "xlm-roberta",
    "xlm-roberta-xl",
}
LINEAR = {"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "rwkv7", "xlstm", "retnet"}
RESOLVE_SECONDS = 0.7  # longer is not waited for an answer of the name server; a slow one may still be right


def with_gguf(model: str, gguf_file: str | None) -> str:
    """One name for a GGUF file: that of its folder or repository, and behind a slash its own."""
    return model if gguf_file is None else f"{model.rstrip('/')}/{gguf_file}"


def checked(args: Any, **needs: bool) -> str:
    """The model that parsed arguments name, after `check` of it and of their adapter."""
    model = with_gguf(args.model, args.gguf_file)
    check(model, args.adapter, **needs)
    return model


def check(model: str, adapter: str | None = None, *, converts: bool = False, tokenizer: bool = True) -> None:
    """Raise an error that says what `model` and `adapter` are where they are not what a command needs.

    Args:
        model: a folder, a GGUF file, or a name on the hub.
        adapter: of a DSLA adapter, or None.
        converts: the command needs an original model with softmax attention, so no hybrid and no model that is linear already.
        tokenizer: the command needs one beside the weights.

    Raises:
        ValueError: for what is there and of another kind.
        FileNotFoundError: for what is not there.
        OSError: for a name on the hub that cannot be looked up.
    """
    converts = converts or adapter is not None
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf":
        _check_gguf(model, folder)
    elif folder.is_file():
        raise ValueError(f"{model} is a file: give the folder that holds the checkpoint, such as {folder.parent}")
    elif folder.is_dir():
        _check_folder(model, folder, tokenizer)
        _check_kind(model, _read(folder / "config.json"), converts)
    else:
        found = _on_hub(model, "model")
        if found is not None:
            _check_kind(model, _read(found), converts)
    if adapter is not None:
        check_adapter(adapter)


def check_adapter(adapter: str) -> None:
    """Raise an error that says what `adapter` is where it is no DSLA adapter; errors as those of `check`."""
    folder = Path(adapter).expanduser()
    if folder.is_file():
        raise ValueError(f"{adapter} is a file: give the folder that holds the adapter, such as {folder.parent}")
    if not folder.is_dir():
        _on_hub(adapter, "adapter")
        return
    if not (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file():
            hybrid = _read(folder / "config.json").get("model_type") == "dsla"
            kind = "a hybrid, which has its one level and takes no adapter" if hybrid else "a whole model"
            raise ValueError(f"{adapter} is not an adapter but {kind}: give it as --model, or another --adapter")
        if (folder / "alignment").is_dir():
            raise ValueError(f"{adapter} is not an adapter yet: its distillation has not come to its end; the same command goes on")
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json{_content(folder)}; give a folder of `dsla distill`")
    config = _read(folder / "adapter_config.json")
    if config.get("peft_type") != "DSLA":
        raise ValueError(
            f"{adapter} holds a {config.get('peft_type')} adapter, not a DSLA adapter: merge it into its model first "
            "(docs/share.md), and train a DSLA adapter of the result with `dsla distill`"
        )
    if not any(folder.glob("adapter_model.*")):
        raise ValueError(f"{adapter} has an adapter_config.json and no weights (adapter_model.safetensors): copy it again as a whole")


# --- folders ----------------------------------------------------------------------------------------------------


def _check_folder(name: str, folder: Path, tokenizer: bool) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            config = _read(folder / "adapter_config.json")
            base, kind = config.get("base_model_name_or_path") or "BASE", config.get("peft_type")
            if kind == "DSLA":
                raise ValueError(f"{name} is a DSLA adapter, not a model: give --model {base} --adapter {name}")
            raise ValueError(
                f"{name} is a {kind} adapter of {base}, not a model: merge it into {base} first (PEFT's merge_and_unload(), then "
                "save_pretrained() of model and tokenizer), and give the folder with the result"
            )
        if files := sorted(file.name for file in folder.glob("*.gguf")):
            raise ValueError(
                f"{name} holds GGUF files and no config.json: give one of them, as --model {folder / files[0]}"
                + (f" (others: {', '.join(files[1:4])})" if len(files) > 1 else "")
            )
        if inner := sorted(path.parent for path in folder.glob("*/config.json")):
            raise ValueError(f"{name} is no checkpoint: it has no config.json; did you mean {inner[0]}?")
        raise ValueError(f"{name} is no checkpoint: it has no config.json{_content(folder)}; give a folder as save_pretrained() writes it")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise ValueError(f"{name} has a config.json and no weights{_content(folder)}: copy or download it again as a whole")
    if tokenizer and not any((folder / file).is_file() for file in TOKENIZERS):
        raise ValueError(
            f"{name} has no tokenizer ({', '.join(TOKENIZERS[:2])}, ...): copy the tokenizer's files of the original checkpoint into it, "
            "or save them there with AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )


def _check_gguf(name: str, file: Path) -> None:
    if not file.parent.is_dir():  # REPOSITORY/FILE.gguf
        if HUB_NAME.fullmatch(str(file.parent)):
            _on_hub(str(file.parent), "model", file.name)
            return
    elif not file.is_file():
        others = sorted(other.name for other in file.parent.glob("*.gguf"))
        raise FileNotFoundError(f"no such file: {name}" + (f"; {file.parent} has {', '.join(others[:4])}" if others else ""))
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the package gguf: pip install gguf")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged, it is no JSON ({error}): copy or download the folder again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged, it holds no settings: copy or download the folder again")
    return content


def _content(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f" (it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else " (the folder is empty)"


# --- kinds ------------------------------------------------------------------------------------------------------


def _check_kind(name: str, config: dict[str, Any], converts: bool) -> None:
    kind = config.get("model_type")
    if kind == "dsla":
        if converts:
            base = (config.get("dsla_config") or {}).get("base_model_name_or_path")
            raise ValueError(
                f"{name} is a hybrid already, whose softmax weights are gone where it is DSLA: "
                f"give the original model{f', {base}' if base else ''}"
            )
        return
    if kind is None:
        raise ValueError(f"{name}/config.json names no model_type, so it is not of transformers: give a checkpoint that transformers loads")
    if config.get("is_encoder_decoder") or kind in ENCODER_DECODERS:
        raise ValueError(f"{name} is an encoder-decoder ({kind}): DSLA is for decoders, models that write one token after the other")
    if not config.get("text_config") and ("vision_config" in config or "llm_config" in config or "thinker_config" in config):
        raise ValueError(
            f"{name} is a multimodal model ({kind}) whose text model is not where commands look for it (text_config): save that in a "
            "folder of its own, docs/multimodal.md shows how, and give the folder"
        )
    architectures = [str(architecture) for architecture in config.get("architectures") or ()]
    masked = bool(architectures) and all(architecture.endswith(("ForMaskedLM", "ForPreTraining")) for architecture in architectures)
    if (kind in ENCODERS or masked) and not config.get("is_decoder"):
        raise ValueError(f"{name} is an encoder ({kind}), whose attention looks ahead, and a state cannot: give a decoder such as a Llama")
    if kind in LINEAR:
        raise ValueError(f"{name} ({kind}) has no softmax attention to convert, it is linear already: give a transformer such as a Llama")


# --- the hub ----------------------------------------------------------------------------------------------------


def _on_hub(name: str, what: str, file: str | None = None) -> Path | None:
    """The config file of a repository in the cache, None where it can only be had from the hub.

    Raises:
        FileNotFoundError: for what is no name of the hub and not there.
        OSError: where the hub cannot be asked.
    """
    if not HUB_NAME.fullmatch(name) or ".." in name:
        raise FileNotFoundError(f"no such folder: {name}{_similar(name)}")
    file = file or ("config.json" if what == "model" else "adapter_config.json")
    cached = _cached(name, file)
    if cached is not None:
        return None if file.endswith(".gguf") else cached
    here = f"{name} is no folder here{_similar(name)}, and not in the hub's cache ({_cache()})"
    fetch = f"give a folder, or download it first where there is a network: hf download {name}"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError(f"{here}; {variable} is set, so the hub is not asked: {fetch}")
    host = re.sub(r"^\w+://([^/:]+).*", r"\1", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if not _resolves(host):
        raise OSError(f"{here}; {host} cannot be reached, its name is not found: {fetch}")
    return None


def _cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(name: str, file: str) -> Path | None:
    repository = _cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(repository.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _resolves(host: str) -> bool:
    """False if the name server says that there is no such name, or there is no name server."""
    failed = threading.Event()

    def ask() -> None:
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            failed.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(RESOLVE_SECONDS)
    return not failed.is_set()


def _similar(name: str) -> str:
    """A folder beside the one that is not there whose name is like it."""
    path = Path(name).expanduser()
    while not path.parent.is_dir():
        path = path.parent
    try:
        others = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, others, n=1, cutoff=0.75)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
