"""Batches of short and long queries, each for its own kernel: one launch after the other.

Schedule. The prefill kernel takes a mixed batch whole: who waits for memory runs beside who
multiplies, and the longest decodes' keys are shared out where they would last longer than all else.
But what shares give is written and merged, and over fp8 what decodes read is widened. Where one
launch takes longer for that, the decode kernel takes the sequences of short queries, whose keys it
divides evenly over the whole GPU, and the prefill kernel the others; its programs begin as the
first kernel's end, unless it shares keys out. Each passes over what is the other's as the device
has it, so that a captured graph follows sequences that begin and end their prompts.

Bytes: as the kernels'. Limit: the memory first, then the matrix units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda import decode, decode_calls, prefill
from pagedattn.attention.cuda.prefill_choice import way_of
from pagedattn.attention.cuda.prefill_estimate import Work, read_seconds
from pagedattn.attention.known_lengths import short_and_long

if TYPE_CHECKING:
    from pagedattn.attention.call import AttentionCall

# fitted as `prefill_estimate` is
DECODE_SECONDS = 2.5e-6  # of the decode kernel, besides reading K and V,
LAUNCH_SECONDS = 3.3e-6  # and of the second launch, besides what it takes alone


def pays(call: AttentionCall) -> bool:
    """Whether a call is a mixed batch that two launches take, and in less time than one.

    Chosen by what the host knew when the batch was made, see :class:`KnownLengths`.
    """
    known = call.batch.known_lengths
    if known is None or not known.is_mixed or not call.causal:
        return False
    if prefill.not_taken(call) is not None:
        return False
    short = short_of(call)
    if decode_calls.not_taken(short) is not None or decode_calls.is_crowded(short):
        return False
    work = Work.of(call)
    two = DECODE_SECONDS + read_seconds(work, work.sequences[0], widened=False) + LAUNCH_SECONDS
    return way_of(work).seconds > two + way_of(Work.of(call, long_only=True)).seconds


def short_of(call: AttentionCall) -> AttentionCall:
    """Return a mixed call as the decode kernel is cut for it: with the short queries' bounds.

    Raises:
        ValueError: the batch has short queries alone, or long ones alone, as far as is known.

    """
    known, _ = short_and_long(call.batch.known_lengths)
    batch = replace(
        call.batch,
        max_query_length=known.most_queries,
        likely_kv_length=round(known.most_kv * call.batch.expected_kv_length),
        is_full=False,
        known_lengths=None,
    )
    return replace(call, batch=batch)


class MixedLaunch:
    """Both kernels' launches for calls of one signature, whose batch is known to be mixed.

    Args:
        call: one of them.

    Raises:
        ValueError: it is not.

    """

    def __init__(self, call: AttentionCall) -> None:
        self._short = decode.DecodeLaunch(short_of(call), among_longer=True)
        self._long = prefill.PrefillLaunch(call, long_only=True)

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
