"""Writes docs/modules.md: every module with the first sentence of its docstring, and where modules of old names are now.

python .ci/modules.py           write it
python .ci/modules.py --check   exit with 1 if it is not what would be written
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = {"dsla_cli": ROOT / "src", "dsla_hf": ROOT / "src", "dsla_kernels": ROOT / "kernels"}
HEAD = """# Modules

Written by `python .ci/modules.py` from the first sentence of each module's docstring. Within `dsla_hf` a folder imports those below it:
cli, serving, evaluation, training, inference, models, levels, core, compat (`tests/project/test_arrows.py`).
"""
MOVED_HEAD = """## Old names

`import` by these names works until 0.3, with a warning.

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
    return "\n".join(parts) + "\n" + MOVED_HEAD + "".join(f"| `dsla_hf.{old}` | `dsla_hf.{new}` |\n" for old, new in _moved().items())


def _moved() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("moved", ROOT / "src" / "dsla_hf" / "moved.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MOVED


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page() else f"{PAGE.name} is old: python .ci/modules.py")
    PAGE.write_text(page(), encoding="utf-8")
