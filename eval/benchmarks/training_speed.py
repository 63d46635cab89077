"""Speed of distillation steps of a small model, beside a plain step of training the same model, on one GPU.

    python eval/benchmarks/training_speed.py
    python eval/benchmarks/training_speed.py --page    # measures nothing: docs/scale.md from the rows

The shape is that of SmolLM2-135M with random weights, in bf16; levels count KV heads and are drawn at random. `plain` is forward, backward
and AdamW of all weights for the next token, with SDPA. Ways: `recorded` as the steps are by default, `liger` without CUDA graphs, `eager`
without either. Writes eval/results/training-speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
from operations import SHAPES, Shape  # noqa: E402
from peft import get_peft_model  # noqa: E402
from reporting import RESULTS, fill_page, rows_table, write_results  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback  # noqa: E402

from dsla_hf import DSLAConfig  # noqa: E402
from dsla_hf.training.arguments import DSLATrainingArguments  # noqa: E402
from dsla_hf.training.trainer import DSLATrainer  # noqa: E402

WARM_UP = 5  # steps: two of each kind of recording, and what compiles
WAYS: dict[str, dict[str, Any]] = {
    "recorded": {},
    "liger": {"cuda_graphs": False},
    "eager": {"cuda_graphs": False, "use_liger_kernel": False},
}
LAYERS: dict[str, dict[str, Any]] = {"states": {"window_size": 384}, "window": {"states": False, "window_size": 512}}
STAGES = ("alignment", "logits")
COLUMNS = ["step", "layer", "way", "rows", "length", "step_seconds", "tokens_per_second", "of_plain", "peak_gib"]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Times(TrainerCallback):
    """Of the steps after the warm-up."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        if state.global_step > WARM_UP:
            self.times.append(time.perf_counter() - self.begin)


def make_base(shape: Shape, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape.config(), max_position_embeddings=8192, use_cache=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def plain_seconds(shape: Shape, ids: torch.Tensor, steps: int) -> float:
    model = make_base(shape, ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ids.is_cuda)
    times = []
    for _ in range(WARM_UP + steps):
        synchronise()
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def stage_seconds(shape: Shape, ids: torch.Tensor, stage: str, layer: str, way: str, steps: int) -> float:
    model = get_peft_model(make_base(shape, ids.device), DSLAConfig(task_type="CAUSAL_LM", conversion_unit="head", **LAYERS[layer]))
    if stage == "logits":
        model.set_conversion_order([(index, head) for index in range(shape.layers) for head in range(shape.kv_heads)])
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        args = DSLATrainingArguments(
            output_dir=folder,
            stage=stage,
            per_device_train_batch_size=len(ids),
            level_draws=2,
            max_steps=WARM_UP + steps,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not ids.is_cuda,
            **WAYS[way],
        )
        data = [{"input_ids": row} for row in ids.cpu() for _ in range(WARM_UP + steps)]
        DSLATrainer(model, args, train_dataset=data, callbacks=[times]).train()
    return statistics.median(times.times)


def page_table(folder: Path) -> str:
    found = json.loads((folder / "training-speed.json").read_text())
    rows = [{**row, "tokens_per_second": round(row["tokens_per_second"], -2)} for row in found["rows"]]
    return f"One {found['device']}, torch {found['versions']['torch']}.\n\n{rows_table(rows, COLUMNS)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10, help=f"measured ones, after {WARM_UP} that do not count")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of training-speed.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; the table of docs/scale.md from the rows")
    options = parser.parse_args(arguments)
    if options.page:
        fill_page(REPOSITORY / "docs" / "scale.md", {"training-speed": page_table(options.results)})
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    shape, rows = SHAPES[options.shape], list[dict[str, Any]]()
    for count in options.rows:
        ids = torch.randint(0, shape.vocabulary, (count, options.length), device=device)
        plain = plain_seconds(shape, ids, options.steps)
        kinds = [(stage, layer, way) for stage in STAGES for layer in options.layers for way in options.ways]
        for stage, layer, way in [("plain", "", ""), *kinds]:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            taken = plain if stage == "plain" else stage_seconds(shape, ids, stage, layer, way, options.steps)
            row = {"shape": options.shape, "step": stage, "layer": layer, "way": way, "rows": count, "length": options.length}
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" and stage != "plain" else None
            row |= {"step_seconds": taken, "tokens_per_second": ids.numel() / taken, "of_plain": plain / taken, "peak_gib": peak}
            rows.append(row)
            write_results("training-speed", rows, folder=options.results)
            print(rows_table([row], COLUMNS), flush=True)
    print(rows_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
