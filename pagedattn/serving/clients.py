"""Clients that wait for their answers: so many at once, each sending its next when it has one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagedattn.serving.load import ServingRequest


class Engine(Protocol):
    """What the clients need of a serving engine that is driven step by step."""

    def submit(self, number: int, request: ServingRequest) -> None:
        """Give it a request; `number` names it."""

    def step(self) -> Sequence[tuple[int, int]]:
        """Do one step; returns (number, new tokens) of each request that got some."""

    def abort(self, numbers: Sequence[int]) -> None:
        """Forget requests that have not ended."""


class Watch(Protocol):
    """Looks at an engine while clients use it; what it does counts into the clients' times."""

    def sent(self, number: int, request: ServingRequest) -> None:
        """A request was given to the engine."""

    def received(self, seconds: float, tokens: Sequence[tuple[int, int]]) -> None:
        """A step has ended, `seconds` after the first request, with these (number, new tokens)."""


@dataclass(slots=True)
class LoadRun:
    """What so many clients at once had of an engine.

    Attributes:
        users: clients; each has one request at a time.
        seconds: from the first request sent to the last token received.
        completed: requests whose answers are complete.
        prompt_tokens: of the completed requests.
        output_tokens: received, of all requests.
        first_token_s: seconds from sending to the first token, of each that has one.
        inter_token_s: seconds between two tokens of an answer, of all answers.
        latency_s: seconds from sending to the last token, of the completed.
        interrupted: whether it was stopped before its end.

    """

    users: int
    seconds: float = 0.0
    completed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    interrupted: bool = False

    def per_second(self, count: float) -> float:
        """Return a count over the run's time; 0 if nothing was received."""
        return count / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Client:
    request: ServingRequest
    sent: float
    last: float = 0.0
    received: int = 0


def run_clients(
    engine: Engine,
    requests: Sequence[ServingRequest],
    users: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda _: None,
    watch: Watch | None = None,
) -> LoadRun:
    """Send all requests, at most `users` at a time, and wait for every answer.

    A token's time is when the step that brought it returned, as a client of the same process sees
    it. Tokens that come in one step came at once: between them lie 0 seconds.

    Args:
        engine: with no requests in it; has none afterwards.
        requests: in the order of sending.
        users: how many wait at the same time, at least 1.
        clock: seconds.
        progress: is told after each step how many answers are complete.
        watch: is told of every request and step.

    Returns:
        What was measured; all until then if Ctrl-C stops it, with `interrupted`.

    """
    if users < 1:
        raise ValueError(f"users must be 1 or more, not {users}.")
    run, waiting = LoadRun(users), list(enumerate(requests))[::-1]
    clients: dict[int, _Client] = {}
    start = clock()
    try:
        while waiting or clients:
            while waiting and len(clients) < users:
                number, request = waiting.pop()
                clients[number] = _Client(request, clock())
                engine.submit(number, request)
                if watch is not None:
                    watch.sent(number, request)
            received = engine.step()
            now = clock()
            run.seconds = now - start if received else run.seconds
            for number, tokens in received:
                _receive(run, clients, number, tokens, now)
            if watch is not None:
                watch.received(now - start, received)
            progress(run.completed)
    except KeyboardInterrupt:
        run.interrupted = True
        engine.abort(list(clients))
    return run


def _receive(
    run: LoadRun, clients: dict[int, _Client], number: int, tokens: int, now: float
) -> None:
    client = clients[number]
    if not client.received:
        run.first_token_s.append(now - client.sent)
    else:
        run.inter_token_s.append(now - client.last)
    run.inter_token_s += [0.0] * (tokens - 1)
    client.received += tokens
    client.last = now
    run.output_tokens += tokens
    if client.received >= client.request.output_tokens:
        run.completed += 1
        run.prompt_tokens += len(client.request.prompt)
        run.latency_s.append(now - client.sent)
        del clients[number]
