"""Whether a base has passed the checks: what one returns, and what a record holds."""

from __future__ import annotations

from typing import Any

MOVES, NOT_PACKED = "moves the base, too", "not in the base"
TOLERANCE = 1e-4  # of the largest logit, in fp32; what sums in another order is far below
HEADS = "heads"  # the check that plans of whole layers do without


def holds(value: Any) -> bool:
    """Whether a check that returned this has passed."""
    return value if isinstance(value, bool) else value <= TOLERANCE if isinstance(value, float) else value in (MOVES, NOT_PACKED)


def check_passed(record: dict[str, Any], unit: str) -> None:
    """Raises ValueError if a check of a record does not hold that a plan of this unit needs; names those, and the way out."""
    needed = {name: value for name, value in record["checks"].items() if unit == "head" or name != HEADS}
    if failed := {name: value for name, value in needed.items() if not holds(value)}:
        told = "; ".join(f"{name}: {value}" for name, value in failed.items())
        way = "conversion_unit='layer' takes it" if list(failed) == [HEADS] else "docs/architectures.md says what each is"
        raise ValueError(
            f"model type {record['model_type']!r} has not been tested, and {len(failed)} of {len(needed)} checks on a small model do not "
            f"hold: {told}. {way}"
        )
