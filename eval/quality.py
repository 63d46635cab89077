"""Quality by level of a base and its adapters: long-context tasks, zero-shot choices, WikiText-2; then one page.

    python eval/quality.py --model teacher --adapter default=my-adapter --adapter control=other \
        --zero-shot data/zero_shot --wikitext data/wikitext2/valid.txt --haystack data/novels_val.jsonl.xz

writes eval/results/quality.json and quality.html. Every level of every part is kept in --work as it finishes, and a run that was
interrupted goes on there; quality.json is rewritten with each. `--parts own` needs no lm-eval. The plain base is measured too: level 0
must have its score, to the last digit.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from pathlib import Path
from typing import Any

from reporting import RESULTS, write_results

from dsla_hf.evaluation import long_context
from dsla_hf.evaluation.harness import evaluate
from dsla_hf.evaluation.report.page import report

PARTS = ("own", "zero_shot", "wikitext")
BASE = "base without adapter"


def write_choice_tasks(folder: Path, sources: Path) -> list[str]:
    """A definition for lm-eval of every .jsonl file in `sources`, and their names.

    A document has `query`, `choices` and `gold`; or `context_options`, one of which `gold` names, and a `continuation` that is scored
    after each of them.

    Raises:
        ValueError: if there is no such file, or a document has other fields.
    """
    names = []
    for file in sorted(sources.glob("*.jsonl")):
        with file.open(encoding="utf-8") as opened:
            fields = json.loads(opened.readline()).keys()
        if {"query", "choices", "gold"} <= fields:
            answer = "{% if query.startswith('Question:') %}\nAnswer:{% endif %}"
            asked = {"doc_to_text": "{{query.strip()}}" + answer, "doc_to_choice": "choices", "doc_to_target": "gold"}
        elif {"context_options", "continuation", "gold"} <= fields:
            asked = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        else:
            raise ValueError(f"{file}: expected query, choices, gold or context_options, continuation, gold; found {sorted(fields)}")
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
        task = {"task": f"zero_shot_{file.stem}", **_from(file, "test"), "output_type": "multiple_choice", **asked, "metric_list": metrics}
        (folder / f"{file.stem}.yaml").write_text(json.dumps(task))  # JSON is YAML
        names.append(task["task"])
    if not names:
        raise ValueError(f"{sources} holds no .jsonl files")
    return names


def write_wikitext_task(folder: Path, source: Path) -> list[str]:
    """The definition of lm-eval's `wikitext` for the articles of a file in WikiText's tokenised form, and its name."""
    import lm_eval.tasks

    # An article begins with a line " = Title = "; its sections have more of the signs.
    pages = re.split(r"(?m)^(?= = [^=].* = $)", source.read_text(encoding="utf-8"))
    pages_file = folder / "wikitext.jsonl"
    pages_file.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages if page.strip()), encoding="utf-8")
    included = Path(lm_eval.tasks.__file__).parent / "wikitext" / "wikitext.yaml"
    own = {"include": str(included), "task": "wikitext2_validation", "dataset_name": None, "training_split": None, "test_split": None}
    (folder / "wikitext.yaml").write_text(json.dumps(own | _from(pages_file, "validation")))
    return [own["task"]]


def _from(file: Path, split: str) -> dict[str, Any]:
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(file.resolve())}}, f"{split}_split": split}


def measure(options: argparse.Namespace, part: str, adapter: str | None, output: Path) -> None:
    """One part at all levels of an adapter, or of the base alone: a file per level in `output`."""
    more: dict[str, Any] = {"limit": options.limit, "batch_size": options.batch_size, "dtype": options.dtype}
    if part == "own":
        tasks = list(long_context.TASKS)
        more |= {"limit": options.samples, "lengths": options.lengths, "haystack": options.haystack, "seed": options.seed}
    else:
        definitions = Path(options.work) / "tasks" / part
        definitions.mkdir(parents=True, exist_ok=True)
        if part == "zero_shot":
            tasks = write_choice_tasks(definitions, Path(options.zero_shot))
        else:
            tasks = write_wikitext_task(definitions, Path(options.wikitext))
        more["include_path"] = str(definitions)
    levels = None if adapter is None else options.levels
    evaluate(options.model, adapter, levels, tasks, str(output), **more)


def gather(work: Path, arms: list[str], parts: list[str]) -> list[dict[str, Any]]:
    """A row for each task at each level that has been measured so far."""
    rows = []
    for arm in arms:
        for part in parts:
            for file in sorted((work / arm / part).glob("level-*.json")):
                result = json.loads(file.read_text(encoding="utf-8"))
                for task, metrics in result["tasks"].items():
                    rows.append({"arm": arm, "level": result["level"], "task": task, "device": result["device"], **metrics})
    return rows


def level_0_is_the_base(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """For each arm, whether all that was measured at its level 0 is that of the base, to the last digit."""

    def at_0(arm: str) -> dict[str, dict[str, Any]]:
        return {row["task"]: {**row, "arm": ""} for row in rows if row["arm"] == arm and row["level"] == 0}

    base = at_0(BASE)
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] != BASE and row["level"] == 0)
    return {arm: all(row == base.get(task) for task, row in at_0(arm).items()) for arm in arms}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--model", required=True, help="the base: a folder or a hub name")
    parser.add_argument("--adapter", action="append", required=True, metavar="[NAME=]DIR", help="its adapter; again for others beside it")
    parser.add_argument("--levels", type=listed, default=["0", "4", "8", "12", "16"])
    parser.add_argument("--parts", type=listed, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--zero-shot", help="folder with .jsonl files of choices")
    parser.add_argument("--wikitext", help="WikiText-2 in its tokenised form")
    parser.add_argument("--haystack", help="text of the long-context tasks, as in `dsla eval`")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[512, 1024, 2048, 4000])
    parser.add_argument("--samples", type=int, default=100, help="of each long-context task at each length")
    parser.add_argument("--limit", type=int, help="documents of each other task (default: all)")
    parser.add_argument("--batch-size", type=int, help="default: as many as fit")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/quality", help="folder for results of single levels")
    parser.add_argument("--output", default=str(RESULTS / "quality.json"))
    parser.add_argument("--page", nargs="*", default=[str(RESULTS / "quality.html")], help=".html or .md; none: no page")
    parser.add_argument("--speed", nargs="*", default=[], help="files with measurements of speed for the page")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: known are {', '.join(PARTS)}")
        if part != "own" and getattr(options, part) is None:
            parser.error(f"the part {part} needs --{part.replace('_', '-')}; --parts leaves it out")
    if not options.output.endswith(".json"):
        parser.error(f"--output {options.output} must end in .json")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # peft 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    named = [(name, path) if equals else (Path(name).name, name) for name, equals, path in (a.partition("=") for a in options.adapter)]
    adapters: dict[str, str | None] = {BASE: None, **dict(named)}
    if len(adapters) <= len(named):
        raise ValueError(f"adapters need names of their own, as NAME=DIR: {options.adapter}")
    work, output = Path(options.work), Path(options.output)
    for part in options.parts:
        for arm, adapter in adapters.items():
            try:
                measure(options, part, adapter, work / arm / part)
            finally:
                rows = gather(work, list(adapters), options.parts)
                if rows:
                    same = level_0_is_the_base(rows)
                    write_results(output.stem, rows, folder=output.parent, level_0_is_the_base=same)
    print(f"level 0 is the base, to the last digit: {same}")
    for page in options.page:
        report([str(output)], page, speed=options.speed, title="Quality by level")


if __name__ == "__main__":
    main()
