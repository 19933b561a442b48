"""Gather and merge in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall


def gather_rows(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `query[rows]`; the first row where one is -1."""
    return query.index_select(0, rows.clamp(min=0))


def merge_parts(
    call: AttentionCall,
    own: tuple[torch.Tensor, torch.Tensor],
    parts: tuple[torch.Tensor, torch.Tensor],
    parts_of_token: torch.Tensor,
) -> None:
    """Write the result and the log-sum-exp; see `PartsImplementation`.

    The sum over all keys is that of the partial results, each times exp(its log-sum-exp), which
    with sinks is divided by one more term.
    """
    places = parts_of_token.long()
    if not places.is_cuda:  # the host may look which columns are used
        places = places[:, (places >= 0).any(0)]
    missing = places < 0
    # [num_query_tokens, 1 + parts, num_query_heads]
    lse = torch.cat(
        [
            own[1][:, None],
            parts[1][places.clamp(min=0)].masked_fill(missing[..., None], float("-inf")),
        ],
        dim=1,
    )
    peak = lse.amax(1)
    if call.sinks is not None:
        peak = torch.maximum(peak, call.sinks)
    peak = peak.masked_fill(peak == float("-inf"), 0)  # where nothing is seen
    weights = torch.exp(lse - peak[:, None])
    total = weights.sum(1)
    if call.sinks is not None:
        total += torch.exp(call.sinks - peak)
    if call.lse is not None:
        call.lse.copy_(peak + total.log())
    weights /= total.masked_fill(total == 0, 1)[:, None]
    result = own[0] * weights[:, 0, :, None]
    for column in range(places.shape[1]):
        # a row that is none's was not written, and 0 times NaN is NaN
        part = parts[0][places[:, column].clamp(min=0)]
        part.masked_fill_(missing[:, column, None, None], 0)
        result += part * weights[:, 1 + column, :, None]
    call.out.copy_(result)
