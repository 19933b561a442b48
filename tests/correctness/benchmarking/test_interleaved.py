"""Rounds by turns until medians are known, throttled rounds left out, failures kept apart."""

import itertools
import math
import time

import numpy as np
import pytest

from pagedattn.benchmarking import (
    CaseTiming,
    HostWork,
    StopRule,
    ThrottledError,
    median_precision,
    time_interleaved,
)


class Scripted:
    """Takes the seconds that it was told, the last ones for ever, and writes itself down."""

    def __init__(self, name, seconds, journal=None):
        self.name, self.journal = name, journal if journal is not None else []
        self.seconds = itertools.chain(seconds[:-1], itertools.repeat(seconds[-1]))

    def replay(self):
        self.journal.append(self.name)
        return next(self.seconds)


RULE = StopRule(precision=0.01, least=10, most=40, seconds=1e9)


def test_all_take_turns_and_the_first_changes():
    journal = []
    works = {name: Scripted(name, [1.0], journal) for name in "AB"}
    found = time_interleaved(works, StopRule(least=6, most=6))
    assert "".join(journal) == "AAABBB" + "AABB" + "BBAA" + "AABB"  # three each warm up
    assert {name: rounds.seconds for name, rounds in found.items()} == {
        "A": (1.0,) * 6,
        "B": (1.0,) * 6,
    }


def test_rounds_go_on_until_the_last_median_is_known():
    rng = np.random.default_rng(0)
    noisy = rng.lognormal(0.0, 0.02, 200).tolist()
    found = time_interleaved({"calm": Scripted("c", [1.0]), "noisy": Scripted("n", noisy)}, RULE)
    calm, noisy = found["calm"], found["noisy"]
    assert len(calm.seconds) == len(noisy.seconds)
    assert 10 < len(noisy.seconds) < 40
    assert noisy.precision <= 0.01
    assert median_precision(noisy.seconds[:-2]) > 0.01  # one lap earlier it was not


def test_what_is_never_known_well_ends_at_the_most_rounds_or_seconds():
    wild = {"wild": Scripted("w", np.random.default_rng(1).lognormal(0, 1, 100).tolist())}
    assert len(time_interleaved(wild, RULE)["wild"].seconds) == 40
    slow = {"slow": Scripted("s", [1.0, 2.0] * 100)}
    rounds = time_interleaved(slow, StopRule(least=4, most=100, seconds=20.0))["slow"]
    assert 20.0 <= sum(rounds.seconds) < 24.0


def test_what_has_taken_its_seconds_is_timed_no_more_while_others_go_on():
    wild = np.random.default_rng(1).lognormal(0.0, 1.0, (2, 100)) * 1e-3
    works = {
        "slow": Scripted("s", [3.0]),
        "wild": Scripted("w", wild[0].tolist()),
        "slower": Scripted("t", [9.0]),
        "as wild": Scripted("x", wild[1].tolist()),
    }
    found = time_interleaved(works, StopRule(least=10, most=40, seconds=42.0))
    rounds = {name: len(each.seconds) for name, each in found.items()}
    assert rounds == {"slow": 14, "wild": 40, "slower": 10, "as wild": 40}


@pytest.mark.parametrize("share", [0.5, 0.74, 0.76])
def test_rounds_below_three_quarters_of_the_usual_clock_are_left_out_and_counted(share):
    clocks = itertools.cycle([2e9] * 9 + [2e9 * share])
    times = []

    def probe():
        times.append(next(clocks))
        return times[-1]

    class Work:
        def replay(self):
            return 2e9 / times[-1]

    rule = StopRule(least=20, most=20)
    rounds = time_interleaved({"it": Work()}, rule, probe, patience=0)["it"]
    if share < 0.75:
        assert rounds.discarded == 2
        assert set(rounds.seconds) == {1.0}
        assert len(rounds.seconds) == 20
    else:
        assert rounds.discarded == 0
        assert max(rounds.seconds) > 1.3
    assert rounds.clock_hz == 2e9
    assert rounds.columns()["sm_clock_mhz"] == pytest.approx(2000)


def test_a_work_that_only_runs_while_the_clock_is_low_ends_with_a_sentence():
    laps = itertools.cycle("AABBCC" + "BBCCAA" + "CCAABB")  # who begins changes from lap to lap
    turns = itertools.chain("AAABBBCCC", laps)
    works = {name: Scripted(name, [1.0]) for name in "ABC"}
    with pytest.raises(ThrottledError, match=r"22 of 22 rounds of B ran below 75% of the usual"):
        time_interleaved(
            works,
            StopRule(least=400, most=40),
            lambda: 1e9 if next(turns) == "B" else 2e9,
            patience=0,
        )


