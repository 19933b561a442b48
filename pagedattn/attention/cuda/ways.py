"""All ways in which the kernels can take a call, so that the one they choose can be checked.

Which kernel a call goes to, and how it is cut, is chosen by estimates whose rates were fitted to
times. Here a call's other ways are made, to be timed beside the chosen one; see
`pagedattn.benchmarking.choices`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda import decode_calls, launcher_of, prefill
from pagedattn.attention.cuda.decode import DecodeLaunch
from pagedattn.attention.cuda.decode_division import CLUSTERS, NO_LIMIT
from pagedattn.attention.cuda.mixed import MixedLaunch, short_of
from pagedattn.attention.cuda.module import num_multiprocessors
from pagedattn.attention.cuda.prefill import PrefillLaunch
from pagedattn.attention.cuda.prefill_choice import prices_of, ways_to_divide
from pagedattn.attention.cuda.prefill_config import usual_cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.attention.call import AttentionCall

    KernelLaunch = DecodeLaunch | PrefillLaunch | MixedLaunch

SHARES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
MOST_SHARED_BYTES = 1 << 30  # of shares' results in float32
FEWEST_COLUMNS = 8  # queries times heads of a group: of no more, none is prefill's


def name_of(launch: KernelLaunch, call: AttentionCall) -> str:
    """Return what tells a launch from others of the same call: its kernel, and how it is cut.

    >>> name_of(DecodeLaunch(call), call)  # doctest: +SKIP
    'decode: 16 ranges, 8 tiles of 64'
    """
    if isinstance(launch, MixedLaunch):
        return f"{name_of(launch.short, short_of(call))}; {name_of(launch.long, call)}"
    if isinstance(launch, PrefillLaunch):
        cut = launch.cut
        words = [f"tiles of {cut.rows} by {cut.kv_tile}"]
        if cut.head_parts > 1:
            words.append(f"heads in {cut.head_parts} parts")
        if launch.splits > 1:
            words.append(f"keys in {launch.splits} shares")
        return f"prefill: {', '.join(words)}"
    config = launch.config
    words = [f"{launch.num_ranges} ranges", f"{config.stages} tiles of {config.tile}"]
    if config.programs > 1:
        words.append(f"{config.programs} programs")
    if config.cluster > 1:
        words.append(f"clusters of {config.cluster}")
    elif keeps_whole(launch, call):
        words.append("whole rows")
    return f"decode: {', '.join(words)}"


def keeps_whole(launch: DecodeLaunch, call: AttentionCall) -> bool:
    """Whether a launch cuts no row, where sequences are as long as the host knows them to be."""
    if not decode_calls.is_even(call):
        return launch.config.keeps_whole
    _, row_bytes = decode_calls.longest_row(call)
    return row_bytes <= launch.most_whole_bytes


def chosen_way(call: AttentionCall) -> KernelLaunch:
    """Return the launch that the implementation `cuda` chooses.

    Raises:
        ValueError: the call goes to Triton's kernels.

    """
    launcher = launcher_of(call)
    if launcher is None:
        raise ValueError(f"the CUDA kernels cannot take {decode_calls.not_taken(call)}")
    return launcher(call)


def ways_of(call: AttentionCall) -> dict[str, KernelLaunch]:
    """Return launches of a call, by what `name_of` says of them: the chosen one first.

    Of decode they differ in programs on a multiprocessor, in clusters, and in whether rows are cut;
    of prefill in tiles, in parts of heads, and in shares of keys; mixed batches have one launch and
    two. Each is compiled.

    Raises:
        ValueError: the call goes to Triton's kernels.

    """
    found: dict[str, KernelLaunch] = {}
    for launch in _launches(call):
        found.setdefault(name_of(launch, call), launch)
    return found


def _launches(call: AttentionCall) -> Iterator[KernelLaunch]:
    yield chosen_way(call)
    by_decode = decode_calls.not_taken(call) is None
    if by_decode:
        yield from _by_decode(call)
    if prefill.not_taken(call) is not None:
        return
    if by_decode and decode_calls.columns_of(call) <= FEWEST_COLUMNS:
        return
    yield from _by_prefill(call)
    if call.causal and call.batch.mixture is not None:
        short = short_of(call)
        if decode_calls.not_taken(short) is None:
            yield MixedLaunch(call)


def _by_decode(call: AttentionCall) -> Iterator[DecodeLaunch]:
    num_programs, is_even = num_multiprocessors(call.query.device), decode_calls.is_even(call)
    heads, ranges, _ = decode_calls.divide(call, num_programs, 1)
    for programs in (1, 2):
        config = decode_calls.config_for(call, num_programs, heads, ranges, programs=programs)
        for is_whole in (False, True):
            yield DecodeLaunch(
                call,
                replace(config, most_whole_bytes=NO_LIMIT if is_whole else 0)
                if is_even
                else replace(config, keeps_whole=is_whole),
            )
    for cluster in CLUSTERS if is_even else ():
        try:
            heads, ranges, _ = decode_calls.divide(call, num_programs, cluster)
        except ValueError:  # there are too many rows
            continue
        config = decode_calls.config_for(call, num_programs, heads, ranges, programs=1)
        yield DecodeLaunch(call, replace(config, cluster=cluster))


def _by_prefill(call: AttentionCall) -> Iterator[PrefillLaunch]:
    for cut in prices_of(call) or (usual_cut(call),):
        for way in ways_to_divide(call, cut):
            yield PrefillLaunch(call, cut=way, splits=1)
    if not call.causal:
        return
    tiles = -(-call.batch.expected_kv_length // usual_cut(call).kv_tile)
    for splits in SHARES:
        if splits <= tiles and 4 * call.out.numel() * splits <= MOST_SHARED_BYTES:
            yield PrefillLaunch(call, splits=splits)
