"""The load: prompts as token ids, and how many tokens each request generates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.workloads import MOONCAKE_BLOCK_TOKENS, TraceError, load_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from numpy.typing import NDArray

FIRST_TOKEN = 3  # smaller ids are often special: padding, begin, end


class LoadError(ValueError):
    """A load cannot be made; the message is one sentence for the person who asked for it."""


@dataclass(frozen=True, slots=True)
class ServingRequest:
    """One request: `prompt` is int64 [num_prompt_tokens], and `output_tokens` are generated."""

    prompt: NDArray[np.int64]
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens at its end."""
        return len(self.prompt) + self.output_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in their order of arrival; `name` and `note` say to a reader what they are."""

    name: str
    requests: tuple[ServingRequest, ...]
    note: str

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens to generate."""
        return sum(request.output_tokens for request in self.requests)


def synthetic_load(
    num_requests: int,
    *,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocab_size: int,
    max_model_len: int,
    shared_prefix: int = 0,
    seed: int = 0,
) -> Load:
    """Random tokens; lengths uniform between two bounds, both included.

    Args:
        num_requests: how many.
        prompt_tokens: shortest and longest prompt, without the shared prefix.
        output_tokens: fewest and most tokens to generate.
        vocab_size: tokens are ids below it.
        max_model_len: no request may be longer.
        shared_prefix: tokens that all prompts begin with.
        seed: of everything random.

    Raises:
        LoadError: the longest request would not fit the model, or a bound is not at least 1.

    """
    if num_requests < 1 or min(prompt_tokens[0], output_tokens[0]) < 1 or shared_prefix < 0:
        raise LoadError(
            f"a load needs 1 request or more with 1 token or more in and out, not {num_requests} "
            f"with {prompt_tokens[0]} and {output_tokens[0]}."
        )
    longest = shared_prefix + prompt_tokens[1] + output_tokens[1]
    if longest > max_model_len:
        raise LoadError(
            f"the longest request has {longest} tokens ({shared_prefix} shared, {prompt_tokens[1]} "
            f"in, {output_tokens[1]} out); the model takes {max_model_len}."
        )
    rng = np.random.default_rng(seed)
    prefix = rng.integers(FIRST_TOKEN, vocab_size, shared_prefix)
    ins = rng.integers(prompt_tokens[0], prompt_tokens[1] + 1, num_requests)
    outs = rng.integers(output_tokens[0], output_tokens[1] + 1, num_requests)
    requests = tuple(
        ServingRequest(
            np.concatenate([prefix, rng.integers(FIRST_TOKEN, vocab_size, tokens)]), int(out)
        )
        for tokens, out in zip(ins.tolist(), outs.tolist(), strict=True)
    )
    shared = f", the first {shared_prefix} of each prompt shared" if shared_prefix else ""
    note = (
        f"{prompt_tokens[0]} to {prompt_tokens[1]} tokens in, {output_tokens[0]} to "
        f"{output_tokens[1]} out{shared}"
    )
    return Load("synthetic", requests, note)


