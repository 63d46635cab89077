"""Shapes of arguments, written once: a line a tensor, from which checks and messages follow.

    TOKEN = table({
        "q": "B 1 Hq K; fp32, bf16 or fp16",
        "k": "B 1 Hkv K; as q",
        "recurrent": "B Hkv 2 K V; fp32; in place",
        "keys": "B Hkv L K; as q or fp8",
        "lengths": "B; int32 or int64",
        "sink_logits": "Hq; floating-point; optional",
    })

A line has the dimensions, then rules. A letter (or a word) is a size: the first tensor that has it decides, all later ones must agree.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
FP8 = torch.float8_e4m3fn  # of keys and values that lie in caches alone: no sums are in it
NUMBERS = {str(number): number for number in range(10)}  # dimensions of a fixed size
KERNEL_DTYPES = "fp32, bf16 or fp16"  # that the Triton kernels take


class Argument(NamedTuple):
    """A line of a table."""

    name: str
    letters: tuple[str, ...]
    new: tuple[tuple[int, str], ...]  # dimensions that this line may be the first to have
    words: str  # of its dtype
    dtypes: tuple[torch.dtype, ...]  # that it may have; none given: any
    like: str  # the argument whose dtype it has, or one of `dtypes`; or ""
    optional: bool
    dense: bool  # in the last dimension
    in_place: bool  # contiguous, as it changes
    rows: bool  # each entry of the first dimension is contiguous
    note: str  # that messages add, or ""


# Without and with `kv_heads`: `tables[int(kv_heads is not None)]`.
Tables = tuple[tuple[Argument, ...], tuple[Argument, ...]]


def table(lines: Mapping[str, str]) -> tuple[Argument, ...]:
    """Reads lines `dimensions; rule; ...` by name of the argument. Rules: dtypes (`fp32, bf16 or fp16`, `floating-point`, `as q`,
    `as q or fp8`), `optional` (may be None), `dense` (its last dimension), `in place` (contiguous), `rows` (what each entry of its first
    dimension holds is contiguous); `(words)` are added to messages.

    Raises:
        ValueError: names a rule that there is not.
    """
    arguments, known = [], {*NUMBERS}
    for name, line in lines.items():
        argument = _argument(name, line, known)
        arguments.append(argument)
        if not argument.optional:
            known.update(argument.letters)
    return tuple(arguments)


def two_tables(lines: Mapping[str, str]) -> Tables:
    """The table of these lines, and the one beside `kv_heads`, where k and v are of all heads of a layer, of which `kv_heads` names those
    that all other tensors are of."""
    others = {name: line.replace("Hkv", "heads") if name in ("k", "v") else line for name, line in lines.items()}
    return table(lines), table(others | {"kv_heads": "Hkv; int32; dense; (one a KV head in use)"})


def _argument(name: str, line: str, known: set[str]) -> Argument:
    dimensions, *rules = (part.strip() for part in line.split(";"))
    letters = tuple(dimensions.split())
    words = like = note = ""
    dtypes: tuple[torch.dtype, ...] = ()
    for rule in rules:
        if rule in ("optional", "dense", "in place", "rows"):
            continue
        if rule.startswith("("):
            note = rule
            continue
        words = rule
        if rule.startswith("as "):
            like, _, narrow = rule.removeprefix("as ").partition(" or ")
            dtypes = (FP8,) if narrow == "fp8" else ()
            if narrow not in ("", "fp8"):
                raise ValueError(f"{name} has the rule {rule!r}: beside the dtype of {like} a rule of shapes.table knows fp8 alone")
        elif rule == "floating-point":
            dtypes = tuple(dtype for dtype in DTYPES.values() if dtype.is_floating_point)
        else:
            names = re.split(", | or ", rule)
            if not DTYPES.keys() >= {*names}:
                raise ValueError(f"{name} has the rule {rule!r}: neither dtypes of {', '.join(DTYPES)} nor a rule of shapes.table")
            dtypes = tuple(DTYPES[each] for each in names)
    return Argument(
        name,
        letters,
        tuple((place, letter) for place, letter in enumerate(letters) if letter not in known),
        words,
        dtypes,
        like,
        "optional" in rules,
        "dense" in rules,
        "in place" in rules,
        "rows" in rules,
        note,
    )


def check(arguments: tuple[Argument, ...], given: Mapping[str, Tensor | None], **sizes: int) -> dict[str, int]:
    """Compares tensors with a table; the first line's tensor decides the device of all.

    Args:
        given: by name, every argument of the table; those that are optional may be None.
        sizes: of letters that are known beforehand.

    Returns:
        The size of every letter.

    Raises:
        ValueError: names the first argument that does not fit, what it must be and what it is.
    """
    first = given[arguments[0].name]
    if first is None:
        raise _missing(arguments[0].name)
    device, fixed, sizes = first.device, sizes, NUMBERS | sizes
    for argument in arguments:
        name, letters, new, _, dtypes, like, optional, dense, in_place, rows, _ = argument
        x = given[name]
        if x is None and optional:
            continue
        if x is None:
            raise _missing(name)
        shape = x.shape
        if new:
            if len(shape) != len(letters):
                raise _misfit(given, argument, x, device, sizes, fixed)
            for place, letter in new:
                sizes.setdefault(letter, shape[place])
        if shape != tuple([sizes[letter] for letter in letters]) or x.device != device or (dtypes and not like and x.dtype not in dtypes):
            raise _misfit(given, argument, x, device, sizes, fixed)
        if like and x.dtype != given[like].dtype and x.dtype not in dtypes:  # type: ignore[union-attr]
            raise _misfit(given, argument, x, device, sizes, fixed)
        if dense and x.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in the last dimension, got strides {x.stride()}; call contiguous() on it")
        if in_place and not x.is_contiguous():
            raise ValueError(f"{name} changes in place and must be contiguous, got strides {x.stride()}")
        if rows and shape[0] and not x[0].is_contiguous():
            raise ValueError(f"{name} changes in place and {name}[i] must be contiguous, got strides {x.stride()}")
    return sizes


def _misfit(
    given: Mapping[str, Tensor | None],
    wrong: Argument,
    x: Tensor,
    device: torch.device,
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
) -> ValueError:
    """What x must be, with the sizes that others have decided, and what it is. fixed: sizes that no tensor has decided."""
    fits = x.ndim == len(wrong.letters)
    own = {letter for place, letter in wrong.new if letter not in fixed and fits and sizes[letter] == x.shape[place]}
    shape = ", ".join(letter if letter in own else str(sizes.get(letter, letter)) for letter in wrong.letters)
    like = given[wrong.like] if wrong.like else None
    words = wrong.words if like is None else " or ".join(map(str, (like.dtype, *wrong.dtypes)))
    must = f"{words} [{shape}] on {device}".lstrip()
    note = f"(of the dtype of {wrong.like})" if like is not None and x.dtype != like.dtype else wrong.note
    return ValueError(f"{wrong.name} must be {must}, got {x.dtype} {list(x.shape)} on {x.device} {note}".rstrip())


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} must be a tensor, got None")


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError if query heads cannot be shared out among key-value heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key-value heads")


def new_output(q: Tensor, v: Tensor) -> Tensor:
    """Room for the output of attention, `[B, T, Hq, V]` in q's dtype: what its operators return, and their fakes."""
    return q.new_empty(*q.shape[:3], v.shape[-1])


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor as it is or, where strides differ, as a copy; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]
