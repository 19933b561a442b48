"""Blocks that sequences of a batch share, read once: parts of attention, and their merge.

    page table ─▶ tree of shared blocks ─▶ schedule ─▶ plan ─▶ gather, attend twice, merge
                  pagedattn.shared_prefix   arrays      tensors

A *part* is a range of blocks that two or more sequences share, and the query tokens of all of them.
Every query of a part sees all of its keys, so the parts of all levels are one ordinary batch of
paged attention without causality. What is left to each sequence behind the blocks of its parts is
another, causal as ever. Both give float32 and the log-sum-exp, which are merged in fixed order.

Source: Juravsky et al. 2024 (Hydragen) and FlashInfer's cascade (Ye et al. 2024) for the merge of
attention over a shared prefix and over own tokens; ChunkAttention (Ye et al. 2024) for the tree.
"""

from pagedattn.attention.cascade.plan import CascadePlan
from pagedattn.attention.cascade.run import attend_in_parts, plan_of
from pagedattn.attention.cascade.sharing import SharedNow, Sharing

__all__ = ["CascadePlan", "SharedNow", "Sharing", "attend_in_parts", "plan_of"]
