"""The requests that the calculator fills memory with: lengths of a named workload or of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pagedattn.config import ConfigError, one_of
from pagedattn.reservation import RequestError, Requests, fill
from pagedattn.workloads import ALPACA, AZURE_CONVERSATION, SHAREGPT, load_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from numpy.typing import NDArray

    from pagedattn.reservation import Filled
    from pagedattn.reservation.base import Reservation

_LENGTHS = {lengths.name: lengths for lengths in (SHAREGPT, ALPACA, AZURE_CONVERSATION)}
_NUM_DRAWN = 20_000
_SMALLEST, _LARGEST = 2.0**-20, 2.0**20


def workload_names() -> tuple[str, ...]:
    """Return the names that :meth:`Workload.named` knows."""
    return tuple(_LENGTHS)


@dataclass(frozen=True)
class Workload:
    """Lengths to draw requests from, before they are scaled and cut to a model's maximum.

    ``prompts`` and ``outputs`` are float64 ``[num_lengths]`` in tokens, one request an element;
    ``max_model_len`` is the most tokens of a request. A request that is running, and has generated
    any part of its output with equal chance, holds ``prompt + output / 2`` tokens on average.
    """

    name: str
    prompts: NDArray[np.float64]
    outputs: NDArray[np.float64]
    max_model_len: int

    @classmethod
    def named(cls, name: str, max_model_len: int, seed: int) -> Workload:
        """Draw 20,000 lengths of a known workload; raise ConfigError for another name."""
        lengths = _LENGTHS[one_of("workload", name, workload_names())]
        prompts, outputs = lengths.sample(np.random.default_rng(seed), _NUM_DRAWN)
        return cls(name, prompts.astype(np.float64), outputs.astype(np.float64), max_model_len)

    @classmethod
    def of_trace(cls, path: str | PathLike[str], max_model_len: int) -> Workload:
        """Take the lengths of a trace; raises :class:`pagedattn.workloads.TraceError`."""
        trace = load_trace(path)
        prompts = np.array([request.prompt_tokens for request in trace], dtype=np.float64)
        outputs = np.array([request.output_tokens for request in trace], dtype=np.float64)
        return cls("trace", prompts, outputs, max_model_len)

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens that a running request holds, cut as :meth:`draw` cuts."""
        prompts, outputs = self._cut
        return float((prompts + outputs / 2).mean())

    @property
    def mean_lengths(self) -> tuple[float, float]:
        """Mean tokens of a prompt, and of an output."""
        prompts, outputs = self._cut
        return float(prompts.mean()), float(outputs.mean())

    @property
    def num_cut(self) -> int:
        """How many of the lengths are of a request above the maximum, and are cut to fit it."""
        return int(self._is_too_long.sum())

    def scaled_to(self, mean_tokens: float) -> Workload:
        """Return the workload with all lengths times one factor, so that ``mean_tokens`` is this.

        Raises :class:`pagedattn.config.ConfigError` where no factor does that, as lengths are cut
        to the model's maximum.
        """
        low, high = _SMALLEST, _LARGEST
        least, most = (self._times(factor).mean_tokens for factor in (low, high))
        if not least < mean_tokens < most:
            raise ConfigError(
                f"mean tokens must be above {least:g} and below {most:g} for requests of at "
                f"most {self.max_model_len} tokens, not {mean_tokens:g}."
            )
        while high / low > 1 + 1e-9:
            middle = (low * high) ** 0.5
            is_less = self._times(middle).mean_tokens < mean_tokens
            low, high = (middle, high) if is_less else (low, middle)
        return self._times(high)

    def draw(self, rng: np.random.Generator, num_requests: int) -> Requests:
        """Draw requests that are all there at the start, with replacement."""
        prompts, outputs = self._cut
        chosen = rng.integers(0, prompts.size, num_requests)
        return Requests(
            np.zeros(num_requests),
            prompts[chosen].astype(np.int64),
            outputs[chosen].astype(np.int64),
        )

    def held_tokens(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.int64]:
        """Draw the tokens that running requests hold, int64 ``[num_requests]``."""
        requests = self.draw(rng, num_requests)
        generated = (rng.random(num_requests) * requests.output_tokens).astype(np.int64)
        return requests.prompt_tokens + generated

    def _times(self, factor: float) -> Workload:
        return Workload(self.name, self.prompts * factor, self.outputs * factor, self.max_model_len)

    @cached_property
    def _whole(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return whole lengths, a prompt and an output of the maximum at most."""
        most = self.max_model_len
        prompts, outputs = (
            np.clip(np.rint(lengths), 1, most) for lengths in (self.prompts, self.outputs)
        )
        return prompts, outputs

    @property
    def _is_too_long(self) -> NDArray[np.bool_]:
        prompts, outputs = self._whole
        return prompts + outputs > self.max_model_len

    @cached_property
    def _cut(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return whole lengths: a prompt that is too long is cut to half, then the output."""
        most = self.max_model_len
        prompts, outputs = self._whole
        prompts = np.where(self._is_too_long, np.minimum(prompts, most // 2), prompts)
        return prompts, np.minimum(outputs, most - prompts)


def fill_with(
    make: Callable[[], Reservation], workload: Workload, num_slots: int, seed: int
) -> Filled:
    """Fill an empty memory with requests that are under way, until one does not fit.

    Draws more requests than fit, however many that are. Raises
    :class:`pagedattn.reservation.RequestError` if a request does not fit alone.
    """
    count = 16 + int(2 * num_slots / workload.mean_tokens)
    while True:
        requests = workload.draw(np.random.default_rng(seed), count)
        try:
            return fill(make(), requests, seed=seed)
        except RequestError:
            raise
        except ValueError:  # all of them fit
            count *= 2
