"""Speed and memory of distillation steps at 1B and 8B, beside the floor by operations, on one GPU or several.

    python eval/scale.py
    accelerate launch --config_file examples/configs/ddp.yaml eval/scale.py --shapes 8b
    accelerate launch --config_file examples/configs/fsdp2.yaml eval/scale.py --shapes 8b
    python eval/scale.py --plan

Weights are random and made on the device. Steps are those of `DSLATrainer`; a row is written to eval/results/scale.json as soon as
it is measured, in place of an earlier one of the same shape, stage and kind of run. The floor is the time of the matrix products
that a step needs (eval/operations.py) at the measured rate of one large bf16 product. `--plan` measures nothing: it draws the plots
and fills docs/scale.md from the rows, with what 70B on 64 GPUs takes on paper (eval/scale_plan.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from operations import LAYER, SHAPES, WINDOW_ALONE, Shape, alignment_operations, logits_operations
from peft import get_peft_model
from reporting import RESULTS, rows_table, write_results
from scale_plan import write_page
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from dsla_hf import DSLAConfig
from dsla_hf.inference.batching import out_of_memory
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.losses import alignment_loss
from dsla_hf.training.trainer import DSLATrainer
from dsla_kernels import kernel_path

STAGES = ("alignment", "logits")
WARM_UP = 3
# transformers 5.18 renamed it.
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in DSLATrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
)
COLUMNS = ["shape", "stage", "processes", "kind", "batch", "checkpointing", "step_seconds", "tokens_per_second", "peak_gib"]
COLUMNS += ["share_of_floor", "share_of_parts"]
# A row replaces an earlier one that is alike in these.
KEY = ("shape", "stage", "processes", "kind", "batch", "length", "checkpointing", "states")


def on_gpu() -> bool:
    return torch.cuda.is_available()


def synchronise() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def seconds(run: Any, repeats: int) -> float:
    """Median time of `run()`, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronise()
        begin = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a bf16 matrix product, large enough to fill the device."""
    size = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 20)


class Steps(TrainerCallback):
    """Times of the steps after the warm-up, and the most memory that was held in them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        if on_gpu() and state.global_step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        if state.global_step > WARM_UP:
            self.times.append(time.perf_counter() - self.begin)


def make_model(shape: Shape, device: torch.device, layer: DSLAConfig = LAYER) -> Any:
    """An adapter for all layers on a bf16 base with random weights, made on the device."""
    torch.manual_seed(0)  # the same in every process
    config = AutoConfig.for_model("llama", **shape.config(), max_position_embeddings=131072, use_cache=False)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", states=layer.states, window_size=layer.window_size))


