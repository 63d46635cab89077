"""Lays out what the Hugging Face kernel builder takes: build.toml, flake.nix, the licence, and the package under torch-ext.

python kernels/hub_layout.py FOLDER
"""

import shutil
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
PACKAGE = "dsla_kernels"


def lay_out(folder: Path) -> None:
    """Writes into `folder`, which must be empty or not exist."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    # The builder writes an _ops.py of its own, with operator names that no other build has.
    ignored = shutil.ignore_patterns("__pycache__", "_ops.py", "py.typed")
    shutil.copytree(KERNELS / PACKAGE, folder / "torch-ext" / PACKAGE, ignore=ignored)
    for path in (KERNELS / "build.toml", KERNELS / "flake.nix", KERNELS.parent / "LICENSE"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lay_out(Path(sys.argv[1]))
