"""Hybrids in vLLM on a GPU: whether they say what `generate` says in bf16, and a token's time beside vLLM's own model and our engine.

    python eval/vllm_gpu.py
    python eval/vllm_gpu.py --parts speed --arms "vllm 0 graph" "vllm 16 graph"
    python eval/vllm_gpu.py --shape tiny --lengths 200 300 --rows 1 2
    python eval/vllm_gpu.py --page    # measures nothing: the table of docs/vllm.md, and its plot

Rows go to eval/results/vllm.json as soon as they are there, in place of earlier ones of the same
measurement; an arm that fails, or takes longer than `--limit` seconds, leaves a row with `error`, and others go on.
Each arm of `speed` has a process of its own.

`equal`: hybrids with random weights continue prompts greedily in vLLM. A model in fp32 then says of each token how far its logit is below
the best one: 0 for the best. What `generate` writes in bf16 has regrets, too, where two tokens are as good as equal; those of vLLM's texts
must be no larger in the mean (`regret`), up to a factor for chance. With the states shut out of that model they must be
(`regret_without_states`), or the texts say nothing. (The largest of the regrets says little: it is the luck of one token of 448.)

`speed`: arms are named by engine (`vllm`, `ours`), level and mode. Weights are random. A prompt's time is that of one prompt; before tokens
are timed vLLM fills its cache with noise (eval/vllm_fill.py), as reading long prompts many times would take minutes. A token's time is the
median of the engine's steps in which all rows got one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from random_hybrids import let_states_speak
from reporting import RESULTS, fill_page, rows_table, write_results
from transformers import AutoConfig, AutoModelForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.core.plots import figure, save
from dsla_hf.core.tables import markdown_table
from dsla_hf.inference.bench.measure import Case, Runner, measured
from dsla_hf.inference.bench.models import networks, preset_config, random_model

PARTS = ("equal", "speed")
DOCS = Path(__file__).parent.parent / "docs"
# A row replaces an earlier one that is alike in these.
KEY = ("part", "shape", "arm", "length", "batch_size")
TOKENS = 32  # of which the median is taken
CHUNK = 8192  # tokens of prompts that vLLM reads in a step
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096, "initializer_range": 0.2}
# In bf16 the mean regret of vLLM's texts may be so much larger than that of our own ones.
NOISE = 2.0
WINDOWED = {"window_size": 16, "sink_tokens": 2}
HEADS = [(1, 1), (2, 0), (2, 1), (3, 1)]
# Hybrids that are compared, by name: overrides of the shape's config, and how it is converted.
COMPARED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "layers": ("tiny", {}, {"conversion_order": [1, 3], **WINDOWED}),
    "pure": ("tiny", {}, {"conversion_order": [1, 3], "window_size": 0}),
    "heads": ("tiny", {}, {"conversion_unit": "head", "conversion_order": HEADS, **WINDOWED}),
    "llama3-8b, 4 layers": ("llama3-8b", {"num_hidden_layers": 4}, {"conversion_order": [1, 2]}),
}
LENGTHS = (3, 15, 17, 40, 133, 300, 1500)
WRITTEN = 64  # tokens of a text


@dataclass(frozen=True)
class Options:
    """shape, lengths, rows: what is timed. levels: of `ours` and `vllm`. own_rows: as rows, of our engine, which reads all prompts."""

    shape: str
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    own_rows: tuple[int, ...]


Tell = Callable[[dict[str, Any]], None]


def config_of(shape: str, **overrides: Any) -> Any:
    config = AutoConfig.for_model("llama", **TINY) if shape == "tiny" else preset_config(shape)
    config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | overrides)
    return config


def where() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vllm_settings(**more: Any) -> dict[str, Any]:
    """What all of vLLM's models here are started with."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return {"dtype": dtype, "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0, **more}


# --- the same texts -----------------------------------------------------------------------------------------------------


