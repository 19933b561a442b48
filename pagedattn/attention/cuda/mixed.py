"""Batches of short and long queries, each for its own kernel: one launch after the other.

Schedule. The prefill kernel takes a mixed batch whole. Where decodes and chunks are drawn by turns,
or see about as many keys, who waits for memory runs beside who multiplies. But there a decode is
one program's work for each KV head, and the longest of them can last longer than all else; if keys
are shared out, decodes are merged as well; and over fp8 what they read is widened. Where one launch
takes longer for that, the decode kernel takes the sequences of short queries, whose keys it divides
evenly over the whole GPU, and the prefill kernel the others; its programs begin as the first
kernel's end, unless it shares keys out. Each passes over what is the other's as the device has it,
so that a captured graph follows sequences that begin and end their prompts.

Bytes: as the kernels'. Limit: the memory first, then the matrix units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda import decode, decode_calls, prefill
from pagedattn.attention.cuda.decode_fits import fit_for
from pagedattn.attention.cuda.prefill_choice import (
    PRODUCT_RATE,
    divided,
    merge_seconds,
    splits_of,
)
from pagedattn.attention.cuda.prefill_config import usual_cut
from pagedattn.kv_cache import FP8

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall
    from pagedattn.attention.mixture import Mixture

# fitted to times on an H100, of mixed batches whose lengths are even, log-normal, or even but one,
# which the prefill kernel drew from both ends, and not sorted as it draws up to 192 sequences now;
# the rate at which decode reads is each GPU's own
ITEM_RATE = 27.5e9  # elements of K and V a second, of a decode, by a program of the prefill kernel
# what reading decodes' keys adds to one launch, in times of what the decode kernel takes for it
READ_BESIDE = 0.8  # while chunks multiply, unless keys are shared out
READ_FP8 = 1.3  # over fp8, where they are widened
LATE = 0.5  # of the longest decode that is left when all else is done, where decodes are many
NUM_PROGRAMS = 132
MANY_ITEMS = 4 * NUM_PROGRAMS  # decodes times KV heads, and shares
LAUNCH_SECONDS = 16e-6  # of the beginning and end of one launch more


def pays(call: AttentionCall) -> bool:
    """Whether a call is a mixed batch that two launches take, and in less time than one.

    Chosen by what the host knew when the batch was made, see :class:`Mixture`.
    """
    mixture, cache = call.batch.mixture, call.cache
    if mixture is None or not call.causal or prefill.not_taken(call) is not None:
        return False
    short = short_of(call)
    if decode_calls.not_taken(short) is not None or decode_calls.is_crowded(short):
        return False
    longest, tokens = mixture.longest_short_kv, mixture.short_kv_tokens
    if call.window is not None:
        longest = min(longest, call.window)
        tokens = min(tokens, mixture.num_short * call.window)
    head_elements = 2 * cache.head_size
    head_bytes = head_elements * cache.key.element_size()
    read_rate = fit_for(call.query.device).read_rate
    reading = tokens * cache.num_kv_heads * head_bytes / read_rate
    multiplying = 2 * head_elements * call.query.shape[1] * mixture.visible_pairs / PRODUCT_RATE
    splits, of_long = (splits_of(call, NUM_PROGRAMS, each) for each in (None, mixture))
    two = reading + multiplying + LAUNCH_SECONDS + merge_seconds(call, of_long)
    if splits > 1:
        _, shared_out = divided(call, NUM_PROGRAMS, mixture, usual_cut(call), splits=splits)
        multiplying = max(multiplying, shared_out)
    if cache.dtype == FP8:
        reading *= READ_FP8
    elif splits == 1:
        reading *= READ_BESIDE
    alone = longest * head_elements / ITEM_RATE / splits
    late = LATE * min(1, mixture.num_short * cache.num_kv_heads * splits / MANY_ITEMS)
    one = max(alone, multiplying + reading + late * alone)
    return one + merge_seconds(call, splits) > two


def short_of(call: AttentionCall) -> AttentionCall:
    """Return a mixed call as the decode kernel is cut for it: with the short queries' bounds."""
    mixture = _mixture_of(call)
    batch = replace(
        call.batch,
        max_query_length=mixture.most_short_queries,
        likely_kv_length=mixture.longest_short_kv,
        is_full=False,
    )
    return replace(call, batch=batch)


def _mixture_of(call: AttentionCall) -> Mixture:
    mixture = call.batch.mixture
    if mixture is None:
        raise ValueError("the batch has short queries alone, or long ones alone")
    return mixture


class MixedLaunch:
    """Both kernels' launches for calls of one signature; the call's batch must have a `mixture`.

    Args:
        call: one of them.

    Raises:
        ValueError: it has none.

    """

    def __init__(self, call: AttentionCall) -> None:
        self._long = prefill.PrefillLaunch(call, mixture=_mixture_of(call))
        self._short = decode.DecodeLaunch(short_of(call), among_longer=True)

    def __call__(self, call: AttentionCall) -> None:
        """Launch both on the current stream.

        Args:
            call: of the signature; `out`, and `lse` if given, are written.

        """
        self._short(call)
        self._long(call)

    @property
    def short(self) -> decode.DecodeLaunch:
        """The first launch, over short queries."""
        return self._short

    @property
    def long(self) -> prefill.PrefillLaunch:
        """The second launch, over long queries."""
        return self._long
