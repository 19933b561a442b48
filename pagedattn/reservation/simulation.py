"""A small discrete-event run: requests come, wait for memory, and get a token a step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.memory import kv_bytes_per_token
from pagedattn.reservation.use import KVUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagedattn.config import ModelConfig
    from pagedattn.reservation.base import Reservation
    from pagedattn.reservation.requests import Requests


@dataclass(frozen=True)
class StepTime:
    """How long a step takes, in seconds.

    Attributes:
        fixed: reading the weights, and what the host does once a step.
        per_sequence: what the host does for each running request.
        per_token: arithmetic for each token that the step computes, prompts included.
        per_stored_token: reading the K and V of one token of context.
        per_offloaded_slot: bringing one slot over the bus.

    """

    fixed: float
    per_sequence: float = 0.0
    per_token: float = 0.0
    per_stored_token: float = 0.0
    per_offloaded_slot: float = 0.0

    @classmethod
    def roofline(
        cls,
        model: ModelConfig,
        *,
        bandwidth: float,
        flops: float,
        bus_bandwidth: float = 16e9,
        efficiency: float = 1.0,
    ) -> StepTime:
        """Work out what the GPU does, from a model; the host costs nothing.

        Args:
            model: weights and K and V, in its own dtype; its number of parameters must be known.
            bandwidth: bytes a second of the GPU's memory.
            flops: operations a second of its matrix units.
            bus_bandwidth: bytes a second between host and GPU.
            efficiency: share of these that is reached.

        """
        weight_bytes = model.weight_bytes
        if model.num_parameters is None or weight_bytes is None:
            raise ValueError(f"the number of parameters of {model.name} is not known")
        kv_bytes = kv_bytes_per_token(model)
        return cls(
            fixed=weight_bytes / (bandwidth * efficiency),
            per_token=2 * model.num_parameters / (flops * efficiency),
            per_stored_token=kv_bytes / (bandwidth * efficiency),
            per_offloaded_slot=kv_bytes / (bus_bandwidth * efficiency),
        )

    def seconds(self, num_running: int, num_tokens: int, stored: float, offloaded: int) -> float:
        """Time of a step.

        Args:
            num_running: requests that get a token.
            num_tokens: tokens that are computed, prompts included.
            stored: tokens of context that are read.
            offloaded: slots that pass the bus.

        """
        return (
            self.fixed
            + num_running * self.per_sequence
            + num_tokens * self.per_token
            + stored * self.per_stored_token
            + offloaded * self.per_offloaded_slot
        )


@dataclass(frozen=True)
class Simulation:
    """What a run shows; means are over time, from the first arrival to the last.

    Attributes:
        mean_running: mean number of requests in a step (SOSP '23, Figure 13).
        peak_running: greatest number.
        mean_waiting: mean number of requests that wait.
        use: mean use of the slots (Figure 2).
        peak_tokens: most tokens stored at once.
        requests_per_s: requests that ended, over the time until the last one did.
        tokens_per_s: tokens generated over that time.
        queued_tokens_per_s: tokens generated a second while requests still come or wait, so that
            the run's end, in which the last ones run alone, does not count.
        normalised_latency_s: mean over requests that ended of seconds from arrival to end, by
            tokens of output (§6.1).
        num_preempted: how many times a request had to go for the others' sake.
        num_steps: steps of the run.

    """

    mean_running: float
    peak_running: int
    mean_waiting: float
    use: KVUse
    peak_tokens: int
    requests_per_s: float
    tokens_per_s: float
    queued_tokens_per_s: float
    normalised_latency_s: float
    num_preempted: int
    num_steps: int


@dataclass(frozen=True)
class Filled:
    """A memory into which no more goes.

    Attributes:
        num_requests: requests that are in.
        use: what the slots are used for.

    """

    num_requests: int
    use: KVUse


def fill(
    reservation: Reservation, requests: Requests, progress: float | None = None, seed: int = 0
) -> Filled:
    """Admit requests in order until one does not fit: how many users a memory holds at once.

    Args:
        reservation: an empty one; changed.
        requests: at least as many as fit.
        progress: share of its output that each has generated already; None draws it for each,
            evenly between 0 and 1, as a snapshot of a running system.
        seed: of that drawing.

    Raises:
        ValueError: all of `requests` fit, so that the answer is not known.

    """
    rng = np.random.default_rng(seed)
    done = rng.random(len(requests)) if progress is None else np.full(len(requests), progress)
    generated = (done * requests.output_tokens).astype(np.int64)
    lengths = zip(
        requests.prompt_tokens.tolist(),
        requests.output_tokens.tolist(),
        generated.tolist(),
        strict=True,
    )
    for number, (prompt, output, so_far) in enumerate(lengths):
        if reservation.admit(prompt, output, so_far) is None:
            return Filled(number, reservation.use().while_one_waits())
    raise ValueError(f"all {len(requests)} requests fit; give more")


class _Run:
    """The state of a run; `handles`, `which` and `generated` are of the running, oldest first."""

    def __init__(self, reservation: Reservation, requests: Requests, step_time: StepTime) -> None:
        self.reservation, self.requests, self.step_time = reservation, requests, step_time
        self.now = 0.0
        self.arrived = 0
        self.waiting: deque[int] = deque()  # numbers of requests
        self.handles = np.empty(0, dtype=np.int64)
        self.which = np.empty(0, dtype=np.int64)
        self.generated = np.zeros(len(requests), dtype=np.int64)
        self.ended_s = np.zeros(len(requests))
        self.num_ended = self.num_preempted = self.num_steps = 0
        self.measured_s = self.running_s = self.waiting_s = 0.0
        self.measured_tokens = 0
        self.use = KVUse(0, 0, 0, 0, 0)
        self.peak_running = self.peak_tokens = 0

    def _arrive(self) -> None:
        arrivals = self.requests.arrival_s
        if not self.waiting and not self.which.size:
            self.now = max(self.now, float(arrivals[self.arrived]))
        last = int(np.searchsorted(arrivals, self.now, side="right"))
        self.waiting.extend(range(self.arrived, last))
        self.arrived = last

    def _admit(self) -> int:
        """Let in those that fit, first come first served; returns the tokens to prefill."""
        entered, handles, prefilled = [], [], 0
        while self.waiting:
            number = self.waiting[0]
            prompt = int(self.requests.prompt_tokens[number])
            output, so_far = int(self.requests.output_tokens[number]), int(self.generated[number])
            handle = self.reservation.admit(prompt, output, so_far)
            if handle is None:
                break
            entered.append(self.waiting.popleft())
            handles.append(handle)
            prefilled += prompt + so_far
        if entered:
            self.which = np.concatenate([self.which, np.array(entered)])
            self.handles = np.concatenate([self.handles, np.array(handles)])
        return prefilled

    def step(self) -> None:
        """Let requests in, compute a token for each, and let go those that are done."""
        self._arrive()
        prefilled = self._admit()
        use = self.reservation.use()
        running = self.which.size
        seconds = self.step_time.seconds(
            running, prefilled + running, use.token_states, self.reservation.offloaded()
        )
        is_measured = self._measure(use.while_one_waits() if self.waiting else use, seconds)
        self.now += seconds
        gone = self.reservation.advance(self.handles)
        staying = self.which.size - gone.size
        if is_measured:
            self.measured_tokens += staying
        # those that go have computed nothing in this step
        self.waiting.extendleft(reversed(self.which[staying:].tolist()))
        self.num_preempted += gone.size
        self.which, self.handles = self.which[:staying], self.handles[:staying]
        self.generated[self.which] += 1
        done = self.generated[self.which] == self.requests.output_tokens[self.which]
        if done.any():
            self.reservation.finish(self.handles[done])
            self.ended_s[self.which[done]] = self.now
            self.num_ended += int(np.count_nonzero(done))
            self.which, self.handles = self.which[~done], self.handles[~done]

    def _measure(self, use: KVUse, seconds: float) -> bool:
        """Add a step to the means unless it is of the run's end; returns whether it was added."""
        self.num_steps += 1
        self.peak_running = max(self.peak_running, self.which.size)
        self.peak_tokens = max(self.peak_tokens, int(use.token_states))
        if self.arrived == len(self.requests) and self.measured_s > 0 and not self.waiting:
            return False
        self.measured_s += seconds
        self.running_s += seconds * self.which.size
        self.waiting_s += seconds * len(self.waiting)
        self.use += use * seconds
        return True

    def result(self) -> Simulation:
        ended = np.flatnonzero(self.ended_s)
        waited = self.ended_s[ended] - self.requests.arrival_s[ended]
        latency = waited / self.requests.output_tokens[ended]
        return Simulation(
            mean_running=self.running_s / self.measured_s,
            peak_running=self.peak_running,
            mean_waiting=self.waiting_s / self.measured_s,
            use=self.use * (1 / self.measured_s),
            peak_tokens=self.peak_tokens,
            requests_per_s=self.num_ended / self.now,
            tokens_per_s=float(self.generated.sum()) / self.now,
            queued_tokens_per_s=self.measured_tokens / self.measured_s,
            normalised_latency_s=float(latency.mean()) if ended.size else float("nan"),
            num_preempted=self.num_preempted,
            num_steps=self.num_steps,
        )


def simulate(
    reservation: Reservation,
    requests: Requests,
    step_time: StepTime,
    progress: Callable[[int, int], None] | None = None,
    *,
    max_steps: int | None = None,
) -> Simulation:
    """Serve `requests`, first come first served, with a token a step for each that runs.

    Means are taken while requests still come or wait, so that the end of the run, in which the
    last ones run alone, does not count.

    Args:
        reservation: an empty one; empty again afterwards, unless `max_steps` ended the run.
        requests: at least one.
        step_time: how long a step takes.
        progress: told how many requests of how many have ended, after every 1000 steps.
        max_steps: stop after so many steps, with requests still running and waiting; what has
            ended and was generated by then counts. None serves all.

    Raises:
        RequestError: a request does not fit, even alone.
        ValueError: there are no requests, or no steps.

    """
    if not len(requests):
        raise ValueError("there must be at least 1 request")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; it must be at least 1")
    run = _Run(reservation, requests, step_time)
    while run.num_ended < len(requests) and run.num_steps != max_steps:
        run.step()
        if progress is not None and run.num_steps % 1000 == 0:
            progress(run.num_ended, len(requests))
    return run.result()
