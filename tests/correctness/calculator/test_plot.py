"""``benchmark_results``: four plots, nothing that overlaps, the same bytes each time."""

import dataclasses
from itertools import combinations
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from pagedattn.calculator import Calculation
from pagedattn.calculator.plot import draw, write_plot
from pagedattn.config import ModelConfig
from pagedattn.hardware import GIB, GPU
from pagedattn.report.style import plain_style


@pytest.fixture(scope="module")
def unknown(settings):
    """A calculation of a GPU without known bandwidth, names that are long, and many GPUs."""
    plain = ModelConfig.preset("llama-3-8b")
    model = dataclasses.replace(plain, name="a model with a rather long name " * 3)
    gpu = GPU("a GPU with a rather long name " * 3, 2 * GIB)
    memory = {"tensor_parallel_size": 8, "dtype": "float8_e4m3", "scales": "per-token-head"}
    made = settings(model=model, gpu=gpu, memory=memory, num_users=1000)
    return Calculation.of(made, lambda _: None)


def drawn_texts(figure):
    """The words on the page and their boxes in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            hidden |= {label for at, label in labels if not (low <= at <= high and axes.axison)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            yield text.get_text(), text.get_window_extent(renderer)


@pytest.mark.parametrize("name", ["small", "windowed", "unknown"])
def test_no_words_overlap_or_leave_the_page(name, request):
    with plain_style():
        figure = draw(request.getfixturevalue(name))
        texts = list(drawn_texts(figure))
    page = figure.bbox
    for text, box in texts:
        assert box.x0 >= page.x0, text
        assert box.x1 <= page.x1, text
        assert box.y0 >= page.y0, text
        assert box.y1 <= page.y1, text
    for (one, a), (other, b) in combinations(texts, 2):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 1 or height <= 3, f"{one!r} lies over {other!r}"


def test_there_are_four_panels_and_all_systems_in_them(small):
    with plain_style():
        figure = draw(small)
    assert len(figure.axes) == 4
    waste, users, throughput, sharing = figure.axes
    systems = [row.system for row in small.waste.systems]
    for axes in (waste, users):
        assert [label.get_text() for label in axes.get_yticklabels()] == systems
    named = [text.get_text() for text in throughput.get_legend().get_texts()]
    assert set(named) == {*systems, "bound of a full batch"} - {"flexgen"}
    separate, shared = (line.get_ydata() for line in sharing.get_lines())
    unit = small.sharing.bytes_per_block / GIB
    assert separate[-1] == pytest.approx(40 * unit)
    assert shared[-1] == pytest.approx(13 * unit)


def test_bars_are_as_long_as_shares(small):
    with plain_style():
        waste = draw(small).axes[0]
    widths = [patch.get_width() for patch in waste.patches]
    expected = [
        100 * row.shares[cause]
        for row in small.waste.systems
        for cause in ("token_states", "reservation", "internal", "external")
    ]
    assert widths == pytest.approx(expected)
    starts = [patch.get_x() for patch in waste.patches]
    ends = [patch.get_x() + patch.get_width() for patch in waste.patches]
    assert starts[::4] == [0] * len(small.waste.systems)
    assert starts[1::4] == pytest.approx(ends[::4])
    assert ends[3::4] == pytest.approx([100] * len(small.waste.systems))


def test_where_nothing_was_run_the_panel_says_why(unknown):
    with plain_style():
        throughput = draw(unknown).axes[2]
    (text,) = [text.get_text() for text in throughput.texts if "Not" in text.get_text()]
    assert " ".join(text.split()).startswith("Not calculated: the bandwidth of a GPU with")


def test_the_files_are_the_same_each_time_and_have_no_date(small, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = write_plot(small, tmp_path / "a", ("png", "svg"))
    assert names == ["benchmark_results.png", "benchmark_results.svg"]
    assert write_plot(small, tmp_path / "b", ("png", "svg")) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / names[0]).read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a" / names[1]).read_text(encoding="utf-8")
    assert "dc:date" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")
