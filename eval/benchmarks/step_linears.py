"""The linear layers of a decoder layer in a step of one token a row: kernels for few rows, separate products, and joined ones.

    python eval/benchmarks/step_linears.py

Milliseconds of all of them in a layer, with the activation between, bf16, without the host's launches (a CUDA graph of several layers with
weights of their own, so that nothing is left in a cache): `kernels` are this library's, which take up to 16 rows; `separate` are seven
products by cuBLAS; `joined` are four, queries, keys and values in one and gate and up in one, as steps run them whose weights lie beside
each other. `floor` is the time of reading the weights once, at the speed of a copy that is measured beside. Writes
eval/results/step_linears.json. On a CPU it runs at a size that says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from reporting import RESULTS, rows_table, write_results  # noqa: E402
from torch import Tensor  # noqa: E402

from dsla_hf.inference.fusion import can_compile  # noqa: E402
from dsla_kernels import gated_linear, linears, takes_few_rows  # noqa: E402

# Hidden size, of queries, of keys and of values, of the MLP.
SHAPES = {"llama2-7b": (4096, 4096, 4096, 11008), "llama3-8b": (4096, 4096, 1024, 14336), "tiny": (64, 64, 32, 96)}
ROWS = (1, 8, 16, 17, 24, 32, 48, 64, 128)
FORMS = ("kernels", "separate", "joined")
LAYERS = 4


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def multiplied(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Layer:
    """Weights of a layer, `[N, K]`; those of one x lie one behind the other."""

    def __init__(self, shape: str, device: str, compiled: Callable[[Any], Any]):
        hidden, queries, keys, inner = SHAPES[shape]

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / columns**0.5

        self.qkv, self.both = weight(queries + 2 * keys, hidden), weight(2 * inner, hidden)
        self.attention, self.mlp = self.qkv.split([queries, keys, keys]), self.both.chunk(2)
        self.o, self.down = weight(hidden, queries), weight(hidden, inner)
        self.gated, self.multiplied = compiled(gated), compiled(multiplied)
        self.queries = queries

    def kernels(self, x: Tensor) -> Tensor:
        q = linears(x, list(self.attention))[0]
        x = linears(q, [self.o])[0]
        return linears(gated_linear(x, *self.mlp, "silu"), [self.down])[0]

    def separate(self, x: Tensor) -> Tensor:
        q, *_ = [F.linear(x, weight) for weight in self.attention]
        x = F.linear(q, self.o)
        return F.linear(self.multiplied(*(F.linear(x, weight) for weight in self.mlp)), self.down)

    def joined(self, x: Tensor) -> Tensor:
        q = F.linear(x, self.qkv)[..., : self.queries].contiguous()  # a rotation makes it so
        x = F.linear(q, self.o)
        return F.linear(self.gated(F.linear(x, self.both)), self.down)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.qkv, self.both, self.o, self.down))


def milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        call()
        return float(do_bench_cudagraph(call, rep=20, return_mode="median"))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


@torch.no_grad()
def measure(shape: str, device: str, every: tuple[int, ...]) -> list[dict[str, Any]]:
    compiles = device == "cuda" and can_compile(torch.device(device))
    layers = [Layer(shape, device, torch.compile if compiles else lambda function: function) for _ in range(LAYERS)]
    source = torch.empty(2**28 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    copied = 2 * source.numel() / milliseconds(lambda: source.clone(), device)  # bytes a millisecond, read and written
    found = []
    for rows in every:
        x = torch.randn(rows, 1, SHAPES[shape][0], device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"shape": shape, "rows": rows, "floor": layers[0].bytes / copied}
        for form in FORMS:
            if form == "kernels" and not takes_few_rows(x, layers[0].o):
                continue
            through = [getattr(layer, form) for layer in layers]
            torch.testing.assert_close(through[0](x), layers[0].separate(x), rtol=0.05, atol=0.05)

            def call(through: list[Callable[[Tensor], Tensor]] = through, x: Tensor = x) -> None:
                for layer in through:
                    layer(x)

            row[form] = milliseconds(call, device) / LAYERS
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step_linears.json")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, every = (["llama2-7b", "llama3-8b"], ROWS) if device == "cuda" else (["tiny"], (1, 17))
    rows = [row for shape in shapes for row in measure(shape, device, every)]
    write_results("step_linears", rows, folder=args.results)
    print(
        rows_table(
            rows, ["shape", "rows", "floor", *(form for form in ("kernels", "separate", "joined") if any(form in row for row in rows))]
        )
    )
    return rows


if __name__ == "__main__":
    main()
