"""What `dsla eval` does: tasks of lm-eval and of `long_context` at several levels, with one load of the model and a file per level."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core.files import write_json
from ..core.results import origin
from ..core.tables import terminal_table
from ..levels.policies import Stats
from ..levels.table import CACHE_LENGTHS
from ..models.adapter import active_config
from ..models.architectures import convertible_layers
from ..models.loading import (
    check_at_least_one,
    device,
    level_to_run_at,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_adapter_config,
)
from . import long_context
from .in_window import fits_window, text_in_window
from .local_datasets import local_datasets
from .tasks import FOLDER as TASKS_FOLDER

# Documents at a time where no batch size is given; halved when memory does not suffice.
AUTO_BATCH = {"cuda": 64, "cpu": 8}
LENGTHS, SAMPLES = (1024,), 40
# Resampling for the standard errors of metrics that are no means.
BOOTSTRAP_ITERATIONS = 1000
MOST_COLUMNS = 8  # of levels, in the table that is printed
BY_LIKELIHOOD = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # kinds of lm-eval's tasks
PACKAGES = ("dsla-hf", "torch", "transformers", "peft", "lm-eval")


def evaluate(
    model: str,
    adapter: str | None,
    levels: Sequence[int | str] | None,
    tasks: Sequence[str],
    output: str,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    data: str | None = None,
    dtype: str = "auto",
    lengths: Sequence[int] | None = None,
    haystack: str | None = None,
    seed: int = 0,
) -> dict[int, dict[str, Any]]:
    """Measure tasks at levels, one result file `level-LL.json` each in `output`, print a table, and return the results by level.

    A file that is there and was made with the same settings is kept; of a level that was interrupted, what the model answered lm-eval is
    kept. A hybrid has one level, a base without adapter level 0.

    Args:
        model: a base or a hybrid.
        adapter: a DSLA adapter of that base, or None.
        levels: numbers or shares such as "50%". None: the adapter's own level.
        tasks: names of lm-eval (groups, tags and patterns too), of the groups in `dsla_hf.evaluation.tasks`, and of `long_context.TASKS`.
        output: folder of the result files.
        limit: documents per task, samples of a long-context task.
        batch_size: sequences at a time. None: as many as fit.
        num_fewshot: examples before each question of lm-eval's tasks.
        include_path: folder with task definitions (YAML) for lm-eval.
        data: folder with data sets of lm-eval's tasks, as in `local_datasets`. Those that it has not come from the hub.
        dtype: of the weights; "auto" as they were saved.
        lengths: tokens of long-context tasks, and of lm-eval's tasks that take `max_seq_lengths`.
        haystack: text file for long-context tasks.
        seed: of long-context tasks.

    Raises:
        ValueError: before weights are read, for an unknown level or task, contradicting options, or results with other settings in
            `output`; then for an adapter of another base, or memory that does not suffice for one sequence.
        ImportError: if lm-eval, or a package that a task needs, is missing.
        OSError: if a file or a data set is missing.
    """
    tasks = list(dict.fromkeys(tasks))
    _check_options(tasks, output, limit, batch_size, num_fewshot, include_path, data)
    own = [task for task in tasks if task in long_context.TASKS]
    others = [task for task in tasks if task not in own]
    converted = _layers_by_level(model, adapter, levels)

    settings = _settings(model, adapter, tasks, dtype, limit, lengths)
    if others:
        settings |= {"num_fewshot": num_fewshot, "include_path": include_path and _digest(sorted(Path(include_path).rglob("*.*")))}
        if data is not None:
            settings |= {"data": _digest(sorted(Path(data).rglob("*.*")))}
    if own:
        settings |= {"haystack": haystack and _digest([Path(haystack)]), "seed": seed}
    settings = json.loads(json.dumps(settings))  # as they are read from a file
    plan = {level: settings | {"layers": layers} for level, layers in converted.items()}
    results = {level: found for level in plan if (found := _finished(_result_file(output, level), plan[level])) is not None}
    for level in results:
        print(f"level {level}: already in {_result_file(output, level)}")
    missing = [level for level in plan if level not in results]
    if missing:
        tokenizer = load_tokenizer(model)
        prepared = long_context.prepare(tokenizer, own, lengths or LENGTHS, limit or SAMPLES, seed, haystack) if own else []
        harness = _Harness(others, include_path, data, model, lengths) if others else None
        network = load_model(model, dtype) if adapter is None else load_adapter(model, adapter, dtype)
        network = network.to(device()).eval()
        Path(output).mkdir(parents=True, exist_ok=True)
        for level in missing:
            if adapter is not None:
                network.set_level(level)
            kept, cache = _heads(network, adapter, level)
            print(f"level {level}{_kept(kept)}: {', '.join(tasks)}")
            start = time.perf_counter()
            measured = long_context.run_tasks(network, prepared, batch_size) | cache
            result: dict[str, Any] = {"level": level, **kept, "tasks": measured, "model": model, "adapter": adapter}
            result |= {"window": _window(network) if level else None}
            if harness is not None:
                size = batch_size or AUTO_BATCH.get(network.device.type, AUTO_BATCH["cpu"])
                metrics, details = harness.run(network, size, limit, num_fewshot, _answers(output, level, plan[level]))
                measured |= metrics
                result |= details
            result |= {
                "settings": plan[level],
                **origin(
                    _command(model, adapter, level, settings, output, batch_size, include_path, data, haystack),
                    PACKAGES,
                    network.device.type,
                ),
                "seconds": round(time.perf_counter() - start, 1),
            }
            write_json(_result_file(output, level), result)
            _forget_answers(output, level)
            results[level] = result
    results = {level: results[level] for level in plan}
    print(table({level: result["tasks"] for level, result in results.items()}, {level: _kept(result) for level, result in results.items()}))
    for line in _within_windows(results.values()):
        print(line)
    print(f"results in {output}")
    return results


def _check_options(
    tasks: list[str],
    output: str,
    limit: int | None,
    batch_size: int | None,
    num_fewshot: int | None,
    include_path: str | None,
    data: str | None,
) -> None:
    """Raises ValueError for what can be seen to be wrong before anything is read."""
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None:
            check_at_least_one(name, value)
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    if not tasks:
        raise ValueError(f"no task is named: give names of lm-eval, or out of {list(long_context.TASKS)}")
    for folder, content in ((include_path, "the task definitions"), (data, "the data sets")):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder: give the folder that holds {content}")
    if Path(output).is_file():
        raise ValueError(f"{output} is a file: give a folder for the results")


def _settings(
    model: str, adapter: str | None, tasks: list[str], dtype: str, limit: int | None, lengths: Sequence[int] | None
) -> dict[str, Any]:
    """What a result depends on, whatever its tasks are."""
    return {
        "model": _identity(model, "config.json", "tokenizer.json"),
        "adapter": None if adapter is None else _identity(adapter),
        "mathematics": None if adapter is None else read_adapter_config(adapter).mathematics(),
        "dtype": dtype,
        "tasks": sorted(tasks),
        "limit": limit,
        "lengths": None if lengths is None else list(lengths),
    }


def table(results: dict[int, dict[str, dict[str, float]]], notes: Mapping[int, str] | None = None) -> str:
    """Metrics by level, for a terminal: a row for each metric of each task, without standard errors; where there are many levels, for
    each level of each of them. `notes`: what stands beside the number of a level."""
    named = {level: f"{level}{(notes or {}).get(level, '')}" for level in results}
    found = dict.fromkeys((task, metric) for tasks in results.values() for task, metrics in tasks.items() for metric in metrics)
    names = [(task, metric) for task, metric in found if "_stderr" not in metric]

    def cell(level: int, task: str, metric: str) -> str:
        value = results[level].get(task, {}).get(metric)
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

    rows: list[tuple[str, ...]]
    if len(results) <= MOST_COLUMNS:
        rows = [("task", "metric", *(f"level {name}" for name in named.values()))]
        rows += [(*name, *(cell(level, *name) for level in results)) for name in names]
    else:
        rows = [("task", "metric", "level", "")]
        rows += [(*name, named[level], cell(level, *name)) for name in names for level in results]
    return terminal_table(rows, left=2)


# --- lm-eval ----------------------------------------------------------------------------------------------------


class _Harness:
    """Some tasks of lm-eval, found and loaded.

    Raises:
        ImportError: if lm-eval, or a package that a task needs, is missing.
        ValueError: names the unknown tasks and those of similar names, or says why a task cannot be loaded.
        OSError: if a data set cannot be had.
    """

    def __init__(self, tasks: list[str], include_path: str | None, data: str | None, model: str, lengths: Sequence[int] | None):
        from .lm_eval import DSLALM

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the harness's own command does
        self.model_class, self.model, self.data = DSLALM, model, data
        metadata: dict[str, Any] = {"pretrained": model} | ({} if lengths is None else {"max_seq_lengths": list(lengths)})
        self.manager = self._manager(tasks, include_path, metadata)
        self.tasks: list[str] = []
        for task in tasks:
            found = self.manager.match_tasks([task])
            if not found:
                known = [*long_context.TASKS, *self.manager.all_tasks]
                close = difflib.get_close_matches(task, known, 3) or [name for name in known if task.lower() in name.lower()][:3]
                where = "" if include_path else " (tasks of your own: --include-path)"
                raise ValueError(
                    f"unknown task {task!r}{', close are ' + str(close) if close else '; `lm_eval ls tasks` lists all'}{where}"
                )
            self.tasks += [name for name in found if name not in self.tasks]
        with local_datasets(data):
            for task in self.tasks:
                self._load(task)

    @staticmethod
    def _manager(tasks: list[str], include_path: str | None, metadata: dict[str, Any]) -> Any:
        from lm_eval.tasks import TaskManager

        if include_path is not None:  # reading the definitions of all built-in tasks takes some ten seconds
            manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
            if set(tasks) <= set(manager.all_subtasks):
                return manager
        folders = [str(folder) for folder in (TASKS_FOLDER, include_path) if folder is not None]
        return TaskManager(include_path=folders, metadata=metadata)

    def _load(self, task: str) -> None:
        """Load a task once before any weights are, so that its faults show at once; its data set is kept on disk."""
        try:
            self.manager.load([task])
        except ImportError as error:
            package = getattr(error, "name", None)
            hint = f": pip install {package}" if package else ""
            raise ImportError(f"task {task} needs a package that is not installed ({error}){hint}") from None
        except OSError as error:
            raise OSError(
                f"task {task}: its data set cannot be had ({error}); it needs the hub once, or local files: --data DIR with DIR/OWNER/NAME"
            ) from None
        except Exception as error:  # definitions and data of others raise whatever they like
            local = " (the files of --data need the columns and splits that the hub has)" if self.data else ""
            raise ValueError(f"task {task} cannot be loaded: {type(error).__name__}: {error}{local}") from error

    def run(
        self, network: Any, batch_size: int, limit: int | None, num_fewshot: int | None, answers: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metrics by task and group, and details. `answers` is where those of the model are kept, as the beginning of a file name."""
        from lm_eval import simple_evaluate

        tokenizer = load_tokenizer(self.model)
        with _quiet("lm_eval.models.huggingface"):  # it warns of a model that is loaded already
            harness_model = self.model_class(network, tokenizer=tokenizer, batch_size=batch_size)
        with local_datasets(self.data):
            found: Any = simple_evaluate(
                model=harness_model,
                tasks=self.tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=True,  # for the lengths of what was read
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                task_manager=self.manager,
                use_cache=answers,
            )
        metrics = {task: _plain(values) for task, values in {**found["results"], **found.get("groups", {})}.items()}
        details = {
            "batch_size": harness_model.batch_size,
            "task_versions": found["versions"],
            "num_fewshot": found["n-shot"],
            "higher_is_better": found.get("higher_is_better", {}),
            "samples": {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()},
            "longest_text": _longest_texts(found, tokenizer),
        }
        return {task: values for task, values in metrics.items() if values}, details


