"""What types of base models that are not in the table have shown when they were tried: for this process, and in adapters and hybrids."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from ..architectures import TRIED, Architecture
from ..configuration import DSLAConfig
from .verdict import check_passed

logger = logging.get_logger(__name__)

_records: dict[str, dict[str, Any]] = {}
_running: ContextVar[bool] = ContextVar("whether checks of an untested type run", default=False)


def record_of(model_type: str | None) -> dict[str, Any] | None:
    """The record of a type, None where it has none: it is in the table, or was not tried."""
    return _records.get(model_type or "")


def may_convert(model_type: str | None, config: DSLAConfig) -> bool:
    """Whether a type that is not in the table has passed, and `config` asks for it: by its argument, or because its weights are of one."""
    asked = config.allow_untested or config.checked_base is not None or _running.get()
    return asked and record_of(model_type) is not None


def new_record(config: Any, architecture: Architecture) -> dict[str, Any]:
    """A record without checks for the type of a base with this config, in JSON's types."""
    return {"model_type": config.model_type, "code": code_of(config.model_type), "architecture": asdict(architecture), "checks": {}}


def keep(record: dict[str, Any]) -> None:
    """From now on its type is known."""
    kind = record["model_type"]
    _records[kind], TRIED[kind] = record, _architecture(record)


def forget(model_type: str) -> None:
    """From now on it is not."""
    _records.pop(model_type, None)
    TRIED.pop(model_type, None)


@contextmanager
def running() -> Iterator[None]:
    """Within it types with a record are converted whatever a config says: checks are what it is made by."""
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)


def is_running() -> bool:
    """Whether `running` is around."""
    return _running.get()


def check_record(record: Any, model_type: str | None, source: str) -> dict[str, Any]:
    """A record from a file.

    Raises:
        ValueError: if it is none, or of another type; `source` names the file.
    """
    names = {"model_type", "code", "architecture", "checks"}
    whole = isinstance(record, dict) and names <= record.keys() and isinstance(record["checks"], dict) and bool(record["checks"])
    if not whole or record["model_type"] != model_type or not _is_architecture(record["architecture"]):
        raise ValueError(
            f"{source}: 'checked_base' is no record of the checks of model type {model_type!r}: take it from the source of the weights, or "
            "make the adapter anew with DSLAConfig(allow_untested=True)"
        )
    return record


def take_record_of_hybrid(model_type: str | None, record: Any, source: str, unit: str) -> None:
    """Know the type that a hybrid names, by the record in its config. That the code of the base has changed since is said: its attention
    may do something else now.

    Raises:
        ValueError: as `check_record`, and if a check of the record does not hold that levels of this unit need.
    """
    record = check_record(record, model_type, source)
    try:
        check_passed(record, unit)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if record["code"] is None or record["code"] != code_of(model_type):
        logger.warning_once(
            f"{source}: the code of {model_type!r} is not the one that passed the checks of DSLA; DSLAConfig(allow_untested=True) on the "
            "original model runs them again"
        )
    keep(record)


def code_of(model_type: str | None) -> str | None:
    """A hash of the Python module that has the models of a type, without comments; None where there is no source."""
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        source = inspect.getsource(inspect.getmodule(model_class))  # type: ignore[arg-type]
    except (KeyError, OSError, TypeError):
        return None
    lines = (line.strip() for line in source.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line and not line.startswith("#")).encode()).hexdigest()


def _is_architecture(values: Any) -> bool:
    """Whether all of these values from a file can be those of an `Architecture`."""
    known = asdict(Architecture())
    if not (isinstance(values, dict) and values.keys() <= known.keys()):
        return False
    kinds = {name: (list, tuple) if isinstance(known[name], tuple) else type(known[name]) for name in values}
    names = values.get("names", {})
    return all(isinstance(value, kinds[name]) for name, value in values.items()) and all(isinstance(x, str) for x in names.values())


def _architecture(record: dict[str, Any]) -> Architecture:
    return Architecture(**record["architecture"])
