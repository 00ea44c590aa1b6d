"""The report and the terminal: every number as in the metrics, everything escaped, nothing fetched."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import TINY_FLAGS, command
from saved_runs import changed, make_run, many

import report
import terminal
from charts import load_run
from document import Code, Heading, Paragraph, Table, to_html, to_markdown
from formats import MISSING, SYNTHETIC_NOTE, count, number, percent, signed, signed_span, span
from visualize import draw_galleries, image_reader

HOSTILE = 'a<script>alert(1)</script>&"\' | `x` **b**'


class Page(HTMLParser):
    """What a test asks of a page: tags with attributes, texts, the text of each element with a data-path."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.quoted, self.stack = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, "elements left open"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if self.stack and self.stack[-1][0] != "style":
            self.texts.append(text)
        if self.stack and "data-path" in self.stack[-1][1]:
            self.quoted.append((self.stack[-1][1]["data-path"], self.stack[-1][1]["value"], text))

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(saved):
    return load_run(saved)


def page(run) -> Page:
    html, markdown = report.write_report(run)
    return Page(html.read_text(encoding="utf-8"))


def lookup(metrics, path):
    for key in path.split("."):
        metrics = metrics[int(key)] if isinstance(metrics, list) else metrics[key]
    return metrics


def ways_to_write(value):
    if isinstance(value, list):
        return {span(value), signed_span(value), f"{value[0]:.6g} to {value[1]:.6g}"}
    if isinstance(value, str):
        return {value}
    return {number(value), signed(value), count(value), percent(value), f"{value:g}"} if value is not None else {MISSING}


def test_every_number_of_the_report_is_that_of_the_metrics(run):
    metrics = json.loads((run.folder / "metrics.json").read_text())
    quoted = page(run).quoted
    assert len(quoted) > 200
    for path, value, text in quoted:
        assert value == str(lookup(metrics, path)), path
        assert text in ways_to_write(lookup(metrics, path)), path
    paths = {path for path, _, _ in quoted}
    for score in ("predictive_variance", "saliency_variance", "fused"):
        assert {f"test.foreground_ece.{score}", f"test.foreground_ece_interval.{score}"} <= paths
    assert {"verdict", "lambda", "test.dice", "test.images"} <= paths
    assert sum(path.startswith("study.rules") for path in paths) >= 3 * len(metrics["study"]["rules"])


def test_both_formats_say_the_same_numbers(run):
    html, markdown = (path.read_text(encoding="utf-8") for path in report.write_report(run))
    plain = re.sub(r"\\(.)", r"\1", markdown)
    for _, _, text in Page(html).quoted:
        assert text in plain


def test_the_verdict_comes_first_then_the_table(run):
    shown = page(run)
    text = shown.text
    assert text.index(run.metrics["verdict"]) < text.index("predictive variance", text.index(run.metrics["verdict"]) + 1)
    order = [tag for tag, _ in shown.tags if tag in ("h1", "table", "figure")]
    assert order[:2] == ["h1", "table"]
    lead = next(index for index, (tag, a) in enumerate(shown.tags) if a.get("class") == "lead")
    assert lead < next(index for index, (tag, _) in enumerate(shown.tags) if tag == "table")


def test_the_page_is_one_file_without_script_or_network(run):
    shown = page(run)
    assert not shown.all("script")
    assert all(attributes["src"].startswith("data:image/") for attributes in shown.all("img"))
    assert all(a["href"].startswith(("#", "data:")) for a in shown.all("a") + shown.all("link"))
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    text = (run.folder / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_the_page_is_accessible(run):
    shown = page(run)
    assert shown.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert len(shown.all("img")) == 12
    descriptions = [attributes["alt"] for attributes in shown.all("img")]
    assert all(len(text) > 40 and SYNTHETIC_NOTE.lower() in text.lower() for text in descriptions)
    assert all(attributes["scope"] in ("row", "col") for attributes in shown.all("th"))
    ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in shown.all("a")} <= set(ids)


def test_warnings_name_what_limits_the_numbers(run):
    metrics = json.loads(json.dumps(run.metrics))
    metrics["test"].update(images_without_foreground=2, empty_cams=7, precision_fallbacks=3,
                           clipped_pixels={"pred_variance": 14, "saliency_variance": 1024})
    metrics["test"]["dice"] = 0.51
    metrics["skipped"] = [{"id": "x <b>", "reason": "no mask"}]
    narrow = {"image": "a", "largest": 0.5, "largest_elsewhere": 0.4}
    metrics["validation"]["range_set_by"] = {
        "pred_variance": narrow, "saliency_variance": {"image": "wide", "largest": 0.2, "largest_elsewhere": 0.01}
    }
    said = page(changed(run, **metrics)).text
    for part in ("synthetic lesions, drawn", "tiny discs", "2 of 6 test images have no lesion", "7 of 180 Grad-CAM",
                 "3 test images overflowed", "14 pixels of the predictive and 1,024 of the saliency", "Only 6 test images",
                 "Only 4 validation images",
                 "One validation image, wide, sets the scale of the saliency variance", "segments badly (test Dice 0.5100)",
                 "Pairs left out, 1 in all: x <b> (no mask).", "image size 32 (default: 256)"):
        assert part in said, part
    assert "sets the scale of the predictive" not in said
    metrics["validation"]["range_set_by"]["saliency_variance"] = narrow
    metrics["test"].update(images_without_foreground=0, empty_cams=0, precision_fallbacks=0, images=519,
                           clipped_pixels={"pred_variance": 0, "saliency_variance": 0})
    metrics["validation"].update(empty_cams=0, images_without_foreground=0, images=260)
    metrics["test"]["dice"] = 0.87
    metrics.update({"synthetic": False, "data_note": None, "lambda": 0.5, "skipped": []})
    configuration = {**run.record["configuration"], "image_size": 256}
    clean = changed(run._replace(record={**run.record, "configuration": configuration}), **metrics)
    assert "Nothing stands out" in page(clean).text
    assert SYNTHETIC_NOTE not in re.sub("(?s)<img.*?>", "", (run.folder / "report.html").read_text())


