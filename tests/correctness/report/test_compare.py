"""Two runs: rows are joined, what changed is found, and nothing else is."""

import json

import numpy as np
import pytest

from pagedattn.report.compare import compare, comparison_tables, summary_sentence
from pagedattn.report.results import load_run
from pagedattn.report.values import ResultsError

from .compared_runs import benchmark, compared, measured, run_file


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_two_runs_of_the_same_are_the_same(tmp_path, seed, keep):
    found = compared(tmp_path, measured(seed), measured(seed + 100), keep=keep)
    assert found.counts["same"] >= 0.95 * 40
    assert found.counts["slower"] == found.counts["faster"] == 0
    assert found.mean_ratio == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (0.95, "faster")])
def test_a_change_of_five_percent_in_one_row_is_found_and_nothing_else(
    tmp_path, factor, verdict, keep
):
    after = measured(1, factors={"row17": factor})
    found = compared(tmp_path, measured(0), after, keep=keep)
    changed = {c.name: c.verdict for c in found.changes if c.verdict != "same"}
    assert changed == {"row17": verdict}


def test_a_sure_but_small_difference_does_not_matter(tmp_path):
    after = measured(1, noise=0.001, factors={f"row{i}": 1.01 for i in range(40)})
    found = compared(tmp_path, measured(0, noise=0.001), after)
    assert found.counts["same"] == 40
    assert all(change.ratio.low > 1 for change in found.changes)


def test_a_large_but_unsure_difference_is_unclear(tmp_path):
    noisy = {"row": np.array([1, 1, 1, 2, 2, 2, 1.4, 1.5, 1.6]) * 1e-3}
    other = {"row": np.array([1, 1, 1.2, 2, 2, 2, 1.6, 1.7, 1.8]) * 1e-3}
    (change,) = compared(tmp_path, noisy, other).changes
    assert change.ratio.value > 1.03
    assert change.ratio.low < 1
    assert change.verdict == "unclear"


def test_a_few_rounds_tell_nothing(tmp_path):
    before, after = measured(0, rounds=4), measured(1, rounds=4, factors={"row3": 2.0})
    assert compared(tmp_path, before, after).counts["unclear"] == 40


def test_rows_are_joined_by_name_and_the_others_listed(tmp_path):
    before, after = measured(0, rows=5), measured(1, rows=5)
    before["old"], after["new"] = before["row0"], after["row0"]
    found = compared(tmp_path, before, after, others=2)
    assert [change.name for change in found.changes] == [f"row{i}" for i in range(5)]
    assert (found.added, found.removed, found.num_skipped) == (("new",), ("old",), 4)
    titles = [table.title for table in comparison_tables(found)]
    assert titles == [
        "Only in the second run",
        "Only in the first run",
        "Skipped, of other suites",
    ]
    assert comparison_tables(found)[-1].lines == [["other0"], ["other1"]]
    assert "1 new, 1 removed, 4 of other suites skipped" in summary_sentence(found)


def test_the_same_files_give_the_same_comparison(tmp_path):
    first, again = (compared(tmp_path, measured(0), measured(1)) for _ in range(2))
    assert first == again


def test_runs_without_a_common_row_are_refused(tmp_path):
    with pytest.raises(ResultsError, match="no row in common"):
        compared(tmp_path, {"a": np.ones(9)}, {"b": np.ones(9)})


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    path = run_file(tmp_path / "a.json", {"row": np.ones(9)})
    content = json.loads(path.read_text())
    content["benchmarks"][0]["stats"]["data"] = [1.0, "two"]
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=r"stats\.data must be a number"):
        load_run([path])


@pytest.mark.parametrize("count", [4, 19, 40])
def test_a_change_of_any_share_of_the_rows_is_found(tmp_path, count):
    factors = {f"row{i}": 1.2 for i in range(count)}
    found = compared(tmp_path, measured(0), measured(1, factors=factors))
    assert {c.name for c in found.changes if c.verdict == "slower"} == set(factors)
    assert found.counts["same"] == 40 - count


def test_a_change_of_three_times_the_margin_is_found_however_rows_scatter(tmp_path):
    rng = np.random.default_rng(5)
    factors = {f"row{i}": float(rng.choice([0.7, 0.8, 1.1, 1.25, 1.5])) for i in range(40)}
    found = compared(tmp_path, measured(0), measured(1, factors=factors))
    for change in found.changes:
        assert change.verdict == ("slower" if factors[change.name] > 1 else "faster")


def test_rows_of_one_name_in_one_file_are_all_kept_and_numbered(tmp_path):
    paths = []
    for name, times in (("a", (1, 2, 3)), ("b", (1, 2.5, 3))):
        path = run_file(tmp_path / f"{name}.json", {"row": np.full(9, 1e-3)})
        content = json.loads(path.read_text())
        content["benchmarks"] = [benchmark("row", np.full(9, 1e-3 * t)) for t in times]
        path.write_text(json.dumps(content))
        paths.append(path)
    found = compare(*(load_run([path]) for path in paths))
    verdicts = {c.name: c.verdict for c in found.changes}
    assert verdicts == {"row": "same", "row #2": "slower", "row #3": "same"}


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_one_round_to_four_tell_nothing_with_samples_or_without(tmp_path, rounds):
    before = run_file(tmp_path / "a.json", measured(0, rounds=rounds), keep=True)
    after = run_file(tmp_path / "b.json", measured(1, factors={"row3": 3.0}), keep=False)
    found = compare(load_run([before]), load_run([after]))
    assert found.counts["unclear"] == 40


def test_a_file_with_samples_is_compared_with_one_without(tmp_path):
    before = run_file(tmp_path / "a.json", measured(0), keep=True)
    after = run_file(tmp_path / "b.json", measured(1, factors={"row3": 1.1}), keep=False)
    found = compare(load_run([before]), load_run([after]))
    assert {c.name for c in found.changes if c.verdict != "same"} == {"row3"}


def test_no_rounds_or_samples_of_another_median_are_refused(tmp_path):
    path = run_file(tmp_path / "a.json", {"row": np.ones(9)})
    content = json.loads(path.read_text())
    stats = content["benchmarks"][0]["stats"]
    for changes, message in (({"rounds": 0}, "rounds must be 1"), ({"data": [2.0]}, "the median")):
        content["benchmarks"][0]["stats"] = stats | changes
        path.write_text(json.dumps(content))
        with pytest.raises(ResultsError, match=message):
            load_run([path])
