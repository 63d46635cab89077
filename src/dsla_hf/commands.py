"""What `dsla order`, `dsla merge` and `dsla generate` do. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from .cards import adapter_card
from .configuration import DSLAConfig, resolve_level
from .corpus import token_blocks
from .data import check_teaches
from .interrupts import on_interrupt
from .progress import quieten_libraries
from .saving import written_whole
from .sensitivity import LayerRanking, rank_layers


def order(
    model: str,
    adapter: str,
    data: list[str],
    *,
    metric: str = "kl",
    sequences: int = 16,
    length: int = 2048,
    dtype: str = "auto",
    dry_run: bool = False,
) -> LayerRanking:
    """Rank the layers of an adapter by `metric` of `rank_layers`, print them, and store the order in the adapter.

    Only its configuration and model card are written; weights belong to layers and stay as they are. The level stays.

    Args:
        data: as the sources of `corpus.token_blocks`; of chats everything is read.

    Raises:
        ValueError: if there is too little text, the window reads nearly all of each sequence, or `adapter` is no DSLA adapter of this
            model.
        OSError: if a file is missing.
        ImportError: without the `datasets` library.
        KeyboardInterrupt: says that the adapter is unchanged.
    """
    quieten_libraries()
    with on_interrupt(lambda: f"interrupted; {adapter} is as it was"):
        return _order(model, adapter, data, metric, sequences, length, dtype, dry_run)


def _order(model: str, adapter: str, data: list[str], metric: str, sequences: int, length: int, dtype: str, dry_run: bool) -> LayerRanking:
    config = read_adapter_config(adapter)
    if not dry_run and not Path(adapter).is_dir():
        raise ValueError(f"{adapter} is not a folder, so the order cannot be stored in it: give a folder, or --dry-run to print only")
    check_at_least_one("sequences", sequences)
    check_at_least_one("length", length)
    blocks = token_blocks(data, AutoTokenizer.from_pretrained(model), length, max_tokens=sequences * length, completion_only=False)
    if metric != "entropy":
        check_teaches(blocks, config.window_size, config.sink_tokens, purpose="to rank layers on")
    tuned = load_adapter(model, adapter, dtype).to(device())
    ranking = rank_layers(tuned, [row["input_ids"] for row in blocks], metric=metric)
    print(ranking_table(ranking))
    if not dry_run:
        config = tuned.peft_config["default"]
        tuned.base_model.set_conversion_order(ranking.order, ranking.scores)
        with written_whole(Path(adapter)) as temporary:
            config.save_pretrained(str(temporary))
            (temporary / "README.md").write_text(adapter_card(config, tuned.config))
        print(f"order stored in {adapter}; its level stays {config.level}")
    return ranking


def merge(model: str, adapter: str, level: int | str, output: str, *, dtype: str = "auto") -> Any:
    """Save the adapter merged at one level, a hybrid checkpoint with the tokenizer of the base, and return the hybrid.

    Raises:
        ValueError: for level 0, a level above the plan, an adapter of another base, or an output that holds another model.
        OSError: if a file is missing.
    """
    number = resolve_level(level, read_adapter_config(adapter), num_layers(model))
    if number == 0:
        raise ValueError(f"level {level} converts no layer: the merged model would be {model} itself; levels to merge start at 1")
    if Path(output).is_file():
        raise ValueError(f"{output} is a file: give a folder to save into")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned = load_adapter(model, adapter, dtype)
    tuned.set_level(number)
    layers = sorted(tuned.peft_config["default"].converted_layers)
    hybrid = tuned.merge_and_unload()
    hybrid.save_pretrained(output)  # refuses a folder with another model, so it goes before the tokenizer
    tokenizer.save_pretrained(output)
    print(f"hybrid saved in {output}: layers {layers} of {hybrid.config.num_hidden_layers} are DSLA (level {number})")
    return hybrid


def generate(
    model: str,
    adapter: str | None,
    level: int | str | None,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> str:
    """Print the continuation of a prompt as it comes, and return it. `model` is a base, with or without adapter, or a hybrid.

    Raises:
        ValueError: if the options contradict each other, or the adapter is not of this model.
        OSError: if a file is missing.
    """
    check_at_least_one("max_new_tokens", max_new_tokens)
    given = {name: value for name, value in (("temperature", temperature), ("top-p", top_p)) if value is not None}
    if given and not do_sample:
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)} shape the sampling: give --do-sample too, or leave them out")
    base_config = AutoConfig.from_pretrained(model)
    number = level_to_run_at(model, base_config, adapter, level)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty: give some text to go on from")
    if adapter is None:
        network = load_model(model, dtype)
    else:
        network = load_adapter(model, adapter, dtype)
        network.set_level(number)
    network = network.to(device()).eval()
    settings = network.generation_config
    if not do_sample:
        # A checkpoint may bring sampling settings of its own, which greedy search does not read and warns about.
        settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    set_seed(seed)
    ids = network.generate(
        **{name: inputs[name].to(network.device) for name in ("input_ids", "attention_mask")},
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        **{name.replace("-", "_"): value for name, value in given.items()},
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- shared by all commands, `dsla distill` among them ----------------------------------------------------------


def level_to_run_at(
    model: str, base_config: Any, adapter: str | None, level: int | str | None, names: tuple[str, str] = ("--adapter", "--level")
) -> int | None:
    """The level to set, None where there is none; `names` are what the user calls adapter and level.

    Raises:
        ValueError: for an adapter or a level that `model` cannot have.
    """
    if base_config.model_type == "dsla":
        layers = base_config.get_dsla_config().converted_layers
        given = " and ".join(name for name, value in zip(names, (adapter, level), strict=True) if value is not None)
        if given:
            raise ValueError(
                f"{given} cannot be had with {model}: it is a hybrid, merged with layers {sorted(layers)} as DSLA and without "
                "their softmax weights; levels need the original model and its adapter"
            )
        return None
    if adapter is None:
        if level is not None:
            raise ValueError(f"{names[1]} needs {names[0]}: {model} alone has no DSLA layers")
        return None
    config = read_adapter_config(adapter)
    # Without a level, that of the adapter; None there is the whole plan.
    return config.level if level is None else resolve_level(level, config, base_config.num_hidden_layers)


def read_adapter_config(adapter: str) -> DSLAConfig:
    """The configuration of a DSLA adapter, without its weights.

    Raises:
        ValueError: if there is no adapter, or one of another method.
    """
    path = Path(adapter)
    if path.exists() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json")
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, DSLAConfig):
        raise ValueError(f"{adapter} holds a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not a DSLA adapter")
    return config


def load_model(model: str, dtype: str) -> Any:
    """A checkpoint on the CPU; `dtype` "auto" is the one it was saved in.

    Raises:
        ValueError: if it is of an unknown kind, or a file of weights is damaged.
        OSError: if a file is missing.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"{model}: its weights are damaged or incomplete ({error})") from None


def load_adapter(model: str, adapter: str, dtype: str, trainable: bool = False) -> Any:
    """A checkpoint with the adapter on it, on the CPU; `dtype` is that of the checkpoint.

    Raises:
        ValueError: if the adapter is not of this checkpoint, or a file of weights is damaged.
        OSError: if a file is missing.
    """
    base = load_model(model, dtype)
    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)
    except SafetensorError as error:
        raise ValueError(f"{adapter}: its weights are damaged or incomplete ({error})") from None


def num_layers(model: str) -> int:
    """How many decoder layers a checkpoint has, by its configuration."""
    return AutoConfig.from_pretrained(model).num_hidden_layers


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def ranking_table(ranking: LayerRanking) -> str:
    """The ranking for a terminal."""
    heading = {"kl": "kl of it alone", "greedy": "kl up to it", "entropy": "entropy"}[ranking.metric]
    lines = [f"{'layer':>5}  {heading:>15}    ({ranking.tokens:,} tokens read {ranking.passes} times, least harmful first)"]
    lines += [f"{layer:>5}  {ranking.scores[layer]:>15.6f}" for layer in ranking.order]
    return "\n".join([*lines, f"order: {ranking.order}"])
