"""Documents in both formats: everything escaped, tables aligned, pictures inside."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image
from saved_runs import Page

from reporting.document import (
    STYLE_SHEET,
    Bullets,
    Code,
    Contents,
    Heading,
    Link,
    Paragraph,
    Picture,
    Quoted,
    Table,
    parts,
    plain,
    to_html,
    to_markdown,
)

HOSTILE = 'a<script>alert(1)</script>&"\' | `x` **b**'
NUMBER = Quoted("test.dice", 0.87512, "0.8751")


def body(*blocks) -> str:
    """The HTML of blocks alone."""
    return to_html("x", blocks).split("<main>\n")[1].split("\n</main>")[0]


def test_blocks_escape_in_both_formats():
    blocks = [Heading(1, HOSTILE), Paragraph(HOSTILE), Table(HOSTILE, (HOSTILE, "n"), [[HOSTILE, "1"]]), Code("echo ```")]
    shown = Page(to_html(HOSTILE, blocks))
    assert not shown.all("script")
    assert shown.text.count(HOSTILE) == 6  # with the title
    markdown = to_markdown(blocks, None)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)
    assert "````sh\necho ```\n````" in markdown


def test_a_text_is_a_string_a_number_or_both():
    assert parts("a") == ["a"]
    assert parts(NUMBER) == [NUMBER]
    assert parts(("a ", NUMBER)) == ["a ", NUMBER]
    assert plain(["Dice ", NUMBER, "."]) == "Dice 0.8751."


def test_html_keeps_the_path_and_the_exact_value_of_a_number():
    assert body(Paragraph(["Dice ", NUMBER], "note")) == (
        '<p class="note">Dice <data value="0.87512" data-path="test.dice">0.8751</data></p>')


def test_links_are_addresses_in_both_formats():
    text = ["see ", Link(Path("seed-42/a report.html"), "seed-42"), " and ", Link(Path("/runs/b&c.html"), HOSTILE), "."]
    shown = Page(body(Paragraph(text)))
    assert shown.text == f"see seed-42 and {HOSTILE}."
    assert [attributes["href"] for attributes in shown.all("a")] == ["seed-42/a%20report.html", "file:///runs/b%26c.html"]
    markdown = to_markdown([Paragraph(text[:2])], Path())
    assert markdown == "see [seed-42](<seed-42/a%20report.html>)\n"
    assert parts(text[1]) == [text[1]] and plain(text[:2]) == "see seed-42"


def test_headings_lists_and_contents():
    blocks = [Contents(), Heading(2, "A & B", "ab"), Heading(2, "without"), Heading(3, "deeper", "c"),
              Bullets(["x", ["y ", NUMBER]], "warnings"), Bullets(["z"])]
    assert body(*blocks).splitlines() == [
        '<nav aria-label="Contents"><ul><li><a href="#ab">A &amp; B</a></li></ul></nav>',
        '<h2 id="ab">A &amp; B</h2>', "<h2>without</h2>", '<h3 id="c">deeper</h3>',
        '<ul class="warnings"><li>x</li><li>y <data value="0.87512" data-path="test.dice">0.8751</data></li></ul>',
        "<ul><li>z</li></ul>",
    ]
    assert to_markdown(blocks, None) == "## A \\& B\n\n## without\n\n### deeper\n\n- x\n- y 0.8751\n\n- z\n"


def test_tables_set_words_left_and_numbers_right():
    table = Table("Caption", ("name", "n", "verdict"), [["a", NUMBER, "x"]], words=(0, 2))
    html = body(table)
    assert '<tr><th scope="col">name</th><th scope="col" class="number">n</th><th scope="col">verdict</th></tr>' in html
    assert '<tr><th scope="row">a</th><td class="number"><data' in html
    assert html.endswith("<td>x</td></tr>\n</tbody></table></div>")
    assert 'class="scroll short"' in html
    assert 'class="scroll"' in body(table._replace(rows=[["a", "1", "x"]] * 13))  # may break between pages
    assert to_markdown([table], None) == (
        "*Caption*\n\n| name | n | verdict |\n| --- | ---: | --- |\n| a | 0.8751 | x |\n")


def test_paragraphs_of_a_kind_stand_out_in_markdown():
    blocks = [Paragraph("a", "lead"), Paragraph("b", "synthetic"), Paragraph("c", "note"), Paragraph("d\ne")]
    assert to_markdown(blocks, None) == "**a**\n\n**b**\n\n> c\n\nd e\n"


def test_pictures_are_embedded_in_html_and_linked_in_markdown(tmp_path):
    path = tmp_path / "figures" / "a b.png"
    path.parent.mkdir()
    Image.new("RGB", (200, 100), (200, 150, 140)).save(path)
    plot, photo = Picture(path, "First. Second.", ["Dice ", NUMBER]), Picture(path, "Alt", "Caption", photo=True)
    for picture, kind, mime in ((plot, "PNG", "png"), (photo, "JPEG", "jpeg")):
        (shown,) = Page(body(picture)).all("img")
        head, content = shown["src"].split(",")
        assert head == f"data:image/{mime};base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == kind
        assert (shown["width"], shown["height"], shown["alt"]) == ("200", "100", picture.alt)
        assert shown["style"] == "--legible:84px"  # 200 * 0.42
    assert 'aria-label="First."' in body(plot)
    assert base64.b64encode(path.read_bytes()).decode() in body(plot)  # the file as it is
    assert '<figure class="photo">' in body(photo)
    assert to_markdown([plot], tmp_path) == "![First. Second.](<figures/a b.png>)\n\n*Dice 0.8751*\n"


def test_the_style_sheet_stands_inside_the_page_and_fetches_nothing():
    styles = STYLE_SHEET.read_text(encoding="utf-8")
    assert f"<style>\n{styles}</style>" in to_html("x", [])
    assert not re.search(r"url\(|@import|</", styles)
    for kind in ("lead", "synthetic", "note", "warnings", "caption", "number", "scroll", "paper"):
        assert f".{kind}" in styles
