"""One call of attention in parts: gather, attend twice, merge."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from pagedattn.attention.cascade.costs import GPU, Layer
from pagedattn.attention.cascade.plan import KeptBatches

if TYPE_CHECKING:
    from pagedattn.attention.batch import AttentionBatch
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.cascade.plan import CascadePlan
    from pagedattn.attention.registry import Implementation


class PartsImplementation(Protocol):
    """What an implementation needs beside `attention` for shared blocks to be read once.

    Its `attention` takes `causal=False`, and a float32 `out` whatever the query's type is; for
    these calls `unsupported` is not asked. The batch of the parts has sequences without queries or
    tokens, `slots` that mean nothing, and more query rows than the last of `query_starts` says:
    those are nobody's and may be left as they are.
    """

    def gather_rows(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return `query[rows]`, contiguous; anything where a row is -1."""

    def merge_parts(
        self,
        call: AttentionCall,
        own: tuple[torch.Tensor, torch.Tensor],
        parts: tuple[torch.Tensor, torch.Tensor],
        parts_of_token: torch.Tensor,
    ) -> None:
        """Write `call.out`, and `call.lse` if given, from partial results; join `call.sinks`.

        Args:
            call: the whole one.
            own: float32 result [num_query_tokens, num_query_heads, head_size] and log-sum-exp
                [num_query_tokens, num_query_heads] over each sequence's own blocks.
            parts: the same over shared blocks, [num_rows, ...].
            parts_of_token: int32 [num_query_tokens, max_parts], rows of `parts`, then -1.

        """


def plan_of(implementation: Implementation, call: AttentionCall) -> CascadePlan | None:
    """Return how to read the batch's shared blocks once, or None to read them for each sequence.

    None where the implementation makes no parts, where nothing is shared or it does not pay, and
    where scores depend on positions: under a window or ALiBi. On a CPU it does not pay: PyTorch
    gathers every key anyway.
    """
    sharing = call.batch.sharing
    if (
        sharing is None
        or sharing.is_idle
        or call.window is not None
        or call.alibi_slopes is not None
        or not hasattr(implementation, "merge_parts")
    ):
        return None
    cache = call.cache
    device = call.query.device
    if device.type != "cuda" and not sharing.always:
        return None
    layer = Layer(
        num_query_heads=call.query.shape[1],
        num_kv_heads=cache.num_kv_heads,
        head_size=cache.head_size,
        kv_bytes=cache.key.element_size(),
        processors=_processors(device),
        costs=None if sharing.always else GPU,
    )
    return sharing.plan(layer, call.batch)


def attend_in_parts(implementation: Implementation, call: AttentionCall, plan: CascadePlan) -> None:
    """Write what `implementation.attention(call)` would, reading shared blocks once.

    Memory: for each query token and part it is in, its query, and its result in float32; one such
    result more for each query token.
    """
    steps: PartsImplementation = implementation  # type: ignore[assignment]
    query = steps.gather_rows(call.query, plan.tensors.rows)
    parts = _partial(query)
    own = _partial(call.query)
    of_parts, of_own = _kept_batches(call.batch, plan)
    in_parts = replace(call, batch=of_parts, query=query, sinks=None, causal=False)
    implementation.attention(replace(in_parts, out=parts[0], lse=parts[1]))
    implementation.attention(replace(call, batch=of_own, out=own[0], lse=own[1], sinks=None))
    steps.merge_parts(call, own, parts, plan.tensors.parts_of_token)


def _partial(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)


def _kept_batches(
    batch: AttentionBatch, plan: CascadePlan
) -> tuple[AttentionBatch, AttentionBatch]:
    """Return both batches, which are made once for all layers of a step."""
    schedule = plan.schedule
    stays = batch.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    kept = plan.kept
    if kept is None or kept.schedule is not schedule or kept.batch() is not batch:
        plan.kept = kept = KeptBatches(schedule, weakref.ref(batch), {})
    if stays not in kept.made:
        kept.made[stays] = _batches(batch, plan, stays=stays)
    return kept.made[stays]


def _batches(
    batch: AttentionBatch, plan: CascadePlan, *, stays: bool
) -> tuple[AttentionBatch, AttentionBatch]:
    """Make the batch of the parts, and that of what is each sequence's own.

    Both count with the batch's own arrivals, since they are launched one after the other. Lengths
    are bounded by those of now, but if that `stays`: in a graph that is being captured, which later
    steps replay.
    """
    made, schedule = plan.tensors, plan.schedule
    longest_part = int(schedule.lengths.max(initial=0))
    longest_own = int(schedule.own_lengths.max(initial=0))
    of_parts = replace(
        batch,
        block_tables=made.tables,
        kv_lengths=made.lengths,
        query_starts=made.starts,
        slots=batch.slots.new_empty(1).expand(made.rows.shape[0]),
        # what a captured graph holds for has room for other batches too
        max_query_length=plan.max_queries if batch.device.type == "cuda" else schedule.most_queries,
        max_kv_length=batch.max_kv_length if stays else longest_part,
        likely_kv_length=longest_part,
        is_full=False,
        likely_shared=False,
        known_lengths=None,
        sharing=None,
    )
    of_own = replace(
        batch,
        block_tables=made.own_tables,
        kv_lengths=made.own_lengths,
        max_kv_length=batch.max_kv_length if stays else longest_own,
        likely_kv_length=longest_own,
        is_full=False,
        likely_shared=False,
        known_lengths=None,
        sharing=None,
    )
    return of_parts, of_own


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
