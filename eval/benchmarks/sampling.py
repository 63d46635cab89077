"""Times of what chooses the next tokens of many texts, by what they ask for: `NextTokens`, which the server calls once a step.

    python eval/benchmarks/sampling.py
    python eval/benchmarks/sampling.py --page

writes eval/results/sampling.json. On a CUDA device `ms` is what the device is busy with, from the end of the model's call to the last
token: work that is queued behind a busy device, as in a server, where the host gets ready while the model runs; `host_ms` is what that
takes the host, and `alone_ms` the time of a call on an idle device, tokens read. On a CPU `ms` is the time of a call. `--page` measures
nothing: it fills docs/measured/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
from reporting import RESULTS, fill_page, rows_table, write_results  # noqa: E402

from dsla_hf.inference.sampling import Sampling  # noqa: E402
from dsla_hf.serving.engine.request import Request  # noqa: E402
from dsla_hf.serving.engine.tokens import NextTokens  # noqa: E402

VOCABULARIES = (32_000, 128_256)
PAGE = REPOSITORY / "docs" / "measured" / "serving.md"
PROMPT = list(range(100, 356))
SMALLEST_VOCABULARY = PROMPT[-1] + 1
BUSY = 8192  # rows and columns of the matrices whose product keeps a device busy


class EverySecond:
    """A constraint that allows half of the tokens, always."""

    def __init__(self, vocabulary: int):
        self.words = torch.full((-(-vocabulary // 32),), 0x55555555, dtype=torch.int32)

    def mask(self) -> torch.Tensor:
        return self.words

    def accept(self, token: int) -> None:
        pass


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "temperature, top_k": {"temperature": 0.7, "top_k": 50},
    "temperature, top_p": {"temperature": 0.7, "top_p": 0.9},
    "temperature, top_k, top_p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "temperature, min_p": {"temperature": 1.0, "min_p": 0.05},
    "greedy, penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "greedy, bias of 10 tokens": {"logit_bias": tuple((token, 1.0) for token in range(10))},
    "greedy, mask": {"constraint": True},
    "greedy, logprobs 0": {"logprobs": 0},
    "greedy, logprobs 20": {"logprobs": 20},
    "all of it": {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": ((5, 1.0),),
        "constraint": True,
        "logprobs": 5,
    },
}


def requests_of(case: dict[str, Any], rows: int, vocabulary: int) -> list[Request]:
    """As the engine has them, a slot each."""
    asked = {name: value for name, value in case.items() if name != "constraint"}
    found = []
    for slot in range(rows):
        constraint = EverySecond(vocabulary) if case.get("constraint") else None
        request = Request(PROMPT, 10**6, Sampling(seed=slot, **asked), lambda event: None, 0.0, constraint)
        request.slot = slot
        found.append(request)
    return found


def logits_of(rows: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Of about the shape of a language model's: most of what is likely is a few tokens, of a long tail. bf16 on a GPU."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary) - 1.3 * torch.rand(rows, vocabulary).argsort(-1).float().add_(1).log_()
    return logits.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(case: dict[str, Any], rows: int, vocabulary: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step."""
    logits, requests = logits_of(rows, vocabulary, device), requests_of(case, rows, vocabulary)
    chooses = NextTokens(rows, vocabulary, set(), device)

    def step(meanwhile: Any = None) -> None:
        for request, found in zip(requests, chooses(logits, requests, meanwhile), strict=True):
            request.tokens.append(found.token)

    def timed(call: Any) -> float:
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)

    for _ in range(3):
        step()
    if device.type == "cpu":
        return {"ms": median(timed(step) for _ in range(repeats))}
    busy, device_times, host_times = torch.randn(BUSY, BUSY, device=device, dtype=torch.bfloat16), [], []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        for _ in range(8):
            busy @ busy
        start.record()
        begin, ready = time.perf_counter(), []

        def launched(end: Any = end, ready: list[float] = ready) -> None:
            end.record()
            ready.append(time.perf_counter())

        step(launched)
        host_times.append(1000 * (ready[0] - begin))
        end.synchronize()
        device_times.append(start.elapsed_time(end))
    alone = [timed(step) for _ in range(repeats)]
    return {"ms": median(device_times), "host_ms": median(host_times), "alone_ms": median(alone)}


def page_part(found: dict[str, Any]) -> str:
    """A table of what was measured, and on what."""
    rows = found["rows"]
    about = f"{found['device']}, {rows[0]['rows']} rows, torch {found['versions']['torch']}; `{found['command']}`"
    columns = [name for name in ("vocabulary", "asked", "ms", "host_ms", "alone_ms") if name in rows[0]]
    return f"{about}\n\n{rows_table(rows, columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=None, help="of each (default: 50 on a GPU, 3 on a CPU)")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of sampling.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; fill docs/measured/serving.md")
    args = parser.parse_args()
    if args.page:
        fill_page(PAGE, {"sampling": page_part(json.loads((args.results / "sampling.json").read_text()))})
        return
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda, got {args.device}")
    repeats = (50 if device.type == "cuda" else 3) if args.repeats is None else args.repeats
    for name, number in (("rows", args.rows), ("repeats", repeats)):
        if number < 1:
            parser.error(f"--{name} must be 1 or more, got {number}")
    if min(args.vocabularies) < SMALLEST_VOCABULARY:
        parser.error(
            f"--vocabularies must be {SMALLEST_VOCABULARY} or more, which has the tokens of the prompt, got {min(args.vocabularies)}"
        )
    rows = []
    for vocabulary in args.vocabularies:
        for name in args.cases:
            found = measure(CASES[name], args.rows, vocabulary, device, repeats)
            rows.append({"device": device.type, "vocabulary": vocabulary, "rows": args.rows, "asked": name, **found})
    write_results("sampling", rows, folder=args.results)
    print(rows_table(rows, max((list(row) for row in rows), key=len)))


if __name__ == "__main__":
    main()