def trace_load(
    path: str | PathLike[str],
    num_requests: int,
    *,
    kind: str,
    vocab_size: int,
    max_model_len: int,
    max_output_tokens: int | None = None,
    seed: int = 0,
) -> Load:
    """The first requests of an Azure or Mooncake trace, in its lengths; arrivals are not kept.

    Mooncake's hashes stand for 512 tokens each: prompts that name the same one have the same
    tokens there, so a prefix cache finds what it would have found.

    Args:
        path: the trace.
        num_requests: how many at most.
        kind: ``azure`` or ``mooncake``, which the file must be.
        vocab_size: tokens are ids below it.
        max_model_len: longer requests lose the end of their prompts.
        max_output_tokens: more are not generated.
        seed: of the tokens.

    Raises:
        LoadError: the file cannot be read, or is the other kind.

    """
    try:
        trace = load_trace(path)[:num_requests]
    except TraceError as error:
        raise LoadError(str(error)) from None
    if (kind == "mooncake") != bool(trace[0].prefix_hashes):
        raise LoadError(f"{Path(path).name} is no {kind} trace.")
    rng = np.random.default_rng(seed)
    blocks: dict[int, NDArray[np.int64]] = {}
    requests = []
    for request in trace:
        for key in request.prefix_hashes:
            if key not in blocks:
                blocks[key] = rng.integers(FIRST_TOKEN, vocab_size, MOONCAKE_BLOCK_TOKENS)
        if request.prefix_hashes:
            prompt = np.concatenate([blocks[key] for key in request.prefix_hashes])
            prompt = prompt[: request.prompt_tokens]
        else:
            prompt = rng.integers(FIRST_TOKEN, vocab_size, request.prompt_tokens)
        requests.append((prompt, request.output_tokens))
    return _fitted(
        kind, f"lengths of {Path(path).name}", requests, max_model_len, max_output_tokens
    )


def sharegpt_load(
    path: str | PathLike[str],
    num_requests: int,
    *,
    encode: Callable[[str], Sequence[int]],
    max_model_len: int,
    max_output_tokens: int | None = None,
) -> Load:
    """The first turns of ShareGPT's conversations: what was asked, and as many tokens as answered.

    Args:
        path: JSON, a list of objects with ``conversations``, each a list of ``{"value": text}``.
        num_requests: how many at most; conversations without an answer are left out.
        encode: the model's tokenizer, text to token ids.
        max_model_len: longer requests lose the end of their prompts.
        max_output_tokens: more are not generated.

    Raises:
        LoadError: the file cannot be read or holds no conversation with an answer.

    """
    requests = []
    for asked, answered in _conversations(Path(path)):
        prompt, output = (np.array(encode(text), np.int64) for text in (asked, answered))
        if len(prompt) and len(output):
            requests.append((prompt, len(output)))
        if len(requests) == num_requests:
            break
    if not requests:
        raise LoadError(f"{Path(path).name} holds no conversation with an answer.")
    note = f"first turns of {Path(path).name}"
    return _fitted("sharegpt", note, requests, max_model_len, max_output_tokens)


def check_file(path: str | PathLike[str], kind: str) -> None:
    """Read a file of requests as a load would, before an engine is started for it.

    Args:
        path: the file.
        kind: ``sharegpt``, ``azure`` or ``mooncake``.

    Raises:
        LoadError: as `sharegpt_load` and `trace_load` do.

    """
    if kind == "sharegpt":
        sharegpt_load(path, 1, encode=lambda text: [0] * bool(text), max_model_len=2)
    else:
        trace_load(path, 1, kind=kind, vocab_size=FIRST_TOKEN + 1, max_model_len=2)


def _conversations(path: Path) -> list[tuple[str, str]]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LoadError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name} must hold JSON, but it does not ({error}).") from None
    if not isinstance(content, list):
        raise LoadError(f"{path.name} must hold a list of conversations.")
    found = []
    for entry in content:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise LoadError(f"{path.name} must hold objects with a list of conversations.")
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if len(texts) == 2 and all(isinstance(text, str) for text in texts):
            found.append((str(texts[0]), str(texts[1])))
    return found


def _fitted(
    name: str,
    note: str,
    requests: list[tuple[NDArray[np.int64], int]],
    max_model_len: int,
    max_output_tokens: int | None,
) -> Load:
    """Cut outputs to the most allowed, then prompts to what is left of the model's length."""
    fitted, num_cut = [], 0
    for prompt, output in requests:
        kept = min(output, max_output_tokens or output, max_model_len - 1)
        room = max_model_len - kept
        num_cut += len(prompt) > room or kept < output
        fitted.append(ServingRequest(prompt[:room], kept))
    if num_cut:
        note += f", {num_cut} of {len(fitted)} cut to fit"
    return Load(name, tuple(fitted), note)
