"""Attention shapes by what their names say: any decode step, verification, prompt or chunk."""

from __future__ import annotations

import re

from pagedattn.workloads.attention_shape import AttentionShape

_LENGTH = r"[1-9]\d*k?"
_NUMBER = r"[1-9]\d*"
_NAME = re.compile(
    rf"(?:(?:decode|verify(?P<drafts>{_NUMBER}))-B(?P<batch>{_NUMBER})-(?P<context>{_LENGTH})"
    rf"|prefill-(?:(?P<prompts>{_NUMBER})x)?(?P<prompt>{_LENGTH})"
    rf"|chunk-(?P<chunk>{_LENGTH})-over-(?P<whole>{_LENGTH}))"
    rf"(?:-h(?P<heads>{_NUMBER})x(?P<kv_heads>{_NUMBER}))?(?:-d(?P<head_size>{_NUMBER}))?"
    rf"(?:-block(?P<block_size>{_NUMBER}))?"
    rf"(?:-window(?P<window>{_LENGTH}))?(?:-cap(?P<soft_cap>{_NUMBER}))?"
    rf"(?P<alibi>-alibi)?(?P<sinks>-sinks)?(?P<fp8>-fp8)?"
)
GRAMMAR = (
    "decode-B16-2k, verify4-B16-2k, prefill-8k, prefill-16x1k or chunk-512-over-8k, and behind it "
    "as needed, in this order, -h28x4, -d64, -block32, -window1k, -cap50, -alibi, -sinks, -fp8"
)
"""Examples of all that a name can say, in the order in which it does."""


def shape_of_name(name: str) -> AttentionShape | None:
    """Return the shape that a name says, or None if it is none of this grammar.

    ``decode-B16-2k-h28x4`` is a decode step of 16 sequences of 2048 tokens each, 28 query heads on
    4 KV heads. A ``k`` is 1024 tokens. What a name leaves out is 32 query heads on 8 KV heads
    (``-h``), heads of 128 (``-d``), blocks of 16 (``-block``), none of a layer's options, which
    are a window of so many tokens (``-window1k``), a soft cap, a whole number (``-cap50``), ALiBi
    (``-alibi``) and attention sinks (``-sinks``), and bfloat16, where ``-fp8`` is a cache of fp8.
    A name says them in this order. ``verify4`` has 4 query tokens at each sequence's end,
    ``prefill-16x1k`` 16 prompts of 1024, and ``chunk-512-over-8k`` the last 512 tokens of a prompt
    of 8192.

    Raises:
        ConfigError: it says what cannot be, such as 10 heads on 4.

    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    said = found.groupdict()
    if said["prompt"]:
        count, queries, context = int(said["prompts"] or 1), said["prompt"], said["prompt"]
    elif said["chunk"]:
        count, queries, context = 1, said["chunk"], said["whole"]
    else:
        count, queries, context = int(said["batch"]), said["drafts"] or "1", said["context"]
    return AttentionShape(
        name,
        (_tokens(queries),) * count,
        (_tokens(context),) * count,
        num_query_heads=int(said["heads"] or 32),
        num_kv_heads=int(said["kv_heads"] or 8),
        head_size=int(said["head_size"] or 128),
        block_size=int(said["block_size"] or 16),
        kv_dtype="float8_e4m3" if said["fp8"] else None,
        window=_tokens(said["window"]) if said["window"] else None,
        soft_cap=float(said["soft_cap"]) if said["soft_cap"] else None,
        alibi=said["alibi"] is not None,
        sinks=said["sinks"] is not None,
    )


def _tokens(length: str) -> int:
    return int(length.removesuffix("k")) * (1024 if length.endswith("k") else 1)
