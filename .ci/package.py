"""Build the sdist, and the wheel from it; install each into an environment of its own, outside the tree, and try it: `make package`.

These environments borrow dependencies from the one that runs this, so that nothing is downloaded; the release workflow tries the same
files in environments that have nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DIST = REPOSITORY / "dist"
ADDED = ("PKG-INFO", "setup.cfg")  # by setuptools
PACKAGES = ("dsla_cli", "dsla_hf", "dsla_kernels")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def listed(*options: str) -> set[str]:
    return set(run("git", "ls-files", "-z", *options, cwd=REPOSITORY).split("\0")) - {""}


def check_contents(sdist: Path, wheel: Path) -> None:
    """The sdist holds what git does and nothing else, where this is a clone; the wheel the packages and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    own = {name for name in names if name not in ADDED and ".egg-info/" not in name}
    if (REPOSITORY / ".git").exists():
        tracked = {name for name in listed() if (REPOSITORY / name).exists()}
        links = tuple(f"{name}/" for name in tracked if (REPOSITORY / name).is_dir())  # to folders, which the sdist holds as such
        if missing := {name for name in tracked if (REPOSITORY / name).is_file()} - own:
            sys.exit(f"{sdist.name} lacks {sorted(missing)[:9]}: say so in MANIFEST.in")
        if others := {name for name in own - tracked - listed("--others", "--exclude-standard") if not name.startswith(links)}:
            sys.exit(f"{sdist.name} holds {sorted(others)[:9]}, which git does not know")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    if tops != {*PACKAGES, wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}:
        sys.exit(f"{wheel.name} holds {sorted(tops)}")


def try_out(file: Path, folder: Path) -> str:
    """What the smoke test says of the installed file."""
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Paths in a .pth file come last and their own .pth files are not read: an editable installation there is not seen.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    shutil.copy(Path(__file__).parent / "smoke.py", folder)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": clean.get("OMP_NUM_THREADS", "1")}
    run(
        *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--no-cache", "--python", python, file),
        cwd=folder,
        env=clean,
    )
    return run(python, "smoke.py", cwd=folder, env=clean).strip().splitlines()[-1]


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, cwd=REPOSITORY)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second, ThreadPoolExecutor() as pool:
        for file, said in zip((wheel, sdist), pool.map(try_out, (wheel, sdist), (Path(first), Path(second))), strict=True):
            print(f"{file.name} ({file.stat().st_size / 2**20:.1f} MiB): {said}")


if __name__ == "__main__":
    main()
