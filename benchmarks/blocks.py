"""A page as a list of blocks, and the two ways to write it: Markdown with pictures beside it, HTML with all inside."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff }
h1, h2, h3 { line-height: 1.2; margin-top: 2em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top }
th { border-bottom: 2px solid #8c959f }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
td:nth-child(n+3) { white-space: nowrap }
figure { margin: 1rem 0 }
figure svg { max-width: 100%; height: auto }
figcaption { color: #57606a; font-size: 0.9rem }
code { background: #f2f4f6; padding: 0 0.25em }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and **strong** mean what they do in Markdown."""

    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    name: str  # of the file, without its ending
    caption: str
    svg: str


Block = Heading | Text | Items | Table | Figure


def markdown(blocks: Sequence[Block], images: str) -> str:
    """``images``: the folder of the pictures, seen from the page."""
    return "\n\n".join(_markdown(block, images) for block in blocks) + "\n"


def _markdown(block: Block, images: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(head, rows):
            lines = [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in (head, *rows)]
            lines.insert(1, "|" + "---|" * min(2, len(head)) + "---:|" * (len(head) - 2))
            return "\n".join(lines)
        case Figure(name, caption, _):
            return f"![{caption}]({images}/{name}.svg)\n\n*{caption}*"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_images(blocks: Sequence[Block], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            (folder / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")


def html_page(blocks: Sequence[Block], title: str) -> str:
    """One file that needs no other."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
            lines = ("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f'<div class="wide"><table><tr>{top}</tr>\n' + "\n".join(lines) + "</table></div>"
        case Figure(name, caption, svg):
            return f"<figure>{_inlined(svg, name)}<figcaption>{_inline(caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # a link to another page leads nowhere from here
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _inlined(svg: str, name: str) -> str:
    """Without its prologue, and with names of its own: two pictures of one page must not share any."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
