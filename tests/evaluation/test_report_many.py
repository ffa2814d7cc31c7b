import base64
import io
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from PIL import Image
from test_report import log_scalars, make_run, skip_drawing, words, write_images

from evaluation.report.collect import Run
from evaluation.report.examples import ON_SHEET, Grid, Picture, example_sheet
from evaluation.report.figures import (
    budget_figure,
    curve_figures,
    has_lanes,
    histogram_figure,
    histogram_methods,
    scores_figure,
)
from evaluation.report.labels import label_points
from evaluation.report.page import write
from evaluation.report.style import (
    COLOURS,
    FONTS,
    MARKERS,
    MORE_COLOURS,
    STYLE,
    colour,
    data_uri,
    marker,
    picture,
    swatch,
)

METHODS = ("base", "best_of_2", "best_of_4", "miner", *(f"m{i}" for i in range(5)))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "tiny", methods=METHODS, seeds=(0, 1), budgets=(1, 2))


def test_methods_of_one_colour_differ_in_shape():
    arms = [*COLOURS, *(f"m{i}" for i in range(len(MORE_COLOURS) * len(MARKERS)))]
    looks = {(colour(arm, arms), marker(arm, arms)) for arm in arms if arm not in ("backbone", "reference")}
    assert len(looks) == len(arms) - 2
    assert len({swatch(arm, arms) for arm in arms}) == len(arms) - 1  # backbone and reference look alike


def test_figures_are_laid_out_alike_on_every_machine(run):
    """In a font that comes with matplotlib; the reader may have a narrower one."""
    drawn = picture(scores_figure(Run.read(run))).decode()
    assert set(re.findall(r"font-family: ([^;\"]*)", drawn)) == {f"{FONTS[1]}, sans-serif"}


def test_arms_stand_one_below_the_other(run):
    read = Run.read(run)
    assert has_lanes(read)
    shown = words(scores_figure(read))
    assert [w for w in shown if w in ("real", "base 1×", "m4 2×")] == ["real", "base 1×", "m4 2×"]
    assert {"test: DSC", "test: ASD", "shift: DSC", "shift: ASD"} <= set(shown)


def test_long_names_stand_one_below_the_other(tmp_path):
    short = make_run(tmp_path / "short", methods=("base", "miner"))
    long = make_run(tmp_path / "long", methods=("base", "a_method_with_quite_a_name"))
    assert not has_lanes(Run.read(short))
    assert has_lanes(Run.read(long))


def test_histograms_are_those_of_the_yardsticks_and_ours(run):
    read = Run.read(run)
    assert histogram_methods(read) == ["base", "best_of_2", "best_of_4", "miner"]
    assert [w for w in words(histogram_figure(read)) if w in METHODS] == histogram_methods(read)


def test_few_histograms_are_all_drawn(tmp_path):
    read = Run.read(make_run(tmp_path / "r", methods=METHODS[:6]))
    assert histogram_methods(read) == list(METHODS[:6])


def test_one_legend_names_all_methods(run):
    shown = words(budget_figure(Run.read(run)))
    assert [shown.count(m) for m in ("real", *METHODS)] == [1] * 10


def test_curves_are_those_of_the_first_seed(run):
    for seed in (0, 1):
        log_scalars(run / f"seed{seed}/m1/1x", "val/dsc")
        log_scalars(run / f"seed{seed}/m2/1x", "val/dsc")
    read = Run.read(run)
    assert [(c.arm, c.seed) for c in read.curves()] == [("m1", 0), ("m2", 0)]
    shown = words(curve_figures(read)["Segmenter, budget 1×"])
    assert shown[-2:] == ["m1", "m2"]


def test_curves_have_a_legend_of_arms_and_one_of_seeds(tmp_path):
    run = make_run(tmp_path / "r")
    for arm in ("seed0/real", "seed1/miner/1x"):
        log_scalars(run / arm, "val/dsc")
    assert words(curve_figures(Run.read(run))["Segmenter, budget 1×"])[-4:] == [
        "real",
        "miner",
        "seed 0",
        "seed 1",
    ]


@pytest.fixture
def pictured(tmp_path):
    run = make_run(tmp_path / "pair", budgets=(1, 2))
    for method in ("base", "miner"):
        write_images(run / "seed0" / method / "synthetic", method, 0)
    return run


