"""Chats as token ids, and which of them the assistant writes."""

from __future__ import annotations

import re
from typing import Any

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
ALL_TOKENS = "learn from all tokens of the chats instead (--completion_only false)"


def marked_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and of each whether the assistant writes it (1) or not (0).

    A template that marks it (`{% generation %}`) is believed. Otherwise the chat is rendered up to each answer and with it: what the
    answer adds, white space behind it left out, is the assistant's; where a token is only partly in it, it counts.

    Raises:
        ValueError: if the marks are nowhere, or there are none and the chat up to an answer is no beginning of the whole chat.
    """
    if MARKS.search(tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        marks = list(found["assistant_masks"])
        if not any(marks) and any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                "the tokenizer's chat template has {% generation %} marks, but none around what the assistant of this chat writes: give a "
                f"template that has, or {ALL_TOKENS}"
            )
        return list(found["input_ids"]), marks
    text, spans = _answers(tokenizer, messages)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the chat template does not mark what the assistant writes ({{% generation %}}), and {type(tokenizer).__name__} does not tell "
            f"where its tokens lie in the text: use a fast tokenizer, or {ALL_TOKENS}"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = [int(any(begin < stop and start < end for begin, end in spans)) for start, stop in found["offset_mapping"]]
    return list(found["input_ids"]), marks


def _answers(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and where in it (characters) the assistant writes."""

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt) if count or prompt else ""

    text, spans = render(len(messages)), []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(place, prompt=True), render(place + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the tokenizer's chat template does not mark what the assistant writes ({% generation %}), and it cannot be found: message "
                f"{place + 1} of a chat is written in another way when the chat goes on, or after the prompt for it. Give a template with "
                f"marks, or {ALL_TOKENS}"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans
