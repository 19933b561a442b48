"""Two runs: what changed is found, and nothing else is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pagedattn.report import cli
from pagedattn.report.compare import VERDICTS, compare, comparison_tables, summary_sentence
from pagedattn.report.results import load_run
from pagedattn.report.rows import ResultsError

ROUNDS = 30
REPEATED = Path(__file__).parents[3] / "figures" / "h100-repeat"


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
    assert command(tmp_path, *words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_runs_of_two_machines_are_compared_only_when_asked(tmp_path, capsys):
    assert command(tmp_path, cpu="Epyc") == 2
    assert "different machines" in capsys.readouterr().err
    assert command(tmp_path, "--allow-different-machines", cpu="Epyc") == 0


@pytest.mark.parametrize(
    "other",
    [{"gpu": "NVIDIA H200"}, {"gpu_uuid_sha256": "b"}, {"gpu": None, "gpu_uuid_sha256": None}],
)
def test_two_gpus_are_compared_only_when_asked(tmp_path, capsys, other):
    paths = []
    for name, changes in (("a", {}), ("b", other)):
        path = run_file(tmp_path / f"{name}.json", measured(0))
        content = json.loads(path.read_text())
        machine = {"cpu": "Xeon", "gpu": "NVIDIA H100", "gpu_uuid_sha256": "a"} | changes
        content["machine_info"]["pagedattn"]["machine"] = machine
        path.write_text(json.dumps(content))
        paths.append(str(path))
    target = tmp_path / "c.md"
    assert cli.main(["compare", *paths, "--markdown", str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--allow-different-machines" in captured.err
    named = captured.err.partition("machines (")[2].partition("): give")[0].split("; ")
    assert named[0] != named[1]
    assert not target.exists()
    assert cli.main(["compare", *paths, "--allow-different-machines"]) == 0
    assert cli.main(["compare", paths[0], paths[0]]) == 0


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


# what a whole run of 40 rows may look like, in shares of the true time: float64 [rounds]
def log_normal(percent):
    return lambda rng, rounds: np.exp(rng.normal(0, percent / 100, rounds))


def drifting(rng, rounds):
    return np.exp(rng.normal(0, 0.01, rounds)) * (1 + np.linspace(0, 0.03, rounds))


def shifted(percent):
    """Noise of 0.5 % around a level that each run chooses anew for each row."""
    return lambda rng, rounds: np.exp(rng.normal(0, 0.005, rounds) + rng.normal(0, percent / 100))


def wandering(rng, rounds):
    """Neighbouring rounds are alike: a correlation of 0.9, and 2 % in all."""
    steps = rng.normal(0, 0.02, rounds)
    for i in range(1, rounds):
        steps[i] = 0.9 * steps[i - 1] + np.sqrt(1 - 0.81) * steps[i]
    return np.exp(steps)


def with_outliers(rng, rounds):
    far = rng.random(rounds) < 0.1
    return np.exp(rng.normal(0, 0.02, rounds)) * np.where(far, rng.uniform(1.5, 5, rounds), 1)


def in_two_heaps(rng, rounds):
    return np.exp(rng.normal(0, 0.005, rounds)) * np.where(rng.random(rounds) < 0.5, 1, 1.08)


def shares(tmp_path, noise, *, keep, rounds=30, changed=4, pairs=10):
    """Shares of verdicts of unchanged rows, and of those 5 % slower, of 10 pairs of 40 rows."""
    same, slow = dict.fromkeys(VERDICTS, 0.0), dict.fromkeys(VERDICTS, 0.0)
    rng = np.random.default_rng(rounds)
    for _ in range(pairs):
        before = {f"row{i}": 1e-4 * noise(rng, rounds) for i in range(40)}
        after = {f"row{i}": 1e-4 * noise(rng, rounds) for i in range(40)}
        for i in range(changed):
            after[f"row{i}"] *= 1.05
        for change in compared(tmp_path, before, after, keep=keep).changes:
            counts, rows = (
                (slow, changed) if int(change.name[3:]) < changed else (same, 40 - changed)
            )
            counts[change.verdict] += 1 / rows / pairs
    return same, slow


@pytest.mark.parametrize("keep", [True, False], ids=["samples", "quartiles"])
@pytest.mark.parametrize(
    ("noise", "same", "found"),
    [
        (log_normal(1), 0.99, 0.99),
        (log_normal(3), 0.97, 0.90),
        (log_normal(5), 0.75, 0.60),
        (drifting, 0.99, 0.99),
        (shifted(1), 0.90, 0.75),
        (with_outliers, 0.95, 0.90),
    ],
    ids=["1 %", "3 %", "5 %", "drift", "shifted 1 %", "outliers"],
)
def test_unchanged_rows_are_the_same_and_five_percent_is_found(tmp_path, noise, same, found, keep):
    unchanged, slower = shares(tmp_path, noise, keep=keep)
    assert unchanged["same"] >= same
    assert unchanged["slower"] + unchanged["faster"] <= 0.05
    assert slower["slower"] >= found
    assert slower["faster"] == 0


@pytest.mark.parametrize("keep", [True, False], ids=["samples", "quartiles"])
@pytest.mark.parametrize("rounds", [5, 10, 30])
@pytest.mark.parametrize("noise", [shifted(2), wandering, in_two_heaps])
def test_noise_that_hides_a_change_makes_rows_unclear_and_not_wrong(tmp_path, noise, keep, rounds):
    unchanged, slower = shares(tmp_path, noise, keep=keep, rounds=rounds)
    assert unchanged["slower"] + unchanged["faster"] <= 0.10
    assert slower["faster"] <= 0.05


def test_without_looking_for_it_noise_between_runs_would_be_taken_for_change(tmp_path, monkeypatch):
    monkeypatch.setattr("pagedattn.report.compare.scatter_between_runs", lambda *_: 0.0)
    unchanged, _ = shares(tmp_path, shifted(2), keep=True)
    assert unchanged["slower"] + unchanged["faster"] > 0.20


def test_rounds_like_their_neighbours_are_seldom_wrong_because_that_is_looked_for(
    tmp_path, monkeypatch
):
    def share_wrong():
        rng, wrong = np.random.default_rng(3), 0
        for _ in range(60):
            # of nine rows the scatter between runs is not known
            runs = [{f"row{i}": 1e-4 * wandering(rng, 30) for i in range(9)} for _ in range(2)]
            counts = compared(tmp_path, *runs).counts
            wrong += counts["slower"] + counts["faster"]
        return wrong / 540

    looked_for = share_wrong()
    monkeypatch.setattr("pagedattn.report.compare.serial_widening", lambda _: 1.0)
    assert looked_for < 0.08
    assert looked_for < 0.65 * share_wrong()


def test_scatter_between_runs_is_told_and_a_change_of_rows_is_none(tmp_path):
    quiet = compared(tmp_path, measured(0), measured(1))
    assert quiet.scatter < 0.005
    rng = np.random.default_rng(0)
    moved = {f"row{i}": float(np.exp(rng.normal(0, 0.02))) for i in range(40)}
    noisy = compared(tmp_path, measured(0), measured(1, factors=moved))
    assert 0.012 < noisy.scatter <= 0.03
    assert f"rows scatter by {100 * noisy.scatter:.1f} % between the runs" in summary_sentence(
        noisy
    )


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


def test_a_limit_below_the_margin_is_the_margin(tmp_path, capsys):
    slow = measured(1, noise=0.001, factors={"row17": 1.025})
    before = run_file(tmp_path / "a.json", measured(0, noise=0.001))
    after = run_file(tmp_path / "b.json", slow)
    words = ["compare", str(before), str(after), "--fail-on-regression"]
    assert cli.main([*words, "2%"]) == 1
    assert "Slower by more than 2 %: row17." in capsys.readouterr().out
    assert cli.main([*words, "5%"]) == 0


def test_rows_that_cannot_be_told_are_counted_where_no_regression_is_found(tmp_path, capsys):
    assert command(tmp_path, "--fail-on-regression", "5%", after=measured(1, rounds=3)) == 0
    out = capsys.readouterr().out
    assert "No row is slower by more than 5 %; 40 rows cannot be told." in out


def test_two_real_runs_of_the_same_code_are_the_same():
    runs = [load_run([REPEATED / f"{name}.json"]) for name in ("first", "second")]
    found = compare(*runs)
    assert len(found.changes) > 50
    assert found.counts["same"] >= 0.95 * len(found.changes)
    assert found.counts["slower"] == found.counts["faster"] == 0


def test_five_percent_in_any_row_of_a_real_run_are_found_and_nothing_else(tmp_path):
    content = json.loads((REPEATED / "second.json").read_text())
    for row in content["benchmarks"][::15]:
        times, slower = row["stats"], dict(row["stats"])
        slower |= {name: 1.05 * times[name] for name in ("min", "q1", "median", "q3", "max")}
        slower["data"] = [1.05 * seconds for seconds in times["data"]]
        row["stats"] = slower
        path = tmp_path / "slower.json"
        path.write_text(json.dumps(content))
        row["stats"] = times
        found = compare(load_run([REPEATED / "first.json"]), load_run([path]))
        changed = [c.name for c in found.changes if c.verdict in ("slower", "faster")]
        assert changed == [row["name"]]


def test_a_busy_machine_is_told_and_so_are_rows_that_all_moved_alike(tmp_path, capsys):
    slow = measured(1, factors={f"row{i}": 1.3 for i in range(40)})
    paths = [
        run_file(tmp_path / "before.json", measured(0)),
        run_file(tmp_path / "after.json", slow),
    ]
    content = json.loads(paths[1].read_text())
    page, text = tmp_path / "c.html", tmp_path / "c.md"
    words = ["compare", *map(str, paths), "--html", str(page), "--markdown", str(text)]
    for load, is_busy in ((2.0, False), (5.7, True)):
        content["machine_info"]["pagedattn"] |= {"num_cpus": 2, "cpu": {"load_1min": load}}
        paths[1].write_text(json.dumps(content))
        assert cli.main(words) == 0
        for said in (capsys.readouterr().out, page.read_text(), text.read_text()):
            assert ("after.json ended with 5.7 processes at a time on 2 cores" in said) is is_busy
            assert re.search(r"Half of the rows changed by \+(29|30)\.\d % or more", said)
    assert cli.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert "Half of the rows" not in capsys.readouterr().out


def test_settings_in_which_the_runs_differ_are_told_and_what_always_varies_is_not(tmp_path, capsys):
    paths = [run_file(tmp_path / f"{name}.json", measured(0)) for name in ("one", "two")]
    content = json.loads(paths[1].read_text())
    own = content["machine_info"]["pagedattn"]
    own |= {"num_threads": 2, "versions": {"torch": "2.13.0"}, "cpu": {"mhz": 2100, "load_1min": 1}}
    paths[0].write_text(json.dumps(content))
    own |= {"num_threads": 1, "versions": {"torch": "2.12.0"}, "cpu": {"mhz": 3000, "load_1min": 2}}
    paths[1].write_text(json.dumps(content))
    assert cli.main(["compare", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "The runs differ in PyTorch's CPU threads (2; 1), torch (2.13.0; 2.12.0)." in said
    assert cli.main(["compare", str(paths[0]), str(paths[0])]) == 0
    assert "The runs differ" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare", "a.json", "b.json", "--html", "a.json"], "a.json is read"),
        (["compare", "a.json", "b.json", "--markdown", "link.json"], "link.json is read"),
        (["compare", "a.json", "b.json", "--markdown", "x", "--html", "./x"], "x cannot be two"),
        (["a.json", "--document", "a.json"], "a.json is read"),
    ],
)
def test_no_file_that_is_read_is_written_over(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        run_file(Path(f"{name}.json"), measured(0))
    Path("link.json").symlink_to("b.json")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
