"""Bookkeeping beside a peer's: ratios, hit rates and their plots, worked out by hand."""

import re
from pathlib import Path

import pytest

from pagedattn.report import cli, load
from pagedattn.report.bars import draw_bookkeeping
from pagedattn.report.comparison import comparison_tables, hit_rate_tables, hit_rates
from pagedattn.report.hit_rate import draw_hit_rate
from pagedattn.report.results import load_run
from pagedattn.report.style import looks_of, plain_style
from pagedattn.report.summary import summarise
from pagedattn.report.tables import bookkeeping_tables


@pytest.fixture
def summary(made, tmp_path):
    return summarise(load_run([made.write(tmp_path / "run.json", made.peers())]).rows)


def texts(figure):
    """All texts of a figure, by what they say, in pixels."""
    with plain_style():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        drawn = [*figure.texts]
        for axes in figure.axes:
            drawn += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
            drawn += [axes._left_title, axes.xaxis.label]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]


def test_each_call_has_a_line_with_medians_and_how_many_times_faster_it_is(summary):
    (table,) = comparison_tables(summary)
    assert table.title == "block manager on cpu, beside vllm"
    assert table.header == [
        "operation",
        "workload",
        "sequences",
        "from_lists",
        "pagedattn",
        "vllm",
        "vllm, hashing of it",
        "from_lists over vllm",
        "pagedattn over vllm",
    ]
    assert table.lines == [
        ["admit", "caching", "256", "800 µs", "500 µs", "2 ms", "1.5 ms", "2.50x", "4.00x"],
        ["free", "caching", "256", "-", "300 µs", "200 µs", "-", "-", "0.67x"],
        ["replay", "trace, 900 blocks", "-", "-", "7 s", "14 s", "-", "-", "2.00x"],
        ["replay", "trace, 5000 blocks", "-", "-", "7 s", "14 s", "-", "-", "2.00x"],
    ]


def test_calls_without_the_peer_stay_in_the_table_of_bookkeeping(summary):
    (table,) = bookkeeping_tables(summary)
    assert table.lines == [["fork", "caching", "pagedattn", "40 µs"]]


def test_without_a_peer_nothing_is_compared(made, tmp_path):
    content = made.peers()
    content["benchmarks"] = [
        row for row in content["benchmarks"] if row["extra_info"]["implementation"] != "vllm"
    ]
    summary = summarise(load_run([made.write(tmp_path / "run.json", content)]).rows)
    assert comparison_tables(summary) == []
    (table,) = bookkeeping_tables(summary)
    assert {line[0] for line in table.lines} == {"admit", "fork", "free", "replay"}


def test_hit_rates_are_shares_of_the_blocks_looked_up(summary):
    (table,) = hit_rate_tables(summary)
    assert table.title == "prefix cache hit rates, 1,234 requests, 200 blocks of 512 tokens"
    assert table.header == [
        "pool blocks",
        "pagedattn",
        "vllm",
        "ideal",
        "pagedattn evicted",
        "vllm evicted",
    ]
    # of 200 blocks 45, 30 and 60
    assert table.lines == [
        ["900", "22.5 %", "15.0 %", "30.0 %", "150", "150"],
        ["5,000", "30.0 %", "30.0 %", "30.0 %", "20", "20"],
    ]


def test_a_pool_that_one_of_them_lacks_has_a_dash(made, tmp_path):
    content = made.peers()
    del content["benchmarks"][-1]
    summary = summarise(load_run([made.write(tmp_path / "run.json", content)]).rows)
    (table,) = hit_rate_tables(summary)
    assert table.lines[1] == ["5,000", "30.0 %", "-", "30.0 %", "20", "-"]


def test_caches_that_were_asked_for_other_blocks_are_apart(made, tmp_path):
    content = made.peers()
    content["benchmarks"][-1]["extra_info"]["num_lookup_blocks"] = 400
    summary = summarise(load_run([made.write(tmp_path / "run.json", content)]).rows)
    first, second = hit_rates(summary)
    assert (first.pools, second.pools) == ([900, 5000], [5000])
    assert (first.ideal, second.ideal) == (0.3, 0.15)


def test_the_columns_of_prefix_caches_are_in_the_table_of_rows(made, tmp_path):
    table = load(made.write(tmp_path / "run.json", made.peers()))
    replays = table[table.operation == "replay"]
    assert replays.pool_blocks.tolist() == [900, 900, 5000, 5000]
    assert replays.num_hit_blocks.tolist() == [45, 30, 60, 60]
    assert table[table.hashing_us.notna()].hashing_us.tolist() == [1500]
    assert table[table.operation == "free"].pool_blocks.isna().all()


def test_the_bookkeeping_plot_says_ratios_and_no_text_lies_on_another(summary):
    with plain_style():
        figure = draw_bookkeeping(summary, looks_of(summary.implementations))
    assert len(figure.axes) == 2  # the replays take seconds, and have a panel of their own
    boxes = [(text, box) for text, box in texts(figure) if text]
    said = [text for text, _ in boxes]
    assert {"2.50x", "4.00x", "0.67x", "2.00x", "500 µs", "40 µs", "14 s"} <= set(said)
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[:i]:
            assert text == other or not box.overlaps(other_box), f"{text!r} lies on {other!r}"


def test_a_ratio_stands_beyond_the_peers_time_and_a_median_on_the_other_side(summary):
    with plain_style():
        figure = draw_bookkeeping(summary, looks_of(summary.implementations))
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}

    def pixel(microseconds):
        return figure.axes[0].transData.transform((microseconds, 0))[0]

    assert boxes["500 µs"].x1 < pixel(500) < pixel(2000) < boxes["4.00x"].x0
    assert boxes["0.67x"].x1 < pixel(200) < pixel(300) < boxes["300 µs"].x0


def test_the_hit_rate_plot_has_a_line_for_each_and_one_for_the_ideal(summary):
    with plain_style():
        (axes,) = draw_hit_rate(summary, looks_of(summary.implementations)).axes
    ours, theirs, ideal = axes.lines
    assert list(ours.get_xdata()) == list(theirs.get_xdata()) == [900, 5000]
    assert list(ours.get_ydata()) == [22.5, 30.0]
    assert list(theirs.get_ydata()) == [15.0, 30.0]
    assert list(ideal.get_ydata()) == [30.0, 30.0]
    # where both are equal, the one behind is seen on both sides of the one in front
    assert ours.get_linewidth() > 2 * theirs.get_linewidth()
    assert ours.get_zorder() < theirs.get_zorder()
    assert ours.get_color() != theirs.get_color()


def test_without_prefix_caches_the_plot_is_left_out_with_the_reason(made, tmp_path):
    summary = summarise(load_run([made.write(tmp_path / "run.json", made.cpu())]).rows)
    assert draw_hit_rate(summary, {}) == "no row is of a prefix cache's hits"
    assert hit_rate_tables(summary) == []


def test_the_report_and_the_terminal_show_the_comparison(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.write(tmp_path / "run.json", made.peers())
    assert cli.main(["run.json", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "block manager on cpu, beside vllm\n" in printed
    assert "prefix cache hit rates, 1,234 requests, 200 blocks of 512 tokens\n" in printed
    assert "| admit | caching | 256 | 800 µs | 500 µs | 2 ms | 1.5 ms | 2.50x | 4.00x |" in report
    assert "| 900 | 22.5 % | 15.0 % | 30.0 % | 150 | 150 |" in report
    assert re.search(r"### Hit rate\n\n!\[Hit rate of prefix caches against 2 sizes", report)
    for name in ("bookkeeping", "hit_rate"):
        assert Path(f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
