"""The tutorial's figures show what the block manager, the cache and the reservations hold."""

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.patches import Ellipse, FancyArrowPatch

from pagedattn import BlockManager, PageTable
from pagedattn.report.concepts import (
    attention_flow,
    block_sharing,
    block_structure,
    canvas,
    kv_cache_problem,
    memory_comparison,
    performance_comparison,
)
from pagedattn.report.concepts.drawing import concept_style


def drawn(module, **settings):
    """The page that a scene is drawn on."""
    with concept_style():
        return module.draw(module.scene(**settings)).axes[0]


def words_of(page):
    return [text.get_text() for text in page.texts]


def column(page, x):
    """What is written at a distance from the left, from top to bottom."""
    texts = [text for text in page.texts if text.get_position()[0] == pytest.approx(x)]
    return [text.get_text() for text in sorted(texts, key=lambda text: text.get_position()[1])]


def boxes(page, *, width=None):
    found = [patch for patch in page.patches if not isinstance(patch, (FancyArrowPatch, Ellipse))]
    return [box for box in found if width is None or box.get_width() == pytest.approx(width)]


# -- block_structure -------------------------------------------------------------------------


def freed_in(order, block_size):
    """A manager that hands out blocks in the reverse of `order`."""
    manager = BlockManager(len(order), block_size)
    ids = manager.allocate([block_size] * len(order))
    blocks = [PageTable.of(manager, [one]).block_tables[0, 0] for one in ids]
    for block in order:
        manager.free([ids[blocks.index(block)]])
    return manager


