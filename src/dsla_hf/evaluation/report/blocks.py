"""A page as blocks, and what becomes of them: Markdown with pictures beside it, or one HTML file (`page.html.jinja`)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ...core.files import write_whole
from ...core.tables import markdown_table

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Command:
    text: str


@dataclass(frozen=True)
class Figure:
    """A PNG, what it shows in words, and what a file of it is called after the page's own name."""

    image: bytes
    text: str
    name: str


Block = Heading | Paragraph | Table | Command | Figure


def write_page(blocks: Sequence[Block], page: Path) -> str:
    """Write a page, .md or .html, and return its text. Pictures of page.md are page-NAME.png."""
    if page.suffix == ".html":
        text = _html(blocks)
    else:
        for block in blocks:  # before the page that links them
            if isinstance(block, Figure):
                write_whole(page.with_name(_file_of(block, page)), block.image)
        text = "\n\n".join(_markdown(block, page) for block in blocks) + "\n"
    write_whole(page, text)
    return text


def _file_of(figure: Figure, page: Path) -> str:
    return f"{page.stem}-{figure.name}.png"


def _markdown(block: Block, page: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Table():
            return markdown_table(block.head, block.rows)
        case Command():
            return f"```console\n{block.text}\n```"
        case Figure():
            return f"![{block.text}]({quote(_file_of(block, page))})"


def _html(blocks: Sequence[Block]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        blocks=[(type(block).__name__, block) for block in blocks],
        base64=lambda image: base64.b64encode(image).decode(),
    )
