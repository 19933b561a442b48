"""A shared prefix and a fork: reference counts, and copy on write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.block_manager import BlockManager
from pagedattn.page_table import PageTable
from pagedattn.report.concepts.canvas import (
    BLUE,
    DARK_RED,
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
from pagedattn.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from matplotlib.figure import Figure

    from pagedattn.block_manager import BlockCopies

SYSTEM = "You are a helpful assistant. Keep answers short."
QUESTIONS = "Define page table.", "Why blocks?"
ANSWERS = "An", "It"
FREED_ORDER = (3, 5, 0, 4, 2, 1)
"""In which order the pool's blocks were last freed; the last is taken first."""

_NAMES = "A", "B", "C"
_COLOURS = BLUE, ORANGE, GREEN
_LEFT = 3.88  # where the blocks begin
_PITCH, _WIDE = 1.11, 1.02
_LINE, _CHIP = 0.232, 0.27


@dataclass(frozen=True)
class Stage:
    """What a block manager holds after a step.

    Attributes:
        title: what was done.
        story: what that did.
        num_used: blocks in use.
        num_unshared: blocks that would be in use if nothing were shared.
        tokens: for each sequence its tokens, a word each.
        tables: for each sequence its physical blocks, in logical order.
        ref_counts: for each block of the pool, how many entries of block tables name it.
        copies: blocks that were copied, from and to.
        grown: sequences that the step appended a token to.

    """

    title: str
    story: str
    num_used: int
    num_unshared: int
    tokens: tuple[tuple[str, ...], ...]
    tables: tuple[tuple[int, ...], ...]
    ref_counts: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()
    grown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Three steps of a block manager, whose blocks have `block_size` tokens."""

    block_size: int
    stages: tuple[Stage, ...]


class _Play:
    """The block manager and the sequences, as words and as ids."""

    def __init__(self, freed_order: SequenceOf[int]) -> None:
        self.manager = BlockManager(len(freed_order), block_size=4)
        blocks = self.manager.allocate([4] * len(freed_order))
        first = PageTable.of(self.manager, blocks).block_tables[:, 0].tolist()
        for block in freed_order:
            self.manager.free([blocks[first.index(block)]])
        self.vocabulary: list[str] = []
        self.sequences: list[Sequence] = []
        self.ids: list[int] = []

    def tokens_of(self, text: str) -> list[int]:
        """Return a token for each word, a new one for a new word."""
        words = text.split()
        self.vocabulary += [word for word in dict.fromkeys(words) if word not in self.vocabulary]
        return [self.vocabulary.index(word) for word in words]

    def admit(self, prompt: str) -> int:
        """Begin a sequence; return how many of its tokens were found in the prefix cache."""
        self.sequences.append(Sequence(self.tokens_of(prompt)))
        admitted = self.manager.admit([self.sequences[-1].token_ids])
        self.ids.append(int(admitted.sequence_ids[0]))
        return int(admitted.num_cached_tokens[0])

    def fork(self, place: int) -> None:
        """Begin a sequence that is as another is."""
        self.sequences.append(self.sequences[place].fork())
        self.ids.append(int(self.manager.fork(self.ids[place])[0]))

    def append(self, places: SequenceOf[int], words: SequenceOf[str]) -> BlockCopies:
        """Append a word to some sequences in one step."""
        tokens = [self.tokens_of(word)[0] for word in words]
        for place, token in zip(places, tokens, strict=True):
            self.sequences[place].append(token)
        return self.manager.append([self.ids[place] for place in places], token_ids=tokens)

    def stage(
        self,
        title: str,
        story: str,
        copies: BlockCopies | None = None,
        grown: tuple[int, ...] = (),
    ) -> Stage:
        """Ask the manager for its state."""
        table = PageTable.of(self.manager, self.ids)
        counts = table.num_blocks().tolist()
        rows = table.block_tables.tolist()
        pairs = () if copies is None else zip(copies.sources, copies.destinations, strict=True)
        statistics = self.manager.statistics()
        return Stage(
            title,
            story,
            statistics.num_used_blocks,
            statistics.num_unshared_blocks,
            tuple(
                tuple(self.vocabulary[token] for token in sequence.token_ids)
                for sequence in self.sequences
            ),
            tuple(tuple(row[:count]) for row, count in zip(rows, counts, strict=True)),
            tuple(self.manager.ref_counts(range(self.manager.num_blocks)).tolist()),
            tuple((int(source), int(destination)) for source, destination in pairs),
            grown,
        )


def scene(
    system: str = SYSTEM,
    questions: tuple[str, str] = QUESTIONS,
    freed_order: SequenceOf[int] = FREED_ORDER,
) -> Scene:
    """Admit two prompts that begin alike, fork the first, and append a token to both of these."""
    play = _Play(freed_order)
    play.admit(f"{system} {questions[0]}")
    cached = play.admit(f"{system} {questions[1]}")
    own = play.sequences[1].num_tokens - cached
    first = play.stage(
        "Two prompts begin alike",
        f"B's first {plural(cached, 'token')} are in the cache: it takes a new block for its "
        f"last {plural(own, 'token')}.",
    )
    play.fork(0)
    second = play.stage(
        "A is forked into C",
        "For a second answer, C gets A's block table. No block is taken, nothing is copied.",
    )
    copies = play.append([0, 2], ANSWERS)
    story = "Each writes into a block that is its own: nothing is copied."
    if len(copies):
        source, destination = int(copies.sources[0]), int(copies.destinations[0])
        story = (
            f"Both write into block {source}: one gets a copy, block {destination}, and the other "
            f"keeps it."
        )
    third = play.stage("A and C go on", story, copies, grown=(0, 2))
    return Scene(play.manager.block_size, (first, second, third))


def draw(scene: Scene) -> Figure:
    """Draw the steps below each other; columns are physical blocks."""
    heights = [_height(scene, stage) for stage in scene.stages]
    canvas = Canvas(
        1.32 + sum(heights),
        "Sharing blocks, until one is written",
        "A prefix and a fork cost no memory: block tables name the same blocks. "
        "A block's reference count is how many do.",
    )
    top = canvas.top + 0.2
    for number, (stage, height) in enumerate(zip(scene.stages, heights, strict=True), 1):
        if number > 1:
            canvas.box(MARGIN, top - 0.12, WIDTH - 2 * MARGIN, 0.012, fill="#bbbbbb", line=0)
        _draw_stage(canvas, scene, stage, number, top)
        top += height
    return canvas.figure


def _tall(scene: Scene) -> float:
    """Return the height of a block."""
    return scene.block_size * _LINE + 0.1


def _height(scene: Scene, stage: Stage) -> float:
    rows = len(stage.tables) * (_CHIP + 0.07)
    return 0.62 + _tall(scene) + 0.04 + rows + 0.5


def _draw_stage(canvas: Canvas, scene: Scene, stage: Stage, number: int, top: float) -> None:
    canvas.badge(MARGIN + 0.14, top + 0.2, f"{number}")
    canvas.write(MARGIN + 0.4, top + 0.2, stage.title, size=HEADING, weight="bold", across="left")
    lines = canvas.wrap(stage.story, _LEFT - MARGIN - 0.6)
    lines += [
        "",
        f"In use: {plural(stage.num_used, 'block')},",
        f"without sharing {stage.num_unshared}.",
    ]
    canvas.write(MARGIN, top + 0.5, "\n".join(lines), size=SMALL, across="left", down="top")
    _draw_blocks(canvas, scene, stage, top + 0.5)
    y = top + 0.5 + _tall(scene) + 0.09
    for place, table in enumerate(stage.tables):
        canvas.write(_LEFT - 0.15, y + _CHIP / 2, _NAMES[place], weight="bold", across="right")
        for logical, block in enumerate(table):
            canvas.box(
                _LEFT + block * _PITCH,
                y,
                _WIDE,
                _CHIP,
                f"logical {logical}",
                fill=tint(_COLOURS[place]),
                edge=_COLOURS[place],
            )
        y += _CHIP + 0.07
    canvas.write(_LEFT - 0.15, y + 0.13, "references", colour=GREY, across="right")
    for block, count in enumerate(stage.ref_counts):
        x = _LEFT + block * _PITCH + _WIDE / 2
        if count:
            canvas.badge(x, y + 0.13, f"{count}", fill=DARK_RED if count > 1 else GREY)
        else:
            canvas.write(x, y + 0.13, "0", colour=GREY)


def _draw_blocks(canvas: Canvas, scene: Scene, stage: Stage, top: float) -> None:
    """Draw each block of the pool with its words, and the copies from one to another."""
    size = scene.block_size
    for block, count in enumerate(stage.ref_counts):
        left = _LEFT + block * _PITCH
        owners = [place for place, table in enumerate(stage.tables) if block in table]
        fill = "white"
        if owners:
            fill = PALE if count > 1 else tint(_COLOURS[owners[0]])
        canvas.write(left, top - 0.15, f"block {block}", size=SMALL, across="left")
        canvas.box(
            left,
            top,
            _WIDE,
            _tall(scene),
            "" if owners else "free",
            fill=fill,
            line=2.2 if count > 1 else 1.0,
            style="-" if owners else "--",
        )
        if not owners:
            continue
        place = owners[0]
        logical = stage.tables[place].index(block)
        words = stage.tokens[place][logical * size : (logical + 1) * size]
        for line, word in enumerate(words):
            is_last = logical * size + line == len(stage.tokens[place]) - 1
            canvas.write(
                left + _WIDE / 2,
                top + 0.02 + (line + 0.8) * _LINE,
                word,
                size=SMALL,
                down="baseline",
                weight="bold" if is_last and place in stage.grown else "normal",
            )
    for source, destination in stage.copies:
        start, end = (_LEFT + block * _PITCH + _WIDE - 0.14 for block in (source, destination))
        canvas.route([(start, top), (start, top - 0.33), (end, top - 0.33), (end, top - 0.02)])
        canvas.write(
            (start + end) / 2, top - 0.46, "copy", size=SMALL, weight="bold", colour=DARK_RED
        )
