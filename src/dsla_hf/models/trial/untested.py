"""Types of base models that are not in the table: tried on small models, and converted if all checks hold."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from ..architectures import SUPPORTED_BASES, why_impossible
from ..configuration import DSLAConfig
from .checks import CHECKS, outcome
from .records import check_record, code_of, forget, is_running, keep, new_record, record_of, running
from .small_models import small_config, small_model
from .structure import read_structure
from .verdict import HEADS, check_passed, holds


def try_untested(model: Any, config: DSLAConfig) -> None:
    """Know the type of `model` if `config` asks for that and it passes; what does not ask, or is refused by its structure, is left to
    `check_model`. An adapter that was made over code which has not changed since needs no checks, if its record has all of them.

    Raises:
        ValueError: names the checks that do not hold.
    """
    base = getattr(model, "config", None)
    kind = getattr(base, "model_type", None)
    asked = config.allow_untested or config.checked_base is not None
    if kind is None or kind in SUPPORTED_BASES or is_running() or not asked or why_impossible(base) is not None:
        return
    code = code_of(kind)
    known = [check_record(x, kind, "adapter_config.json") for x in (record_of(kind), config.checked_base) if x is not None]
    whole = (x for x in known if code is not None and x["code"] == code and CHECKS.keys() <= x["checks"].keys())
    record = next(whole, None) or _tried(model, kind)
    check_passed(record, config.conversion_unit)
    keep(record)


def _tried(model: Any, kind: str) -> dict[str, Any]:
    """The record of a type that has none."""
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model type {kind!r} has not been tested, and cannot be: AutoModelForCausalLM knows no model of it")
    from ...core.progress import say  # with tqdm, which nothing else of an adapter needs

    say(f"model type {kind!r} has not been tested with DSLA: running {len(CHECKS)} checks on small models of it")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), running():
            record = _record(model, kind)
    finally:
        forget(kind)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return record


def _record(model: Any, kind: str) -> dict[str, Any]:
    """What all checks found; what one raises is in its place, in words."""
    try:
        config = small_config(model.config)
        record = new_record(config, read_structure(_small(model, config, uneven=False)))
    except Exception as error:  # whatever unknown code does
        raise ValueError(
            f"model type {kind!r} has not been tested, and cannot be: of a small model of it, {type(error).__name__}: {error}"
        ) from error
    record["versions"] = {name: version(name) for name in ("dsla-hf", "transformers", "torch")}

    def run(name: str) -> None:
        keep(record)
        record["checks"][name] = outcome(name, CHECKS[name], lambda uneven: _small(model, config, uneven))

    from ...core.progress import bar

    for name in bar(CHECKS, desc="checks"):
        run(name)
    if not holds(record["checks"][HEADS]):  # a gate or a norm behind the attention may have something of each head
        record["architecture"]["ordered"] = False
        run(HEADS)
    return record


def _small(model: Any, config: Any, uneven: bool) -> Any:
    torch.default_generator.manual_seed(0)  # of the CPU alone, which the caller gets back as it was
    return small_model(model, config, uneven)
