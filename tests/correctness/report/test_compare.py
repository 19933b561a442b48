"""Two runs: what changed is found, and nothing else is."""

import json

import numpy as np
import pytest

from pagedattn.report import cli
from pagedattn.report.compare import compare, comparison_tables, summary_sentence
from pagedattn.report.results import load_run
from pagedattn.report.rows import ResultsError

ROUNDS = 30


def benchmark(name, samples, *, keep=True):
    seconds = sorted(float(s) for s in samples)
    q1, median, q3 = np.percentile(seconds, (25, 50, 75)).tolist()
    stats = {"min": seconds[0], "q1": q1, "median": median, "q3": q3, "max": seconds[-1]}
    stats |= {"rounds": len(seconds)} | ({"data": list(map(float, samples))} if keep else {})
    extra = {"area": "attention", "implementation": "triton", "workload": name, "device": "cuda"}
    return {"fullname": f"tests/x.py::{name}", "extra_info": extra, "stats": stats}


def run_file(path, rows, *, keep=True, cpu="Xeon", others=0):
    benchmarks = [benchmark(name, samples, keep=keep) for name, samples in rows.items()]
    benchmarks += [{"fullname": f"other{i}", "extra_info": {}, "stats": {}} for i in range(others)]
    info = {"pagedattn": {"machine": {"cpu": cpu, "gpu": None}}}
    path.write_text(json.dumps({"machine_info": info, "benchmarks": benchmarks}))
    return path


def measured(seed, *, noise=0.01, rows=40, factors=None, rounds=ROUNDS):
    """Times of rows between 2 µs and 2 ms, each with a relative noise."""
    true = np.geomspace(2e-6, 2e-3, rows)
    rng = np.random.default_rng(seed)
    return {
        f"row{i}": time
        * (factors or {}).get(f"row{i}", 1.0)
        * (1 + noise * rng.normal(size=rounds))
        for i, time in enumerate(true)
    }


def compared(tmp_path, before, after, **options):
    paths = [
        run_file(tmp_path / f"{name}.json", rows, **options)
        for name, rows in (("before", before), ("after", after))
    ]
    return compare(*(load_run([path]) for path in paths))


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
    assert titles == ["Only in the second run", "Only in the first run"]
    assert "1 new, 1 removed, 4 of other suites skipped" in summary_sentence(found)


def test_the_same_files_give_the_same_comparison(tmp_path):
    first, again = (compared(tmp_path, measured(0), measured(1)) for _ in range(2))
    assert first == again


def test_runs_without_a_common_row_are_refused(tmp_path):
    with pytest.raises(ResultsError, match="no row in common"):
        compared(tmp_path, {"a": np.ones(9)}, {"b": np.ones(9)})


def command(tmp_path, *words, after=None, cpu="Xeon"):
    before = run_file(tmp_path / "a.json", measured(0))
    other = run_file(tmp_path / "b.json", measured(1) if after is None else after, cpu=cpu)
    return cli.main(["compare", str(before), str(other), *words])


def test_the_command_fails_on_a_regression_only(tmp_path, capsys):
    slow = measured(1, factors={"row17": 1.10})
    assert command(tmp_path, "--fail-on-regression", "5%") == 0
    assert "No row is slower by more than 5 %." in capsys.readouterr().out
    assert command(tmp_path, "--fail-on-regression", "5%", after=slow) == 1
    out = capsys.readouterr().out
    assert "1 slower" in out
    assert "Slower by more than 5 %: row17." in out
    assert command(tmp_path, "--fail-on-regression", "20%", after=slow) == 0
    assert command(tmp_path, after=slow) == 0


def test_the_command_writes_markdown_of_all_rows(tmp_path, capsys):
    target = tmp_path / "comparison.md"
    assert command(tmp_path, "--markdown", str(target)) == 0
    text = target.read_text()
    assert text.count("| row") == 41  # and the header
    assert "95 % bootstrap intervals" in text
    assert str(target) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fail-on-regression", "fast"], "must be a percentage"),
        (["--margin", "0"], "must be a percentage"),
        (["--margin", "nan"], "must be a percentage"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path, *words)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_runs_of_two_machines_are_compared_only_when_asked(tmp_path, capsys):
    assert command(tmp_path, cpu="Epyc") == 2
    assert "different machines" in capsys.readouterr().err
    assert command(tmp_path, "--allow-different-machines", cpu="Epyc") == 0


def test_a_missing_file_is_told_in_one_sentence(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path / "x.json"), str(tmp_path / "y.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    path = run_file(tmp_path / "a.json", {"row": np.ones(9)})
    content = json.loads(path.read_text())
    content["benchmarks"][0]["stats"]["data"] = [1.0, "two"]
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=r"stats\.data must be a number"):
        load_run([path])
