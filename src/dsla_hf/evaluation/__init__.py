"""What a level costs in quality: text, lm-eval, long contexts, and the pages that show it."""

from .levels import cache_bytes_per_sequence, evaluate_levels

__all__ = ["cache_bytes_per_sequence", "evaluate_levels"]
