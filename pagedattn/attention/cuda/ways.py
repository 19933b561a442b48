"""Ways in which the kernels can take a call, so that the one they choose can be checked.

Which kernel a call goes to, and how it is cut, is chosen by estimates whose rates were fitted to
times. Here a call's other ways are made, to be timed beside the chosen one; see
`pagedattn.benchmarking.choices`. Varied is what estimates decide. Of each number of programs on a
multiprocessor, decode's tiles are those that are chosen for it, for rows that are whole and for
those that are cut; where keys are shared out, prefill has its usual tiles, and heads in the parts
that are chosen; two launches are as they are chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pagedattn.attention.cuda import decode_calls, decode_division, launcher_of, prefill
from pagedattn.attention.cuda.decode import DecodeLaunch
from pagedattn.attention.cuda.decode_division import CLUSTERS, MIN_TILE, WholeRows
from pagedattn.attention.cuda.mixed import MixedLaunch, short_of
from pagedattn.attention.cuda.module import num_multiprocessors
from pagedattn.attention.cuda.prefill import PrefillLaunch
from pagedattn.attention.cuda.prefill_choice import MOST_SHARED_BYTES, ways_to_divide
from pagedattn.attention.cuda.prefill_estimate import Work, prices_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.attention.call import AttentionCall

    KernelLaunch = DecodeLaunch | PrefillLaunch | MixedLaunch

SHARES = (2, 3, 4, 6, 8, 12, 16, 24, 32)


def name_of(launch: KernelLaunch, call: AttentionCall) -> str:
    """Return what tells a launch from others of the same call: its kernel, and how it is cut.

    For example ``decode: 16 ranges, 4 tiles of 64, whole rows, 1 a range``: that many are in shared
    memory, of as many tokens.
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
        if decode_calls.has_even_rows(call):
            of_range, more = launch.whole.of_range, launch.whole.more
            words[-1] += f", {max(1, of_range)} a range"
            if of_range and more:
                words[-1] += f" and one more in {more}"
    if config.aligns:
        words.append("rows begin with a range")
    return f"decode: {', '.join(words)}"


def keeps_whole(launch: DecodeLaunch, call: AttentionCall) -> bool:
    """Whether a launch cuts no row, where sequences are as long as the host knows them to be."""
    row = decode_calls.longest_row(call)
    if not decode_calls.has_even_rows(call):
        num_programs = num_multiprocessors(call.query.device)
        return decode_calls.stays_whole(call, launch.config, num_programs)
    return row[1] <= launch.whole.most_bytes


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

    Of decode they differ in programs on a multiprocessor, in clusters and how many a row has, in
    whether rows are cut, and in how whole ones are divided; of prefill in tiles, in parts of heads,
    and in shares of keys; mixed batches have one launch and two. Each is compiled.

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
    if by_decode and decode_calls.columns_of(call) <= decode_calls.FEW_COLUMNS:
        return
    yield from _by_prefill(call)
    known = call.batch.known_lengths
    if call.causal and known is not None and known.is_mixed:
        short = short_of(call)
        if decode_calls.not_taken(short) is None:
            yield MixedLaunch(call)


def _by_decode(call: AttentionCall) -> Iterator[DecodeLaunch]:
    num_programs = num_multiprocessors(call.query.device)
    kv_length, _ = decode_calls.longest_row(call)
    heads, ranges, _ = decode_calls.divide(call, num_programs, 1)
    for programs in (1, 2):
        if decode_calls.has_even_rows(call):
            config = decode_calls.config_for(call, num_programs, heads, ranges, programs=programs)
            for whole in _whole_rows(call, num_programs, heads, ranges, config.programs):
                yield DecodeLaunch(call, replace(config, whole=whole))
        else:
            yield from _of_several_lengths(call, (num_programs, heads, ranges), programs)
    for cluster, at_once in CLUSTERS.items() if decode_calls.has_even_rows(call) else ():
        most = at_once // (call.batch.num_sequences * call.cache.num_kv_heads)  # of a row
        for count in dict.fromkeys((1, most)) if most else ():
            try:
                heads, ranges, _ = decode_calls.divide(call, num_programs, cluster, count)
            except ValueError:  # there are too many rows
                continue
            config = decode_calls.config_for(call, num_programs, heads, ranges, programs=1)
            launch = DecodeLaunch(call, replace(config, cluster=cluster, clusters_of_row=count))
            rows = call.batch.num_sequences * call.cache.num_kv_heads // heads
            tokens = launch.num_ranges // rows * MIN_TILE
            if launch.config.cluster == cluster and tokens <= kv_length:
                yield launch  # all clusters run at once, and each program has a tile


def _of_several_lengths(
    call: AttentionCall, sizes: tuple[int, int, int], programs: int
) -> Iterator[DecodeLaunch]:
    """Make launches that cut rows, anywhere and each by itself, and one that does not if it can.

    Args:
        call: of such rows.
        sizes: programs of which each multiprocessor has one, heads that are read side by side, and
            ranges.
        programs: on a multiprocessor.

    """
    cut = decode_calls.config_for(call, *sizes, programs=programs, keeps=False)
    for aligns in (False, True):
        yield DecodeLaunch(call, replace(cut, aligns=aligns))
    whole = decode_calls.config_for(call, *sizes, programs=programs, keeps=True)
    if decode_calls.stays_whole(call, whole, sizes[0]):
        yield DecodeLaunch(call, whole)


def _whole_rows(
    call: AttentionCall, num_programs: int, heads: int, ranges: int, programs: int
) -> list[WholeRows]:
    """Return how rows of one length can be divided: cut, and in each way left whole.

    Args:
        call: of such rows.
        num_programs: one on each multiprocessor.
        heads: that are read side by side by one program on a multiprocessor.
        ranges: of one program on a multiprocessor.
        programs: on a multiprocessor.

    """
    if programs > 1:
        heads = decode_division.heads_in_parallel(call.cache.num_kv_heads, num_programs * programs)
        ranges = num_programs * programs // heads
    num_rows = call.batch.num_sequences * call.cache.num_kv_heads // heads
    whole = WholeRows.ways(max(1, num_rows), ranges)
    return [replace(whole[0], most_bytes=0), *whole]


def _by_prefill(call: AttentionCall) -> Iterator[PrefillLaunch]:
    work = Work.of(call)
    for cut in prices_of(work) or (work.usual,):
        for way in ways_to_divide(work, cut):
            yield PrefillLaunch(call, cut=way, splits=1)
    if not call.causal:
        return
    tiles = -(-call.batch.expected_kv_length // work.usual.kv_tile)
    for splits in SHARES:
        if splits <= tiles and 4 * call.out.numel() * splits <= MOST_SHARED_BYTES:
            yield PrefillLaunch(call, splits=splits)