@pytest.mark.parametrize("order", [block_structure.FREED_ORDER, (7, 6, 5, 4, 3, 2, 1, 0)])
@pytest.mark.parametrize("num_tokens", [5, 16, 38])
def test_a_page_table_is_drawn_as_the_manager_has_it(order, num_tokens):
    words = " ".join(block_structure.PROMPT.split()[:num_tokens])
    page = drawn(block_structure, prompt=words, freed_order=order)

    manager = freed_in(order, 16)
    manager.allocate([25])
    table = PageTable.of(manager, manager.allocate([num_tokens]))
    blocks = table.block_tables[0, : table.num_blocks()[0]].tolist()
    slots = table.slots([num_tokens]).tolist()

    entries = column(page, block_structure._TABLE + 0.3)[1:]
    assert entries == [str(block) for block in blocks]
    filled = column(page, block_structure._TABLE + 0.95)[1:]
    assert [int(count) for count in filled] == [
        min(16, num_tokens - 16 * logical) for logical in range(len(blocks))
    ]
    # where each physical block's row is, by its number
    rows = {}
    for text in page.texts:
        if text.get_position()[0] == pytest.approx(block_structure._POOL - 0.16):
            rows[round(text.get_position()[1] - block_structure._TALL / 2, 4)] = int(
                text.get_text()
            )
    coloured = {}
    for box in boxes(page, width=block_structure._SLOT):
        offset = round((box.get_x() - block_structure._POOL) / block_structure._SLOT)
        slot = 16 * rows[round(box.get_y(), 4)] + offset
        for logical, fill in enumerate(block_structure._FILLS):
            if same_color(box.get_facecolor(), fill):
                coloured[slot] = logical
    assert coloured == {slot: place // 16 for place, slot in enumerate(slots)}
    block, offset = divmod(slots[-1], 16)
    product = f"slot {block} \N{MULTIPLICATION SIGN} 16 + {offset} = {slots[-1]}:"
    assert any(text.startswith(product) for text in words_of(page))


# -- block_sharing ---------------------------------------------------------------------------


def read_stages(page):
    """Tables, reference counts and words of each step, read off the drawing."""
    left, pitch = block_sharing._LEFT, block_sharing._PITCH

    def block_at(x):
        return int((x - left) / pitch)

    texts = sorted(page.texts, key=lambda text: text.get_position()[1])
    stages = []
    for text in texts:
        x, y = text.get_position()
        content = text.get_text()
        if content == "block 0":
            stages.append({"tables": {}, "references": {}, "rows": [], "words": {}})
        if not stages:
            continue
        stage = stages[-1]
        if content in block_sharing._NAMES:
            stage["rows"].append((y, content))
        elif content.startswith("logical "):
            stage["tables"].setdefault(round(y, 3), {})[int(content[8:])] = block_at(x)
        elif content.isdigit() and x > left and stage["rows"]:
            stage["references"][block_at(x)] = int(content)
        elif x > left and not content.startswith(("block ", "free", "copy")):
            stage["words"].setdefault(block_at(x), []).append(content)
    for stage in stages:
        names = [name for _, name in sorted(stage["rows"])]
        rows = [stage["tables"][y] for y in sorted(stage["tables"])]
        stage["tables"] = {
            name: [row[logical] for logical in sorted(row)]
            for name, row in zip(names, rows, strict=True)
        }
    return stages


@pytest.mark.parametrize("order", [block_sharing.FREED_ORDER, (1, 5, 3, 0, 2, 4)])
@pytest.mark.parametrize("questions", [block_sharing.QUESTIONS, ("What is a block?", "Why?")])
def test_sharing_is_drawn_as_the_manager_has_it(order, questions):
    page = drawn(block_sharing, questions=questions, freed_order=order)
    stages = read_stages(page)

    manager = freed_in(order, 4)
    prompts = [f"{block_sharing.SYSTEM} {question}".split() for question in questions]
    known = list(dict.fromkeys(prompts[0] + prompts[1]))
    ids = {}
    expected = []

    def note():
        table = PageTable.of(manager, list(ids.values()))
        expected.append(
            (
                {
                    name: row[:count].tolist()
                    for name, row, count in zip(
                        ids, table.block_tables, table.num_blocks(), strict=True
                    )
                },
                manager.ref_counts(range(manager.num_blocks)).tolist(),
            )
        )

    for name, prompt in zip("AB", prompts, strict=True):
        admitted = manager.admit([[known.index(word) for word in prompt]])
        ids[name] = int(admitted.sequence_ids[0])
    assert admitted.num_cached_tokens.tolist() == [8]
    note()
    ids["C"] = int(manager.fork(ids["A"])[0])
    note()
    copies = manager.append([ids["A"], ids["C"]])
    note()

    assert len(stages) == len(expected) == 3
    for stage, (tables, references) in zip(stages, expected, strict=True):
        assert stage["tables"] == tables
        assert [stage["references"][block] for block in range(manager.num_blocks)] == references
        named = [block for table in stage["tables"].values() for block in table]
        assert references == [named.count(block) for block in range(manager.num_blocks)]
    assert (words_of(page).count("copy")) == len(copies)
    answered = [*prompts[0], block_sharing.ANSWERS[0]], [*prompts[0], block_sharing.ANSWERS[1]]
    for name, tokens in (("A", answered[0]), ("B", prompts[1]), ("C", answered[1])):
        blocks = stages[2]["tables"][name]
        assert [word for block in blocks for word in stages[2]["words"][block]] == tokens


def test_a_copy_is_drawn_from_the_shared_block_to_the_new_one():
    page = drawn(block_sharing)
    table = read_stages(page)[2]["tables"]
    assert sum(isinstance(patch, FancyArrowPatch) for patch in page.patches) == 1
    (line,) = page.lines
    start, end = (
        int((x - block_sharing._LEFT) / block_sharing._PITCH)
        for x in (line.get_xdata()[0], line.get_xdata()[-1])
    )
    assert {start, end} == {table["A"][2], table["C"][2]}


# -- attention_flow --------------------------------------------------------------------------


def read_numbers(page, left):
    """Numbers in cells that begin at `left`, a list for each row."""
    rows = {}
    for text in page.texts:
        x, y = text.get_position()
        place = (x - left) / attention_flow._NUMBER - 0.5
        if abs(place - round(place)) < 1e-6 and 0 <= round(place) < 4:
            content = text.get_text().replace("\N{MINUS SIGN}", "-")
            try:
                rows.setdefault(round(y, 3), {})[round(place)] = float(content)
            except ValueError:
                continue  # a heading
    full = [row for row in rows.values() if len(row) == 4]
    return np.array([[row[place] for place in range(4)] for row in full])


@pytest.mark.parametrize("num_tokens", [9, 10, 12])
def test_attention_can_be_worked_out_from_the_numbers_drawn(num_tokens):
    page = drawn(attention_flow, num_tokens=num_tokens)
    keys = read_numbers(page, attention_flow._KEY)
    values = read_numbers(page, attention_flow._VALUE)
    query, keys = keys[0], keys[1:]
    values, output = values[:-1], values[-1]
    assert len(keys) == len(values) == num_tokens
    scores = keys @ query / 2
    weights = np.exp(scores) / np.exp(scores).sum()
    shown = [text for text in words_of(page) if text.startswith("0.") and len(text) == 5]
    assert [float(text) for text in shown] == pytest.approx(weights, abs=5.1e-4)
    assert output == pytest.approx(weights @ values, abs=5.1e-3)


def test_attention_reads_the_slots_of_the_page_table():
    order = (0, 1, 2, 3, 4, 5, 6)
    page = drawn(attention_flow, num_tokens=10, freed_order=order)
    manager = freed_in(order, 4)
    table = PageTable.of(manager, manager.allocate([10]))
    entries = [text for text in words_of(page) if "→" in text and text[0].isdigit()]
    assert entries == [f"{i} → {block}" for i, block in enumerate(table.block_tables[0])]
    slots = [int(text) for text in column(page, attention_flow._SLOT + 0.2) if text.isdigit()]
    assert slots[:10] == table.slots([10]).tolist()


# -- kv_cache_problem ------------------------------------------------------------------------


@pytest.mark.parametrize(("max_model_len", "num_fit"), [(2048, 7), (4096, 3)])
def test_requests_are_drawn_as_long_as_they_are(max_model_len, num_fit):
    with concept_style():
        scene = kv_cache_problem.scene(max_model_len)
        page = kv_cache_problem.draw(scene).axes[0]
    assert scene.num_fit == num_fit == 15_728 // max_model_len
    totals = (scene.requests.prompt_tokens + scene.requests.output_tokens).tolist()
    labels = [text for text in words_of(page) if text.endswith(" tokens")]
    assert labels == [f"{total:,} tokens" for total in totals[:num_fit]]
    scale = kv_cache_problem._WIDE / max_model_len
    answers = [
        box.get_width()
        for box in boxes(page)
        if same_color(box.get_facecolor(), kv_cache_problem._OUTPUT[0])
    ]
    expected = scene.requests.output_tokens[:num_fit] * scale
    assert answers[:num_fit] == pytest.approx(expected.tolist())
    assert {f"{num_fit} requests", "800 KiB"} <= set(words_of(page))
    assert f"{15_728 - num_fit * max_model_len:,} slots left, of no use" in words_of(page)
    never = 1 - np.mean(totals) / max_model_len
    assert f"{100 * never:.0f} %" in words_of(page)


# -- the comparisons -------------------------------------------------------------------------


def test_shares_are_drawn_to_scale():
    shares = {
        "orca-max": {"token_states": 0.5, "reservation": 0.25, "internal": 0.2, "external": 0.05},
        "paged": {"token_states": 0.9, "reservation": 0.06, "internal": 0.04, "external": 0.0},
    }
    with concept_style():
        page = memory_comparison.draw(memory_comparison.Scene(shares)).axes[0]
    wide = memory_comparison._WIDE
    fills = [fill for _, fill, _ in memory_comparison._CAUSES.values()]

    def bars(height):
        """Where bars of a height begin and how wide they are, as shares of the memory."""
        return [
            ((box.get_x() - memory_comparison._LEFT) / wide, box.get_width() / wide)
            for box in boxes(page)
            if box.get_height() == pytest.approx(height)
            and any(same_color(box.get_facecolor(), fill) for fill in fills)
            and box.get_width() != pytest.approx(0.3)  # the legend's
        ]

    assert np.array(bars(memory_comparison._TALL)) == pytest.approx(
        np.array(
            [(0, 0.5), (0.5, 0.25), (0.75, 0.2), (0.95, 0.05), (0, 0.9), (0.9, 0.06), (0.96, 0.04)]
        )
    )
    assert np.array(bars(memory_comparison._THIN)) == pytest.approx(
        np.array([(0, 0.204), (0.204, 0.133), (0.337, 0.573), (0.91, 0.089), (0, 0.963)])
    )
    assert {"50", "25", "20", "5", "90", "6"} <= set(words_of(page))


def test_the_lines_are_those_of_the_runs():
    with concept_style():
        scene = performance_comparison.scene(rates=(1.0, 2.0), max_steps=300)
        _, running, tokens = performance_comparison.draw(scene).axes
    for axes, values in ((running, scene.running), (tokens, scene.tokens)):
        lines = [tuple(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 2]
        assert {tuple(ys) for ys in values.values()} <= set(lines)
    assert scene.running["paged"] != scene.running["orca-max"]
    points = [line.get_ydata()[0] for line in running.lines if len(line.get_ydata()) == 1]
    assert points == list(performance_comparison.PAPER.values())


def test_names_stand_beside_the_ends_of_their_lines_in_order():
    with concept_style():
        scene = performance_comparison.scene(rates=(1.0, 2.0), max_steps=300)
        page = performance_comparison.draw(scene).axes[0]
    labels = performance_comparison.LABELS
    for values, is_right in ((scene.running, False), (scene.tokens, True)):
        ends = sorted(values, key=lambda name: values[name][-1])
        texts = [
            text
            for text in page.texts
            if text.get_text() in labels.values()
            and (text.get_position()[0] > canvas.WIDTH / 2) is is_right
        ]
        texts.sort(key=lambda text: -text.get_position()[1])
        assert [text.get_text() for text in texts] == [labels[name] for name in ends]
