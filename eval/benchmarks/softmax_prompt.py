"""Times of the kernel that reads pieces of prompts over blocks, beside SDPA's flash kernel over a dense cache. Needs a CUDA device.

    python eval/benchmarks/softmax_prompt.py

writes eval/results/softmax_prompt.json. SDPA gets keys and values where it wants them, for nothing: the copy out of the blocks, which it
would need, stands in a column of its own. Operations are those of the visible half.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from reporting import RESULTS, rows_table, write_results  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from dsla_kernels.ops.softmax import prompt  # noqa: E402
from dsla_kernels.ops.softmax.tiles import Launch  # noqa: E402

HEADS, SIZE, BLOCK = 32, 128, 64
PIECES = [(256, 0), (1024, 0), (2048, 0), (512, 2048), (2048, 6144), (2048, 14336)]  # new tokens, tokens before them
LAUNCHES = [Launch(64, 8, 3), Launch(64, 8, 4), Launch(64, 4, 3), Launch(128, 8, 2), Launch(128, 8, 3), Launch(32, 4, 4)]


def measure(new: int, past: int, kv_heads: int, launches: list[Launch]) -> dict[str, Any]:
    """Milliseconds of one layer's attention."""
    total = new + past
    blocks = -(-total // BLOCK)
    q = torch.randn(1, new, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(blocks + 1, BLOCK, kv_heads, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(blocks, device="cuda")[None] + 1
    starts, lengths = torch.tensor([past], device="cuda"), torch.tensor([total], device="cuda")

    def gather() -> list[torch.Tensor]:
        return [x[table[0]].flatten(0, 1)[None, :total].transpose(1, 2) for x in (keys, values)]

    dense = [x.contiguous() for x in gather()]
    mask, grouped = causal_lower_right(new, total), kv_heads != HEADS
    operations = 4 * HEADS * SIZE * sum(range(past + 1, total + 1))

    def ours() -> torch.Tensor:
        return prompt.softmax_prompt(q, keys, values, starts, lengths, table)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), *dense, attn_mask=mask, enable_gqa=grouped)

    torch.testing.assert_close(ours(), sdpa().transpose(1, 2), rtol=0.02, atol=0.02)
    row: dict[str, Any] = {"new": new, "past": past, "kv_heads": kv_heads}
    row["ours_ms"] = do_bench(ours, return_mode="median")
    row["sdpa_ms"], row["copy_ms"] = do_bench(sdpa, return_mode="median"), do_bench(gather, return_mode="median")
    row["tera_operations_per_second"] = operations / row["ours_ms"] / 1e9
    for launch in launches:
        prompt.tuned = launch
        row[str(tuple(launch))] = do_bench(ours, return_mode="median")
    prompt.tuned = None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", action="store_true", help="try tiles, warps and stages, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of softmax_prompt.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and there is none")
    rows = [measure(new, past, kv_heads, LAUNCHES if args.launches else []) for kv_heads in (32, 8) for new, past in PIECES]
    write_results("softmax_prompt", rows, folder=args.results)
    print(rows_table(rows, max((list(row) for row in rows), key=len)))


if __name__ == "__main__":
    main()
