"""What `dsla order`, `dsla merge` and `dsla generate` do. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import TextStreamer, set_seed

from .cards import adapter_card
from .configuration import resolve_level
from .data import PackedTokens, read_texts
from .loading import (
    check_at_least_one,
    check_convertible,
    device,
    level_to_run_at,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    num_layers,
    read_adapter_config,
)
from .saving import WEIGHT_FILES, check_hybrid_directory, name_model, written_whole
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

    Raises:
        ValueError: if there is too little text, or `adapter` is no DSLA adapter of this model.
        OSError: if a file is missing.
    """
    check_convertible(model, load_config(model))
    config = read_adapter_config(adapter)
    if not dry_run and not Path(adapter).is_dir():
        raise ValueError(f"{adapter} is not a folder, so the order cannot be stored in it: give a folder, or --dry-run to print only")
    check_at_least_one("sequences", sequences)
    blocks = packed(data, load_tokenizer(model), length, sequences * length).blocks
    tuned = load_adapter(model, adapter, dtype).to(device())
    ranking = rank_layers(tuned, list(blocks.split(1)), metric=metric)
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
    tokenizer = load_tokenizer(model)
    tuned = load_adapter(model, adapter, dtype)
    tuned.set_level(number)
    layers = sorted(tuned.peft_config["default"].converted_layers)
    hybrid = tuned.merge_and_unload()
    check_hybrid_directory(Path(output), hybrid.config)
    with written_whole(Path(output), WEIGHT_FILES) as temporary:
        tokenizer.save_pretrained(temporary)
        hybrid.save_pretrained(temporary)
    name_model(hybrid, output)
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
    base_config = load_config(model)
    number = level_to_run_at(model, base_config, adapter, level)
    tokenizer = load_tokenizer(model)
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


# --- shared with `dsla distill` ---------------------------------------------------------------------------------


def packed(files: Iterable[str], tokenizer: Any, length: int, max_tokens: int) -> PackedTokens:
    """The text of the files, in their order, in blocks of `length` tokens.

    Raises:
        ValueError: if the text gives less than one block, or a file is of another kind.
        OSError: if a file is missing.
    """
    check_at_least_one("length", length)
    files = list(files)
    for file in files:  # also those that are not reached within `max_tokens`
        if not Path(file).is_file():
            raise FileNotFoundError(f"no such file: {file}")

    def texts() -> Iterator[str]:
        for file in files:
            yield from read_texts(file)

    return PackedTokens.from_texts(texts(), tokenizer, length, max_tokens=max_tokens)


def ranking_table(ranking: LayerRanking) -> str:
    """The ranking for a terminal."""
    heading = {"kl": "kl of it alone", "greedy": "kl up to it", "entropy": "entropy"}[ranking.metric]
    lines = [f"{'layer':>5}  {heading:>15}    ({ranking.tokens:,} tokens read {ranking.passes} times, least harmful first)"]
    lines += [f"{layer:>5}  {ranking.scores[layer]:>15.6f}" for layer in ranking.order]
    return "\n".join([*lines, f"order: {ranking.order}"])