def _longest_texts(found: dict[str, Any], tokenizer: Any) -> dict[str, int]:
    """Tokens of the longest text of each task, and of each group of tasks, that is scored by the likelihood of what stands there."""
    longest: dict[str, int] = {}
    for task, samples in (found.get("samples") or {}).items():
        if found["configs"][task].get("output_type") in BY_LIKELIHOOD:
            asked = {"".join(x for x in arguments if isinstance(x, str)) for sample in samples for arguments in sample["arguments"]}
            texts = tokenizer(sorted(asked), add_special_tokens=True, verbose=False)["input_ids"] if asked else []
            longest[task] = max(map(len, texts), default=0)
    for group, tasks in (found.get("group_subtasks") or {}).items():
        if tasks and all(task in longest for task in tasks):
            longest[group] = max(longest[task] for task in tasks)
    return longest


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings of one logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; "acc,none" becomes "acc". RULER says -1 of a length that it did not measure."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float))
        and name not in ("name", "alias", "sample_len", "sample_count")
        and not (value == -1 and name.removesuffix(",none").isdecimal())
    }


# --- levels, settings, files ------------------------------------------------------------------------------------


def _layers_by_level(model: str, adapter: str | None, levels: Sequence[int | str] | None) -> dict[int, list[Any]]:
    """The levels to measure, each with the layers (or heads) that are DSLA there."""
    base_config = load_config(model)
    if levels is not None and not levels:
        raise ValueError("no level is named: give some, such as 0,4,50%, or leave --levels out for the adapter's own")
    numbers = [
        level_to_run_at(model, base_config, adapter, level, ("--adapter", "--levels")) for level in ([None] if levels is None else levels)
    ]
    if base_config.model_type == "dsla":
        layers = _as_stored(base_config.get_dsla_config().conversion_order)
        return {len(layers): layers}
    if adapter is None:
        return {0: []}
    order = _as_stored(read_adapter_config(adapter).conversion_order or convertible_layers(base_config))
    return {number: order[:number] for number in (len(order) if number is None else number for number in numbers)}


