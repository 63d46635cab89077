"""Whether the Triton kernels, and the tests that run them through Triton's interpreter, are those that passed.

Those tests take a third of the suite's time on a CPU. `make test` leaves them out while nothing that they test has changed since
`make test-kernels` passed, which records it:

    python tests/support/kernel_sources.py           exit with 0 if nothing has changed
    python tests/support/kernel_sources.py --files   print the files of these tests
    python tests/support/kernel_sources.py --record  to be run after the tests have passed
"""

import hashlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "test_kernels",
    "test_kernels_in_layer",
    "test_head_subsets",
    "test_head_counts",
    "test_window_alone",
    "test_divergence",
    "test_sample",
    "test_gates_kernel",
    "test_few_rows",
    "test_softmax_decode",
    "test_caches_kernel",
    "test_fp8_caches",
    "test_pages",
)
LAYER = ("attention", "checks", "padding", "past", "precision", "recording", "step")  # modules of dsla_hf.core that call the kernels
RECORD = ROOT / "tests" / "support" / "kernels_passed.txt"


def test_files() -> list[Path]:
    """Of the tests that need the interpreter."""
    return [ROOT / f"tests/kernels/{name}.py" for name in MODULES]


def digest() -> str:
    """Of all sources that these tests depend on."""
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / f"src/dsla_hf/core/{name}.py" for name in LAYER), *test_files()]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def unchanged() -> bool:
    """Whether the sources are those that passed."""
    return RECORD.is_file() and RECORD.read_text(encoding="utf-8").split() == [digest()]


def leave_out(config, items) -> None:
    """Of the tests that pytest has collected, leave out these if they passed with these very sources, unless all or a file of theirs was
    asked for."""
    named = any(module in str(argument) for argument in config.args for module in MODULES)
    if os.environ.get("TRITON_INTERPRET") != "1" or config.getoption("--kernels") or named or not unchanged():
        return
    left_out = [item for item in items if item.path.stem in MODULES]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.path.stem not in MODULES]


if __name__ == "__main__":
    if "--files" in sys.argv[1:]:
        print(*(file.relative_to(ROOT) for file in test_files()))
    elif "--record" in sys.argv[1:]:
        RECORD.write_text(f"{digest()}\n", encoding="utf-8")
    elif not unchanged():
        sys.exit("the kernels, or their tests, have changed since they passed: make test-kernels")
