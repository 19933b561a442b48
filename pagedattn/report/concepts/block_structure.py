"""A sequence's logical blocks, its page table, and the physical blocks behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.block_manager import BlockManager
from pagedattn.memory import wasted_slots
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
from pagedattn.report.text import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

PROMPT = (
    "An operating system keeps a program's memory in pages, and a table says where each page "
    "lies. PagedAttention does the same with the keys and values of a sequence: it keeps them in "
    "blocks, wherever one is free"
)
FREED_ORDER = (0, 6, 2, 5, 7, 3, 1, 4)
"""In which order the pool's blocks were last freed; the last is taken first."""

_COLOURS = BLUE, ORANGE, GREEN
_FILLS = tuple(tint(colour) for colour in _COLOURS)
_EMPTY, _OTHER = ("white", ".."), (PALE, "////")  # fill and hatch
_ROW = 0.44  # from one physical block to the next
_CELL, _TALL = 0.272, 0.3
_LOGICAL, _TABLE, _POOL = 0.62, 5.62, 7.52  # where each part's cells begin
_SLOT = 0.135


@dataclass(frozen=True)
class Scene:
    """A block manager's state: the page table of one sequence, and of another.

    Attributes:
        words: the first sequence's tokens, a word each.
        table: its page table.
        other: the other's.
        num_blocks: blocks in the pool.

    """

    words: tuple[str, ...]
    table: PageTable
    other: PageTable
    num_blocks: int


def scene(prompt: str = PROMPT, freed_order: Sequence[int] = FREED_ORDER) -> Scene:
    """Admit a sequence of 25 tokens and then the prompt, to a pool of blocks of 16 tokens.

    The prompt is one to three blocks long.
    """
    words = tuple(prompt.split())
    vocabulary = {word: token for token, word in enumerate(dict.fromkeys(words))}
    manager = BlockManager(len(freed_order), block_size=16)
    all_blocks = manager.allocate([16] * len(freed_order))
    first = PageTable.of(manager, all_blocks).block_tables[:, 0].tolist()
    for block in freed_order:
        manager.free([all_blocks[first.index(block)]])
    other = PageTable.of(manager, manager.allocate([25]))
    admitted = manager.admit([[vocabulary[word] for word in words]])
    table = PageTable.of(manager, admitted.sequence_ids)
    return Scene(words, table, other, manager.num_blocks)


def draw(scene: Scene) -> Figure:
    """Draw a sequence of at most three blocks."""
    size, blocks = scene.table.block_size, _blocks(scene.table)
    num_tokens = len(scene.words)
    empty = wasted_slots(num_tokens, size)
    canvas = Canvas(
        6.85,
        "Blocks, and the page table that finds them",
        f"{plural(num_tokens, 'token')} take {plural(len(blocks), 'block')} of {size} tokens, "
        f"wherever a block is free. All that is wasted: {plural(empty, 'slot')} at the end.",
    )
    top = canvas.top + 0.22
    for left, text in (
        (_LOGICAL, "Logical blocks: tokens in order"),
        (_TABLE, "Page table"),
        (_POOL, "Physical blocks: the pool"),
    ):
        canvas.write(left, top, text, size=HEADING, weight="bold", across="left")
    top += 0.62
    canvas.write(_TABLE + 0.3, top - 0.24, "block", colour=GREY)
    canvas.write(_TABLE + 0.95, top - 0.24, "tokens", colour=GREY)
    canvas.write(_POOL + size * _SLOT + 0.1, top - 0.24, "slots", colour=GREY, across="left")
    shown = num_tokens - 1  # the token whose way is shown
    for logical, block in enumerate(blocks):
        y = top + logical * _ROW * scene.num_blocks / len(_COLOURS)
        _draw_logical(canvas, scene, logical, y, shown)
        _draw_entry(canvas, logical, block, min(size, num_tokens - logical * size), y)
        start = _TABLE + 1.34, y + _TALL / 2
        end = _POOL - 0.32, top + block * _ROW + _TALL / 2
        canvas.arrow(start, end, colour=_COLOURS[logical], line=2.0)
    _draw_pool(canvas, scene, top, shown)
    y = top + _ROW * scene.num_blocks + 0.14
    kinds = ("another sequence's", *_OTHER), ("empty", *_EMPTY), ("free", "white", "")
    canvas.key(_TABLE + 0.6, y, kinds, gap=0.25)
    _draw_example(canvas, scene, y + 0.42, shown)
    return canvas.figure


def _blocks(table: PageTable) -> list[int]:
    """Return the physical blocks of a page table's only sequence, in logical order."""
    count = int(table.num_blocks()[0])
    return [int(block) for block in table.block_tables[0, :count]]


