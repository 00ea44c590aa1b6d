"""A document of headings, paragraphs, tables and pictures, written as one HTML file or as Markdown.

Texts are plain: both writers escape everything, whatever file name or id it came from. The HTML needs no
script, no network and no other file: styles and pictures are inside.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Union

from PIL import Image


class Quoted(NamedTuple):
    """A number from ``metrics.json``: its dotted path there, the exact value, and how it is shown."""

    path: str
    value: object
    text: str


Text = Union[str, Quoted, Sequence[Union[str, Quoted]]]


class Heading(NamedTuple):
    level: int
    text: str
    anchor: str = ""


class Paragraph(NamedTuple):
    """kind: "" or the name of a style: "lead", "synthetic", "note"."""

    text: Text
    kind: str = ""


class Bullets(NamedTuple):
    items: Sequence[Text]
    kind: str = ""


class Code(NamedTuple):
    text: str


class Table(NamedTuple):
    """caption: shown above, and said by screen readers; the first cell of a row is its heading.

    words: the columns of words, by index, which are set flush left; numbers are set flush right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    words: Sequence[int] = (0,)


class Picture(NamedTuple):
    """A picture file; ``alt`` says in words what it shows, ``caption`` how to read it; ``photo``: embedded as JPEG."""

    path: Path
    alt: str
    caption: Text
    photo: bool = False


class Contents(NamedTuple):
    """Links to the headings of level 2 that have an anchor."""


Block = Union[Heading, Paragraph, Bullets, Code, Table, Picture, Contents]


def parts(text: Text) -> list:
    """The pieces of a text, strings and numbers."""
    return [text] if isinstance(text, (str, Quoted)) else list(text)


def plain(text: Text) -> str:
    return "".join(piece if isinstance(piece, str) else piece.text for piece in parts(text))


# ---------------------------------------------------------------- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file."""
    body = "\n".join(_html_block(index, block, blocks) for index, block in enumerate(blocks))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{STYLE_SHEET}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _html_text(text: Text) -> str:
    return "".join(
        escape(piece) if isinstance(piece, str)
        else f'<data value="{escape(str(piece.value))}" data-path="{escape(piece.path)}">{escape(piece.text)}</data>'
        for piece in parts(text)
    )


