"""Which steps run, and which blocks a failed one leaves unwritten."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagedattn.block_manager.in_flight import StepsInFlight


def ids(*blocks):
    return np.array(blocks, np.int32)


def running(steps):
    return steps.state()["running"].tolist()


def test_before_the_first_step_none_runs():
    steps = StepsInFlight(1000)
    assert (steps.newest, steps.oldest_running, steps.newest_running) == (0, 1, 0)
    assert not steps.poll()


def test_steps_are_numbered_from_one():
    steps = StepsInFlight(1000)
    assert [steps.start(None) for _ in range(3)] == [1, 2, 3]
    assert (steps.newest, steps.oldest_running, steps.newest_running) == (3, 1, 3)


def test_a_step_that_is_done_ends_those_before_it_and_none_after():
    steps = StepsInFlight(1000)
    for _ in range(4):
        steps.start(None)
    steps.finish(2)
    assert running(steps) == [3, 4]
    steps.finish(2)
    assert running(steps) == [3, 4]
    steps.finish(4)
    assert (steps.oldest_running, steps.newest_running) == (5, 0)


@pytest.mark.parametrize("step", [-1, 0, 3])
def test_a_step_that_was_never_started_is_refused_and_nothing_changes(step):
    steps = StepsInFlight(1000)
    steps.start(None)
    steps.start(None)
    for operation in (steps.finish, steps.fail):
        with pytest.raises(ValueError, match=f"step {step} was never started; the newest is 2"):
            operation(step)
        assert running(steps) == [1, 2]


def test_polling_ends_at_the_first_step_that_is_not_done():
    steps = StepsInFlight(1000)
    done = {1: True, 2: True, 3: False, 4: True}
    for number in done:
        steps.start(lambda number=number: done[number])
    assert steps.poll()
    assert running(steps) == [3, 4]
    assert not steps.poll()
    done[3] = True
    assert steps.poll()
    assert running(steps) == []


def test_a_step_that_cannot_say_that_it_is_done_holds_up_those_that_can():
    steps = StepsInFlight(1000)
    steps.start(None)
    steps.start(lambda: True)
    assert not steps.poll()
    assert running(steps) == [1, 2]


def test_polling_does_not_ask_the_steps_behind_one_that_is_not_done():
    steps = StepsInFlight(1000)
    asked = []
    for number in (1, 2, 3):
        steps.start(lambda number=number: asked.append(number) or number == 1)
    steps.poll()
    assert asked == [1, 2]


def test_blocks_are_written_by_the_step_that_follows():
    steps = StepsInFlight(1000)
    steps.start(None)
    steps.note_written(ids(5, 3))
    steps.note_written(ids(3, 9))
    steps.start(None)
    steps.note_written(ids(7))
    steps.start(None)
    assert steps.fail(3).tolist() == [7]
    assert steps.fail(2).tolist() == [3, 5, 9]
    assert running(steps) == [1]


def test_a_failed_step_takes_later_ones_and_what_the_next_would_write_along():
    steps = StepsInFlight(1000)
    steps.start(None)
    steps.start(None)
    steps.note_written(ids(4))  # by step 3, which was never started
    lost = steps.fail(2)
    assert lost.tolist() == [4]
    assert lost.dtype == np.int32
    assert running(steps) == [1]
    assert steps.start(None) == 3


def test_what_a_finished_step_wrote_is_not_lost():
    steps = StepsInFlight(1000)
    steps.start(None)
    steps.note_written(ids(1))
    steps.start(None)
    steps.note_written(ids(2))
    steps.start(None)
    steps.finish(2)
    assert steps.state()["written"].tolist() == [2]
    assert steps.fail(3).tolist() == [2]


def test_a_first_step_that_fails_loses_all_blocks():
    steps = StepsInFlight(1000)
    steps.note_written(ids(1, 2))  # kept nowhere: all is lost anyway
    steps.start(None)
    steps.note_written(ids(3))
    assert steps.fail(1) is None
    assert steps.state()["written"].size == 0
    assert running(steps) == []


def test_before_the_first_step_written_blocks_are_not_kept():
    steps = StepsInFlight(1000)
    for block in range(100):
        steps.note_written(ids(block))
    assert steps.state()["written"].size == 0


class StepsMachine(RuleBasedStateMachine):
    """Random steps, against a list of those that run and a list of what they write."""

    def __init__(self):
        super().__init__()
        self.steps = StepsInFlight(1000)
        self.newest = 0
        self.running = []
        self.written = []  # (step, block), none of step 1
        self.next_block = 0

    @rule()
    def start(self):
        self.newest += 1
        assert self.steps.start(None) == self.newest
        self.running.append(self.newest)

    @rule(count=st.integers(0, 3))
    def write(self, count):
        blocks = range(self.next_block, self.next_block + count)
        self.next_block += count
        self.steps.note_written(ids(*blocks))
        if self.newest:
            self.written += [(self.newest + 1, block) for block in blocks]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        step = data.draw(st.sampled_from(self.running))
        self.steps.finish(step)
        self.running = [s for s in self.running if s > step]
        self.written = [(s, b) for s, b in self.written if s > step]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data):
        step = data.draw(st.sampled_from(self.running))
        lost = self.steps.fail(step)
        if step == 1:
            assert lost is None
            self.written = []
        else:
            assert lost.tolist() == sorted({b for s, b in self.written if s >= step})
        self.running = [s for s in self.running if s < step]
        self.written = [(s, b) for s, b in self.written if s < step]

    @rule()
    def reload(self):
        state = self.steps.state()
        self.steps = StepsInFlight(1000)
        self.steps.restore(self.newest, state)

    @invariant()
    def both_agree(self):
        assert self.steps.newest == self.newest
        assert self.steps.oldest_running == min(self.running, default=self.newest + 1)
        assert self.steps.newest_running == max(self.running, default=0)
        state = self.steps.state()
        pairs = zip(state["written_steps"].tolist(), state["written"].tolist(), strict=True)
        assert list(pairs) == self.written
        assert state["running"].tolist() == self.running


TestStepsAgreeWithTwoLists = StepsMachine.TestCase
TestStepsAgreeWithTwoLists.settings = settings(max_examples=60, stateful_step_count=30)
