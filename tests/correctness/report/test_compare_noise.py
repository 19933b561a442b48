"""Noise in and between runs is not taken for change; a change is found, or the row unclear."""

import json
from pathlib import Path

import numpy as np
import pytest

from pagedattn.report.compare import VERDICTS, compare, summary_sentence
from pagedattn.report.results import load_run

from .compared_runs import compared, measured

REPEATED = Path(__file__).parents[3] / "figures" / "h100-repeat"


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
