"""The command `dsla`."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version


def main(arguments: list[str] | None = None) -> int:
    """Run `dsla`; returns the exit status. Errors that a user can mend are printed as one line."""
    parser = argparse.ArgumentParser(prog="dsla", description="Turn a pretrained transformer into a fast hybrid, layer by layer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="see it work in a few minutes on a CPU",
        description="Trains a small Llama on text that comes with Python, converts and distils it, saves it as adapter and "
        "hybrid, generates with the level raised in mid-text, and prints what each level costs and saves.",
    )
    quickstart.add_argument("--output", default="quickstart-output", help="folder for models and plot (default: %(default)s)")
    quickstart.add_argument("--steps", type=int, default=400, help="optimizer steps of the small model (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")

    commands.add_parser(
        "env", help="versions, device, and which kernels run", description="What a bug report needs: versions, device, kernels."
    )

    args = parser.parse_args(arguments)
    try:
        if args.command == "quickstart":
            from .quickstart import run

            run(args.output, args.steps, args.seed)
        else:
            print(environment())
    except (ValueError, OSError, ImportError) as error:
        print(f"dsla {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def environment() -> str:
    """Versions, device and kernel path, a line each."""
    import torch

    from dsla_kernels import kernel_path

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines += [(package, version(package)) for package in ("dsla-hf", "torch", "transformers", "peft", "accelerate")]
    lines += [("device", torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads")]
    lines += [("kernels", kernel_path(device))]
    return "\n".join(f"{name:<14}{value}" for name, value in lines)
