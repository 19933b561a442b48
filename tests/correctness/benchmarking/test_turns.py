"""Rounds by turns: who is timed when, and what of it counts."""

import pytest

from pagedattn.benchmarking import time_by_turns


class Scripted:
    """Moves a clock by hand and writes down what it was asked."""

    def __init__(self, name, seconds, journal, now):
        self.name, self.seconds, self.journal, self.now = name, seconds, journal, now

    def prepare(self):
        self.now[0] += 1000.0  # must not count
        self.journal.append(self.name.lower())

    def run(self):
        self.now[0] += self.seconds
        self.journal.append(self.name)


def play(rounds, **options):
    journal, now = [], [0.0]
    contenders = {
        name: Scripted(name, seconds, journal, now)
        for name, seconds in (("A", 1.0), ("B", 3.0), ("C", 5.0))
    }
    seconds = time_by_turns(contenders, rounds, clock=lambda: now[0], **options)
    return "".join(journal), seconds


def test_each_has_its_turn_and_the_first_changes():
    journal, _ = play(4, turn=2)
    assert journal == "aAaA" + "bBbB" + "cCcC" + "bBbB" + "cCcC" + "aAaA"


def test_rounds_that_do_not_fill_a_turn_are_done_too():
    journal, seconds = play(3, turn=2)
    assert journal == "aAaA" + "bBbB" + "cCcC" + "bB" + "cC" + "aA"
    assert seconds == {"A": [1.0] * 3, "B": [3.0] * 3, "C": [5.0] * 3}


def test_warm_up_comes_first_and_does_not_count():
    journal, seconds = play(1, turn=1, warmup=2)
    assert journal == "aAaA" + "bBbB" + "cCcC" + "aA" + "bB" + "cC"
    assert seconds == {"A": [1.0], "B": [3.0], "C": [5.0]}


def test_what_slows_the_machine_for_a_while_slows_all_alike():
    now = [0.0]

    class Work:
        def prepare(self):
            pass

        def run(self):
            now[0] += 2.0 if now[0] < 100 else 1.0  # slow for the first hundred seconds

    seconds = time_by_turns({"A": Work(), "B": Work()}, 80, turn=5, clock=lambda: now[0])
    assert seconds["A"].count(2.0) == pytest.approx(seconds["B"].count(2.0), abs=5)


def test_a_turn_of_no_rounds_is_refused():
    with pytest.raises(ValueError, match="turn is 0"):
        play(3, turn=0)