@pytest.mark.parametrize("needed", [3, 8])
def test_a_throttled_clock_is_given_time_to_recover(needed, monkeypatch):
    pauses, asked = [], itertools.count()
    monkeypatch.setattr("pagedattn.benchmarking.interleaved.time.sleep", pauses.append)

    def probe():
        """2 GHz, but low from the 15th round on until it has been paused for long enough."""
        return 1e9 if next(asked) >= 17 and len(pauses) < needed else 2e9

    rule = StopRule(least=20, most=20)
    rounds = time_interleaved({"it": Scripted("it", [1.0])}, rule, probe, turn=1)["it"]
    assert len(pauses) == needed
    assert rounds.discarded == (needed - 1) // 5  # it pauses five times before a round, then runs


def test_one_that_fails_leaves_the_others_their_rounds():
    def make(name):
        if name == "wrong":
            raise AssertionError("the result is wrong")
        if name == "absent":
            pytest.skip("it is not installed")
        return Scripted(name, [1.0])

    timing = CaseTiming(["right", "wrong", "absent", "other"], make, StopRule(most=10))
    assert len(timing.of("right").seconds) == 10
    with pytest.raises(AssertionError, match="the result is wrong"):
        timing.of("wrong")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        timing.of("absent")
    assert len(timing.of("other").seconds) == 10


def test_a_round_that_fails_ends_the_case_for_all_and_is_not_tried_again():
    made = []

    class Broken:
        def replay(self):
            raise RuntimeError("the device is gone")

    def make(name):
        made.append(name)
        return Broken()

    timing = CaseTiming(["a", "b"], make, StopRule(most=10))
    for name in "ab":
        with pytest.raises(RuntimeError, match="the device is gone"):
            timing.of(name)
    assert made == ["a", "b"]


def test_a_case_is_timed_once_whoever_asks_first():
    made = []

    def make(name):
        made.append(name)
        return Scripted(name, [1.0])

    timing = CaseTiming(["a", "b"], make, StopRule(most=10))
    assert timing.of("b") is timing.of("b")
    assert timing.of("a").seconds
    assert made == ["a", "b"]


# -- how well a median is known --------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "low", "high"), [(6, 0, 5), (10, 1, 8), (20, 5, 14), (100, 39, 60)]
)
def test_the_interval_of_a_median_is_the_textbooks(count, low, high):
    # ranks of the table for n = 6, 10, 20, 100 (Conover, Practical Nonparametric Statistics)
    samples = [1000.0 + number for number in range(count)]
    median = 1000 + (count - 1) / 2
    assert median_precision(samples[::-1]) == pytest.approx((high - low) / 2 / median)


def test_few_rounds_say_nothing():
    assert median_precision([1.0] * 5) == math.inf
    assert median_precision([]) == math.inf
    assert median_precision([1.0] * 6) == 0.0


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        sample = rng.exponential(1.0, 21)
        width = median_precision(sample.tolist()) * np.median(sample)
        ordered = np.sort(sample)
        held += ordered[5] <= math.log(2) <= ordered[15]
        assert width == pytest.approx((ordered[15] - ordered[5]) / 2)
    assert 0.95 <= held / 2000 < 0.99


# -- against work whose time is known --------------------------------------------------------


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.undisturbed
def test_a_wait_of_known_length_is_measured_to_a_hundredth_with_little_overhead():
    works = {"2 ms": HostWork(lambda: spin(2e-3)), "2.1 ms": HostWork(lambda: spin(2.1e-3))}
    begin = time.perf_counter()
    found = time_interleaved(works, StopRule(least=40, most=40))
    whole = time.perf_counter() - begin
    medians = {name: float(np.median(rounds.seconds)) for name, rounds in found.items()}
    assert medians["2 ms"] == pytest.approx(2e-3, rel=0.01)
    assert medians["2.1 ms"] / medians["2 ms"] == pytest.approx(1.05, abs=0.005)
    measured = sum(sum(rounds.seconds) for rounds in found.values()) * 43 / 40  # and the warm-up
    assert whole < 1.1 * measured + 0.05


def test_rounds_that_settle_do_not_count_in_times_or_clocks():
    journal = []
    cold_first = [5.0, 5.0, 5.0] + [9.0, 1.0, 1.0] * 10  # three warm up, then each turn begins cold
    clocks = itertools.cycle([1e9, 2e9, 2e9])
    for _ in range(3):
        next(clocks)
    works = {"A": Scripted("A", cold_first, journal)}
    rule = StopRule(least=6, most=6)
    found = time_interleaved(works, rule, lambda: next(clocks), turn=2, settle=1)["A"]
    assert found.seconds == (1.0,) * 6
    assert found.clock_hz == 2e9
    assert found.discarded == 0
    assert len(journal) == 3 + 9


@pytest.mark.undisturbed
def test_what_prepares_a_host_round_comes_before_each_and_is_not_timed():
    order = []

    def prepare():
        order.append("prepare")
        time.sleep(0.02)

    work = HostWork(lambda: order.append("call"), prepare)
    assert max(work.replay() for _ in range(3)) < 0.01
    assert order == ["prepare", "call"] * 3
