"""What a run says: speedups, baselines and cases with numbers worked out by hand."""

import doctest

import pytest

from pagedattn.report import ResultsError, style, text
from pagedattn.report.latency import latency_sections
from pagedattn.report.results import load_run
from pagedattn.report.style import looks_of
from pagedattn.report.summary import summarise
from pagedattn.report.tables import bookkeeping_tables, headline_tables


def _summary(made, tmp_path, content, baseline=None):
    run = load_run([made.write(tmp_path / "run.json", content)])
    return summarise(run.rows, baseline)


def _rows(made, counts, num_workloads):
    """Rows of `num_workloads` workloads, of which each implementation has the first so many."""
    return made.file(
        [
            made.benchmark(
                f"{name}-{i}", 1e-3, area="attention", implementation=name, workload=f"w{i}"
            )
            for name, count in counts.items()
            for i in range(min(count, num_workloads))
        ]
    )


def test_a_layer_s_options_are_apart_from_the_usual_shapes_and_no_unequal_lengths(made, tmp_path):
    size = {"num_kv_heads": 8, "head_size": 128, "dtype": "bfloat16", "batch": 4}
    size |= {"kind": "decode", "device": "cuda"}
    options = {"w1k": {"bytes": 2**24}, "w2k": {"bytes": 2**25}, "window": {"window": 64}}
    options |= {name: {name: 32, "bytes": 2**25} for name in ("soft_cap", "alibi", "sinks")}
    options["window"]["bytes"] = 2**20
    options["uneven"] = {"bytes": 2**24}
    rows = [
        made.benchmark(
            f"{name}-a",
            1e-3,
            area="attention",
            implementation="a",
            workload=name,
            context=1024 if name == "w1k" else 2048,
            **size,
            **given,
        )
        for name, given in options.items()
    ]
    (section,) = latency_sections(_summary(made, tmp_path, made.file(rows)))
    families = {point.case.first.workload: point.family for point in section.points}
    assert section.usual == families["w1k"] == families["w2k"]
    assert len(set(families.values())) == len(families) - 1
    uneven = {name for name, family in families.items() if family[-1]}
    assert uneven == {"uneven"}


def test_speedups_and_the_best_are_those_worked_out_by_hand(made, tmp_path):
    summary = _summary(made, tmp_path, made.small())
    one, eight = summary.data_cases
    assert one.speedup("triton", "sdpa_contiguous") == pytest.approx(100 / 80)
    assert eight.speedup("triton", "sdpa_contiguous") == pytest.approx(300 / 400)
    assert eight.speedup("absent", "sdpa_contiguous") is None
    assert (one.best.implementation, eight.best.implementation) == ("triton", "sdpa_contiguous")
    (table,) = headline_tables(summary)
    assert table.header == [
        "workload",
        "best",
        "median µs",
        "share or rate",
        "best over sdpa_contiguous",
        "sdpa_contiguous µs",
        "triton µs",
    ]
    # 150 MB in 80 µs are 1875 GB/s, 61 % of 3087; in 300 µs 500 GB/s, 16 %
    assert table.lines == [
        ["decode-B1-4k", "triton", "80.00", "61 %", "1.25x", "100.0", "80.00"],
        ["decode-B8-4k", "sdpa_contiguous", "300.0", "16 %", "1.00x", "300.0", "400.0"],
    ]


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ({"sdpa_contiguous": 3, "torch": 4, "triton": 4}, "sdpa_contiguous"),
        ({"sdpa_contiguous": 2, "torch": 4, "triton": 4}, "torch"),
        ({"sdpa_contiguous": 2, "torch": 2, "b": 3, "a": 4}, "a"),
        ({"b": 4, "a": 4}, "a"),
    ],
    ids=["sdpa", "torch", "most", "tie"],
)
def test_the_baseline_is_the_one_that_most_workloads_have(made, tmp_path, counts, chosen):
    assert _summary(made, tmp_path, _rows(made, counts, 4)).baseline == chosen


def test_an_unknown_baseline_is_refused_with_the_known_ones(made, tmp_path):
    with pytest.raises(ResultsError, match="one of sdpa_contiguous, triton, not 'nobody'"):
        _summary(made, tmp_path, made.small(), "nobody")
    assert _summary(made, tmp_path, made.small(), "triton").baseline == "triton"


def test_the_same_work_measured_twice_is_two_numbered_cases(made, tmp_path):
    rows = [
        made.benchmark(f"{name}-{i}", 1e-3 * i, area="attention", implementation=name, workload="w")
        for i in (1, 2)
        for name in ("a", "b")
    ]
    summary = _summary(made, tmp_path, made.file(rows))
    assert [case.label for case in summary.data_cases] == ["w", "w #2"]
    assert [case.rows["b"].median_us for case in summary.data_cases] == pytest.approx([1e3, 2e3])


def test_bookkeeping_has_a_table_for_each_area_with_a_column_for_each_size(made, tmp_path):
    rows = [
        made.benchmark(
            f"append-{size}-{where}",
            size * 1e-6,
            area="block_manager",
            implementation="pagedattn",
            workload=where,
            operation="append",
            num_sequences=size,
        )
        for size, where in ((256, "azure"), (64, "azure"), (64, "uniform"))
    ]
    (table,) = bookkeeping_tables(_summary(made, tmp_path, made.file(rows)))
    assert table.header[3:] == ["64 sequences", "256 sequences"]
    assert table.lines == [
        ["append", "azure", "pagedattn", "64 µs", "256 µs"],
        ["append", "uniform", "pagedattn", "64 µs", "-"],
    ]


def test_work_of_much_arithmetic_is_judged_by_its_operations(made, tmp_path):
    summary = _summary(made, tmp_path, made.h100())
    lines = {line[0]: line for table in headline_tables(summary) for line in table.lines}
    assert lines["prefill-8k"][3].endswith("TFLOP/s")
    assert lines["decode-B64-4k"][3].endswith("%")
    assert lines["kv-write-8192-tokens"][1] == "triton"


def test_an_implementation_looks_the_same_in_every_run(made, tmp_path):
    names = _summary(made, tmp_path, made.h100()).implementations
    together = looks_of(names)
    assert all(looks_of([name])[name] == together[name] for name in names)
    assert looks_of(["some_engine"]) == {
        "some_engine": looks_of(["some_engine", "triton"])["some_engine"]
    }


def test_twenty_implementations_look_different():
    looks = looks_of([f"engine_{i}" for i in range(20)]).values()
    assert len({(look.colour, look.marker, look.hatch) for look in looks}) == 20
    eight = looks_of([f"engine_{i}" for i in range(8)]).values()
    assert len({look.colour for look in eight}) == 8


@pytest.mark.parametrize("module", [style, text], ids=["style", "text"])
def test_the_examples_in_docstrings_hold(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 == outcome.failed
