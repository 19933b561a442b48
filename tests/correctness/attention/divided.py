"""What the decode kernel's own source makes of a batch, on the host."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from pagedattn.attention.cuda import decode, decode_config, decode_division
from pagedattn.attention.cuda.decode_fits import H100
from pagedattn.testing.emulator import EmulatedKernel

SOURCE = Path(__file__).with_name("divided.cu")
TILE, HEAD_SIZE = 16, 64


@dataclass(frozen=True)
class Divided:
    """A batch, and what the kernel makes of it.

    Attributes:
        rows: of a group: each sequence as often as there are groups.
        row: tiles of a row, or of the longest.
        parallel_heads: of a group.
        shares_paths: what the host takes it for.
        begins: first tile of each range, and of the one after the last; [ranges + 1].
        range_of: of each tile.
        guessed: tiles that each program with work guesses, 0 where they are not what it has.

    """

    rows: int
    row: int
    parallel_heads: int
    shares_paths: bool
    begins: np.ndarray
    range_of: np.ndarray
    guessed: np.ndarray

    @property
    def sizes(self):
        return np.diff(self.begins)


def divide(
    tiles, num_kv_heads, num_multiprocessors, on_each=1, cluster=1, *,
    head_size=HEAD_SIZE, kv_bytes=2, columns=8, last_tokens=TILE,
):  # fmt: skip
    """Divide sequences of so many tiles, all as many as the longest as far as the host knows.

    The last tile of each has `last_tokens`.
    """
    macros = decode_config.macros_of(
        decode_config.DecodeConfig(columns, TILE, 4, on_each, cluster),
        head_size=head_size, kv_bytes=kv_bytes, group=4, bf16=False, block_size=TILE,
    )  # fmt: skip
    num_programs = num_multiprocessors * on_each
    parallel = decode_division.heads_in_parallel(num_kv_heads, num_programs)
    ranges, groups = num_programs // parallel, num_kv_heads // parallel
    tiles = np.array(tiles, np.int32)
    if cluster > 1:
        rows = len(tiles) * groups
        ranges = ranges // rows // cluster * cluster * rows
        num_programs = ranges * parallel
    total, lengths = int(tiles.sum()) * groups, np.maximum(0, tiles * TILE - TILE + last_tokens)
    rows, row, length = len(tiles) * groups, int(tiles.max()), int(lengths.max())
    kind = decode_division.RowKind.of(head_size, kv_bytes, columns, TILE, fit=H100)
    whole = decode_division.WholeRows.of(
        rows, parallel, ranges, num_programs, length, kind, programs=on_each
    )
    tile_bytes = TILE * 2 * head_size * kv_bytes
    out = np.full(num_programs + 1 + ranges + 1 + total, -7, np.int32)
    parameters = decode._Parameters(
        num_sequences=len(tiles),
        num_kv_heads=num_kv_heads,
        num_programs=num_programs,
        parallel_heads=parallel,
        groups=groups,
        ranges=ranges,
        all_ranges=ranges,
        max_kv_length=length,
        max_query_length=1,
        is_full=1,
        whole_rows=whole.of_range,
        whole_more=whole.more,
        whole_tiles=min(whole.most_bytes // tile_bytes, 1 << 30),
        kv_lengths=lengths.ctypes.data,
        arrived=out.ctypes.data,
    )
    EmulatedKernel(SOURCE, "divide", macros).launch(num_programs, 32, 0, parameters)
    guessed, told, begins, range_of = np.split(out, np.cumsum([num_programs, 1, ranges + 1]))
    assert told == total
    shares_paths = decode_division.shares_paths_unevenly(
        len(tiles), num_kv_heads, num_programs, row * tile_bytes, length, kind
    )
    guessed = guessed[guessed >= 0]
    return Divided(rows, row, parallel, shares_paths, begins, range_of, guessed)


def config_of(on_each, **options):
    """Return how the kernel is cut here."""
    return decode_config.DecodeConfig(8, TILE, 4, on_each, **options)


def described(count, longest, heads, head_size, *, mean=None, is_full=False, window=None):
    """Return a call of so many sequences, as far as the host's choice looks at it.

    The longest has `longest` tokens, and all of them `mean` of it on average, None if not known.
    """
    known = mean and SimpleNamespace(short=SimpleNamespace(mean_kv=mean), longest=longest)
    return SimpleNamespace(
        query=torch.empty((count, heads[0], head_size), device="meta"),
        cache=SimpleNamespace(
            num_kv_heads=heads[1],
            head_size=head_size,
            block_size=TILE,
            key=torch.empty(1, dtype=torch.bfloat16, device="meta"),
        ),
        batch=SimpleNamespace(
            num_sequences=count,
            is_full=is_full,
            max_query_length=1,
            expected_kv_length=longest,
            known_lengths=known,
        ),
        window=window,
    )


def most_tokens(tiles, num_multiprocessors, *, head_size=256, aligns=False):
    """Return how many tokens a row of a KV head has at most that stays whole among these.

    If `aligns`, that is where each row may begin with a range.
    """
    tiles, config = np.array(tiles), decode_config.DecodeConfig(8, TILE, 4, aligns=aligns)
    cutting = decode_config.Cutting.of(config, head_size=head_size, kv_bytes=2, block_size=TILE)
    rows, total = int((tiles > 0).sum()), int(tiles.sum())
    most = total // num_multiprocessors * TILE + int(cutting.of_rows(rows))
    if aligns:
        begun = max(1, num_multiprocessors - rows // 2)
        most = min(most, -(-total // begun) * TILE + cutting.aligned)
    return most


def share_out(
    tiles, num_kv_heads, num_multiprocessors, on_each=1, *,
    head_size=256, window=None, few_ranges=None, keeps_whole=True, **options,
):  # fmt: skip
    """Return tiles of each program, and parts of each sequence and head.

    Rows may stay whole if `keeps_whole`; `options` are others of a `DecodeConfig`. What is cut is
    cut into `few_ranges`, None for as many as there are programs for.
    """
    config = config_of(on_each, keeps_whole=keeps_whole, **options)
    macros = decode_config.macros_of(
        config, head_size=head_size, kv_bytes=2, group=4, bf16=False, block_size=TILE,
        features=("window",) if window else (),
    )  # fmt: skip
    num_programs = num_multiprocessors * on_each
    parallel = decode_division.heads_in_parallel(num_kv_heads, num_programs)
    lengths = np.array(tiles, np.int32) * TILE
    starts = np.arange(lengths.size + 1, dtype=np.int32)
    out = np.zeros(num_programs + lengths.size * num_kv_heads, np.int32)
    parameters = decode._Parameters(
        num_sequences=lengths.size,
        num_kv_heads=num_kv_heads,
        num_programs=num_programs,
        parallel_heads=parallel,
        groups=num_kv_heads // parallel,
        ranges=few_ranges or num_programs // parallel,
        all_ranges=num_programs // parallel,
        max_kv_length=int(lengths.max()),
        max_query_length=1,
        kv_lengths=lengths.ctypes.data,
        query_starts=starts.ctypes.data,
        window=window or 0,
        arrived=out.ctypes.data,
    )
    EmulatedKernel(SOURCE, "share_out", macros).launch(num_programs, 32, 0, parameters)
    return out[:num_programs], out[num_programs:].reshape(lengths.size, num_kv_heads)
