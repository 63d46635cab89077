"""Times of an attention layer of which some KV heads are kept and the others converted, beside those of both kinds alone.

    python eval/benchmarks/heads.py
    python eval/benchmarks/heads.py --shapes 8B --what decode
    python eval/benchmarks/heads.py --page

writes eval/results/heads-layer.json; `--page` measures nothing and fills docs/measured/kernels.md from it. A layer is projections,
attention of both kinds and the output projection, in bf16 and with random weights, from hidden states to hidden states; rotary embedding is
left out. Query heads lie kept ones first, converted ones behind; keys and values are those of all heads, of which each kind reads its own.
A prompt is one text. A token of a row is decoded behind a cache of so many tokens; the token that fills a block of the window, one in many,
is not among them. Both are timed as CALLS calls in one CUDA graph, so without the host, on one stream (`branches` 1) or with the two kinds
side by side (2). `launched_ms` is of a prompt whose kernels the host launches one by one: in a model the other parts lie between these, so
it waits less. `to_mean` is the ratio to the mean of both kinds by their share of heads, `to_dearer` that to the one that takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from captured import in_graph  # noqa: E402
from reporting import RESULTS, fill_page, rows_table, write_results  # noqa: E402
from torch import Tensor  # noqa: E402

from dsla_hf.core.attention import DualState, DualStateAttention  # noqa: E402
from dsla_kernels import append, linears, softmax_decode  # noqa: E402

PAGE = REPOSITORY / "docs" / "measured" / "kernels.md"


class Shape(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    size: int  # of a head


class Plan(NamedTuple):
    """What is measured: shapes by name, tokens of prompts, and rows and cached tokens of decoding."""

    shapes: dict[str, Shape]
    prompts: tuple[int, ...]
    rows: tuple[int, ...]
    caches: tuple[int, ...]


FULL = Plan({"7B": Shape(4096, 32, 32, 128), "8B": Shape(4096, 32, 8, 128)}, (8192, 32768), (1, 16, 64), (8192, 32768))
TINY = Plan({"7B": Shape(32, 4, 4, 8), "8B": Shape(32, 4, 2, 8)}, (150,), (1, 2), (150,))
SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)  # of KV heads, kept
WHAT = ("prefill", "decode")
CALLS = 8


class Layer:
    """An attention layer with `kept` KV heads, and its cache."""

    def __init__(self, shape: Shape, kept: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        group = shape.heads // shape.kv_heads
        order = torch.randperm(shape.kv_heads, device=device)  # heads that are kept lie anywhere
        self.kept, self.converted = order[:kept].sort().values, order[kept:].sort().values.int()
        self.kept_queries = kept * group
        queries, keys = shape.heads * shape.size, shape.kv_heads * shape.size
        self.inputs = [self.random(rows, shape.hidden) * shape.hidden**-0.5 for rows in (queries, keys, keys)]
        self.output = self.random(shape.hidden, queries) * queries**-0.5
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        self.core = None
        if len(self.converted):
            core = DualStateAttention(shape.heads - self.kept_queries, len(self.converted), shape.size)
            self.core = core.to(device, dtype).requires_grad_(False)

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def projected(self, hidden: Tensor) -> list[Tensor]:
        """q, k, v `[B, T, heads, D]`."""
        return [x.unflatten(-1, (-1, self.shape.size)) for x in linears(hidden, self.inputs)]

    def joined(self, hidden: Tensor, kept: Callable[[], Tensor], converted: Callable[[Tensor | None], Any], branches: int) -> Tensor:
        """The layer's output, from what both kinds give `[B, T, heads, D]`; `converted` writes into what it is given."""
        if self.core is None:
            o = kept()
        elif not len(self.kept):
            o = converted(None)[0]
        else:
            o = hidden.new_empty(*hidden.shape[:2], self.shape.heads, self.shape.size)
            if branches == 1:
                converted(o[:, :, self.kept_queries :])
                o[:, :, : self.kept_queries] = kept()
            else:
                main, side = torch.cuda.current_stream(), self.side
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    o[:, :, : self.kept_queries] = kept()
                converted(o[:, :, self.kept_queries :])
                main.wait_stream(side)
        return linears(o.flatten(2), [self.output])[0]

    def of_kept(self, x: Tensor) -> Tensor:
        return x if self.core is None else x.index_select(2, self.kept)

    def prefill(self, hidden: Tensor, branches: int = 1) -> Tensor:
        q, k, v = self.projected(hidden)

        def kept() -> Tensor:
            keys, values = (self.of_kept(x).transpose(1, 2) for x in (k, v))
            queries = q[:, :, : self.kept_queries].transpose(1, 2)
            grouped = queries.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped).transpose(1, 2)

        def converted(out: Tensor | None) -> Any:
            assert self.core is not None
            heads = None if out is None else self.converted
            return self.core(q[:, :, self.kept_queries :], k, v, output_state=True, kv_heads=heads, out=out)

        return self.joined(hidden, kept, converted, branches)

    def fill(self, rows: int, tokens: int) -> None:
        """Random keys, values and states of `tokens` tokens a row, with room for one more."""
        size, heads = self.shape.size, len(self.converted)
        self.keys, self.values = (self.random(rows, len(self.kept), tokens + 1, size) for _ in range(2))
        self.places = torch.full((rows,), tokens, device=self.device, dtype=torch.int32)
        self.lengths = self.places + 1
        if self.core is not None:
            recurrent = torch.randn(rows, heads, 2, size, size, device=self.device)
            ring = [self.random(rows, self.core.sink_tokens + self.core.window_size, heads, size) for _ in range(2)]
            inside = tokens // self.core.window_size * self.core.window_size + 1  # the next token fills no block
            self.state = DualState(recurrent, *ring, torch.full((rows,), inside, device=self.device))

    def decode(self, hidden: Tensor, branches: int) -> Tensor:
        q, k, v = self.projected(hidden)

        def kept() -> Tensor:
            new_keys, new_values = (self.of_kept(x).transpose(1, 2) for x in (k, v))
            append(self.keys, self.values, new_keys, new_values, self.places)
            return softmax_decode(q[:, :, : self.kept_queries], self.keys, self.values, self.lengths)

        def converted(out: Tensor | None) -> Any:
            assert self.core is not None
            heads = None if out is None else self.converted
            queries = q[:, :, self.kept_queries :]
            return self.core(queries, k, v, state=self.state, output_state=True, in_place=True, counts=False, kv_heads=heads, out=out)

        return self.joined(hidden, kept, converted, branches)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of device time; on a CPU one call, so that there is a number."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")
    before = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - before)


