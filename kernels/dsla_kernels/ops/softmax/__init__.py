"""Plain softmax attention, for the layers of a model that stay softmax: a token, a piece of a prompt, and the cache."""

from .caches import append
from .decode import softmax_decode
from .prompt import softmax_prompt

__all__ = ["append", "softmax_decode", "softmax_prompt"]