def test_every_figure_is_also_a_file(pictured, tmp_path):
    write(Run.read(pictured), tmp_path / "figures")
    files = {path.name: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert {f"pair_{kind}.svg" for kind in ("scores", "budgets", "histogram", "examples")} <= {*files}
    page = (pictured / "report/report.html").read_text()
    for kind in ("scores", "budgets", "histogram"):
        assert data_uri(files[f"pair_{kind}.svg"].encode(), "image/svg+xml") in page


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 24), (18, 96)])
def test_sheet_shows_every_line_beside_its_differences(width, height):
    colours = iter(np.random.default_rng(0).permutation(255**2))

    def tile() -> Picture:
        value = int(next(colours))
        image = Image.new("RGB", (width, height), (value // 255, value % 255, 128))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return Picture(data_uri(buffer.getvalue(), "image/png"))

    def line() -> list[Picture]:
        return [tile() for _ in range(ON_SHEET + 2)]

    grid = Grid({"mask": line(), "base": line(), "miner": line()}, {"miner": line()}, [], 0, 1.0)
    found = re.search(r"data:image/png;base64,([^\"]+)", picture(example_sheet(grid)).decode())
    with Image.open(io.BytesIO(base64.b64decode(found.group(1)))) as image:
        sheet = np.asarray(image.convert("RGB"))
    step = len(sheet) // len(grid.lines)
    for row, (name, pictures) in enumerate(grid.lines.items()):
        shown = pictures[:ON_SHEET] + grid.gaps.get(name, [])[:ON_SHEET]
        for column, one in enumerate(shown):
            with Image.open(io.BytesIO(picture(one.uri))) as image:
                expected = np.asarray(image.convert("RGB"))
            found_tile = sheet[row * step :, column * step :][:height, :width]
            assert np.array_equal(found_tile, expected), (name, column)
    assert (sheet[:step, ON_SHEET * step :] == 255).all()  # a line without differences ends there


def test_names_of_a_sheet_are_whole():
    """With as many lines as a comparison of all methods has, and the longest name among them."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, format="PNG")
    line = [Picture(data_uri(buffer.getvalue(), "image/png"))] * ON_SHEET
    names = [*map(str, range(25)), "native_miner_learnt"]
    svg = picture(example_sheet(Grid(dict.fromkeys(names, line), {names[-1]: line}, [], 0, 1.0))).decode()
    found = re.search(rf'<text style="[^"]*text-anchor: end[^"]*" x="([\d.]+)"[^>]*>{names[-1]}<', svg)
    with matplotlib.rc_context(STYLE):
        assert TextPath((0, 0), names[-1], size=9).get_extents().width < float(found.group(1))


def test_names_keep_apart():
    figure = Figure(figsize=(6, 4))
    ax = figure.subplots()
    x, y = [0, 0.001, 0.002, 1, 1], [0, 0, 0, 1, 0.999]
    names = ["first", "second", "third", "top", "right"]
    ax.plot(x, y)
    figure.draw_without_rendering()
    label_points(ax, names, x, y)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the point
    assert [text.get_text() for text in ax.texts] == names
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_page_says_what_it_leaves_out(run, monkeypatch):
    skip_drawing(monkeypatch)
    log_scalars(run / "seed0/m1/1x", "val/dsc")
    page = write(Run.read(run)).read_text(encoding="utf-8")
    for said in (
        "the dashed line is the mean of real",
        "Of 9 methods only base, best_of_2, best_of_4, miner are drawn.",
        "Mean over seeds; the dashed line is the segmenter",
        "a colour per arm, seed 0 alone",
        "<summary>Segmenter, budget 1×</summary>",
        '<body class="many">',
    ):
        assert said in page, said


def test_page_of_few_methods_is_in_full(tmp_path, monkeypatch):
    skip_drawing(monkeypatch)
    run = make_run(tmp_path / "few", seeds=(0,), budgets=(1, 2))
    log_scalars(run / "seed0/miner/1x", "val/dsc")
    page = write(Run.read(run)).read_text(encoding="utf-8")
    for said in (
        "grey lines join the arms",
        "Mean ± standard deviation over seeds; the dashed",
        "a line style per",
    ):
        assert said in page, said
    for said in ("are drawn", "<details>", 'class="many"'):
        assert said not in page, said