def random_hybrid(shape: str, overrides: dict[str, Any], plan: dict[str, Any]) -> Any:
    """A hybrid in fp32 whose states say much, and differently at each token."""
    torch.manual_seed(0)
    model = random_model(config_of(shape, **overrides), torch.float32, where())
    merged = get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM", gate_rank=4, **plan)).merge_and_unload().to(where())
    with torch.no_grad():
        for name, x in merged.named_parameters():
            if name.endswith("norm.weight"):
                x.add_(0.2 * torch.randn_like(x))
    let_states_speak(merged)
    return merged.to(torch.bfloat16).float()  # weights that bf16 has


@torch.no_grad()
def regrets(model: Any, prompt: list[int], text: list[int]) -> list[float]:
    """Of each token of a text, how far its logit is below the best one."""
    ids = torch.tensor([prompt + text], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits.amax(-1) - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]).tolist()


def mean_regrets(model: Any, prompts: list[list[int]], texts: list[list[int]]) -> list[float]:
    """Of each text the mean over its tokens."""
    return [statistics.fmean(regrets(model, prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


def own_text(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": WRITTEN, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def close_states(model: Any) -> None:
    """Shut states out of what a hybrid computes: by their weight beside a window's, or, of a pure layer, as a whole."""
    for name, x in model.named_parameters():
        if ".dsla." in name and ("state_bias" in name or ("norm_weight" in name and "state_bias" not in name)):
            x.data.fill_(-1e4 if "state_bias" in name else 0.0)


def compare(name: str, mode: str, tell: Tell) -> None:
    """One row: what vLLM says of a hybrid beside what `generate` does."""
    shape, overrides, plan = COMPARED[name]
    generator = torch.Generator().manual_seed(0)
    exact = random_hybrid(shape, overrides, plan)
    prompts = [torch.randint(3, exact.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        rounded = exact.to(torch.bfloat16) if torch.cuda.is_available() else exact
        rounded.save_pretrained(folder)
        del exact, rounded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        from vllm import LLM, SamplingParams

        settings = vllm_settings(max_model_len=2048, max_num_seqs=8, max_num_batched_tokens=512, enforce_eager=mode == "eager")
        llm = LLM(folder, gpu_memory_utilization=0.4, **settings)
        sampling = SamplingParams(temperature=0, max_tokens=WRITTEN, ignore_eos=True, detokenize=False)
        said = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        texts = [list(request.outputs[0].token_ids) for request in said]
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(where())
        expected = [own_text(own, prompt) for prompt in prompts]
        exact = own.float()
    same = [sum(1 for _ in _common(a, b)) for a, b in zip(texts, expected, strict=True)]
    row: dict[str, Any] = {
        "same_tokens": sum(same),
        "tokens": WRITTEN * len(prompts),
        "different_tokens": len({token for text in texts for token in text}),
    }
    by_prompt = mean_regrets(exact, prompts, texts)
    row |= {"regret": statistics.fmean(by_prompt), "regrets": by_prompt}
    row["regret_of_generate"] = statistics.fmean(mean_regrets(exact, prompts, expected))
    close_states(exact)
    row["regret_without_states"] = statistics.fmean(mean_regrets(exact, prompts, texts))
    allowed = NOISE * row["regret_of_generate"] + 1e-4
    row["equal"] = row["regret"] <= allowed < row["regret_without_states"]
    tell({"length": max(LENGTHS), "batch_size": len(prompts), **row})


def _common(a: list[int], b: list[int]) -> Any:
    """What two texts begin with alike."""
    for x, y in zip(a, b, strict=True):
        if x != y:
            return
        yield x


# --- a token's time -----------------------------------------------------------------------------------------------------


def write_config(shape: str, level: int, folder: str) -> None:
    """A folder from which vLLM takes a model with random weights: the base at level 0, or a hybrid."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
        if level:
            order = list(range(model.config.num_hidden_layers))[::-1][:level]
            plan = DSLAConfig(task_type="CAUSAL_LM", conversion_order=order)
            model = get_peft_model(model, plan).merge_and_unload()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def time_vllm(options: Options, level: int, mode: str, tell: Tell) -> None:
    """Rows of one level in vLLM: a prompt of each length, then tokens of each length and number of rows."""
    from vllm import LLM
    from vllm_fill import SETTINGS

    with tempfile.TemporaryDirectory() as folder:
        write_config(options.shape, level, folder)
        rows = max(options.rows)
        settings = vllm_settings(max_model_len=max(options.lengths) + 256, max_num_seqs=rows, max_num_batched_tokens=CHUNK)
        settings |= {"load_format": "dummy", "enforce_eager": mode == "eager", "kv_transfer_config": SETTINGS}
        if torch.cuda.is_available():
            settings["gpu_memory_utilization"] = 0.92
        if mode == "graph":
            settings["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, *options.rows})}
        begin = time.perf_counter()
        llm = LLM(folder, **settings)
        started = time.perf_counter() - begin
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    for length in options.lengths:
        for count in options.rows:
            row: dict[str, Any] = {"length": length, "batch_size": count, "start_seconds": started}
            try:
                if count == 1:
                    prefills = [run(llm, vocabulary, length, 1, 2, filled=False)[0][0] for _ in range(2)]
                    row["prefill_seconds"] = prefills[-1]  # the first one may compile
                steps = [seconds for seconds, got in run(llm, vocabulary, length, count, TOKENS, filled=True) if got == count]
                if len(steps) < TOKENS // 2:
                    raise MemoryError(f"the cache has no room for {count} rows of {length} tokens at once")
                row["seconds_per_token"] = statistics.median(steps)
                row["tokens_per_second"] = count / row["seconds_per_token"]
            except MemoryError as error:
                row["error"] = str(error)
            tell(row)


def run(llm: Any, vocabulary: int, length: int, rows: int, tokens: int, filled: bool) -> list[tuple[float, int]]:
    """Seconds of each step of vLLM's engine that gave tokens, and of how many rows; the first one since the requests came.

    Steps that only read part of a prompt are added to the next one.
    """
    from vllm import SamplingParams
    from vllm_fill import FILLED

    engine = llm.llm_engine
    extra = FILLED if filled else None
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
    generator = torch.Generator().manual_seed(length)
    for number in range(rows):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": ids}, sampling)
    steps = []
    last = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if not outputs:
            continue
        now = time.perf_counter()
        steps.append((now - last, len(outputs)))
        last = now
        if filled and len(steps) > 8 * tokens:  # rows wait for one another
            engine.abort_request([output.request_id for output in outputs])
    return steps


def time_ours(options: Options, level: int, tell: Tell) -> None:
    """Rows of one level in our engine: prompts are read."""
    engine = "graph" if torch.cuda.is_available() else "eager"
    with tempfile.TemporaryDirectory() as folder:
        model = options.shape
        if model == "tiny":
            model = folder
            random_model(config_of("tiny"), torch.float32, where()).save_pretrained(folder)
        layers = config_of(options.shape).num_hidden_layers
        levels = [f"{100 * level // layers}%"] if level else ["100%"]
        network, found, _ = next(entry for entry in networks(model, None, levels, "auto", where()) if entry[1] == level)
    assert found == level
    runner = Runner(network)
    for rows in options.own_rows:
        for length in options.lengths if rows == 1 else options.lengths[:1]:
            whole = {"prefill_tokens": length} if rows == 1 else {}  # as `generate` reads one
            numbers = measured(runner, Case(engine, length, rows, TOKENS, **whole))
            kept = ("prefill_seconds", "seconds_per_token", "tokens_per_second", "error", "warm_up_seconds")
            tell({"length": length, "batch_size": rows, **{name: numbers[name] for name in kept if name in numbers}})
            runner.forget()


# --- arms ---------------------------------------------------------------------------------------------------------------


def work(part: str, arms: list[str], options: Options, told: Any) -> None:
    """Some arms, in a process of their own: what each tells goes to `told` with its name, and None at the end."""
    for arm in arms:

        def tell(row: dict[str, Any], arm: str = arm) -> None:
            told.put((arm, row))

        try:
            if part == "equal":
                try:
                    compare(*arm.rsplit(", ", 1), tell)
                finally:
                    leave_vllm()
            else:
                engine, level, mode = arm.split()
                if engine == "vllm":
                    time_vllm(options, int(level), mode, tell)
                else:
                    time_ours(options, int(level), tell)
        except Exception as error:  # the other arms go on
            traceback.print_exc()
            tell({"error": f"{type(error).__name__}: {error}"[:300]})
    told.put(None)


def leave_vllm() -> None:
    """What a model of vLLM leaves behind when nothing holds it any more, so that another one can be made."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def arms_of(part: str, options: Options) -> list[str]:
    """Names of a part's arms, what matters most first."""
    if part == "equal":
        modes = ("eager", "graph")
        tiny = [f"{name}, {mode}" for mode in modes for name, (shape, *_) in COMPARED.items() if shape == "tiny"]
        return tiny + [f"{name}, {mode}" for mode in modes for name, (shape, *_) in COMPARED.items() if shape == options.shape != "tiny"]
    layers = config_of(options.shape).num_hidden_layers
    half = layers // 2
    ours = [f"ours {level} graph" for level in (0, half, layers)]
    return ["vllm 0 graph", *(f"vllm {level} {mode}" for mode in ("graph", "eager") for level in (half, layers)), *ours, "vllm 0 eager"]


class Rows:
    """The rows of the result file, with new ones in place of earlier ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "vllm.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        def key(other: dict[str, Any]) -> tuple[Any, ...]:
            return tuple(other.get(name) for name in KEY)

        def is_past(other: dict[str, Any]) -> bool:
            """Whether this row says better what that one said: an arm that failed and now does not has rows instead of an error."""
            failed = "error" in other and other["length"] is None
            return key(other) == key(row) or (failed and all(other[name] == row[name] for name in ("part", "shape", "arm")))

        self.rows = [*(other for other in self.rows if not is_past(other)), row]
        write_results("vllm", self.rows, folder=self.folder)


def carry_out(part: str, arms: list[str], options: Options, rows: Rows, limit: float) -> None:
    """Run arms in one process and add their rows; if it dies or takes too long, a row says so for each that told nothing."""
    from dsla_hf.vllm.releases import installed_version

    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    # Not a daemon: vLLM and torch start processes of their own.
    process = spawn.Process(target=work, args=(part, arms, options, told))
    begin = time.monotonic()
    process.start()
    silent = dict.fromkeys(arms)

    def add(arm: str, row: dict[str, Any]) -> None:
        shape = options.shape if part == "speed" else COMPARED[arm.rsplit(", ", 1)[0]][0]
        named = {"part": part, "shape": shape, "arm": arm, "length": None, "batch_size": None, "vllm": installed_version()}
        rows.add({**named, **row})
        print(json.dumps(rows.rows[-1]), flush=True)
        silent.pop(arm, None)

    error = None
    while error is None:
        try:
            entry = told.get(timeout=1)
        except queue.Empty:
            if time.monotonic() - begin > limit * len(arms):
                error = f"took longer than {limit:g} s"
            elif not process.is_alive() and told.empty():
                error = f"the process ended with {process.exitcode}"
            continue
        if entry is None:
            break
        add(*entry)
    for arm in [*silent] if error else ():
        add(arm, {"error": error})
    process.join(5)
    if process.is_alive():
        process.kill()
    print(f"{part}, {'; '.join(arms)}: {time.monotonic() - begin:.0f} s {error or ''}", flush=True)


def arm_label(arm: str, layers: int) -> str:
    """In words, of an arm of `speed`."""
    engine, level, mode = arm.split()
    what = "softmax in all layers" if level == "0" else f"{level} of {layers} layers converted"
    return f"{'vLLM' if engine == 'vllm' else 'dsla_hf'}, {what}" + ("" if mode == "graph" else ", no graphs")


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """The table of times in docs/vllm.md, and a plot of tokens a second."""
    found = json.loads((results / "vllm.json").read_text())
    rows = [row for row in found["rows"] if row["part"] == "speed" and "seconds_per_token" in row]
    layers = config_of("llama3-8b").num_hidden_layers
    rows.sort(key=lambda row: (row["length"], row["batch_size"], int(row["arm"].split()[1]), row["arm"]))
    lines = []
    for row in rows:
        prompt = f"{row['prefill_seconds']:.3f}" if row["batch_size"] == 1 and "prefill_seconds" in row else ""
        times = [prompt, f"{1e3 * row['seconds_per_token']:.2f}", f"{row['tokens_per_second']:,.0f}"]
        lines.append([f"{row['length']:,}", str(row["batch_size"]), arm_label(row["arm"], layers), *times])
    table = markdown_table(["tokens of a text", "texts", "", "a prompt, s", "ms a token", "tokens/s"], lines)
    drawn, (axes,) = figure(size=(7, 0.35 * len(rows) + 1))
    names = [f"{row['batch_size']} x {row['length']:,}: {arm_label(row['arm'], layers)}" for row in rows]
    axes.barh(
        names, [1e3 * row["seconds_per_token"] for row in rows], color=["tab:orange" if "ours" in r["arm"] else "tab:blue" for r in rows]
    )
    axes.invert_yaxis()
    axes.set_xlabel("ms a token")
    save(drawn, docs / "images" / "vllm.png")
    about = f"Llama-3.1-8B's shape, random weights, bf16, {found['device']}, vLLM {rows[0]['vllm']}, CUDA graphs:"
    fill_page(docs / "vllm.md", {"vllm": f"{about}\n\n{table}\n\n![ms a token](images/vllm.png)"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=("llama3-8b", "tiny"), default="llama3-8b")
    parser.add_argument("--arms", nargs="+", help="some of the arms that are named in rows")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="tokens of prompts")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64], help="requests at once")
    parser.add_argument("--own-rows", nargs="+", type=int, help="likewise, of our engine, at the first length if more than 1 (all rows)")
    parser.add_argument("--limit", type=float, default=150, help="seconds of an arm")
    parser.add_argument("--begin-within", type=float, default=math.inf, help="seconds after which no further arm begins")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of vllm.json")
    parser.add_argument("--page", action="store_true", help="write docs/vllm.md's table of what was measured")
    given = parser.parse_args(arguments)
    if given.page:
        return write_page(given.results)
    begin = time.monotonic()
    options = Options(given.shape, tuple(given.lengths), tuple(given.rows), tuple(given.own_rows or given.rows))
    rows = Rows(given.results)
    known = {part: arms_of(part, options) for part in given.parts}
    if unknown := {*(given.arms or ())} - {arm for arms in known.values() for arm in arms}:
        parser.error(f"unknown arms {sorted(unknown)}; there are {known}")
    wanted = [(part, arm) for part, arms in known.items() for arm in arms if given.arms is None or arm in given.arms]
    if given.arms:
        wanted.sort(key=lambda entry: given.arms.index(entry[1]))
    # Arms of `equal` in a row share a process; each of `speed` needs all memory.
    for key, group in itertools.groupby(wanted, key=lambda entry: entry if entry[0] == "speed" else entry[0]):
        if time.monotonic() - begin > given.begin_within:
            print(f"not begun: {key}")
            continue
        carry_out(key if isinstance(key, str) else key[0], [arm for _, arm in group], options, rows, given.limit)
    columns = ["part", "arm", "length", "batch_size", "prefill_seconds", "seconds_per_token", "tokens_per_second"]
    columns += ["same_tokens", "tokens", "regret", "regret_of_generate", "regret_without_states", "equal", "error"]
    print(rows_table(rows.rows, columns))


if __name__ == "__main__":
    sys.exit(main())
