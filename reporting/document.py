"""A document of headings, paragraphs, tables and pictures, written as one HTML file or as Markdown.

Texts are plain: both writers escape everything, whatever file name or id it came from. The HTML needs no
script, no network and no other file: styles and pictures are inside.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Union
from urllib.parse import quote

from PIL import Image

STYLE_SHEET = Path(__file__).with_name("report.css")


class Quoted(NamedTuple):
    """A number from ``metrics.json``.

    Attributes:
        path: its dotted path there.
        value: exactly as it stands there.
        text: how it is shown.
    """

    path: str
    value: object
    text: str


class Link(NamedTuple):
    """A link to another file.

    Attributes:
        target: a path relative to the document, or an absolute one.
        text: what is shown.
    """

    target: Path
    text: str

    @property
    def address(self) -> str:
        """The target as a browser and a Markdown viewer understand it."""
        return self.target.as_uri() if self.target.is_absolute() else quote(self.target.as_posix())


Piece = Union[str, Quoted, Link]
Text = Union[Piece, Sequence[Piece]]


class Heading(NamedTuple):
    """A heading of level 1 to 6; ``anchor``: the name under which it is linked to."""

    level: int
    text: str
    anchor: str = ""


class Paragraph(NamedTuple):
    """A paragraph; ``kind``: "" or the name of a style: "lead", "synthetic", "note"."""

    text: Text
    kind: str = ""


class Bullets(NamedTuple):
    """A list of texts; ``kind``: "" or the name of a style: "warnings"."""

    items: Sequence[Text]
    kind: str = ""


class Code(NamedTuple):
    """Commands for a shell."""

    text: str


class Table(NamedTuple):
    """A table; the first cell of a row is its heading.

    Attributes:
        caption: shown above, and said by screen readers.
        header: the heading of every column.
        rows: the cells.
        words: the columns of words, by index, which are set flush left; numbers are set flush right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    words: Sequence[int] = (0,)


class Picture(NamedTuple):
    """A picture file.

    Attributes:
        path: where it lies.
        alt: says in words what it shows.
        caption: how to read it.
        photo: embedded as JPEG, a fifth of the size of PNG for photographs.
    """

    path: Path
    alt: str
    caption: Text
    photo: bool = False


class Contents(NamedTuple):
    """Links to the headings of level 2 that have an anchor."""


Block = Union[Heading, Paragraph, Bullets, Code, Table, Picture, Contents]


def parts(text: Text) -> list[Piece]:
    """The pieces of a text, strings, numbers and links."""
    return [text] if isinstance(text, (str, Quoted, Link)) else list(text)


def plain(text: Text) -> str:
    """A text as one string, numbers as they are shown."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in parts(text))


def worded(blocks: Sequence[Block], word: Callable[[str], str]) -> list[Block]:
    """The blocks with every text as ``word`` puts it; quotes of the metrics, links and commands stay as they are."""

    def text(content: Text) -> Text:
        if isinstance(content, str):
            return word(content)
        return content if isinstance(content, (Quoted, Link)) else [word(p) if isinstance(p, str) else p for p in content]

    def block(one: Block) -> Block:
        if isinstance(one, Heading):
            return one._replace(text=word(one.text))
        if isinstance(one, Paragraph):
            return one._replace(text=text(one.text))
        if isinstance(one, Bullets):
            return one._replace(items=[text(item) for item in one.items])
        if isinstance(one, Table):
            rows = [[text(cell) for cell in row] for row in one.rows]
            return one._replace(caption=word(one.caption), header=[word(cell) for cell in one.header], rows=rows)
        if isinstance(one, Picture):
            return one._replace(alt=word(one.alt), caption=text(one.caption))
        return one

    return [block(one) for one in blocks]


# ---------------------------------------------------------------- HTML


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file, styled by ``report.css``.

    Args:
        title: of the window.
        blocks: the content.
    """
    styles = STYLE_SHEET.read_text(encoding="utf-8")
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
{styles}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _html_text(text: Text) -> str:
    return "".join(map(_html_piece, parts(text)))


def _html_piece(piece: Piece) -> str:
    if isinstance(piece, str):
        return escape(piece)
    if isinstance(piece, Link):
        return f'<a href="{escape(piece.address)}">{escape(piece.text)}</a>'
    return f'<data value="{escape(str(piece.value))}" data-path="{escape(piece.path)}">{escape(piece.text)}</data>'


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def _html_block(index: int, block: Block, blocks: Sequence[Block]) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}{_attribute('id', block.anchor)}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p{_attribute('class', block.kind)}>{_html_text(block.text)}</p>"
    if isinstance(block, Bullets):
        items = "".join(f"<li>{_html_text(item)}</li>" for item in block.items)
        return f"<ul{_attribute('class', block.kind)}>{items}</ul>"
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
    return (
        f'<figure{_attribute("class", "photo" if picture.photo else "")}><div class="scroll paper" role="region" tabindex="0" '
        f'aria-label="{escape(_first_sentence(picture.alt))}">'
        f'<img src="data:image/{kind};base64,{content}" width="{width}" height="{height}" alt="{escape(picture.alt)}" '
        f'style="--legible:{_legible(width)}px"></div>\n'
        f"<figcaption>{_html_text(picture.caption)}</figcaption></figure>"
    )


def _embedded(picture: Picture) -> tuple[str, str, int, int]:
    """Kind, base64 content, width and height in pixels; photographs become JPEG."""
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
    """The width in CSS pixels below which a picture of 160 dots per inch should scroll rather than shrink."""
    return round(width * 0.42)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


# ---------------------------------------------------------------- Markdown


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The document as Markdown.

    Args:
        blocks: the content.
        folder: where the document will lie; pictures are referred to relative to it.
    """
    return "\n\n".join(filter(None, (_markdown_block(block, folder) for block in blocks))) + "\n"


def _markdown_text(text: Text) -> str:
    pieces = [
        f"[{_markdown_plain(piece.text)}](<{piece.address}>)" if isinstance(piece, Link) else _markdown_plain(plain(piece))
        for piece in parts(text)
    ]
    return "".join(pieces).strip()


def _markdown_plain(text: str) -> str:
    """Text on one line with everything escaped that Markdown would act on."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", re.sub(r"\s+", " ", text))


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
