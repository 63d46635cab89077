"""What `dsla generate` does: go on from a prompt, or speak to a chat model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from ..core.interrupts import on_interrupt
from ..models.loading import (
    check_at_least_one,
    device,
    level_to_run_at,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
)


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
