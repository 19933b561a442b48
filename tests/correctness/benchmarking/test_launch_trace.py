"""Tables and the picture of a launch, from marks that are made up."""

import io

import numpy as np
import pandas as pd
import pytest

from pagedattn.benchmarking.launch_trace import (
    MOMENTS,
    PHASES,
    LaunchTrace,
    clock_step_ns,
    moment_table,
    phase_table,
    to_frame,
    typical,
)
from pagedattn.benchmarking.trace_plot import draw_trace
from pagedattn.report.style import plain_style

from .made_up_marks import MERGES, NAMES, START, marks_of, trace_of

SUBTITLE = (
    "NVIDIA H100 80GB HBM3: the median of 9 launches, 16.9 µs from first start to last end; "
    "33.55 MB of K and V at 2,790 GB/s from first asked to last there."
)


def drawn(trace):
    """The axes, and a function that tells the phases that are drawn for a program at a time."""
    with plain_style():
        figure = draw_trace(trace, "decode-B1-8k", "a launch")
        figure.canvas.draw()
    (axes,) = figure.axes

    def phases_at(place, time):
        shapes = zip(PHASES, axes.collections, strict=True)
        return [
            name for name, shape in shapes if shape.get_paths()[0].contains_point((time, place))
        ]

    return axes, phases_at


def test_phases_of_a_program_add_up_to_its_span():
    trace = trace_of()
    widths = np.diff(trace.boundaries())
    assert widths.shape == (12, len(PHASES))
    assert (widths > 0).all()
    spans = trace.of("ended") - trace.of("started")
    assert sorted(widths.sum(axis=1)) == pytest.approx(sorted(spans))


def test_each_phase_lies_between_its_moments():
    marks = np.zeros((1, 1, len(NAMES)), dtype=np.int64)
    marks[0, 0] = START + 1000 * np.array([0, 2, 3, 5, 14, 15, 16, 18, 19, 20, 23])
    widths = np.diff(LaunchTrace.of_marks(marks).boundaries()[0])
    expected = {
        "waiting for lengths": 2,
        "waiting for the first tile": 3,
        "reading": 9,
        "adding up": 4,
        "merging": 5,
    }
    assert dict(zip(PHASES, widths.tolist(), strict=True)) == pytest.approx(expected)


def test_times_are_microseconds_from_the_first_program_s_start():
    marks = marks_of()
    trace = LaunchTrace.of_marks(marks)
    zero = marks[:, :5, 0].min()
    assert trace.of("started").min() == 0
    assert trace.of("lengths_known") == pytest.approx(
        (marks[:, :5, 1].min(axis=1) - zero) * 1e-3, abs=1e-9
    )
    assert trace.of("ended") == pytest.approx(
        (marks[:, :5, 10].max(axis=1) - zero) * 1e-3, abs=1e-9
    )
    assert trace.span_us == trace.of("ended").max()


def test_a_program_without_work_is_left_out_and_not_drawn():
    trace = trace_of(idle=(3, 7))
    assert np.isnan(trace.of("first_there")[[3, 7]]).all()
    assert not np.isnan(trace.of("ended")).any()
    assert len(trace.boundaries()) == 10
    axes, phases_at = drawn(trace)
    assert sorted(axes.get_ylim()) == [-0.5, 9.5]
    assert all(phases_at(place, trace.span_us / 2) for place in range(10))


def test_a_moment_that_no_program_came_to_is_left_out_of_the_table():
    marks = marks_of()
    marks[:, :, MERGES] = -1
    table = moment_table([LaunchTrace.of_marks(marks)], "a row")
    words = [line[0] for line in table.lines]
    assert words == [word for name, word in MOMENTS.items() if NAMES.index(name) not in MERGES]


def test_the_table_counts_programs_and_tells_least_median_and_most():
    trace = trace_of(idle=(1,))
    lines = {line[0]: line[1:] for line in moment_table([trace], "a row").lines}
    assert lines["program ended"][0] == "12"
    assert lines["lengths known"][0] == "11"
    assert lines["parts merged"][0] == "7"
    times = trace.of("written")
    times = times[~np.isnan(times)]
    found = [float(cell) for cell in lines["result or part written"][1:]]
    assert found == pytest.approx([times.min(), np.median(times), times.max()], abs=5e-3)


def test_of_several_launches_the_table_has_the_median_of_each_number():
    traces = [trace_of(seed=seed) for seed in range(5)]
    lines = {line[0]: line[1:] for line in moment_table(traces, "a row").lines}
    most = np.median([trace.span_us for trace in traces])
    assert float(lines["program ended"][-1]) == pytest.approx(most, abs=5e-3)
    assert typical(traces).span_us == most


def test_phases_share_all_of_the_programs_time():
    lines = phase_table([trace_of(seed=seed, idle=(2,)) for seed in range(3)], "a row").lines
    assert [line[0] for line in lines] == list(PHASES)
    assert sum(int(line[2].removesuffix(" %")) for line in lines) == pytest.approx(100, abs=2)


def test_bars_lie_end_to_end_from_the_top_in_the_order_in_which_programs_end():
    trace = trace_of()
    axes, phases_at = drawn(trace)
    boundaries = trace.boundaries()
    assert len(boundaries) == 12
    assert boundaries[:, -1].tolist() == sorted(trace.of("ended"))
    for place, times in enumerate(boundaries):
        for near in (-0.49, 0.0, 0.49):  # the whole height of a bar
            middles = (times[1:] + times[:-1]) / 2
            found = [phases_at(place + near, time) for time in middles]
            assert found == [[name] for name in PHASES]
            assert phases_at(place + near, times[0] - 1e-3) == []
            assert phases_at(place + near, times[-1] + 1e-3) == []
    low, high = axes.get_ylim()
    assert low > high  # the first one is at the top
    assert axes.get_xlim() == pytest.approx((0, trace.span_us))


@pytest.mark.parametrize("num_programs", [1, 132, 264])
def test_phases_and_texts_stay_in_the_picture(num_programs):
    with plain_style():
        figure = draw_trace(trace_of(num_programs=num_programs), "decode-B1-8k", SUBTITLE)
        figure.canvas.draw()
        (legend,) = figure.legends
        shown = [text.get_text() for text in legend.get_texts()]
        boxes = [text.get_window_extent() for text in (*figure.texts, *legend.get_texts())]
        boxes += [axes.get_tightbbox() for axes in figure.axes]
    assert shown == list(PHASES)
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_the_csv_gives_the_same_times_back():
    traces = [trace_of(seed=seed, idle=(4,)) for seed in range(2)]
    text = to_frame(traces).to_csv(index=False, float_format="%.3f")
    frame = pd.read_csv(io.StringIO(text))
    assert list(frame) == ["launch", "program", *(f"{name}_us" for name in MOMENTS)]
    assert list(frame["program"]) == [*range(12)] * 2
    for launch, trace in enumerate(traces):
        times = frame[frame["launch"] == launch].drop(columns=["launch", "program"]).to_numpy()
        np.testing.assert_allclose(times, trace.at_us, atol=5e-4)


def test_the_clock_s_steps_and_the_rate_of_reading_are_told():
    trace = trace_of()
    assert clock_step_ns([trace]) == 32
    us = trace.of("last_there").max() - trace.of("first_asked").min()
    assert trace.read_gb_per_s(10**6) == pytest.approx(1e3 / us)


def test_marks_of_no_launch_are_refused():
    with pytest.raises(ValueError, match="nothing was launched"):
        LaunchTrace.of_marks(np.zeros((12, 16, 16), dtype=np.int64))