def parts_seconds(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Time of the teacher's forward alone, and of all students alone, each forward and backward on inputs of the right kind."""
    calls: dict[int, Any] = {}
    layers = dsla_layers(model)

    def teacher() -> None:
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def keep(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        calls[layer.layer_idx] = args, kwargs, output[0]

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers.values()]
    teacher()
    for hook in hooks:
        hook.remove()

    def students() -> None:
        for index, (args, kwargs, target) in calls.items():
            alignment_loss(layers[index].dsla_attention()(*args, **kwargs)[0], target).backward()

    found = {"teacher_seconds": seconds(teacher, repeats), "students_seconds": seconds(students, repeats)}
    model.zero_grad(set_to_none=True)
    return found


def kind_of_run(trainer: DSLATrainer) -> str:
    return "fsdp2" if trainer.is_fsdp_enabled else "ddp" if trainer.args.world_size > 1 else "one"


def measure(name: str, model: Any, stage: str, checkpointing: bool, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """A row: steps of one stage at all layers, on the processes that there are."""
    shape, layer = SHAPES[name], WINDOW_ALONE if options.window_alone else LAYER
    data = [{"input_ids": torch.randint(0, shape.vocabulary, (options.length,))} for _ in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        args = DSLATrainingArguments(
            output_dir=folder,
            stage=stage,
            train_level=shape.layers if stage == "logits" else None,
            per_device_train_batch_size=options.batch,
            level_draws=2,
            max_steps=WARM_UP + options.steps,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not on_gpu(),
            **{CHECKPOINTING: checkpointing},
        )
        steps = Steps()
        trainer = DSLATrainer(model, args, train_dataset=data, callbacks=[steps])
        alone = {}
        if args.world_size == 1 and stage == "alignment":
            model.to(args.device).train()
            ids = torch.stack([item["input_ids"] for item in data[: options.batch]]).to(args.device)
            alone = parts_seconds(model, ids, options.steps)
        trainer.train()
    tokens = options.batch * options.length
    if stage == "alignment":
        needed = alignment_operations(shape, tokens, options.length, layer)
    else:
        needed = logits_operations(shape, tokens, options.length, range(shape.layers), layer)
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if on_gpu() else 0), device=args.device)
    step = torch.tensor(statistics.median(steps.times), device=args.device)
    peak, step = (trainer.accelerator.gather(x[None]).max().item() for x in (peak, step))
    row = {
        "shape": name,
        "stage": stage,
        "processes": args.world_size,
        "kind": kind_of_run(trainer),
        "batch": options.batch,
        "length": options.length,
        "checkpointing": checkpointing,
        "states": layer.states,
        "layer": kernel_path(args.device),
        "step_seconds": step,
        "tokens_per_second": tokens * args.world_size / step,
        "peak_gib": peak / 2**30 or None,
        "operations": needed,
        "matmul_rate": rate,
        "share_of_floor": needed / rate / step,
        **alone,
    }
    if alone:
        row["share_of_parts"] = sum(alone.values()) / step
    return row


def free(model: Any = None) -> None:
    """Give back the memory of what is referred to no more, gradients of the model included."""
    if model is not None:
        model.zero_grad(set_to_none=True)
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "scale.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def with_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one in place of an earlier one of the same measurement."""

    def key(other: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(other.get(name, True) if name == "states" else other.get(name) for name in KEY)  # older ones had them

    return sorted([*(other for other in rows if key(other) != key(row)), row], key=lambda other: [str(x) for x in key(other)])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=10, help=f"measured steps, after {WARM_UP} that do not count")
    parser.add_argument("--batch", type=int, default=1, help="sequences per process and step")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="also done, on one GPU, when memory does not suffice without")
    parser.add_argument("--window-alone", action="store_true", help="layers have a window of 512 tokens and no states")
    parser.add_argument("--plan", action="store_true", help="measure nothing; plots and docs/scale.md from the rows")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="--plan: GB/s that a GPU receives from other hosts (assumed)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of scale.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.plan:
        print(write_page(stored_rows(options.results), options.bandwidth * 1e9))
        return
    state = PartialState(cpu=not on_gpu())
    rate = matmul_rate(state.device)
    measured = []
    for name in options.shapes:
        model = make_model(SHAPES[name], state.device, WINDOW_ALONE if options.window_alone else LAYER)
        for stage in options.stages:
            for checkpointing in dict.fromkeys((options.gradient_checkpointing, True)):
                try:
                    row = measure(name, model, stage, checkpointing, options, rate)
                except RuntimeError as error:
                    if state.num_processes > 1 or not out_of_memory(error):
                        raise
                    print(f"{name}, {stage}, {options.batch} sequences, checkpointing {checkpointing}: out of memory", flush=True)
                else:
                    break
                free(model)  # here, where the error holds nothing any more
            else:
                continue
            measured.append(row)
            if state.is_main_process:
                write_results("scale", with_row(stored_rows(options.results), row), folder=options.results)
                print(rows_table([row], COLUMNS), flush=True)
        del model
        free()
    if state.is_main_process:
        print(rows_table(measured, COLUMNS))
    if state.num_processes > 1:
        state.destroy_process_group()


if __name__ == "__main__":
    main()