def test_setup_names_split_settings_versions_and_the_command(run):
    said = page(run).text
    for part in ("12.5 %", "python main.py --data 'a folder'", "visualize.py --summary --run", "90.0 s"):
        assert part in said


@pytest.mark.parametrize(("images", "foreground"), [(1, True), (1, False), (3, False)])
def test_a_report_of_few_images_or_none_with_a_lesion(tmp_path, images, foreground):
    folder = make_run(tmp_path, images=images, foreground=foreground)
    loaded = load_run(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "gallery_complex.png").write_bytes(b"of an earlier run")
    draw_galleries(loaded, image_reader(loaded), ["complex"])
    assert ((folder / "figures" / "gallery_complex.png").exists()) is foreground
    shown = page(loaded)
    assert len(shown.all("img")) == foreground
    assert loaded.metrics["verdict"] in shown.text
    assert "nan" not in shown.text.lower().split()
    if not foreground:
        assert MISSING in shown.text
        assert "no lesion pixel" in shown.text


def test_a_report_of_600_images(run):
    assert "600 test images" in page(many(run.folder, 600)).text


def test_hostile_names_are_text(tmp_path):
    ids = [f"{index}{HOSTILE}".replace("/", "") for index in range(2)]
    folder = make_run(tmp_path / "results <b>&", images=2, ids=ids, data_note=HOSTILE)
    loaded = load_run(folder)
    record = {**loaded.record, "images": HOSTILE, "command": ["main.py", HOSTILE], "device_name": HOSTILE,
              "versions": {HOSTILE: HOSTILE}}
    draw_galleries(loaded, image_reader(loaded), ["worst"])
    shown = page(loaded._replace(record=record))
    assert not shown.all("script")
    assert not shown.all("b")
    assert shown.text.count(HOSTILE) >= 5
    markdown = (folder / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", re.sub("(?s)```.*?```", "", markdown))


def test_blocks_escape_in_both_formats():
    blocks = [Heading(1, HOSTILE), Paragraph(HOSTILE), Table(HOSTILE, (HOSTILE, "n"), [[HOSTILE, "1"]]), Code("echo ```")]
    shown = Page(to_html(HOSTILE, blocks))
    assert not shown.all("script")
    assert shown.text.count(HOSTILE) == 6  # with the title
    markdown = to_markdown(blocks, None)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)
    assert "````sh\necho ```\n````" in markdown


def test_a_report_can_be_written_before_any_figure(tmp_path):
    shown = page(load_run(make_run(tmp_path, images=2)))
    assert not shown.all("img")


# ---------------------------------------------------------------- the terminal


def test_the_table_is_aligned_and_plain(run):
    lines = terminal.result_table(run.metrics).splitlines()
    assert len(lines) == 4
    for value, line in zip(run.metrics["test"]["foreground_ece"].values(), lines[1:]):
        assert line.index(number(value)) + 6 == lines[0].index("foreground ECE") + len("foreground ECE")
    assert "\033" not in "".join(lines)
    coloured = terminal.result_table(run.metrics, colour=True)
    assert re.sub(r"\033\[\d*m", "", coloured) == "\n".join(lines)
    coloured.replace("—", "").encode("ascii")  # any terminal can show it


def test_a_table_without_any_foreground(tmp_path):
    table = terminal.result_table(load_run(make_run(tmp_path, images=1, foreground=False)).metrics)
    assert table.count(MISSING) == 3


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.colours_wanted(Terminal())
    assert not terminal.colours_wanted(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.colours_wanted(Terminal())


def test_stage_lines_and_their_silence(capsys):
    with terminal.console():
        terminal.stage("data", "24 images")
    assert re.fullmatch(r"data         24 images  \(\d+\.\d s\)\n", capsys.readouterr().out)
    with terminal.console(quiet=True):
        terminal.stage("data", "24 images")
        for _ in terminal.tqdm(range(3)):
            pass
    assert capsys.readouterr() == ("", "")
    with terminal.console(as_json=True):
        terminal.stage("data", "24 images")
        print("from anywhere")
    out, err = capsys.readouterr()
    assert out == ""
    assert "24 images" in err
    assert "from anywhere" in err


def test_a_quiet_json_run_prints_the_metrics_and_nothing_else(tiny, finished, tmp_path):
    outcome = command("--data", tiny, "--results", tmp_path / "run", "--cache", finished.parent / "cache", *TINY_FLAGS,
                      "--quiet", "--json", "--data-note", "noisy discs", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    assert json.loads(outcome.stdout) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "noisy discs" in Page((tmp_path / "run" / "report.html").read_text()).text


def test_a_run_says_its_stages_and_where_to_look(finished):
    said = (finished.parent / "stdout.txt").read_text()
    for stage in ("data", "training", "maps", "evaluation", "figures"):
        assert re.search(rf"^{stage} .*\(.* (s|min)\)$", said, re.M), stage
    for name in ("report.html", "figures", "metrics.json", "uncertainty_maps"):
        assert str(finished / name) in said
    assert (finished / "report.html").is_file()
    assert (finished / "report.md").is_file()
