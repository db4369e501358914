"""Pictures show the images they are given, plots every history, tables every value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import places
import pytest

from diffusion_distill.report import (
    Line,
    Panel,
    format_table,
    heat_maps,
    image_grid,
    line_plot,
    loss_plot,
    to_uint8,
)
from diffusion_distill.report.curves import moving_mean
from diffusion_distill.report.lines import fitting_scale

GOLDEN = places.GOLDEN / "eval" / "quantise.npz"


def read(path: Path) -> np.ndarray:
    """The pixels of a picture, [height, width, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def find(picture: np.ndarray, patch: np.ndarray) -> list[tuple[int, int]]:
    """Upper left corners at which the patch stands in the picture, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, patch.shape)
    return [(int(y), int(x)) for y, x, _ in np.argwhere((windows == patch).all(axis=(3, 4, 5)))]


def grey(seed: int, count: int = 4, size: int = 5, channels: int = 1) -> np.ndarray:
    """Random images [count, size, size, channels] uint8, none of them white."""
    return np.random.default_rng(seed).integers(0, 200, (count, size, size, channels)).astype(np.uint8)


# Quantisation


def test_every_grey_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / np.float32(127.5) - 1), levels)
    np.testing.assert_array_equal(to_uint8(levels), levels)


def test_quantisation_rounds_and_clips() -> None:
    x = np.array([-7, -1, -1 + 0.6 / 127.5, 0.999, 1, 3], np.float32)
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 1, 255, 255, 255])


def test_recorded_quantisation() -> None:
    if not GOLDEN.is_file():
        pytest.skip("needs quantise.npz in the optional sibling folder ../shared/golden/eval")
    with np.load(GOLDEN) as recorded:
        np.testing.assert_array_equal(to_uint8(recorded["x"]), recorded["round_127p5_x_plus_1"])


# Pictures


def test_images_stand_in_labelled_rows_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    rows = {"teacher, 64 steps": grey(0), "TRACT 1024→32→1": grey(1), "two\nlines": grey(2, count=2)}
    picture = read(image_grid(rows, tmp_path / "grid.png", columns=3, scale=4, title="Digits"))
    corners = [
        [find(picture, np.broadcast_to(image, (5, 5, 3)).repeat(4, 0).repeat(4, 1)) for image in images]
        for images in rows.values()
    ]
    assert [[len(found) for found in row] for row in corners] == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1]]
    places = np.array([[found[0] for found in row[:2]] for row in corners])
    assert (places[:, 0, 0] == places[:, 1, 0]).all()  # one height within a row
    assert (np.diff(places[:, 0, 0]) > 20).all()  # rows do not overlap
    assert len({*places[:, 0, 1]}) == 1 and (places[:, 1, 1] - places[:, 0, 1] > 20).all()  # aligned columns
    left = int(places[0, 0, 1])
    for y in places[:, 0, 0]:
        assert (picture[y : y + 20, :left] < 128).any()  # a label stands beside the row
    assert (picture[:, left - 8 : left] == 255).all()  # and ends before the images begin


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (14, 5)])
def test_small_images_are_enlarged_smoothly(size: int, factor: int, tmp_path: Path) -> None:
    """A ramp stays a ramp: of 10 grey levels a pixel before, 10 / factor after, to within rounding; rows stay alike."""
    ramp = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None] * 10, (1, size, size, 1))
    picture = read(image_grid({"": ramp}, tmp_path / "ramp.png")).astype(int)
    assert picture.shape[0] == size * factor + 32 and size * factor >= 64  # margins of 16
    inside = picture[16 + 2 * factor : -16 - 2 * factor, 16:-16]
    np.testing.assert_array_equal(inside, inside[:, :1, :1].repeat(inside.shape[1], 1).repeat(3, 2))
    wanted = (np.arange(2 * factor, (size - 2) * factor) + 0.5) / factor * 10 - 5  # by the centres of pixels
    np.testing.assert_allclose(inside[:, 0, 0], wanted, atol=1)


def test_the_arrow_has_a_glyph_of_its_own(tmp_path: Path) -> None:
    # A font without it would draw the same box for both.
    arrow, missing = (read(image_grid({c: grey(0)}, tmp_path / "c.png")) for c in ("→", "\U0010fffd"))
    assert arrow.shape != missing.shape or (arrow != missing).any()


def test_colour_floats_and_rows_without_a_label(tmp_path: Path) -> None:
    image = grey(3, count=1, size=64, channels=3)
    picture = read(image_grid({"": image / np.float32(127.5) - 1}, tmp_path / "colour.png"))
    [(y, x)] = find(picture, image[0])
    assert picture.shape == (64 + 2 * y, 64 + 2 * x, 3)  # large images as they are, margins only


def test_a_long_title_is_not_cut(tmp_path: Path) -> None:
    picture = read(image_grid({"": grey(0, count=1)}, tmp_path / "title.png", title="a title wider than its picture"))
    assert (picture < 128).any() and (picture[:, -8:] == 255).all()


BAD_ROWS: dict[str, tuple[dict, dict, type[Exception], str]] = {
    "no rows": ({}, {}, ValueError, "no rows"),
    "empty row": ({"a": grey(0, count=0)}, {}, ValueError, r"Row 'a' has shape \(0, 5, 5, 1\)"),
    "two channels": ({"a": grey(0, channels=2)}, {}, ValueError, "1 or 3"),
    "no channels": ({"a": grey(0)[..., 0]}, {}, ValueError, r"\(4, 5, 5\)"),
    "sizes": ({"a": grey(0), "b": grey(0, size=6)}, {}, ValueError, r"'a': \(5, 5\), 'b': \(6, 6\)"),
    "NaN": ({"a": np.full((1, 2, 2, 1), np.nan)}, {}, ValueError, "NaN"),
    "integers": ({"a": np.zeros((1, 2, 2, 1), int)}, {}, TypeError, "int64"),
    "scale": ({"a": grey(0)}, {"scale": 0}, ValueError, "at least 1"),
    "columns": ({"a": grey(0)}, {"columns": 0}, ValueError, "at least 1"),
}


@pytest.mark.parametrize(("rows", "options", "error", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_drawn_are_refused(
    tmp_path: Path, rows: dict, options: dict, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        image_grid(rows, tmp_path / "grid.png", **options)
    assert not list(tmp_path.iterdir())


# Curves


def test_moving_mean_is_numpys_inside_and_of_fewer_values_at_the_ends() -> None:
    values = np.random.default_rng(0).uniform(size=20)
    found = moving_mean(values, 5)
    np.testing.assert_allclose(found[2:-2], np.convolve(values, np.ones(5) / 5, "valid"), rtol=1e-12)
    np.testing.assert_allclose(found[[0, -1]], [values[:3].mean(), values[-3:].mean()], rtol=1e-12)
    np.testing.assert_allclose(moving_mean(values, 1), values, rtol=1e-12)
    np.testing.assert_allclose(moving_mean(np.ones(7), 4), np.ones(7), rtol=1e-12)


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable, *args: object, **options: object):
    """The figure that a function saves."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
        draw(*args, **options)
    [figure] = figures
    return figure


def plotted(monkeypatch: pytest.MonkeyPatch, *args: object, **options: object):
    """The axes and the legend texts of a loss plot."""
    figure = drawn(monkeypatch, loss_plot, *args, **options)
    return figure.axes[0], [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_plot_shows_every_history_raw_and_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(200)
    jump = np.where(x < 100, 1.0, 0.01)
    histories = {
        "jump": list(zip(x, jump, strict=True)),
        "broken": [(0, 0.5), (1, np.nan), (2, 0.0), (3, 0.4)],
    }
    path = tmp_path / "loss.png"
    axes, legend = plotted(monkeypatch, histories, path, "steps", phases={"8→4": 0, "4→2": 100}, title="Losses")
    assert read(path).shape[:2] == (600, 1080)
    assert (axes.get_yscale(), axes.get_xlabel(), axes.get_title()) == ("log", "steps", "Losses")
    assert legend == ["jump", "broken (2 left out)"]
    raw, smooth = (line.get_ydata() for line in axes.lines[:2])
    np.testing.assert_array_equal(raw, jump)
    np.testing.assert_allclose(smooth, jump, rtol=1e-12)  # no mean reaches across the start of a phase
    np.testing.assert_array_equal(axes.lines[2].get_xdata(), [0, 3])
    assert [text.get_text() for text in axes.texts] == ["8→4", "4→2"]


BAD_HISTORIES = {
    "none": ({}, "no histories"),
    "empty": ({"a": []}, "History 'a'"),
    "no pairs": ({"a": [1.0, 2.0]}, "pairs"),
    "back": ({"a": [(2, 1.0), (1, 1.0)]}, "go back"),
    "nothing finite": ({"a": [(0, np.nan), (1, np.inf)]}, "no finite loss"),
}


@pytest.mark.parametrize(("histories", "said"), BAD_HISTORIES.values(), ids=BAD_HISTORIES)
def test_histories_that_cannot_be_plotted_are_refused(tmp_path: Path, histories: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loss_plot(histories, tmp_path / "loss.png")


# Lines


def test_lines_stand_in_panels_with_one_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.array([2.0, 5.0, 10.0, 25.0])
    base, fitted = Line(x, 10 / x, marker="o"), Line(x, 5 / x, "--", like="DDIM")
    rows = [
        {"NFE": Panel({"DDIM": base, "D-DDIM": fitted}, "calls", "distance", "log", "log", marks={"here": 7.0})},
        {"left": Panel({"iPNDM": Line(x, [1, np.nan, np.inf, 2])}), "right": Panel({"DDIM": base}, yscale="auto")},
    ]
    path = tmp_path / "lines.png"
    figure = drawn(monkeypatch, line_plot, rows, path, title="Digits")
    axes = figure.axes
    assert read(path).shape[1] == 1080 and figure.get_suptitle() == "Digits"
    assert [a.get_title(loc="left") for a in axes] == ["NFE", "left", "right"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DDIM", "D-DDIM", "iPNDM"]
    assert (axes[0].get_xscale(), axes[0].get_xlabel(), axes[0].get_ylabel()) == ("log", "calls", "distance")
    np.testing.assert_array_equal(axes[0].lines[1].get_xydata(), np.stack([x, 5 / x], axis=1))
    np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), [1, np.nan, np.nan, 2])  # a gap
    colours = [line.get_color() for a in axes for line in a.lines[: len(a.lines) - (a is axes[0])]]
    assert colours[0] == colours[1] == colours[3] != colours[2]
    assert [line.get_linestyle() for line in axes[0].lines[:2]] == ["-", "--"]
    assert axes[0].texts[0].get_text() == "here" and set(axes[0].lines[2].get_xdata()) == {7.0}
    boxes = [a.get_position() for a in axes]
    assert boxes[0].width > 1.5 * boxes[1].width and boxes[0].y0 > boxes[1].y1 and boxes[1].x1 < boxes[2].x0


def test_many_lines_have_colours_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = Panel({str(k): Line([0, 1], [0, k]) for k in range(13)})
    figure = drawn(monkeypatch, line_plot, [{"": panel}], tmp_path / "lines.png")
    assert len({line.get_color() for line in figure.axes[0].lines}) == 13


SCALES = {
    "of one size": ([1, 2, 9], "linear"),
    "of many sizes": ([1, 2, 1e3], "log"),
    "of both signs": ([-1, 0, 1, 2], "linear"),
    "of both signs and many sizes": ([-1, 0, 1, 1e3], "asinh"),
    "nothing but zeros": ([0, 0, np.nan], "linear"),
}


@pytest.mark.parametrize(("values", "scale"), SCALES.values(), ids=SCALES)
def test_scales_fit_the_values(values: list[float], scale: str, tmp_path: Path, monkeypatch) -> None:
    assert fitting_scale(values) == scale
    panel = Panel({"a": Line(np.arange(len(values)), values)}, yscale="auto")
    axes = drawn(monkeypatch, line_plot, [{"": panel}], tmp_path / "lines.png").axes[0]
    assert axes.get_yscale() == scale
    if scale != "linear":
        ticks = [float(tick) for tick in axes.get_yticks()]
        low, high = axes.get_ylim()
        assert 3 <= len(ticks) <= 9 and all(low <= tick <= high for tick in ticks)
        assert all(f"{abs(tick):.6e}"[:8] in {f"{digit}.000000" for digit in (0, 1, 2, 3, 5)} for tick in ticks)
        assert (0 in ticks) == (scale == "asinh")


BAD_PANELS: dict[str, tuple[list, str]] = {
    "no rows": ([], "no panels"),
    "empty row": ([{}, {"a": Panel({"b": Line([1], [1])})}], "no panels"),
    "no lines": ([{"a": Panel({})}], "Panel 'a' has no lines"),
    "lengths": ([{"a": Panel({"b": Line([1, 2], [1])})}], r"Line 'b' of panel 'a' has x \(2,\) and y \(1,\)"),
    "nothing finite": ([{"a": Panel({"b": Line([1, 2], [np.nan, np.inf])})}], "nothing to show in 2 points"),
    "nothing above 0": ([{"a": Panel({"b": Line([1, 2], [0, -1])}, yscale="log")}], "nothing to show"),
    "scale": ([{"a": Panel({"b": Line([1], [1])}, xscale="lin")}], "Unknown scale 'lin'. Did you mean 'linear'"),
}


@pytest.mark.parametrize(("rows", "said"), BAD_PANELS.values(), ids=BAD_PANELS)
def test_panels_that_cannot_be_drawn_are_refused(tmp_path: Path, rows: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        line_plot(rows, tmp_path / "lines.png")
    assert not list(tmp_path.iterdir())


# Heat maps


def test_heat_maps_share_their_colours_and_begin_at_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {f"map {k}": np.random.default_rng(k).uniform(0.2, 0.8, (k + 2, k + 2)) for k in range(5)}
    maps["map 1"][0, 2], maps["map 3"][4, 0] = 1.0, 0.0
    path = tmp_path / "maps.png"
    figure = drawn(monkeypatch, heat_maps, maps, path, title="alike", axis="row", quantity="cosine")
    *axes, bar = figure.axes
    assert [a.get_title() for a in axes] == list(maps) and bar.get_ylabel() == "cosine"
    for place, matrix in zip(axes, maps.values(), strict=True):
        np.testing.assert_array_equal(place.images[0].get_array(), matrix)
        assert place.images[0].get_clim() == (0.0, 1.0)
    assert axes[2].get_position().y0 > axes[3].get_position().y1  # five in two rows
    assert [(a.get_xlabel(), a.get_ylabel()) for a in axes] == [
        ("", "row"),
        ("", ""),
        ("row", ""),
        ("row", "row"),
        ("row", ""),
    ]
    # The greatest entry is in the upper right corner of its map: the colours' end stands there in the picture.
    picture, box = read(path), axes[1].get_position()
    height, width = picture.shape[:2]
    yellow = (picture == (253, 231, 36)).all(axis=2) | (picture == (253, 231, 37)).all(axis=2)
    y, x = np.argwhere(yellow[:, : int(width * axes[2].get_position().x1)]).mean(axis=0)
    np.testing.assert_allclose(x / width, box.x0 + box.width * 5 / 6, atol=0.005)
    np.testing.assert_allclose(1 - y / height, box.y0 + box.height * 5 / 6, atol=0.005)


def test_limits_of_colours_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, heat_maps, {"a": np.eye(2)}, tmp_path / "maps.png", limits=(-1.0, 2.0))
    assert figure.axes[0].images[0].get_clim() == (-1.0, 2.0)


BAD_MAPS: dict[str, tuple[dict, dict, str]] = {
    "none": ({}, {}, "no maps"),
    "no matrix": ({"a": np.ones(3)}, {}, r"Map 'a' has shape \(3,\)"),
    "empty": ({"a": np.ones((0, 3))}, {}, r"\(0, 3\)"),
    "not finite": ({"a": np.full((2, 2), np.nan)}, {}, "Map 'a' has values that are not finite"),
    "limits": ({"a": np.eye(2)}, {"limits": (1.0, 1.0)}, "must increase"),
}


@pytest.mark.parametrize(("maps", "options", "said"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_maps_that_cannot_be_drawn_are_refused(tmp_path: Path, maps: dict, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        heat_maps(maps, tmp_path / "maps.png", **options)
    assert not list(tmp_path.iterdir())


# Tables

RESULTS = [
    {"method": "TRACT", "steps": 1, "frechet": 3.14159265},
    {"method": "a|b", "steps": 1024, "frechet": np.float32(0.5), "note": True},
    {"method": "BTD", "steps": None, "frechet": float("nan")},
]


def test_plain_table() -> None:
    assert format_table(RESULTS).splitlines() == [
        "method  steps  frechet  note",
        "------  -----  -------  ----",
        "TRACT       1    3.142  -",
        "a|b      1024      0.5  True",
        "BTD         -      nan  -",
    ]


def test_tables_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown column 'stepz'\. Did you mean 'steps'"):
        format_table(RESULTS, ["stepz"])
    with pytest.raises(ValueError, match="no rows"):
        format_table([])