def in_one(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """CALLS calls as one CUDA graph; on a CPU one behind the other."""
    return in_graph(call, CALLS) if device.type == "cuda" else lambda: [call() for _ in range(CALLS)]


def measure(plan: Plan, shape: str, what: str, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all shares, each beside both kinds alone."""
    sizes, rows = plan.shapes[shape], []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = [(1, tokens) for tokens in plan.prompts] if what == "prefill" else [(b, t) for t in plan.caches for b in plan.rows]
    counts = sorted({max(1, round(share * sizes.kv_heads)) if share else 0 for share in SHARES}, reverse=True)
    for batch, tokens in lengths:
        found: list[dict[str, Any]] = []
        for kept in counts:
            layer = Layer(sizes, kept, device, dtype)
            hidden = layer.random(batch, tokens if what == "prefill" else 1, sizes.hidden)
            mixed = 0 < kept < sizes.kv_heads
            for branches in (1, 2) if mixed and device.type == "cuda" else (1,):
                row: dict[str, Any] = {
                    "shape": shape,
                    "what": what,
                    "batch": batch,
                    "tokens": tokens,
                    "kept": kept,
                    "kv_heads": sizes.kv_heads,
                }
                row["branches"] = branches
                try:
                    if what == "decode":
                        layer.fill(batch, tokens)
                    call = partial(layer.prefill if what == "prefill" else layer.decode, hidden, branches)
                    if what == "prefill":
                        row["launched_ms"] = milliseconds(call, device)
                    calls = in_one(call, device)
                    row["ms"] = milliseconds(calls, device) / CALLS
                    del call, calls
                except torch.cuda.OutOfMemoryError:
                    row["error"] = "out of memory"
                found.append(row)
            del layer
            if device.type == "cuda":
                torch.cuda.empty_cache()
        softmax, states = (next(row.get("ms") for row in found if row["kept"] == kept) for kept in (sizes.kv_heads, 0))
        for row in found:
            if softmax and states and "ms" in row:
                share = row["kept"] / sizes.kv_heads
                row["to_mean"] = row["ms"] / (share * softmax + (1 - share) * states)
                row["to_dearer"] = row["ms"] / max(softmax, states)
            print(row, flush=True)
        rows += found
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and size: both kinds alone, and what lies between as it runs in models, the two kinds side by side."""
    table = []
    for shape, what, batch, tokens in dict.fromkeys((row["shape"], row["what"], row["batch"], row["tokens"]) for row in rows):
        found = [row for row in rows if (row["shape"], row["what"], row["batch"], row["tokens"]) == (shape, what, batch, tokens)]
        line = {"shape": shape, "what": what, "batch": batch, "tokens": tokens}
        alone = {row["kept"]: row["ms"] for row in found if row["kept"] in (0, row["kv_heads"])}
        line |= {"ms, all kept": alone[max(alone)], "ms, none kept": alone[0]}
        part = [row for row in found if row["branches"] == 2]
        for name in ("to_mean", "to_dearer"):
            line[name.replace("_", " ")] = " / ".join(f"{row[name]:.2f}" for row in part)
        line["kept"] = " / ".join(str(row["kept"]) for row in part) + f" of {found[0]['kv_heads']}"
        table.append(line)
    columns = ["shape", "what", "batch", "tokens", "ms, all kept", "ms, none kept", "kept", "to mean", "to dearer"]
    return rows_table(table, columns)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(FULL.shapes), help=f"of {', '.join(FULL.shapes)}")
    parser.add_argument("--what", default=",".join(WHAT), help=f"of {', '.join(WHAT)}")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all of it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of heads-layer.json")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, help="measure nothing; fill this page (docs/measured/kernels.md)")
    args = parser.parse_args(arguments)
    if args.page is not None:
        measured = json.loads((args.results / "heads-layer.json").read_text())
        fill_page(args.page, {"heads": f"On one {measured['device']}:\n\n{summary(measured['rows'])}"})
        return
    plan, device = TINY if args.tiny else FULL, torch.device(args.device)
    for name, given, known in (("--shapes", args.shapes, FULL.shapes), ("--what", args.what, WHAT)):
        if not set(given.split(",")) <= set(known):
            parser.error(f"{name} takes {', '.join(known)}, got {given}")
    if device.type != "cuda" and not args.tiny:
        parser.error("times are those of a CUDA device; --tiny runs on a CPU, too")
    torch.manual_seed(0)
    rows = [row for shape in args.shapes.split(",") for what in args.what.split(",") for row in measure(plan, shape, what, device)]
    write_results("heads-layer", rows, folder=args.results)
    print(rows_table(rows, [*max((list(row) for row in rows), key=len)]))


if __name__ == "__main__":
    main()
