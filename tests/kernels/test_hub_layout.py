"""The source folder for the Hugging Face kernel hub holds what its documentation asks for."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "hub_layout.py"
UNIQUE_OPS = """
import torch

ops = torch.ops._dsla_kernels_1a2b3c

def add_op_namespace_prefix(op_name):
    return f"_dsla_kernels_1a2b3c::{op_name}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "dsla-kernels"
    subprocess.run([sys.executable, SCRIPT, path], check=True)
    return path


def test_the_package_has_the_name_in_build_toml(folder):
    build = tomllib.loads((folder / "build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"} and {"name", "version", "license", "backends"} <= set(build["general"])
    package = folder / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert (package / "__init__.py").exists() and (folder / "flake.nix").exists() and (folder / "LICENSE").exists()
    assert not (package / "_ops.py").exists()


def test_modules_import_each_other_relatively_and_name_no_operator_namespace(folder):
    for path in (folder / "torch-ext" / "dsla_kernels").rglob("*.py"):
        text = path.read_text()
        assert "dsla_kernels::" not in text and "torch.ops" not in text, path.name
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.startswith("dsla") for name in names), path.name


def test_a_build_is_loaded_beside_the_installed_package(folder, tmp_path):
    """As the hub's loader does: under a name of its own, with operators of its own."""
    pytest.importorskip("triton")
    package = folder / "torch-ext" / "dsla_kernels"
    code = f"""
import importlib.util, shutil, sys
import dsla_kernels.ops.chunk, dsla_kernels.ops.decode, dsla_kernels.ops.window
import torch
package = {str(tmp_path / "package")!r}
shutil.copytree({str(package)!r}, package)
open(package + "/_ops.py", "w").write({UNIQUE_OPS!r})
spec = importlib.util.spec_from_file_location("unique_name", package + "/__init__.py", submodule_search_locations=[package])
module = importlib.util.module_from_spec(spec)
sys.modules["unique_name"] = module
spec.loader.exec_module(module)
for name in ("ops.chunk", "ops.decode", "ops.window"):
    importlib.import_module("unique_name." + name)
for name in ("chunk_forward", "chunk_backward", "window_forward", "window_backward", "window_decode", "pure_decode"):
    assert hasattr(torch.ops._dsla_kernels_1a2b3c, name) and hasattr(torch.ops.dsla_kernels, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
