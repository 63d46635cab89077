"""Prompts that do not fit into the context, cut in the middle: the instruction at the beginning and the question at the end stay."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lm_eval.api.task import ConfigurableTask
from transformers import AutoConfig, AutoTokenizer

# What a task is told of the model, in this order; RULER reads the same names.
MODEL_NAMES = ("tokenizer", "pretrained", "model")
CONTEXT_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
# lm-eval's, where neither the configuration nor the tokenizer says how long texts may be.
DEFAULT_CONTEXT, UNLIMITED = 2048, 10**9


def cut_middle(text: str, tokenizer: Any, room: int) -> str:
    """The text if it has at most `room` tokens with those that the tokenizer adds, else its two ends, as much of each.

    Raises:
        ValueError: if `room` does not hold one token.
    """

    def tokens(part: str, special: bool = False) -> list[int]:
        return tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]

    ids = tokens(text)
    kept = room - (len(tokens(text, special=True)) - len(ids))
    if len(ids) <= kept:
        return text
    while kept > 0:
        ends = (ids[: (kept + 1) // 2], ids[len(ids) - kept // 2 :])
        shorter = "".join(tokenizer.decode(end, skip_special_tokens=True, clean_up_tokenization_spaces=False) for end in ends)
        # Text that was cut can take more tokens than it had, at the cut.
        excess = len(tokens(shorter, special=True)) - room
        if excess <= 0:
            return shorter
        kept -= excess
    raise ValueError(f"there is room for {room} tokens of the prompt: the model's context is too short for this task")


@lru_cache(maxsize=4)
def tokenizer_and_context(tokenizer: str, model: str, trust_remote_code: bool) -> tuple[Any, int]:
    """A tokenizer, and how many tokens the model takes: the same number as lm-eval finds."""
    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for holder in (getattr(config, "text_config", None), config):
        for name in CONTEXT_NAMES:
            if isinstance(length := getattr(holder, name, None), int):
                return loaded, length
    return loaded, loaded.model_max_length if loaded.model_max_length < UNLIMITED else DEFAULT_CONTEXT


class MiddleTruncated(ConfigurableTask):
    """A generation task of lm-eval whose prompts are cut in the middle, as LongBench's own code does it; lm-eval cuts off the beginning.

    The model is known from the metadata of the task, which `dsla eval` and lm-eval's command fill in: `pretrained`, and `tokenizer`,
    `max_length`, `trust_remote_code` where they are given.

    Raises:
        ValueError: when prompts are made, if the metadata name no model, or the context is not longer than the answer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def construct_requests(self, doc: dict, ctx: str, **kwargs: Any) -> Any:
        known = self.config.metadata or {}
        names = [known[name] for name in MODEL_NAMES if known.get(name)]
        if not names:
            raise ValueError(
                f"task {self.config.task} cuts prompts to the model's context and knows no model: give its name, "
                "as --metadata pretrained=NAME or TaskManager(metadata={'pretrained': NAME})"
            )
        model = known.get("pretrained") or names[0]
        tokenizer, context = tokenizer_and_context(names[0], model, bool(known.get("trust_remote_code")))
        context = int(known.get("max_length") or context)
        answer = self.config.generation_kwargs["max_gen_toks"]
        if context <= answer:
            raise ValueError(
                f"task {self.config.task} asks for {answer} tokens, the model's context has {context}: give a longer max_length"
            )
        return super().construct_requests(doc=doc, ctx=cut_middle(ctx, tokenizer, context - answer), **kwargs)
