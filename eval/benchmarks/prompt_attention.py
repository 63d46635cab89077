"""Softmax attention of prompts by each kernel there is: what a call takes, and what the first call of a length takes.

    python eval/benchmarks/prompt_attention.py

One layer, one text, bf16; `new` tokens behind `past` cached ones. Milliseconds, without the host's launches (a CUDA graph):

- `flash`, `cudnn`: PyTorch's kernels over dense keys and values; behind a cache cuDNN is given a mask, for it has no other way;
- `chosen`: `dsla_hf.inference.prompt_attention`, of whose rule `planned` is the number of tokens that go to cuDNN;
- `recorded`: the same in a call that is recorded, as the server's first pieces of texts are;
- `blocks`: this library's kernel over blocks, which needs no dense copy.

`*_first` is the first call of that shape, with the plan that cuDNN makes for it. The last rows are texts of random lengths one after the
other, as an unrecorded call meets them, by a thread that has no plans yet: milliseconds a text in the mean, and the same of the same texts
once more. `default` is PyTorch's own choice of kernels. Writes eval/results/prompt_attention.json. What a machine lacks is left out: on a
CPU `chosen` alone runs, at sizes that say nothing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from reporting import RESULTS, rows_table, write_results  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402

from dsla_hf.inference.prompt_attention import attend_to_prompt, cudnn_is_fast, planned_tokens  # noqa: E402
from dsla_kernels import softmax_prompt, uses_triton  # noqa: E402

SHAPES = {"llama2-7b": (32, 32), "llama3-8b": (32, 8)}  # heads of queries, of keys and values
SIZE, BLOCK = 128, 64
PIECES = [(256, 0), (1024, 0), (2048, 0), (8192, 0), (32768, 0), (2500, 0), (7001, 0), (20011, 0), (2048, 6144), (2048, 14336)]
LENGTHS, TEXTS = (2048, 16384), 24  # of texts one after the other
FORMS = ("flash", "cudnn", "chosen", "recorded", "blocks")
REPEATS = 5  # where there are no graphs

Call = Callable[[], Any]


def inputs(new: int, past: int, kv_heads: int, heads: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q `[1, Hq, new, D]`, k and v `[1, Hkv, past + new, D]`, a token's heads beside each other, as a model's projections give them."""
    dtype = torch.bfloat16
    q = torch.randn(1, new, heads, SIZE, device=device, dtype=dtype)
    k, v = (torch.randn(1, past + new, kv_heads, SIZE, device=device, dtype=dtype) for _ in range(2))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """By form what can be called here."""
    new, tokens = q.shape[2], k.shape[2]
    past, grouped = tokens - new, q.shape[1] != k.shape[1]

    def sdpa(backend: SDPBackend | None) -> Call:
        with_mask = past and backend is SDPBackend.CUDNN_ATTENTION
        seen = torch.ones(new, tokens, dtype=torch.bool, device=q.device).tril(past) if with_mask else None

        def call() -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                if not past:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
                mask = causal_lower_right(new, tokens) if seen is None else seen
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

        return call

    found: dict[str, Call] = {"default": sdpa(None), "chosen": lambda: attend_to_prompt(q, k, v)}
    if q.is_cuda:
        found |= {"flash": sdpa(SDPBackend.FLASH_ATTENTION)}
        if torch.backends.cudnn.is_available():
            found |= {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
        if not past:
            found |= {"recorded": lambda: attend_to_prompt(q, k, v, recorded=True)}
    if q.is_cuda and uses_triton(q, v):
        blocks = -(-tokens // BLOCK)
        room = [x.new_zeros(blocks * BLOCK, *x.shape[1:2], SIZE) for x in (k, v)]
        for kept, x in zip(room, (k, v), strict=True):
            kept[:tokens] = x[0].transpose(0, 1)
        table = torch.randperm(blocks, device=q.device)
        keys, values = (x.unflatten(0, (blocks, BLOCK))[table.argsort()].contiguous() for x in room)
        starts, lengths = torch.tensor([past], device=q.device), torch.tensor([tokens], device=q.device)
        found |= {"blocks": lambda: softmax_prompt(q.transpose(1, 2), keys, values, starts, lengths, table[None])}
    return found


def seconds(call: Call, device: str) -> float:
    """Of one call, the host's part with it."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def steady(call: Call, device: str) -> float:
    """Milliseconds of a call whose shape has been met before."""
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(call, rep=20, return_mode="median"))
    return 1000 * statistics.median(seconds(call, device) for _ in range(REPEATS))


def measure(shape: str, new: int, past: int, device: str) -> dict[str, Any]:
    heads, kv_heads = SHAPES[shape]
    q, k, v = inputs(new, past, kv_heads, heads, device)
    planned = 0 if past else planned_tokens(new, SIZE, q.dtype, q.device)
    row: dict[str, Any] = {"shape": shape, "new": new, "past": past, "planned": planned}
    expected = None
    for form, call in calls(q, k, v).items():
        if form not in FORMS:
            continue
        try:
            row[f"{form}_first"] = 1000 * seconds(call, device)
            o = call()
            o = o if form in ("flash", "cudnn") else o.transpose(1, 2)
            expected = o if expected is None else expected
            torch.testing.assert_close(o, expected, rtol=0.05, atol=0.05)
            row[form] = steady(call, device)
        except RuntimeError as error:  # a kernel that does not take this shape
            row[f"{form}_error"] = next(iter(str(error).splitlines()), type(error).__name__)
    return row


def one_after_the_other(shape: str, lengths: tuple[int, int], texts: int, device: str) -> list[dict[str, Any]]:
    """Texts of random lengths, each read once, by forms that meet them with no plans: those of cuDNN are a thread's own."""
    heads, kv_heads = SHAPES[shape]
    draw = random.Random(0)
    sizes = [draw.randint(*lengths) for _ in range(texts)]
    of_sizes = {size: inputs(size, 0, kv_heads, heads, device) for size in sorted(set(sizes))}
    rows = []
    for form in ("default", "flash", "cudnn", "chosen"):
        if form not in calls(*of_sizes[sizes[0]]):
            continue
        passes: list[float] = []

        def read(form: str = form, passes: list[float] = passes) -> None:
            with torch.no_grad():
                by_size = {size: calls(*of_sizes[size])[form] for size in of_sizes}
                for _ in range(2):
                    passes.append(1000 * statistics.mean(seconds(by_size[size], device) for size in sizes))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        if len(passes) == 2:  # else the form does not run here, and the thread has said why
            row = {"shape": shape, "texts": texts, "lengths": list(lengths), "form": form}
            rows.append(row | dict(zip(("first_time", "second_time"), passes, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of prompt_attention.json")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces, lengths, texts = (PIECES, LENGTHS, TEXTS) if device == "cuda" else ([(64, 0), (37, 0), (16, 48)], (16, 64), 4)
    with torch.no_grad():
        rows = [measure(shape, new, past, device) for shape in args.shapes for new, past in pieces]
    random_rows = [row for shape in args.shapes for row in one_after_the_other(shape, lengths, texts, device)]
    details = {"cudnn": torch.backends.cudnn.version(), "cudnn_is_fast": cudnn_is_fast(torch.device(device))}
    write_results("prompt_attention", rows + random_rows, folder=args.results, **details)
    steady_columns = [form for form in FORMS if any(form in row for row in rows)]
    first_columns = [f"{form}_first" for form in steady_columns]
    print(rows_table(rows, ["shape", "new", "past", "planned", *steady_columns, *first_columns]))
    print(rows_table(random_rows, list(random_rows[0])))
    return rows + random_rows


if __name__ == "__main__":
    main()
