"""A sequence: the tokens of a prompt and those generated after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    import numpy.typing as npt

_MAX_TOKEN_ID = int(np.iinfo(np.int64).max)


class Sequence:
    """One prompt and its output, as token ids; it knows nothing about where their K and V lie.

    The arrays it returns are int64, read-only, and stay as they were when the sequence grows.
    Raises ``ValueError`` for an empty prompt and for a token id that is not an integer, 0 or more.

        >>> sequence = Sequence([5, 6, 7])
        >>> sequence.append(8)
        >>> sequence.token_ids.tolist()
        [5, 6, 7, 8]
    """

    __slots__ = ("_buffer", "_num_prompt_tokens", "_num_tokens")

    def __init__(self, prompt_token_ids: SequenceOf[int] | npt.NDArray[np.integer]) -> None:
        self._buffer = _checked_prompt(prompt_token_ids)  # [capacity]; the first num_tokens count
        self._num_prompt_tokens = self._num_tokens = len(self._buffer)

    @property
    def num_tokens(self) -> int:
        """How many tokens the prompt and the output have together."""
        return self._num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens the prompt has: 1 or more."""
        return self._num_prompt_tokens

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The prompt's and the output's token ids, ``[num_tokens]``."""
        return self._read_only(0, self._num_tokens)

    @property
    def prompt_token_ids(self) -> npt.NDArray[np.int64]:
        """The prompt's token ids, ``[num_prompt_tokens]``."""
        return self._read_only(0, self._num_prompt_tokens)

    @property
    def output_token_ids(self) -> npt.NDArray[np.int64]:
        """The appended token ids, ``[num_output_tokens]``."""
        return self._read_only(self._num_prompt_tokens, self._num_tokens)

    def append(self, token_id: int) -> None:
        """Add one generated token; raise ``ValueError``, unchanged, if it is not a token id."""
        token_id = _checked_token_id(token_id)
        if self._num_tokens == len(self._buffer):
            grown = np.empty(2 * len(self._buffer), dtype=np.int64)
            grown[: self._num_tokens] = self._buffer
            self._buffer = grown
        self._buffer[self._num_tokens] = token_id
        self._num_tokens += 1

    def fork(self) -> Sequence:
        """Return a sequence with the same prompt and output that then goes its own way."""
        child = Sequence.__new__(Sequence)
        child._buffer = self._buffer.copy()
        child._num_prompt_tokens = self._num_prompt_tokens
        child._num_tokens = self._num_tokens
        return child

    def _read_only(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        view = self._buffer[start:stop]
        view.flags.writeable = False
        return view


def _checked_token_id(token_id: object) -> int:
    if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
        raise ValueError(f"a token id must be an integer, not {token_id!r}.")
    if not 0 <= token_id <= _MAX_TOKEN_ID:
        raise ValueError(f"a token id must be 0 to {_MAX_TOKEN_ID}, not {token_id}.")
    return int(token_id)


def _checked_prompt(token_ids: SequenceOf[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if len(token_ids) == 0:
        raise ValueError("a prompt must have 1 token or more, not 0.")
    if isinstance(token_ids, np.ndarray) and token_ids.ndim == 1 and token_ids.dtype.kind in "iu":
        _checked_token_id(token_ids.min())
        _checked_token_id(token_ids.max())
        return token_ids.astype(np.int64)
    return np.array([_checked_token_id(token_id) for token_id in token_ids], dtype=np.int64)
