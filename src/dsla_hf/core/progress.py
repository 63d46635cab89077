"""What the console shows of work that takes long: a bar that redraws itself on a terminal, plain lines in a file, and of several
processes the first one alone."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

# The first step builds caches and kernels: it says nothing about those after it.
UNTIMED_STEPS = 1
FIRST_ESTIMATE = 3  # the step after which a rate and a time are shown, whatever logging_steps is


def is_first_process() -> bool:
    """Whether this is the process that speaks, as `accelerate launch` and `torchrun` number them."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    """Whether stderr is a terminal, on which a bar may redraw itself."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """A line on stderr, of the first process alone."""
    if is_first_process():
        tqdm.write(line, file=sys.stderr)


def bar(iterable: Any = None, *, shown: bool = True, **options: Any) -> Any:
    """`tqdm` where somebody sees it: on a terminal, of the first process. In a file each redraw would be a line."""
    return tqdm(iterable, disable=not (shown and on_terminal() and is_first_process()), **options)


def quieten_libraries() -> None:
    """Keep from the console what its reader can do nothing about: bars of other libraries where stderr is no terminal (or this is not
    the first process), and transformers' word that the Trainer's copy of a model knows the tokenizer's end-of-text token."""
    logging.getLogger("transformers.trainer_utils").addFilter(_of_use)
    if on_terminal() and is_first_process():
        return
    transformers_logging.disable_progress_bar()
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()


def _of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("The tokenizer has new PAD/BOS/EOS tokens", "mtime may not be reliable"))


def duration(seconds: float) -> str:
    """Seconds for people: '45 s', '12 min', '3 h 20 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class TrainingProgress(TrainerCallback):
    """A training on one line: loss or KL, level, worst layer, tokens per second, time left. On a terminal the line is a bar's; elsewhere
    it is printed anew at each logging step. What is logged per layer goes to `log_history` and trackers only.

    `tokens` is counted by the trainer, in this process; `processes` multiplies it.
    """

    def __init__(self, name: str, processes: int = 1, disable_bar: bool = False):
        self.name, self.processes, self.disable_bar = name, processes, disable_bar
        self.tokens = 0
        self._bar: Any = None
        self._timed: tuple[float, int, int] | None = None  # when the timed steps began, the step and the tokens then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timed, self._first, self._shown, self._printed = None, state.global_step, "", False
        if is_first_process() and on_terminal() and not self.disable_bar:
            form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, bar_format=form, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._first
        if done == UNTIMED_STEPS:
            self._timed = time.perf_counter(), state.global_step, self.tokens
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._shown, self._pace(state)))), refresh=False)
            self._bar.update(state.global_step - self._bar.n)
        elif done == FIRST_ESTIMATE and args.logging_steps > FIRST_ESTIMATE and state.global_step < state.max_steps:
            self._print(state, "")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        self._shown = summary(logs)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._shown, self._pace(state)))))
        else:
            self._print(state, self._shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is None and not self._printed:  # a run that was shorter than the first estimate
            self._print(state, self._shown)
        self.close()

    def close(self) -> None:
        """Take the bar off, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _pace(self, state: Any) -> str:
        if self._timed is None or state.global_step <= self._timed[1]:
            return ""
        began, step, tokens = self._timed
        seconds = max(time.perf_counter() - began, 1e-9)
        rate = (self.tokens - tokens) * self.processes / seconds
        left = seconds / (state.global_step - step) * (state.max_steps - state.global_step)
        return f"{rate:,.0f} tokens/s" + (f", {duration(left)} left" if left else "")

    def _print(self, state: Any, shown: str) -> None:
        self._printed = True
        say(", ".join(filter(None, (f"{self.name}: step {state.global_step} of {state.max_steps}", shown, self._pace(state)))))


def summary(logs: dict[str, Any]) -> str:
    """What people read of a training's log: 'KL 0.0512, level 4.2', or 'loss 0.31 (worst: layer 3, 0.8)'."""
    layers = {name.rpartition("_")[2]: value for name, value in logs.items() if name.startswith("alignment/layer_")}
    if "kl" in logs:
        return f"KL {logs['kl']:.4g}" + (f", level {logs['level']:.3g}" if "level" in logs else "")
    text = f"loss {logs['loss']:.4g}"
    if layers:
        worst = max(layers, key=layers.__getitem__)
        text += f" (worst: layer {worst}, {layers[worst]:.4g})"
    return text
