"""Times of the Triton kernels beside their floors by bytes, SDPA and fla, and their errors against fp64. Needs a CUDA device.

    python eval/benchmarks/kernels.py --quick
    python eval/benchmarks/kernels.py --parts forward,decode

writes eval/results/kernels.json (rows of parts that did not run are kept) and docs/images/kernels-*.png. Times are medians of
device time with CUDA events: before each call the L2 cache is filled with other bytes that were read (of bytes written there the
call would wait until they are in memory), and the device waits until the call has been queued. A step of decoding is also measured
in a graph of several layers, which each have states of their own, as a model runs it. fla is measured if it can be imported.
`--floors` prints the floors without a device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

from captured import in_graph  # noqa: E402
from reporting import RESULTS, rows_table, write_results  # noqa: E402

IMAGES = REPOSITORY / "docs" / "images"
PARTS = ("forward", "training", "decode", "fold", "tokens", "batch", "heads", "accuracy")
BF16, FP32 = 2, 4  # bytes
CHUNK = 64
LAYERS = 32
CACHE_TOKENS = 8192  # that SDPA decodes after
LONG = 131_072
WAIT_CYCLES = 10_000_000  # about 5 ms, longer than the host takes to queue any call
DEFAULT_BANDWIDTH = 4.25  # TB/s, only for --floors


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; a window of 0 is the pure layer. Gates are bf16, `decays` of each state a token and KV head."""

    tokens: int = 8192
    heads: int = 32
    kv_heads: int = 32
    batch: int = 1
    size: int = 128
    decays: int = 128
    window: int = 0
    sinks: int = 0


PURE = Shape()
PAIRED = Shape(decays=64)  # one decay per rotary pair
WINDOW = Shape(decays=64, window=128, sinks=4)  # with write gates
GROUPED = Shape(kv_heads=8)


# --- floors: the fewest bytes that a scheme can move ----------------------------------------------------------------


def _query_bytes(x: Shape) -> int:
    """q, or o, or a gradient of theirs."""
    return x.batch * x.tokens * x.heads * x.size * BF16


def _key_bytes(x: Shape) -> int:
    """k, v and raw gates: what a state pass reads."""
    gates = 2 * x.decays + (2 if x.window else 0)
    return x.batch * x.tokens * x.kv_heads * (2 * x.size + gates) * BF16


def _gate_bytes(x: Shape) -> int:
    return _key_bytes(x) - 2 * x.batch * x.tokens * x.kv_heads * x.size * BF16


def _state_bytes(x: Shape, element: int = FP32) -> int:
    return x.batch * x.kv_heads * 2 * x.size**2 * element


