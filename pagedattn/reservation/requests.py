"""Streams of requests: when each comes, and how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pagedattn.workloads import Request, RequestLengths


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival.

    Attributes:
        arrival_s: float64 [num_requests], seconds from the start, never falling.
        prompt_tokens: int64 [num_requests], each at least 1.
        output_tokens: int64 [num_requests], each at least 1.

    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = self.arrival_s.size
        if self.prompt_tokens.size != count or self.output_tokens.size != count:
            raise ValueError(
                f"{count} arrivals were given for {self.prompt_tokens.size} prompts and "
                f"{self.output_tokens.size} outputs"
            )
        if count and (self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1):
            raise ValueError("every prompt and every output needs at least 1 token")
        if (np.diff(self.arrival_s) < 0).any():
            raise ValueError("requests must be in order of arrival")

    def __len__(self) -> int:
        return self.arrival_s.size

    @classmethod
    def draw(
        cls,
        lengths: RequestLengths,
        rng: np.random.Generator,
        num_requests: int,
        *,
        rate: float = float("inf"),
        max_model_len: int,
    ) -> Self:
        """Draw requests with Poisson arrivals (SOSP '23, §6.1).

        A request that would be longer than the model allows has its prompt cut to half of the
        maximum, if it is longer, and then its output to what is left.

        Args:
            lengths: distributions of prompt and output lengths.
            rng: source of randomness.
            num_requests: how many.
            rate: requests a second; infinite means that all are there at the start.
            max_model_len: most tokens of a request, at least 2.

        Raises:
            ValueError: the rate is not above 0, or the model's maximum is below 2.

        """
        if not rate > 0:
            raise ValueError(f"rate is {rate}; it must be above 0 requests a second")
        gaps = rng.exponential(1 / rate, num_requests) if rate < float("inf") else 0.0
        prompts, outputs = lengths.sample(rng, num_requests)
        arrivals = np.cumsum(np.broadcast_to(gaps, num_requests))
        return cls(arrivals, *_cut(prompts, outputs, max_model_len))

    @classmethod
    def of_trace(cls, trace: Iterable[Request], *, max_model_len: int) -> Self:
        """Take the requests of a trace (`pagedattn.workloads.load_trace`), cut as in `draw`."""
        rows = [
            (request.arrival_s, request.prompt_tokens, request.output_tokens) for request in trace
        ]
        arrivals, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
        return cls(arrivals.astype(np.float64), *_cut(prompts, outputs, max_model_len))


def _cut(
    prompts: NDArray[np.int64], outputs: NDArray[np.int64], max_model_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if max_model_len < 2:
        raise ValueError(f"max_model_len is {max_model_len}; it must be at least 2")
    too_long = prompts + outputs > max_model_len
    prompts = np.where(too_long, np.minimum(prompts, max_model_len // 2), prompts)
    return prompts, np.minimum(outputs, max_model_len - prompts)
