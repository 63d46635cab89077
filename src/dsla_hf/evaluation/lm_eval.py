"""DSLA in EleutherAI's evaluation harness, lm-eval.

`python -m dsla_hf.evaluation.lm_eval ...` is the harness's own command line, where `--model hf` knows hybrids (without
`trust_remote_code`) and `--model dsla` runs a base with an adapter at a level, and which finds our task groups unless `--include_path`
names others. Importing this module registers the models for use from Python.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers import AutoConfig

from ..inference.batching import halve_until_it_fits
from ..models.loading import level_to_run_at
from .tasks import FOLDER

NOT_INSTALLED = "lm-eval is not installed: pip install 'dsla-hf[eval]' (from a clone: pip install -e '.[eval]')"

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("lm_eval"):
        raise
    if __name__ == "__main__":
        sys.exit(NOT_INSTALLED)
    raise ImportError(NOT_INSTALLED) from None

# What transformers' from_pretrained takes beside the harness's own arguments.
LOADING = ("attn_implementation", "device_map", "experts_implementation")
SEVERAL_LEVELS = "level is one level; several are measured, with one load of the model, by `dsla eval --levels 0,4,8`"


class DSLALM(HFLM):
    """The harness's Hugging Face model, and a DSLA adapter at a level.

    Args:
        pretrained: a base, a hybrid, or a model that is loaded already.
        peft: a DSLA adapter of that base.
        level: a number of layers or a share such as "50%". Default: the adapter's own.
        options: arguments of the harness's `hf` model, and `attn_implementation`, `device_map`, `experts_implementation`.

    A batch that does not fit into memory is halved, with a warning, unless `batch_size` is "auto", which the harness tries out itself.

    Raises:
        ValueError: before weights are read, for an unknown argument, a level that the plan has not, a level or adapter for a hybrid.
    """

    def __init__(self, pretrained: Any, peft: str | None = None, level: int | str | None = None, **options: Any) -> None:
        _check_arguments(level, options)
        self._level: int | None = None
        if isinstance(pretrained, str):
            location = {name: options[name] for name in ("revision", "subfolder", "trust_remote_code") if options.get(name)}
            config = AutoConfig.from_pretrained(pretrained, **location)
            self._level = level_to_run_at(pretrained, config, peft, level, names=("peft", "level"))
        elif peft is not None or level is not None:
            raise ValueError("peft and level belong to a model given by name; on a loaded model call set_level()")
        super().__init__(pretrained, peft=peft, **options)

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        # Not by the harness, which would cut the embeddings down to the tokenizer's size: level 0 is the base as it is.
        super()._create_model(*args, **kwargs)
        if peft is not None:
            tuned = PeftModel.from_pretrained(self.model, peft)
            if self._level is not None:
                tuned.set_level(self._level)
            self._model = tuned

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._halving(super()._loglikelihood_tokens, args, kwargs)

    def generate_until(self, *args: Any, **kwargs: Any) -> Any:
        return self._halving(super().generate_until, args, kwargs)

    def _halving(self, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        def run(batch_size: int) -> Any:
            self.batch_size_per_gpu = batch_size
            return method(*args, **kwargs)

        if not isinstance(self.batch_size_per_gpu, int):
            return method(*args, **kwargs)
        return halve_until_it_fits(run, self.batch_size_per_gpu, "lm-eval")


def _check_arguments(level: Any, options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]
    known += ["level", *LOADING]
    unknown = [str(name) for name in options if name not in known]
    # An older harness reads level=0,4,8 as three arguments, named level, 4 and 8.
    if isinstance(level, (list, tuple)) or (isinstance(level, str) and "," in level) or any(re.match(r"\d", name) for name in unknown):
        raise ValueError(SEVERAL_LEVELS)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"model dsla: unknown model_args {unknown}: {hint}known are {sorted(known)}")


def main() -> int:
    """The harness's command line on `sys.argv`; returns the exit status. Errors that a user can mend are printed as one line."""
    from lm_eval.__main__ import cli_evaluate

    if any(re.search(r"(^|[,\s])level=[^,=]*,\s*\d[^=]*(,|$)", argument) for argument in sys.argv[1:]):
        print(f"dsla_hf.evaluation.lm_eval: {SEVERAL_LEVELS}", file=sys.stderr)
        return 1
    named = any(argument.startswith(("--include_path", "--config")) for argument in sys.argv)
    if len(sys.argv) > 1 and not named:
        sys.argv += ["--include_path", str(FOLDER)]
    # peft 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        cli_evaluate()
    except (ValueError, OSError, ImportError) as error:
        print(f"dsla_hf.evaluation.lm_eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Under its own name, so that there is one class only.
    from dsla_hf.evaluation.lm_eval import main as run_main

    sys.exit(run_main())

register_model("dsla")(DSLALM)
