"""What all pictures share: the stamp, the strip it stands in, and how pictures are saved."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from PIL import Image
from saved_runs import axes, texts

from reporting.formats import SYNTHETIC_NOTE
from reporting.style import save_figure, stamp, stamped
from runtime.errors import UserError


def test_a_saved_picture_has_160_dots_per_inch_and_text_stays_text(tmp_path):
    figure, ax = axes()
    ax.set_title("lesion 0.1235")
    assert Image.open(save_figure(figure, tmp_path / "a.png")).info["dpi"] == pytest.approx((160, 160), abs=0.1)
    assert "lesion 0.1235" in save_figure(figure, tmp_path / "a.svg").read_text()
    pdf = save_figure(figure, tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # a TrueType font, not outlines
    for name in ("a.svg", "a.pdf"):
        save_figure(figure, tmp_path / f"again.{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again.{name}").read_bytes()


def test_the_suffix_decides_the_format(tmp_path):
    figure, _ = axes()
    for name, kind in (("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("bare", "PNG")):
        assert Image.open(save_figure(figure, tmp_path / name)).format == kind
    with pytest.raises(UserError, match="type .bmp; use .png"):
        save_figure(figure, tmp_path / "a.bmp")
    assert not (tmp_path / "a.bmp").exists()


@pytest.mark.parametrize(
    ("synthetic", "data_note", "expected"),
    [(False, None, []), (False, "cropped", ["cropped"]), (True, None, [SYNTHETIC_NOTE]),
     (True, "cropped", [f"{SYNTHETIC_NOTE}; cropped"])],
)
def test_the_stamp_says_what_the_images_are(synthetic, data_note, expected):
    figure = Figure()
    stamp(figure, synthetic, data_note)
    assert [text.get_text() for text in figure.texts] == expected
    stamp(figure, synthetic, data_note, note="seed $7$")
    assert figure.texts[-1].get_text() == "seed $7$"
    assert not figure.texts[-1].get_parse_math()  # dollar signs are text


def test_a_chart_keeps_a_strip_free_for_its_stamp():
    for metrics, strip in (({}, 0.0), ({"data_note": "cropped"}, 0.3 / 4), ({"synthetic": True}, 0.3 / 4)):
        figure = stamped(Figure(figsize=(5, 4), layout="constrained"), metrics)
        assert figure.get_layout_engine().get()["rect"] == pytest.approx((0, strip, 1, 1 - strip))
        assert bool(texts(figure)) is bool(metrics)
