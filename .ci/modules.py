"""Writes docs/modules.md: every module with the first sentence of its docstring, and where modules of old names are now.

python .ci/modules.py           write it
python .ci/modules.py --check   exit with 1 if it is not what would be written
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = {"dsla_cli": ROOT / "src", "dsla_hf": ROOT / "src", "dsla_kernels": ROOT / "kernels"}
HEAD = """# Modules

Written by `python .ci/modules.py` from the first sentence of each module's docstring. Within `dsla_hf` a folder imports those below it:
cli, vllm, serving, evaluation, training, inference, models, levels, core, compat (`tests/project/test_arrows.py`).
"""
MOVED_HEAD = """## Old names

`import` by these names works until 0.3, with a warning; so do members of `dsla_hf` that went to another module
(`src/dsla_hf/moved.py` has them).

| before | now |
|---|---|
"""


def first_sentence(file: Path) -> str:
    """Of its docstring, on one line."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].replace("|", "\\|")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for package, where in PACKAGES.items():
        folders = sorted({file.parent for file in (where / package).rglob("*.py")})
        for folder in folders:
            name = ".".join(folder.relative_to(where).parts)
            lines = [f"## {name}", "", first_sentence(folder / "__init__.py"), ""]
            modules = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
            if modules:
                lines += ["| module | |", "|---|---|"]
                lines += [f"| `{file.stem}` | {first_sentence(file)} |" for file in modules]
                lines.append("")
            parts.append("\n".join(lines))
    names = [
        f"| `{package}.{old}` | `{package}.{new}` |\n" for package in ("dsla_hf", "dsla_kernels") for old, new in _moved(package).items()
    ]
    return "\n".join(parts) + "\n" + MOVED_HEAD + "".join(names)


def _moved(package: str) -> dict[str, str]:
    """The table of a package's `moved.py`, read without what it imports."""
    tree = ast.parse((PACKAGES[package] / package / "moved.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MOVED"
    )


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page() else f"{PAGE.name} is old: python .ci/modules.py")
    PAGE.write_text(page(), encoding="utf-8")
