"""Levels that rise while text is generated: `LevelProcessor`, and `generate(..., level_policy=...)`, which puts one in.

The processor is a stopping criterion that never stops. Of the hooks that `generate` has it is the one that is called once per
step, after the new tokens are accepted and before the next forward, in every way of decoding; a logits processor is called
once per candidate in assisted decoding, also for tokens that are rejected.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ..core.tensor_parallel import agreed_level
from .policies import Policy, Stats, as_policy

logger = logging.get_logger(__name__)

MEASURED_STEPS = 8  # over which the time per token is averaged


class HasLevels(Protocol):
    """What a model with levels offers: `PeftModel`s with a DSLA adapter and hybrids."""

    def get_level(self) -> int: ...

    def set_level(self, level: int) -> None: ...

    def level_sizes(self) -> dict[str, Any]:
        """`min_level`, `max_level`, `num_layers`, `softmax_bytes_per_token`, `dsla_bytes`, as in `Stats`; `unit` if it is a head."""
        ...


class LevelProcessor(StoppingCriteria):
    """Asks a policy after every step of `generate` and raises the level between two forwards.

    Layers that are converted by a raise fold their cache in the next forward, exactly, and free it. A level below the current
    one is not taken within a text: the keys and values are gone. The model keeps the level it ended with.

        processor = LevelProcessor(model, PromptLength(grow=True))
        model.generate(**inputs, stopping_criteria=[processor])

    Args:
        model: a `PeftModel` with a DSLA adapter (or a hybrid, whose level cannot change).
        policy: a function from `Stats` to a level, or what `as_policy` takes.
        load: returns (requests waiting, tokens of the longest waiting prompt), for policies that look at it.
        clock: seconds; for tests.

    Attributes:
        history: (tokens, level) at the start and after each change.
    """

    def __init__(
        self,
        model: HasLevels,
        policy: Policy | str | int,
        *,
        load: Callable[[], tuple[int, int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not all(hasattr(model, name) for name in ("get_level", "set_level", "level_sizes")):
            raise ValueError(f"{type(model).__name__} has no levels: give a PeftModel with a DSLA adapter")
        self.model, self.policy, self.load, self.clock = model, as_policy(policy), load, clock
        self.history: list[tuple[int, int]] = []
        self._sizes = model.level_sizes()
        if self._sizes["min_level"] == self._sizes["max_level"]:
            logger.warning_once(
                f"this model has one level ({model.get_level()}), so a level policy has nothing to choose: load the original model with "
                "the adapter for that"
            )
        self._prompt_tokens: int | None = None
        self._rows = 1
        self._steps: deque[tuple[float, int]] = deque(maxlen=MEASURED_STEPS + 1)  # time and tokens after each step
        self._changed = (float("-inf"), 0)  # time and tokens of the last change

    def begin(self, prompt_tokens: int, rows: int, *, mid_text: bool = False) -> None:
        """Before the prompt is read: take the level that the policy wants for it, so that layers which will be DSLA never build keys
        and values. `mid_text`: the text goes on from a cache, so the level can only rise."""
        self._prompt_tokens, self._rows = prompt_tokens, rows
        self._steps.clear()
        self.history.clear()
        self._ask(prompt_tokens, may_fall=not mid_text)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids.shape[1]
        if self._prompt_tokens is None:  # put in by hand: the first step is over
            self._prompt_tokens, self._rows = tokens - 1, input_ids.shape[0]
        self._steps.append((self.clock(), tokens))
        self._ask(tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def before_chunk(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """As a forward pre-hook during a chunked prefill: a raise between two chunks."""
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if not self._steps and cache is not None and ids is not None:
            self._ask(int(cache.get_seq_length()) + ids.shape[1])

    def stats(self, tokens: int) -> Stats:
        """What the policy sees when texts are this long."""
        now = self.clock()
        queue_depth, longest = (0, 0) if self.load is None else self.load()
        return Stats(
            prompt_tokens=tokens if self._prompt_tokens is None else self._prompt_tokens,
            tokens=tokens,
            rows=self._rows,
            level=self.model.get_level(),
            seconds_per_token=self._seconds_per_token(),
            tokens_since_change=tokens - self._changed[1],
            seconds_since_change=now - self._changed[0],
            queue_depth=queue_depth,
            longest_waiting_prompt=longest,
            **self._sizes,
        )

    def _seconds_per_token(self) -> float | None:
        if len(self._steps) < 2:
            return None
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        return (end - start) / max(last - first, 1)

    def _ask(self, tokens: int, may_fall: bool = False) -> None:
        stats = self.stats(tokens)
        wanted = self.policy(stats)
        if not isinstance(wanted, int) or not 0 <= wanted <= stats.max_level:
            raise ValueError(f"the policy {self.policy!r} asked for level {wanted!r}; the plan has 0 to {stats.max_level}")
        wanted = agreed_level(self.model, max(wanted, stats.min_level))
        if wanted > stats.level or (may_fall and wanted < stats.level):
            self.model.set_level(wanted)
            self._changed = (self.clock(), tokens)
            self._steps.clear()  # times of another level
        level = self.model.get_level()
        if not self.history or self.history[-1][1] != level:
            self.history.append((tokens, level))


def generate_with_levels(generate: Callable[..., Any], model: Any, leveled: HasLevels, args: tuple, options: dict[str, Any]) -> Any:
    """`generate` with `level_policy`.

    Args:
        generate: the transformers method. model: whose method it is. leveled: what has the levels.
        args, options: of the call. `level_policy`: a policy, its name, a level, or a `LevelProcessor`. `draft_level`, `draft_tokens`: see
            `drafting`.

    Raises:
        ValueError: for assisted decoding that would read tokens twice, and options that do not go together.
    """
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    options = dict(zip(names, args, strict=False)) | options
    _check_read_once(model, options)
    draft_level, draft_tokens = options.pop("draft_level", None), options.pop("draft_tokens", None)
    if draft_level is not None:
        by_hand = [x for x in options.get("stopping_criteria") or () if isinstance(x, LevelProcessor)]
        options.setdefault("level_policy", by_hand[0] if by_hand else None)
        from .drafting import generate_drafted  # what only drafts need must not break the import

        return generate_drafted(generate, model, leveled, options, draft_level, draft_tokens, functools.partial(_option, model, options))
    if draft_tokens is not None:
        raise ValueError(f"draft_tokens={draft_tokens!r} without draft_level: give the level that drafts, above the one of the text")
    policy = options.pop("level_policy", None)
    if policy is None:
        return generate(**options)
    processor = policy if isinstance(policy, LevelProcessor) else LevelProcessor(leveled, policy)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), processor])

    prompt = _prompt(options)

    def option(name: str) -> Any:
        return _option(model, options, name)

    tokens, rows = (1, 1) if prompt is None else (prompt.shape[1], prompt.shape[0])
    cache = options.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    processor.begin(max(tokens, past), rows * max(option("num_beams") or 1, option("num_return_sequences") or 1), mid_text=past > 0)
    hook = None
    if option("prefill_chunk_size"):
        hook = model.register_forward_pre_hook(processor.before_chunk, with_kwargs=True)
    try:
        return generate(**options)
    finally:
        if hook is not None:
            hook.remove()


def _prompt(options: dict[str, Any]) -> Tensor | None:
    return next((options[name] for name in ("inputs", "input_ids", "inputs_embeds") if options.get(name) is not None), None)


def _option(model: Any, options: dict[str, Any], name: str) -> Any:
    config = options.get("generation_config") or model.generation_config
    return options.get(name, getattr(config, name, None))


def _check_read_once(model: Any, options: dict[str, Any]) -> None:
    """Refuse what other decoding of transformers takes and its assisted decoding gets wrong: a text of which a cache holds the beginning.
    It is read as a whole, behind what is there."""
    cache, prompt, mask = options.get("past_key_values"), _prompt(options), options.get("attention_mask")
    whole = prompt is not None and (mask is None or mask.shape[1] == prompt.shape[1])
    assisted = any(_option(model, options, name) for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"))
    if assisted and whole and cache is not None and not _option(model, options, "is_assistant") and cache.get_seq_length() > 0:
        raise ValueError(
            f"assisted decoding of transformers reads all {prompt.shape[1]} tokens given, though past_key_values holds "  # type: ignore[union-attr]
            f"{cache.get_seq_length()} of them: leave out past_key_values, or give the other tokens alone, with an attention_mask of all"
        )


def lower_level(model: HasLevels, level: int, input_ids: Tensor, **inputs: Any) -> Any:
    """Go on with a text at a lower level, at the price of reading it again: the keys and values of layers that become softmax
    attention are gone, and only a forward over the whole text makes them anew.

    Args:
        model: a `PeftModel` with a DSLA adapter.
        level: the level to go on with.
        input_ids: the whole text `[B, T]` but for its last token, which `generate` reads itself; `attention_mask` may follow.

    Returns:
        The cache to give to `generate(..., past_key_values=...)`.

    Raises:
        ValueError: if the plan has no such level.
    """
    model.set_level(level)
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **inputs).past_key_values  # type: ignore[operator]
