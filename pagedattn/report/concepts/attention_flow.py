"""One decode query on its way through a paged cache, in numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedattn.attention import AttentionBatch
from pagedattn.attention.call import AttentionCall
from pagedattn.attention.reference import reference_attention
from pagedattn.block_manager import BlockManager
from pagedattn.kv_cache import KVCache
from pagedattn.page_table import PageTable
from pagedattn.report.concepts.canvas import (
    BLUE,
    GREEN,
    GREY,
    HEADING,
    MARGIN,
    ORANGE,
    PALE,
    SMALL,
    WIDTH,
    Canvas,
    tint,
)
from pagedattn.report.style import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_COLOURS = BLUE, ORANGE, GREEN
_FILLS = tuple(tint(colour) for colour in _COLOURS)
_TALL = 0.285  # a row
_NUMBER = 0.57  # a cell of a key or value
_GAP = 0.2  # between blocks
# where each part begins
_TABLE, _POOL, _SLOT, _KEY, _VALUE = MARGIN, 1.98, 3.06, 3.5, WIDTH - MARGIN - 4 * _NUMBER
_SCORE = _KEY + 4 * _NUMBER + 0.12
_WEIGHT = _SCORE + 0.85
_LONGEST = 0.72  # the bar of the greatest weight


@dataclass(frozen=True)
class Scene:
    """A cache of one layer and one head, and what a decode query finds in it.

    Attributes:
        table: the page table of one sequence of nine to twelve tokens, in blocks of four.
        cache: the KV cache, whose unused slots are NaN.
        query: [head_size], the last token's.
        scores: [num_tokens], `query @ key / sqrt(head_size)`.
        weights: [num_tokens], their softmax.
        output: [head_size], what the library's reference gives.

    """

    table: PageTable
    cache: KVCache
    query: NDArray[np.float64]
    scores: NDArray[np.float64]
    weights: NDArray[np.float64]
    output: NDArray[np.float64]


def scene(num_tokens: int = 10, freed_order: tuple[int, ...] = (2, 3, 6, 0, 4, 1, 5)) -> Scene:
    """Fill a cache of blocks of 4 tokens with numbers of one decimal, and ask the reference."""
    manager = BlockManager(len(freed_order), block_size=4)
    blocks = manager.allocate([4] * len(freed_order))
    first = PageTable.of(manager, blocks).block_tables[:, 0].tolist()
    for block in freed_order:
        manager.free([blocks[first.index(block)]])
    table = PageTable.of(manager, manager.allocate([num_tokens]))
    cache = KVCache(
        num_layers=1,
        num_blocks=manager.num_blocks,
        block_size=4,
        num_kv_heads=1,
        head_size=4,
        dtype=torch.float64,
    )
    cache.storage.fill_(torch.nan)
    numbers = np.random.default_rng(7).integers(-15, 16, (2 * num_tokens + 1, 1, 4)) / 10
    key, value, query = (
        torch.from_numpy(part) for part in np.split(numbers, [num_tokens, 2 * num_tokens])
    )
    slots = torch.from_numpy(table.slots([num_tokens]))
    cache.write(0, key, value, slots)
    batch = AttentionBatch.of(table)
    call = AttentionCall(query, cache.layer(0), batch, 4**-0.5, torch.empty_like(query))
    output, _ = reference_attention(call, torch.float64)
    stored, _ = cache.gather(0, table.block_tables[0], num_tokens)
    scores = (stored[:, 0] @ query[0, 0]) / 4**0.5
    weights = torch.softmax(scores, 0)
    return Scene(
        table, cache, query[0, 0].numpy(), scores.numpy(), weights.numpy(), output[0, 0].numpy()
    )


def draw(scene: Scene) -> Figure:
    """Draw the rows of K and V as attention reads them, block after block."""
    size = scene.table.block_size
    num_tokens = int(scene.table.num_tokens[0])
    count = int(scene.table.num_blocks()[0])
    blocks = scene.table.block_tables[0, :count].tolist()
    body = count * (size * _TALL + _GAP) - _GAP
    canvas = Canvas(
        3.36 + body,
        "Attention over a paged cache",
        f"Decoding token {num_tokens - 1}: one head of size 4 reads {num_tokens} keys and values "
        f"from {count} blocks of {size}. Check it by hand.",
    )
    top = canvas.top + 0.22
    headings = (
        (_TABLE, "page table"),
        (_POOL - 0.05, "blocks"),
        (_KEY, "scores  q · k / √4"),
        (_WEIGHT - 0.27, "softmax w"),
        (_VALUE, "output  Σ w v"),
    )
    for number, (left, text) in enumerate(headings, 1):
        canvas.badge(left + 0.14, top, f"{number}")
        canvas.write(left + 0.36, top, text, size=HEADING, weight="bold", across="left")
    _draw_vector(canvas, _KEY, top + 0.32, "query q", scene.query, 1)
    top += 1.12
    labels = (
        (_SLOT + 0.2, "slot"),
        (_KEY + 2 * _NUMBER, "keys K"),
        (_SCORE + 0.38, "score"),
        (_VALUE + 2 * _NUMBER, "values V"),
    )
    for x, text in labels:
        canvas.write(x, top - 0.17, text, size=SMALL, colour=GREY)
    canvas.write(_TABLE, top - 0.17, "logical → block", size=SMALL, colour=GREY, across="left")
    _draw_pool(canvas, scene, top, body)
    for logical, block in enumerate(blocks):
        _draw_block(canvas, scene, logical, block, top, body)
    y = top + body + 0.16
    total = f"Σ w = {scene.weights.sum():.3f}"
    canvas.write(_WEIGHT - 0.2, y + _TALL / 2, total, size=SMALL, across="left")
    _draw_vector(canvas, _VALUE, y, "o", scene.output, 2)
    note = canvas.wrap(
        "Empty slots are never read. The order of the blocks in memory does not matter: a kernel "
        "can take one after the other, with a running maximum and sum for the softmax.",
        _WEIGHT - MARGIN - 0.5,
    )
    canvas.write(MARGIN, y + 0.02, "\n".join(note), size=SMALL, across="left", down="top")
    return canvas.figure


def _draw_vector(
    canvas: Canvas, left: float, y: float, name: str, numbers: NDArray[np.float64], decimals: int
) -> None:
    canvas.write(left - 0.1, y + _TALL / 2, name, weight="bold", across="right")
    for place, number in enumerate(numbers):
        canvas.box(left + place * _NUMBER, y, _NUMBER, _TALL, _signed(number, decimals), line=1.8)


def _draw_pool(canvas: Canvas, scene: Scene, top: float, body: float) -> None:
    """Draw the physical blocks, evenly spread over the height."""
    blocks = _blocks(scene)
    for block in range(scene.cache.layer(0).num_blocks):
        is_used = block in blocks
        canvas.box(
            _POOL,
            _pool_y(scene, block, top, body) - 0.16,
            0.6,
            0.32,
            f"{block}",
            fill=_FILLS[blocks.index(block)] if is_used else PALE,
            weight="bold" if is_used else "normal",
            colour=INK if is_used else GREY,
        )


def _pool_y(scene: Scene, block: int, top: float, body: float) -> float:
    """Return where the middle of a physical block is."""
    num_blocks = scene.cache.layer(0).num_blocks
    return top + 0.16 + block * (body - 0.32) / (num_blocks - 1)


def _blocks(scene: Scene) -> list[int]:
    count = int(scene.table.num_blocks()[0])
    return [int(block) for block in scene.table.block_tables[0, :count]]


def _draw_block(
    canvas: Canvas, scene: Scene, logical: int, block: int, top: float, body: float
) -> None:
    """Draw an entry of the page table, and the rows of the block that it names."""
    size, num_tokens = scene.table.block_size, int(scene.table.num_tokens[0])
    y = top + logical * (size * _TALL + _GAP)
    middle, fill, colour = y + size * _TALL / 2, _FILLS[logical], _COLOURS[logical]
    canvas.box(_TABLE, middle - 0.16, 1.05, 0.32, f"{logical} → {block}", fill=fill, weight="bold")
    place = _pool_y(scene, block, top, body)
    canvas.arrow((_TABLE + 1.09, middle), (_POOL - 0.03, place), colour=colour, line=2.0)
    canvas.arrow((_POOL + 0.64, place), (_SLOT - 0.02, middle), colour=colour, line=2.0)
    layer = scene.cache.layer(0)
    for offset in range(size):
        token, row = logical * size + offset, y + offset * _TALL
        middle = row + _TALL / 2
        canvas.write(_SLOT + 0.2, middle, f"{block * size + offset}", size=SMALL, colour=GREY)
        for left, part in ((_KEY, layer.key), (_VALUE, layer.value)):
            for place, number in enumerate(part[block, 0, offset].tolist()):
                text = _signed(number, 1) if token < num_tokens else ""
                hatch = "" if text else ".."
                canvas.box(
                    left + place * _NUMBER,
                    row,
                    _NUMBER,
                    _TALL,
                    text,
                    fill=fill if text else "white",
                    hatch=hatch,
                )
        if token < num_tokens:
            score, weight = scene.scores[token], scene.weights[token]
            canvas.write(_SCORE + 0.58, middle, _signed(score, 2), size=SMALL, across="right")
            bar = _LONGEST * weight / scene.weights.max()
            canvas.box(_WEIGHT, row + 0.04, bar, _TALL - 0.08, fill=colour)
            left = _WEIGHT + bar + 0.08
            canvas.write(left, middle, f"{weight:.3f}", size=SMALL, across="left")


def _signed(number: float, decimals: int) -> str:
    """Return a number with a true minus sign."""
    return f"{number + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
