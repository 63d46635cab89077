"""Data sets with the column names that lm-eval's functions read."""

from __future__ import annotations

import re
from typing import Any


def logiqa(dataset: Any) -> Any:
    """From `context`, `query`, `options`, `correct_option` (a number from 0, or a letter) to what lm-eval's `logiqa` reads."""

    def renamed(document: dict[str, Any]) -> dict[str, Any]:
        correct = str(document["correct_option"]).strip().lower()
        return {
            "question": document["query"],
            "options": [re.sub(r"^[A-D]\.\s*", "", option) for option in document["options"]],
            "label": "abcd"[int(correct)] if correct.isdecimal() else correct,
        }

    return dataset.map(renamed)


def xsum(dataset: Any) -> Any:
    """From `document`, `summary` to the columns of CNN/DailyMail, whose metrics read them."""
    return dataset.rename_columns({"document": "article", "summary": "highlights"})
