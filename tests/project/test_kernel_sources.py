"""Kernel tests are left out only while nothing that they test has changed."""

from pathlib import Path
from types import SimpleNamespace

import kernel_sources
import pytest


def test_any_change_of_a_kernel_or_its_tests_counts(tmp_path, monkeypatch):
    for folder in ("kernels/dsla_kernels", "src/dsla_hf/core", "tests/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(kernel_sources, "ROOT", tmp_path)
    files = [tmp_path / "kernels/dsla_kernels/a.py", *(tmp_path / f"src/dsla_hf/core/{name}.py" for name in kernel_sources.LAYER)]
    files += kernel_sources.test_files()
    for file in files:
        file.write_text("before")
    monkeypatch.setattr(kernel_sources, "RECORD", tmp_path / "record.txt")
    assert not kernel_sources.unchanged()
    kernel_sources.RECORD.write_text(kernel_sources.digest())
    assert kernel_sources.unchanged()
    for file in files:
        file.write_text("after")
        assert not kernel_sources.unchanged(), file
        file.write_text("before")
    files[0].rename(files[0].with_name("b.py"))
    assert not kernel_sources.unchanged()


def test_the_modules_are_those_that_need_the_interpreter_or_compile():
    folder = Path(__file__).parents[1]
    needing = {file.stem for file in folder.rglob("test_*.py") if "needs a CUDA device, or TRITON_INTERPRET=1" in file.read_text()}
    compiling = {file.stem for file in folder.rglob("test_*.py") if "import compile_only" in file.read_text()}
    assert (needing | compiling) - {"test_kernel_sources"} == set(kernel_sources.MODULES)


@pytest.mark.parametrize(
    "arguments, asked, unchanged, interpreted, left_out",
    [
        ([], False, True, True, True),
        ([], True, True, True, False),
        ([], False, False, True, False),
        ([], False, True, False, False),
        (["tests/kernels/test_gates_kernel.py::test_x"], False, True, True, False),
    ],
    ids=["as passed", "asked for", "changed", "on a GPU", "named"],
)
def test_they_are_left_out_only_where_they_passed(arguments, asked, unchanged, interpreted, left_out, monkeypatch):
    monkeypatch.setattr(kernel_sources, "unchanged", lambda: unchanged)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    told = []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    config = SimpleNamespace(args=arguments, getoption=lambda name: asked, hook=hook)
    items = [SimpleNamespace(path=Path(f"{name}.py")) for name in ("test_gates_kernel", "test_cache", "test_kernels")]
    kept = items[1:2] if left_out else [*items]
    kernel_sources.leave_out(config, items)
    assert items == kept and len(told) == (2 if left_out else 0)
