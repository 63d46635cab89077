"""Imports between modules point one way, in all three packages."""

import ast
import sys
from pathlib import Path

import pytest

import dsla_cli
import dsla_hf
import dsla_kernels

# Folders of dsla_hf: each imports those below it, and itself.
FOLDERS = ["cli", "vllm", "serving", "evaluation", "training", "inference", "models", "levels", "core", "compat"]
TOP = {"__init__", "moved"}  # beside them
PACKAGES = {package.__name__: Path(package.__file__).parent for package in (dsla_cli, dsla_hf, dsla_kernels)}


def absolute_imports(tree, package):
    """Dotted names of everything `tree` imports, in functions too, but for type checkers; `package` is what relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def imports_of(package):
    """Module of a package -> (modules of it that it imports, names of all else that it imports). Names without that of the package."""
    folder = PACKAGES[package]
    files = {path.relative_to(folder).with_suffix("").parts: path for path in sorted(folder.rglob("*.py"))}
    modules = {".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts) for parts in files}
    found = {}
    for parts, path in files.items():
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        own, others = found.setdefault(module, (set(), set()))
        for name in absolute_imports(ast.parse(path.read_text()), (package, *parts[:-1])):
            top, _, rest = name.partition(".")
            if top != package:
                others.add(name)
                continue
            while rest and rest not in modules:
                rest = rest.rpartition(".")[0]
            own.add(rest or "__init__")
        own.discard(module)
    return found


def test_the_import_reader_sees_every_kind_of_import():
    code = "import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from ..g import h\nfrom i import j\n"
    code += "if TYPE_CHECKING:\n    import k"
    assert set(absolute_imports(ast.parse(code), ("p", "q"))) == {"a.b", "p.q.c", "p.q.d.e", "p.g.h", "i.j"}
    imports = imports_of("dsla_hf")
    assert "core.attention" in imports["core.cache"][0] and "models.hybrid" in imports["models.adapter"][0]
    assert "common" in imports_of("dsla_kernels")["ops.chunk.forward"][0]


def test_every_module_has_its_folder():
    assert {module.partition(".")[0] for module in imports_of("dsla_hf")} == {*FOLDERS, *TOP}


def test_folders_import_in_one_direction():
    rank = {folder: place for place, folder in enumerate(FOLDERS)}
    wrong = [
        f"{module} imports {target}"
        for module, (own, _) in imports_of("dsla_hf").items()
        if module not in TOP
        for target in own
        if target in TOP or rank[target.partition(".")[0]] < rank[module.partition(".")[0]]
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycle_between_modules(package):
    graph = {module: own for module, (own, _) in imports_of(package).items() if module != "__init__"}
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                # The init of a package that re-exports its modules is no step: they do not import it.
                if not any(other.startswith(f"{target}.") for other in graph):
                    visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_packages_import_in_one_direction():
    """The command line imports the library, within functions; the library the kernels; the kernels torch and triton alone."""
    tops = {package: {name.split(".")[0] for _, others in imports_of(package).values() for name in others} for package in PACKAGES}
    assert tops["dsla_cli"] - {*sys.stdlib_module_names} == {"dsla_hf"}
    assert "dsla_cli" not in tops["dsla_hf"]
    assert tops["dsla_kernels"] <= {*sys.stdlib_module_names, "torch", "triton"}


def test_the_layer_knows_neither_transformers_nor_peft():
    """The layer, and what it is made of; of `compat` it reads attributes alone."""
    layer = {"attention", "checks", "layout", "masks", "padding", "past", "precision", "recording", "step"}
    imports = imports_of("dsla_hf")
    for module in (*(f"core.{name}" for name in sorted(layer)), "compat.attributes"):
        own, others = imports[module]
        assert not {name.split(".")[0] for name in others} & {"transformers", "peft", "accelerate"}, module
        assert own <= {*(f"core.{name}" for name in layer), "compat.attributes"}, f"{module} needs nothing else of dsla_hf"