def _html_block(index: int, block: Block, blocks: Sequence[Block]) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{escape(block.anchor)}"' if block.anchor else ""
        return f"<h{block.level}{anchor}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        kind = f' class="{escape(block.kind)}"' if block.kind else ""
        return f"<p{kind}>{_html_text(block.text)}</p>"
    if isinstance(block, Bullets):
        kind = f' class="{escape(block.kind)}"' if block.kind else ""
        return f"<ul{kind}>" + "".join(f"<li>{_html_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>'
    if isinstance(block, Table):
        return _html_table(block, f"table-{index}")
    if isinstance(block, Picture):
        return _html_picture(block)
    links = [
        f'<li><a href="#{escape(other.anchor)}">{escape(other.text)}</a></li>'
        for other in blocks if isinstance(other, Heading) and other.level == 2 and other.anchor
    ]
    return '<nav aria-label="Contents"><ul>' + "".join(links) + "</ul></nav>"


def _html_table(table: Table, name: str) -> str:
    looks = ['' if column in table.words else ' class="number"' for column in range(len(table.header))]
    head = "".join(f'<th scope="col"{look}>{escape(cell)}</th>' for cell, look in zip(table.header, looks))
    rows = "\n".join(
        f'<tr><th scope="row">{_html_text(first)}</th>'
        + "".join(f"<td{look}>{_html_text(cell)}</td>" for cell, look in zip(rest, looks[1:])) + "</tr>"
        for first, *rest in table.rows
    )
    # Wide tables scroll inside their own frame, which the keyboard can reach as well; the caption stays where it is.
    short = " short" if len(table.rows) <= 12 else ""
    return (
        f'<p class="caption" id="{name}">{escape(table.caption)}</p>\n'
        f'<div class="scroll{short}" role="region" tabindex="0" aria-labelledby="{name}"><table aria-labelledby="{name}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _html_picture(picture: Picture) -> str:
    kind, content, width, height = _embedded(picture)
    photo = ' class="photo"' if picture.photo else ""
    return (
        f'<figure{photo}><div class="scroll paper" role="region" tabindex="0" '
        f'aria-label="{escape(_first_sentence(picture.alt))}">'
        f'<img src="data:image/{kind};base64,{content}" width="{width}" height="{height}" alt="{escape(picture.alt)}" '
        f'style="--legible:{_legible(width)}px"></div>\n'
        f"<figcaption>{_html_text(picture.caption)}</figcaption></figure>"
    )


def _embedded(picture: Picture) -> tuple[str, str, int, int]:
    """Kind, base64 content, width and height; photographs become JPEG, a fifth of the size of PNG."""
    content = picture.path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        kind = "png"
        if picture.photo:
            stream = io.BytesIO()
            image.convert("RGB").save(stream, "JPEG", quality=85, optimize=True)
            kind, content = "jpeg", stream.getvalue()
    return kind, base64.b64encode(content).decode(), width, height


def _legible(width: int) -> int:
    """The width in CSS pixels below which a picture of 160 dots an inch should scroll rather than shrink."""
    return round(width * 0.42)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


# ---------------------------------------------------------------- Markdown


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The document as Markdown; pictures are referred to relative to ``folder``, where it will lie."""
    return "\n\n".join(filter(None, (_markdown_block(block, folder) for block in blocks))) + "\n"


def _markdown_text(text: Text) -> str:
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(plain(text).split()))


def _markdown_block(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + _markdown_text(block.text)
    if isinstance(block, Paragraph):
        text = _markdown_text(block.text)
        return f"**{text}**" if block.kind in ("lead", "synthetic") else f"> {text}" if block.kind == "note" else text
    if isinstance(block, Bullets):
        return "\n".join(f"- {_markdown_text(item)}" for item in block.items)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return f"{fence}sh\n{block.text}\n{fence}"
    if isinstance(block, Table):
        rows = [block.header, *block.rows]
        lines = ["| " + " | ".join(_markdown_text(cell) for cell in row) + " |" for row in rows]
        rule = "|" + "".join(" --- |" if column in block.words else " ---: |" for column in range(len(block.header)))
        return "\n".join([f"*{_markdown_text(block.caption)}*", "", lines[0], rule, *lines[1:]])
    if isinstance(block, Picture):
        place = block.path.relative_to(folder).as_posix()
        return f"![{_markdown_text(block.alt)}](<{place}>)\n\n*{_markdown_text(block.caption)}*"
    return ""  # a table of contents is the viewer's


STYLE_SHEET = """\
:root { --ground: #fff; --ink: #1c1d1f; --soft: #55585d; --line: #d5d7da; --tint: #f4f5f6; --link: #0a4f8f; --alarm: #a3001e;
  color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #15171a; --ink: #e7e8ea; --soft: #a9adb4; --line: #3a3e45;
  --tint: #1e2126; --link: #8cc0f5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial,
  sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; margin: 0; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); }
h2 { font-size: 1.4rem; margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin-top: 2.5rem; }
p, ul { margin: 0.75rem 0; max-width: 44rem; overflow-wrap: anywhere; }
ul { padding-left: 1.25rem; }
li { margin: 0.35rem 0; }
a { color: var(--link); }
.lead { font-size: 1.5rem; line-height: 1.35; font-weight: 600; margin: 0.75rem 0 1.25rem; max-width: none; }
.synthetic { background: var(--alarm); color: #fff; font-weight: 600; padding: 0.5rem 0.75rem; border-radius: 4px;
  max-width: none; }
.note { color: var(--soft); font-size: 0.925rem; }
.warnings { background: var(--tint); border-left: 4px solid var(--alarm); padding: 0.75rem 1rem 0.75rem 2rem; max-width: none; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 1.5rem 0 0;
  max-width: none; }
nav li { margin: 0; }
nav a { display: inline-block; padding: 0.25rem 0; }
.scroll { overflow-x: auto; margin: 0 0 1.5rem; }
.caption { color: var(--soft); font-size: 0.875rem; margin: 1.5rem 0 0.4rem; }
.scroll:focus-visible, pre:focus-visible, a:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.8rem 0.4rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; }
td.number { white-space: nowrap; }
td:not(.number) { overflow-wrap: break-word; min-width: 4.5rem; }
figure { margin: 1.25rem 0 2.5rem; }
.paper { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; margin: 0; }
.paper img { display: block; width: 100%; min-width: min(100%, var(--legible)); height: auto; }
figcaption { margin-top: 0.6rem; font-size: 0.925rem; color: var(--soft); max-width: 44rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem 1rem; overflow-x: auto; }
code { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 1rem 3rem; }
  .lead { font-size: 1.2rem; }
  h2 { font-size: 1.25rem; margin-top: 2.5rem; }
  .paper img { min-width: var(--legible); }
  tbody th { min-width: 6rem; }
}
@media print {
  @page { size: A4; margin: 16mm; }
  body { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3, .caption { break-after: avoid; }
  h2 { margin-top: 1.5rem; }
  figure, tr, .short, .warnings { break-inside: avoid; }
  .scroll { overflow: visible; }
  .paper { padding: 0; border: 0; }
  .paper img { min-width: 0; max-height: 205mm; object-fit: contain; }
  .photo .paper img { max-height: 100mm; }
  table { font-size: 8pt; }
  td.number { white-space: normal; }
  .synthetic, .warnings { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