def _boundary_bytes(x: Shape) -> int:
    """States at every chunk or block, bf16, written and read."""
    return 2 * (x.tokens // (x.window // 2 if x.window else CHUNK)) * _state_bytes(x, BF16)


def forward_bytes(x: Shape, passes: int = 1) -> int:
    """One pass reads q, k, v and gates and writes o. Two passes: a state pass reads k, v and gates and writes states at
    boundaries; the other reads q, k, v, states (and gates, without a window) and writes o."""
    once = 2 * _query_bytes(x) + _key_bytes(x)
    again = _key_bytes(x) - (_gate_bytes(x) if x.window else 0)
    return once if passes == 1 else once + again + _boundary_bytes(x)


def training_bytes(x: Shape) -> int:
    """The forward in two passes, then: the states again; their gradients from q, do and gates, written and read; q, k, v, gates
    and do read, their gradients written. With a window also o read, and the gradient of the state output written and read."""
    backward = 2 * _boundary_bytes(x) + _key_bytes(x)
    backward += 2 * _query_bytes(x) + _gate_bytes(x)
    backward += 3 * _query_bytes(x) + 2 * _key_bytes(x)
    if x.window:
        backward += 2 * _query_bytes(x)
    return forward_bytes(x, 2) + backward


def decode_bytes(x: Shape) -> float:
    """Pure: both fp32 states read and written. With a window: states read, and written once in W / 2 tokens; ring and sinks read."""
    if not x.window:
        return 2 * _state_bytes(x)
    ring = x.batch * x.kv_heads * (x.window + x.sinks) * 2 * x.size * BF16
    return _state_bytes(x) * (1 + 2 / (x.window // 2)) + ring


def fold_bytes(x: Shape) -> int:
    return _key_bytes(x) + _state_bytes(x)


def floors(what: str, x: Shape) -> dict[str, float]:
    """Bytes by scheme."""
    if what == "forward":
        return {"one pass": forward_bytes(x), "two passes": forward_bytes(x, 2)}
    return {"floor": {"training": training_bytes, "decode": decode_bytes, "fold": fold_bytes}[what](x)}


def operations(what: str, x: Shape) -> int:
    """Multiplications and additions in matrix products as the kernels run them: tiles on the diagonal in full, states of
    several segments gone through twice."""
    state = 2 * 2 * x.size**2  # a query reads both states, or a token goes into both
    if what == "decode":
        query = state + 4 * (x.window + x.sinks) * x.size
        return x.batch * (x.heads * query + (0 if x.window else x.kv_heads * state))
    updates = 2 * x.kv_heads * state
    pairs = 2 * ((x.window if x.window else 0) + CHUNK) * x.size  # one product of a query with the keys that it meets
    if what == "fold":
        token = updates // 2
    elif x.window:
        token = x.heads * (2 * pairs + state) + updates
        if what == "training":  # the query step, the key step, the states' gradients (one product serves both states, twice)
            token += x.heads * (2 * state + 3 * pairs + 4 * pairs + state) + x.kv_heads * 2 * state + updates
    else:
        token = x.heads * (3 * pairs + state) + updates
        if what == "training":  # of the products with pairs, scores' factors in halves make those with values four times
            token += x.heads * (14 * pairs + state + 2 * state) + x.kv_heads * 2 * state + updates
    return x.batch * x.tokens * token


# --- calls ----------------------------------------------------------------------------------------------------------

Call = Callable[[], Any]


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def make_inputs(x: Shape, dtype: torch.dtype = torch.bfloat16, gates: str = "random") -> dict[str, Tensor]:
    """Arguments by name, of the pure layer or of the one with a window."""
    shift = {"random": 0.0, "bound": -100.0, "open": 20.0}[gates]
    inputs = {
        "q": _random(x.batch, x.tokens, x.heads, x.size, dtype=dtype),
        "k": _random(x.batch, x.tokens, x.kv_heads, x.size, dtype=dtype),
        "v": _random(x.batch, x.tokens, x.kv_heads, x.size, dtype=dtype),
        "gate_logits": (_random(x.batch, x.tokens, x.kv_heads, 2, x.decays, dtype=dtype) * 2 + shift),
        "mix": _random(x.heads, 2, dtype=torch.float32).softmax(-1),
    }
    if x.window:
        inputs |= {
            "norm_weight": 1 + 0.1 * _random(x.heads, x.size, dtype=torch.float32),
            "state_gain": 1 + 0.1 * _random(x.heads, dtype=torch.float32),
            "state_bias": 1 + 0.1 * _random(x.heads, dtype=torch.float32),
            "write_logits": _random(x.batch, x.tokens, x.kv_heads, 2, dtype=dtype),
        }
    return inputs


def window_options(x: Shape, inputs: dict[str, Tensor]) -> dict[str, Any]:
    if not x.window:
        return {}
    sinks = tuple(inputs[name].detach()[:, : x.sinks].contiguous() for name in ("k", "v"))
    return {"window_size": x.window, "sinks": sinks, "state_mask": _state_mask(x, x.tokens)}


def apply(module: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The layer's output by `module`'s implementation: `chunk`, `window` or the reference."""
    form = module.fused_window_attention if options else module.dual_state_attention
    return form(**inputs, **options)[0]


def _state_mask(x: Shape, tokens: int, first: int = 0) -> Tensor:
    return (torch.arange(first, first + tokens, device="cuda") >= x.sinks).expand(x.batch, -1).contiguous()


def kernels_of(x: Shape) -> Any:
    from dsla_kernels.ops import chunk, window

    return window if x.window else chunk


def ours(what: str, x: Shape) -> Call:
    if what == "decode":
        return decode_call(x)
    inputs = make_inputs(x)
    if what == "fold":
        from dsla_kernels.ops import states

        arguments = {name: inputs[name] for name in ("k", "v", "gate_logits", "write_logits") if name in inputs}
        return lambda: states.final_state(**arguments)
    module, options = kernels_of(x), window_options(x, inputs)
    if what == "forward":
        return lambda: apply(module, inputs, options)
    leaves = [x.requires_grad_() for x in inputs.values()]
    do = _random(x.batch, x.tokens, x.heads, x.size)
    return lambda: torch.autograd.grad(apply(module, inputs, options), leaves, do)


def decode_call(x: Shape, layers: int = 1, folds: bool = False) -> Call:
    """A token through `layers` layers with states of their own. folds: the token that fills a block."""
    from dsla_kernels.ops import decode

    rank = 16
    lengths = torch.full((x.batch,), 64 * x.window + (x.window // 2 - 1 if folds else 5), device="cuda")
    arguments = []
    for _ in range(layers):
        gates = decode.GateWeights(
            _random(x.kv_heads, x.size, rank),
            _random(x.kv_heads, rank, 2 * x.decays),
            _random(x.kv_heads, 2, x.decays),
            *((_random(x.kv_heads, x.size, 2), _random(x.kv_heads, 2)) if x.window else (None, None)),
        )
        token = [_random(x.batch, 1, heads, x.size) for heads in (x.heads, x.kv_heads, x.kv_heads)]
        recurrent = _random(x.batch, x.kv_heads, 2, x.size, x.size, dtype=torch.float32)
        mix, norm = _random(x.heads, 2, dtype=torch.float32), _random(x.heads, x.size, dtype=torch.float32)
        if x.window:
            ring = [_random(x.batch, x.sinks + x.window, x.kv_heads, x.size) for _ in range(2)]
            gate = [_random(x.heads, dtype=torch.float32) for _ in range(2)]
            arguments.append((*token, recurrent, *ring, lengths, gates, mix, norm, *gate, x.window))
        else:
            arguments.append((*token, recurrent, gates, mix, norm))

    def run() -> None:
        for entry in arguments:
            if x.window:
                decode.window_decode(*entry, advance=False)
            else:
                decode.pure_decode(*entry)

    return run


def layers_of(x: Shape) -> int:
    """Of a model in a graph: more states than the L2 cache holds, and no more than memory does."""
    return LAYERS if x.batch == 1 else 8


def sdpa(what: str, x: Shape, backend: str = "FLASH_ATTENTION") -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    queries = 1 if what == "decode" else x.tokens
    q = _random(x.batch, x.heads, queries, x.size)
    k, v = (_random(x.batch, x.kv_heads, x.tokens, x.size) for _ in range(2))

    def forward() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=what != "decode", enable_gqa=x.heads != x.kv_heads)

    if what != "training":
        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]
    do = torch.randn_like(q)
    return lambda: torch.autograd.grad(forward(), leaves, do)


def fla(what: str, x: Shape, times: int = 1) -> Call:
    from fla.ops.gla import chunk_gla, fused_recurrent_gla

    tokens = 1 if what == "decode" else x.tokens
    q, k, v = (_random(x.batch, tokens, x.heads, x.size) for _ in range(3))
    gates = [F.logsigmoid(_random(x.batch, tokens, x.heads, x.size).float()).div(16).bfloat16() for _ in range(times)]
    if what == "decode":
        states = [_random(x.batch, x.heads, x.size, x.size, dtype=torch.float32) for _ in gates]
        options = {"output_final_state": True}
        return lambda: [fused_recurrent_gla(q, k, v, g, initial_state=s, **options) for g, s in zip(gates, states, strict=True)]
    if what == "forward":
        return lambda: [chunk_gla(q, k, v, g) for g in gates]
    do = torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gates = [g.requires_grad_() for g in gates]
    return lambda: [torch.autograd.grad(chunk_gla(q, k, v, g)[0], [*leaves, g], do) for g in gates]


FORMS: dict[str, Callable[[str, Shape], Call]] = {
    "ours": ours,
    "ours, layers in a graph": lambda what, x: in_graph(decode_call(x, layers_of(x))),
    "ours, the token that fills a block": lambda what, x: decode_call(x, folds=True),
    "SDPA": sdpa,
    "SDPA, cuDNN": lambda what, x: sdpa(what, x, "CUDNN_ATTENTION"),
    "fla": fla,
    "fla twice": lambda what, x: fla(what, x, 2),
}


# --- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    part: str
    what: str
    form: str
    shape: Shape

    @property
    def layer(self) -> str:
        if self.form.startswith(("SDPA", "fla")):
            return ""
        return "window" if self.shape.window else "pure" if self.shape.decays == self.shape.size else "pure, a decay a pair"


def cases(parts: list[str], quick: bool, with_fla: bool) -> Iterator[Case]:
    others = ["SDPA", "SDPA, cuDNN"] + (["fla", "fla twice"] if with_fla else [])

    def compared(part: str, what: str, *shapes: Shape) -> Iterator[Case]:
        """Ours for all shapes, others once for all layers of equal sizes."""
        for x in shapes:
            yield Case(part, what, "ours", x)
        for x in dict.fromkeys(replace(x, decays=x.size, window=0, sinks=0) for x in shapes):
            if what == "decode":
                yield Case(part, what, "SDPA", replace(x, tokens=CACHE_TOKENS))
            for form in others:
                if not (form.startswith("fla") and x.heads != x.kv_heads) and not (form.startswith("SDPA") and what == "decode"):
                    yield Case(part, what, form, x)

    if "forward" in parts:
        yield from compared("forward", "forward", *(replace(PURE, tokens=t) for t in (2048, 8192, 32768)), GROUPED, PAIRED, WINDOW)
    if "training" in parts:
        yield from compared("training", "training", PURE, *([] if quick else [PAIRED, GROUPED]), WINDOW)
    batches = (1, 16, 64)
    if "decode" in parts:
        yield from compared("decode", "decode", *(replace(x, batch=b, tokens=1) for b in batches for x in (PURE, WINDOW)))
        for b, x in itertools.product(batches, (PURE, WINDOW)):
            yield Case("decode", "decode", "ours, layers in a graph", replace(x, tokens=1, batch=b))
        yield Case("decode", "decode", "ours, the token that fills a block", replace(WINDOW, batch=16, tokens=1))
    if "fold" in parts:
        for t in (8192,) if quick else (2048, 8192, 32768):
            yield from (Case("fold", "fold", "ours", replace(x, tokens=t)) for x in (PURE, WINDOW))
    lengths = (1024, 8192, LONG) if quick else tuple(1024 * 2**i for i in range(8))
    if "tokens" in parts:
        yield from compared("tokens", "forward", *(replace(x, tokens=t) for t in lengths for x in (PURE, WINDOW)))
    if "batch" in parts:
        more = (4, 32) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
        yield from compared("batch", "decode", *(replace(x, batch=b, tokens=1) for b in more for x in (PURE, WINDOW)))
    if "heads" in parts:
        for h in (4, 16) if quick else (1, 2, 4, 8, 16, 32, 64):
            yield from compared("heads", "forward", *(replace(x, heads=h, kv_heads=h) for x in (PURE, WINDOW)))


class Clock:
    """Medians of device time."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.others = torch.zeros(32 << 20, dtype=torch.int64, device="cuda")  # 256 MB

    def milliseconds(self, call: Call, repeats: int | None = None) -> tuple[float, float]:
        """Median, and the distance of the quartiles; of fewer calls where one takes long."""
        for _ in range(3):
            call()
        times: list[float] = []
        for _ in range(repeats or self.repeats):
            if len(times) >= 5 and sum(times) > 1000:
                break
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.others.sum()
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        lower, middle, upper = statistics.quantiles(times, n=4)
        return middle, upper - lower

    def bandwidth(self) -> float:
        """TB/s of a large copy, bytes read plus bytes written."""
        source, target = (torch.ones(4 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * source.numel() / self.milliseconds(lambda: target.copy_(source), 10)[0] / 1e9


def measure(case: Case, clock: Clock, bandwidth: float) -> dict[str, Any]:
    row: dict[str, Any] = {"part": case.part, "what": case.what, "layer": case.layer, "form": case.form, **asdict(case.shape)}
    layers = layers_of(case.shape) if "layers" in case.form else 1
    try:
        middle, spread = clock.milliseconds(FORMS[case.form](case.what, case.shape))
        row |= {"ms": middle / layers, "spread": spread / layers}
        torch.cuda.empty_cache()
    except Exception as error:  # one failure must not cost the rest of a run on a lent device
        row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(row, flush=True)
    if case.form.startswith("ours"):
        times = {name: bytes_moved / bandwidth / 1e9 for name, bytes_moved in floors(case.what, case.shape).items()}
        row |= {"floors": times, "operations": operations(case.what, case.shape)}
        row["of floor"] = row["ms"] / list(times.values())[-1] if "ms" in row else None
        row["floor"] = ", ".join(f"{time:.4g}" for time in times.values())
    return row


def compile_ahead(case: Case) -> None:
    """In a process of its own: leaves the compiled kernels of a case in Triton's cache."""
    torch.cuda.empty_cache()  # of the case before
    FORMS[case.form](case.what, case.shape)()
    torch.cuda.synchronize()


def work_ahead(todo: list[Case], checks: list[Check], workers: int) -> list[dict[str, Any]]:
    """Compiles what will be measured and runs the checks, side by side; rows of the checks. A case that fails here fails again,
    and is told, when it is measured."""
    mine = [case for case in dict.fromkeys(replace(case, part="") for case in todo) if case.form == "ours"]
    if not workers:
        return [check_accuracy(check) for check in checks]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = [pool.submit(compile_ahead, case) for case in mine]
        rows = []
        for check, future in [(check, pool.submit(check_accuracy, check)) for check in checks]:
            error = future.exception()
            rows.append(check.row() | {"error": f"{type(error).__name__}: {error}"[:300]} if error else future.result())
        failed = sum(future.exception() is not None for future in compiled)
    print(f"compiled {len(mine) - failed} of {len(mine)} cases ahead", flush=True)
    return rows


# --- accuracy -------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, expected: Tensor) -> float:
    """NaN stays NaN; where nothing is expected, the size of what was found."""
    expected = expected.detach()
    norm = expected.norm()
    return float((found.detach().double() - expected).norm() / (norm if norm > 0 else 1))


@dataclass(frozen=True)
class Check:
    shape: Shape
    dtype: torch.dtype
    gates: str

    def row(self) -> dict[str, Any]:
        layer = "window" if self.shape.window else "pure"
        return {"part": "accuracy", "layer": layer, "dtype": str(self.dtype), "gates": self.gates, **asdict(self.shape)}


def all_checks(quick: bool) -> list[Check]:
    """Outputs and gradients at 1,000 tokens, outputs at 131,072; random gates, all at the bound, all open."""
    found = []
    for layer in (WINDOW, PURE):
        short, long = replace(layer, tokens=1000, heads=4, kv_heads=2), replace(layer, tokens=LONG, heads=2, kv_heads=2)
        for gates in ("random", "bound", "open"):
            found += [Check(x, torch.bfloat16, gates) for x in (short, long)]
            if not quick or gates == "random":
                found.append(Check(short, torch.float32, gates))
            if not quick:
                found.append(Check(long, torch.float32, gates))
    return found


def check_accuracy(check: Check) -> dict[str, Any]:
    """Relative errors against fp64: of the output, and of every gradient unless the text is long."""
    from dsla_kernels import reference

    torch.cuda.empty_cache()
    torch.manual_seed(0)
    x, row = check.shape, check.row()
    try:
        inputs = make_inputs(x, check.dtype, check.gates)
        if x.tokens == LONG:
            with torch.no_grad():
                found = apply(kernels_of(x), inputs, window_options(x, inputs))
                return row | {"output": relative_error(found, reference_in_pieces(x, inputs))}
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        truth = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
        found, expected = (
            apply(module, tensors, window_options(x, tensors)) for module, tensors in ((kernels_of(x), leaves), (reference, truth))
        )
        do = torch.randn_like(found)
        gradients = torch.autograd.grad(found, list(leaves.values()), do)
        true_gradients = torch.autograd.grad(expected, list(truth.values()), do.double())
        errors = {name: relative_error(d, e) for name, d, e in zip(leaves, gradients, true_gradients, strict=True)}
        return row | {"output": relative_error(found, expected), "worst gradient": max(errors.values()), "gradients": errors}
    except Exception as error:  # told in the table
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


PER_TOKEN = ("q", "k", "v", "gate_logits", "write_logits")


def reference_in_pieces(x: Shape, inputs: dict[str, Tensor], piece: int = 8192) -> Tensor:
    """The reference in fp64 on pieces of a long text, each continuing the one before. With a window, a piece begins with the two
    blocks before it, whose outputs are dropped."""
    from dsla_kernels import reference

    inputs = {name: value.double() for name, value in inputs.items()}
    outputs: list[Tensor] = []
    state = None
    for first in range(0, x.tokens, piece):
        begin, end = max(first - x.window, 0), min(first + piece, x.tokens)
        part = {name: value[:, begin:end] if name in PER_TOKEN else value for name, value in inputs.items()}
        if not x.window:
            o, state = reference.dual_state_attention(**part, initial_state=state, output_final_state=True)
            outputs.append(o)
            continue
        mask = _state_mask(x, end - begin, begin)
        sinks = tuple(inputs[name][:, : x.sinks] for name in ("k", "v"))
        start = torch.full((x.batch,), begin, device=mask.device)
        o, _ = reference.fused_window_attention(
            **part, window_size=x.window, sinks=sinks, state_mask=mask, row_start=start, initial_state=state
        )
        outputs.append(o[:, first - begin :])
        taken = end - x.window - begin  # up to where the next piece begins
        arguments = {name: part[name][:, :taken] for name in ("k", "v", "gate_logits", "write_logits")}
        state = reference.block_states(**arguments, block_size=x.window // 2, padding_mask=mask[:, :taken], initial_state=state)[:, -1]
    return torch.cat(outputs, 1)


# --- output ---------------------------------------------------------------------------------------------------------


def make_plots(rows: list[dict[str, Any]]) -> None:
    from dsla_hf.core.plots import figure, mark_measured, mark_plain, save

    for part, axis_key, what, label in (
        ("tokens", "tokens", "forward", "tokens"),
        ("batch", "batch", "decode", "sequences decoded together"),
        ("heads", "heads", "forward", "heads"),
    ):
        shown = [row for row in rows if row["part"] == part and "ms" in row]
        if part == "batch":
            shown += [
                row for row in rows if row["part"] == "decode" and "ms" in row and row["form"] in ("ours", "SDPA", "fla", "fla twice")
            ]
        if not shown:
            continue
        drawn, (axes,) = figure(size=(7, 4.5))
        for i, name in enumerate(dict.fromkeys((row["layer"], row["form"]) for row in shown)):
            points = sorted({row[axis_key]: row for row in shown if (row["layer"], row["form"]) == name}.items())
            text = ", ".join(filter(None, (name[1], name[0])))
            axes.plot([x for x, _ in points], [row["ms"] for _, row in points], "osD^vP"[i % 6] + "-", color=f"C{i}", label=text)
            if name[1] == "ours":
                lowest = [next(iter(row["floors"].values())) for _, row in points]
                axes.plot([x for x, _ in points], lowest, ":", color=f"C{i}", label=f"{name[0]}: floor by bytes")
        axes.set(xlabel=label, ylabel=f"ms, {what}", xscale="log", yscale="log")
        mark_measured(axes.xaxis, {row[axis_key] for row in shown})
        mark_plain(axes.yaxis)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save(drawn, IMAGES / f"kernels-{part}.png")


def save(rows: list[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """Rows with those of parts that did not run in front."""
    path, parts = RESULTS / "kernels.json", {row["part"] for row in rows}
    kept = [row for row in json.loads(path.read_text())["rows"] if row["part"] not in parts] if path.exists() else []
    write_results("kernels", kept + rows, bandwidth_tb_s=bandwidth)
    return kept + rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    times = [row for row in rows if row["part"] != "accuracy"]
    if times:
        columns = ["what", "layer", "form", "batch", "tokens", "heads", "kv_heads", "ms", "spread", "floor", "of floor", "error"]
        print(rows_table(times, columns))
    errors = [row for row in rows if row["part"] == "accuracy"]
    if errors:
        print(rows_table(errors, ["layer", "dtype", "gates", "tokens", "output", "worst gradient", "error"]))


def print_floors(parts: list[str], bandwidth: float) -> None:
    rows = []
    for case in cases(parts, False, False):
        if case.form.startswith("ours"):
            times = {name: moved / bandwidth / 1e9 for name, moved in floors(case.what, case.shape).items()}
            rows.append({"what": case.what, "layer": case.layer, **asdict(case.shape), **times})
            rows[-1]["operations"] = operations(case.what, case.shape)
    columns = ["what", "layer", "batch", "tokens", "heads", "kv_heads", "one pass", "two passes", "floor", "operations"]
    print(f"milliseconds at {bandwidth} TB/s")
    print(rows_table([row for i, row in enumerate(rows) if row not in rows[:i]], columns))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, of " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--repeats", type=int, help="timed calls of each case (50, or 15 with --quick)")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile ahead; 0: compile while measuring")
    parser.add_argument("--floors", action="store_true", help="only print the floors by bytes")
    parsed = parser.parse_args(arguments)
    parsed.parts = parsed.parts.split(",")
    if unknown := [part for part in parsed.parts if part not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parsed.repeats = parsed.repeats or (15 if parsed.quick else 50)
    return parsed


def main() -> None:
    args = parse_arguments()
    if args.floors:
        return print_floors(args.parts, DEFAULT_BANDWIDTH)
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --floors prints the floors without one")
    try:
        import fla.ops.gla  # noqa: F401

        with_fla = True
    except ImportError as error:
        with_fla = False
        print(f"fla is left out: {error}", flush=True)
    torch.manual_seed(0)
    # fla last, its training last of all: it tunes itself over many configurations, and a run cut short should have the rest.
    todo = sorted(cases(args.parts, args.quick, with_fla), key=lambda case: case.form.startswith("fla") * (1 + (case.what == "training")))
    checks = all_checks(args.quick) if "accuracy" in args.parts else []
    errors = work_ahead(todo, checks, args.workers)
    clock = Clock(args.repeats)
    bandwidth = clock.bandwidth()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth:.3f} TB/s", flush=True)
    rows = list(errors)
    known: dict[Case, dict[str, Any]] = {}
    for case in todo:
        key = replace(case, part="")
        if key not in known:
            known[key] = measure(case, clock, bandwidth)
        rows.append(known[key] | {"part": case.part, "repeats": args.repeats})
        save(rows, bandwidth)  # what has been measured outlives a run that is cut short
    everything = save(rows, bandwidth)
    try:
        make_plots(everything)
    except ImportError as error:
        print(f"no plots: {error}")
    print_tables(rows)
    if any("error" in row or math.isnan(row.get("output", 0.0)) for row in rows):
        sys.exit("some cases failed: see the column `error`")


if __name__ == "__main__":
    main()