def _heads(network: Any, adapter: str | None, level: int) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Where levels count heads, `kept`, the KV heads that this one keeps, and as a task `cache` what the cache of one text takes at 2k, 8k
    and 32k tokens."""
    levels = network if adapter is None else network.base_model
    sizes = levels.level_sizes() if hasattr(levels, "level_sizes") else {}  # a base alone has no levels
    if sizes.get("unit") != "head":
        return {}, {}
    stats = Stats(prompt_tokens=0, tokens=0, rows=1, level=level, **sizes)
    cache = {f"bytes_{tokens // 1024}k": stats.cache_bytes(level, tokens) for tokens in CACHE_LENGTHS}
    return {"kept": sizes["num_layers"] - level}, {"cache": cache}


def _window(network: Any) -> int:
    """Tokens that a converted layer or head sees by softmax attention."""
    config = network.config.get_dsla_config() if network.config.model_type == "dsla" else active_config(network)
    return config.window_size


def _within_windows(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each task scored by likelihood whose longest text the window holds, at every level that was measured but the original."""
    raised = [result for result in results if result.get("window")]
    return [
        text_in_window(longest, result["window"], f"{task}: its")
        for result in raised[:1]
        for task, longest in result.get("longest_text", {}).items()
        if all(fits_window(other.get("longest_text", {}).get(task), other["window"]) for other in raised)
    ]


