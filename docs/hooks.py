"""Hooks of mkdocs: what makes one set of links right on the site and on the forge.

The README is the front page. Links to files outside docs/ (results, sources) lead to the forge.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=\))")


def site_link(target: str, page: str, repo_url: str) -> str:
    """`target`, relative to the file `page` of the repository, as a link from that page's place on the site."""
    path = normpath(f"{dirname(page)}/{target}".lstrip("/"))
    if path == "README.md":
        path = "docs/index.md"
    if not path.startswith("docs/"):
        kind = "tree" if (REPOSITORY / path).is_dir() else "blob"
        return f"{repo_url}/{kind}/main/{path}"
    source = "docs" if page == "README.md" else dirname(page)
    return relpath(path, source)


def site_text(text: str, page: str, repo_url: str) -> str:
    return LINK.sub(lambda found: found[1] + site_link(found[2], page, repo_url) + (found[3] or ""), text)


def on_files(files: Any, config: Any) -> Any:
    text = site_text((REPOSITORY / "README.md").read_text(), "README.md", config.repo_url)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == "index.md":
        page.edit_url = f"{config.repo_url}/edit/main/README.md"
        return markdown
    return site_text(markdown, f"docs/{page.file.src_uri}", config.repo_url)
