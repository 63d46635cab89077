"""Whether the Triton kernels, and the tests that run them through Triton's interpreter, are those that passed.

Those tests take a third of the suite's time on a CPU. `make test` leaves them out while nothing that they test has changed since
`make test-kernels` passed, which records it:

    python tests/kernel_sources.py           exit with 0 if nothing has changed
    python tests/kernel_sources.py --record  to be run after the tests have passed
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("test_kernels", "test_kernels_in_layer", "test_gates_kernel", "test_few_rows", "test_softmax_decode", "test_caches_kernel")
RECORD = ROOT / "tests" / "kernels_passed.txt"


def digest() -> str:
    """Of all sources that these tests depend on."""
    files = [*(ROOT / "kernels").rglob("*.py"), ROOT / "src/dsla_hf/core/attention.py", *(ROOT / f"tests/{name}.py" for name in MODULES)]
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def unchanged() -> bool:
    """Whether the sources are those that passed."""
    return RECORD.is_file() and RECORD.read_text(encoding="utf-8").split() == [digest()]


if __name__ == "__main__":
    if "--record" in sys.argv[1:]:
        RECORD.write_text(f"{digest()}\n", encoding="utf-8")
    elif not unchanged():
        sys.exit("the kernels, or their tests, have changed since they passed: make test-kernels")
