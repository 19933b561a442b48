"""The report says what was found supported, in the words of the run, and refuses a broken file."""

import json

import pytest

from pagedattn.report.results import load_run
from pagedattn.report.support import support_tables
from pagedattn.report.values import ResultsError
from tests.correctness.report.conftest import make_benchmark

ROW = make_benchmark("one", 1e-5, area="attention", implementation="a", workload="w")


def finding(implementation="ours", feature="decode", status="passed", detail=""):
    return {
        "implementation": implementation, "feature": feature, "status": status, "detail": detail,
    }  # fmt: skip


@pytest.fixture
def run_of(tmp_path):
    def make(support):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"benchmarks": [ROW], "machine_info": {}, "support": support}))
        return load_run([path])

    return make


def test_each_implementation_has_a_line_and_each_size_that_is_right_is_named(run_of):
    run = run_of(
        [
            finding(),
            finding(feature="window", status="unsupported", detail="it does not do a window"),
            finding(feature="head size 64"),
            finding(feature="head size 80", status="raised", detail="RuntimeError: no"),
            finding(feature="head size 96"),
            finding("peer", detail="decode only"),
            finding("peer", "window", "wrong", "an error of 0.2"),
            finding(feature="CUDA graph", status="untried", detail="there is no CUDA GPU"),
        ]
    )
    table, reasons = support_tables(run)
    assert table.header == ["implementation", "decode", "window", "CUDA graph", "head sizes"]
    assert table.lines == [
        ["ours", "yes", "no", "not tried", "64, 96"],
        ["peer", "yes*", "wrong", "-", "none"],
    ]
    assert ["peer", "window", "wrong", "an error of 0.2"] in reasons.lines
    assert ["ours", "head size 80", "raises", "RuntimeError: no"] in reasons.lines


def test_one_detail_of_many_features_is_one_line(run_of):
    run = run_of([finding(feature=f, status="unsupported", detail="no GPU") for f in "abc"])
    assert support_tables(run)[1].lines == [["ours", "a, b, c", "no", "no GPU"]]


def test_a_run_that_probed_nothing_has_no_table(run_of):
    assert support_tables(run_of([])) == []


@pytest.mark.parametrize(
    ("support", "sentence"),
    [
        ({}, None),
        ("yes", "support must be a list"),
        ([3], "each of support must be a JSON object"),
        (
            [finding(status="fine")],
            "status must be one of passed, wrong, unsupported, raised, untried, not 'fine'",
        ),
        ([finding() | {"detail": None}], "must have a text detail"),
    ],
)
def test_a_broken_list_is_refused(run_of, support, sentence):
    if sentence is None:
        assert support_tables(run_of(support)) == []
        return
    with pytest.raises(ResultsError, match=sentence):
        run_of(support)