def _kept(result: Mapping[str, Any]) -> str:
    return f" (KV heads kept: {result['kept']})" if "kept" in result else ""


def _as_stored(units: list[Any]) -> list[Any]:
    """Layers, or pairs of layer and KV head, as a file of results gives them back."""
    return [list(unit) if isinstance(unit, tuple) else unit for unit in units]


def _identity(name: str, *files: str) -> str:
    """What a checkpoint or an adapter is compared by: of a folder its weights and some files, of one on the hub its name."""
    folder = Path(name)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return _digest([*(folder / file for file in files), *weights]) if folder.is_dir() else name


def _digest(files: Sequence[Path]) -> str:
    """A hash of the content of files, of large ones their sizes, beginnings, middles and ends."""
    digest, part = hashlib.sha256(), 1 << 20
    for file in files:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{size} ".encode())
            with file.open("rb") as opened:
                for place in sorted({0, max(0, size // 2 - part // 2), max(0, size - part)}):
                    opened.seek(place)
                    digest.update(opened.read(part))
    return digest.hexdigest()[:16]


def _result_file(output: str, level: int) -> Path:
    return Path(output) / f"level-{level:02d}.json"


def _forget_answers(output: str, level: int) -> None:
    """Remove what was kept of a level for the case of an interrupt."""
    for file in Path(output).glob(f".level-{level:02d}-*"):
        with suppress(OSError):  # where open files cannot be removed it stays, and is of no use
            file.unlink()


def _answers(output: str, level: int, settings: dict[str, Any]) -> str:
    """The beginning of a file name for what the model answers at a level with these settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return str(Path(output) / f".level-{level:02d}-{digest}")


def _finished(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results in a file made with these settings, None if there is no file.

    Raises:
        ValueError: if the file is of other settings, or no result file.
    """
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        before = result["settings"]
        result["tasks"]
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"{file} is no result of `dsla eval`: give another --output, or remove the file") from None
    if before != settings:
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        differences = ", ".join(f"{name} ({before.get(name)} there, {settings.get(name)} now)" for name in names)
        raise ValueError(f"{file} was made with other settings: {differences}; give another --output, or remove the file")
    return result


def _command(
    model: str,
    adapter: str | None,
    level: int,
    settings: dict[str, Any],
    output: str,
    batch_size: int | None,
    include_path: str | None,
    data: str | None,
    haystack: str | None,
) -> str:
    """The command that makes this level's file."""
    lengths = settings["lengths"] and ",".join(map(str, settings["lengths"]))
    options = {
        "model": model,
        "adapter": adapter,
        "levels": None if adapter is None else level,
        "tasks": ",".join(settings["tasks"]),
        "output": output,
        "limit": settings["limit"],
        "batch-size": batch_size,
        "num-fewshot": settings.get("num_fewshot"),
        "include-path": include_path,
        "data": data,
        "dtype": settings["dtype"],
        "lengths": lengths,
        "haystack": haystack,
        "seed": settings.get("seed"),
    }
    return shlex.join(
        ["dsla", "eval", *(str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value))]
    )