def _draw_logical(canvas: Canvas, scene: Scene, logical: int, y: float, shown: int) -> None:
    """Draw a logical block: a cell for each token, and the words below."""
    size = scene.table.block_size
    canvas.write(_LOGICAL - 0.16, y + _TALL / 2, f"{logical}", weight="bold")
    for offset in range(size):
        token = logical * size + offset
        is_filled = token < len(scene.words)
        canvas.box(
            _LOGICAL + offset * _CELL,
            y,
            _CELL,
            _TALL,
            f"{token}" if is_filled else "",
            fill=_FILLS[logical] if is_filled else _EMPTY[0],
            hatch="" if is_filled else _EMPTY[1],
        )
    if shown // size == logical:
        left = _LOGICAL + shown % size * _CELL
        canvas.box(left, y, _CELL, _TALL, fill="none", line=3.2, layer=2.5)
    words = " ".join(scene.words[logical * size : (logical + 1) * size])
    lines = canvas.wrap(words, size * _CELL)
    canvas.write(
        _LOGICAL, y + _TALL + 0.07, "\n".join(lines), size=SMALL, across="left", down="top"
    )


def _draw_entry(canvas: Canvas, logical: int, block: int, num_tokens: int, y: float) -> None:
    """Draw an entry of the page table, and the arrow that leads to it."""
    canvas.arrow((_LOGICAL + 16 * _CELL + 0.1, y + _TALL / 2), (_TABLE - 0.08, y + _TALL / 2))
    canvas.box(_TABLE, y, 0.6, _TALL, f"{block}", fill=_FILLS[logical], weight="bold")
    canvas.box(_TABLE + 0.6, y, 0.7, _TALL, f"{num_tokens}")


def _draw_pool(canvas: Canvas, scene: Scene, top: float, shown: int) -> None:
    """Draw every physical block with its slots."""
    size, own, others = scene.table.block_size, _blocks(scene.table), _blocks(scene.other)
    looks: dict[int, tuple[str, str]] = {}  # slot: fill and hatch
    for block in own + others:
        looks |= {block * size + offset: _EMPTY for offset in range(size)}
    for place, slot in enumerate(scene.table.slots([len(scene.words)]).tolist()):
        looks[slot] = _FILLS[place // size], ""
    for slot in scene.other.slots(scene.other.num_tokens).tolist():
        looks[slot] = _OTHER
    for block in range(scene.num_blocks):
        y = top + block * _ROW
        canvas.write(_POOL - 0.16, y + _TALL / 2, f"{block}", weight="bold")
        for offset in range(size):
            left = _POOL + offset * _SLOT
            fill, hatch = looks.get(block * size + offset, ("white", ""))
            canvas.box(left, y, _SLOT, _TALL, fill=fill, hatch=hatch, line=0.7, edge=GREY)
        canvas.box(_POOL, y, size * _SLOT, _TALL, fill="none", layer=2.4)
        canvas.write(
            _POOL + size * _SLOT + 0.1,
            y + _TALL / 2,
            f"{block * size}\N{EN DASH}{block * size + size - 1}",
            size=SMALL,
            across="left",
        )
    slot = int(scene.table.slots([len(scene.words)])[shown])
    left, y = _POOL + slot % size * _SLOT, top + slot // size * _ROW
    canvas.box(left, y, _SLOT, _TALL, fill="none", line=3.2, layer=2.5)


def _draw_example(canvas: Canvas, scene: Scene, y: float, shown: int) -> None:
    """Work out the slot of one token, step by step."""
    size = scene.table.block_size
    logical, offset = divmod(shown, size)
    block = _blocks(scene.table)[logical]
    slot = int(scene.table.slots([len(scene.words)])[shown])
    product = f"slot {block} \N{MULTIPLICATION SIGN} {size} + {offset} = {slot}:"
    steps = (
        (f"where is token {shown},\n“{scene.words[shown]}”?", 1.95),
        (f"logical block {shown} // {size} = {logical}\noffset {shown} % {size} = {offset}", 2.5),
        (f"page table\n{logical} → block {block}", 1.6),
        (f"{product}\nits K and V lie there", 2.4),
    )
    gap = (WIDTH - 2 * MARGIN - sum(width for _, width in steps)) / 3
    left = MARGIN
    for number, (text, width) in enumerate(steps):
        if number:
            canvas.arrow((left - gap + 0.08, y + 0.31), (left - 0.08, y + 0.31))
        is_end = number in (0, len(steps) - 1)
        fill = _FILLS[logical] if number else "white"
        canvas.box(left, y, width, 0.62, text, fill=fill, line=3.2 if is_end else 1.0)
        left += width + gap
