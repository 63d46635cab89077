"""What `dsla order`, `dsla merge` and `dsla generate` do. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from .cards import adapter_card
from .configuration import resolve_level
from .corpus import token_blocks
from .data import check_teaches
from .interrupts import on_interrupt
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
from .progress import quieten_libraries
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
    with on_interrupt(lambda: f"{adapter} is as it was"):
        return _order(model, adapter, data, metric, sequences, length, dtype, dry_run)


def _order(model: str, adapter: str, data: list[str], metric: str, sequences: int, length: int, dtype: str, dry_run: bool) -> LayerRanking:
    check_convertible(model, load_config(model))
    config = read_adapter_config(adapter)
    if not dry_run and not Path(adapter).is_dir():
        raise ValueError(f"{adapter} is not a folder, so the order cannot be stored in it: give a folder, or --dry-run to print only")
    check_at_least_one("sequences", sequences)
    check_at_least_one("length", length)
    blocks = token_blocks(data, load_tokenizer(model), length, max_tokens=sequences * length, completion_only=False)
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
    prompt: str | None,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> str:
    """Print the continuation of a prompt as it comes, and return it. `model` is a base, with or without adapter, or a hybrid.

    With `chat` the prompt is what a user says, and the answer is printed. Without a prompt a conversation follows: each line of the
    standard input is answered, until it ends; the last answer is returned. `system` is what the conversation begins with.

    Raises:
        ValueError: if the options contradict each other, the adapter is not of this model, or `chat` is asked of a tokenizer without a
            chat template.
        OSError: if a file is missing.
        KeyboardInterrupt: in mid-conversation, with a line that says what is kept.
    """
    check_at_least_one("max_new_tokens", max_new_tokens)
    given = {name: value for name, value in (("temperature", temperature), ("top-p", top_p)) if value is not None}
    if given and not do_sample:
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)} shape the sampling: give --do-sample too, or leave them out")
    if system is not None and not chat:
        raise ValueError("--system begins a conversation: give --chat too, or leave it out")
    if prompt is None and not chat:
        raise ValueError("there is no prompt: give --prompt or --prompt-file, or --chat for a conversation")
    base_config = load_config(model)
    number = level_to_run_at(model, base_config, adapter, level)
    tokenizer = load_tokenizer(model)
    messages = [] if system is None else [{"role": "system", "content": system}]
    if chat:
        inputs = _chat_inputs(tokenizer, [*messages, {"role": "user", "content": "?" if prompt is None else prompt}], model)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel() or (chat and prompt is not None and not prompt.strip()):
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
    if chat and tokenizer.eos_token_id is not None:  # chats often end their turns with another token than the base its texts
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        settings.eos_token_id = sorted({end for end in ends if end is not None} | {tokenizer.eos_token_id})
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    set_seed(seed)

    def go_on(inputs: Any, cache: Any = None) -> tuple[str, Tensor, Any]:
        """The continuation, printed as it comes; all tokens, and the cache of them."""
        found = network.generate(
            **{name: inputs[name].to(network.device) for name in ("input_ids", "attention_mask")},
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **{name.replace("-", "_"): value for name, value in given.items()},
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
        )
        new = found.sequences[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True), found.sequences, found.past_key_values

    if prompt is not None:
        return go_on(inputs)[0]
    with on_interrupt(_leave_conversation):
        return _converse(go_on, tokenizer, messages, model)


def _chat_inputs(tokenizer: Any, messages: list[dict[str, str]], model: str) -> Any:
    """What a chat model reads, up to where its answer begins: `input_ids` and `attention_mask` `[1, T]`.

    Raises:
        ValueError: if the tokenizer has no chat template, or the template does not take such messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{model} has no chat template, so it is no chat model: give --prompt without --chat, and it goes on from the text"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # templates raise errors of jinja2, which is imported where a template is used
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        hint = "; perhaps it takes no --system" if messages[0]["role"] == "system" else ""
        raise ValueError(f"the chat template of {model} does not take the conversation: {error}{hint}") from None


def _converse(go_on: Callable[..., tuple[str, Tensor, Any]], tokenizer: Any, messages: list[dict[str, str]], model: str) -> str:
    """Answer lines of the standard input until it ends; empty ones are passed over. Returns the last answer."""
    answer, read, cache = "", None, None
    for line in _lines():
        messages.append({"role": "user", "content": line})
        inputs = _chat_inputs(tokenizer, messages, model)
        # What was read goes on from its cache, unless the template or the tokenizer writes the answer in another way than the model did.
        known = 0 if cache is None else int(cache.get_seq_length())
        ids = inputs["input_ids"]
        if read is not None and not (ids.shape[1] > known and torch.equal(ids[:, :known], read[:, :known].cpu())):
            cache = None
        answer, read, cache = go_on(inputs, cache)
        messages.append({"role": "assistant", "content": answer})
    return answer


def _lines() -> Iterator[str]:
    """The lines of the standard input that say something; a terminal is shown where to write."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        if line.strip():
            yield line.strip()


def _leave_conversation() -> str:
    print()  # ends the line of a half answer
    return "nothing is kept of a conversation"


# --- shared with `dsla distill` ---------------------------------------------------------------------------------


def ranking_table(ranking: LayerRanking) -> str:
    """The ranking for a terminal."""
    heading = {"kl": "kl of it alone", "greedy": "kl up to it", "entropy": "entropy"}[ranking.metric]
    lines = [f"{'layer':>5}  {heading:>15}    ({ranking.tokens:,} tokens read {ranking.passes} times, least harmful first)"]
    lines += [f"{layer:>5}  {ranking.scores[layer]:>15.6f}" for layer in ranking.order]
    return "\n".join([*lines, f"order: {ranking.order}"])
