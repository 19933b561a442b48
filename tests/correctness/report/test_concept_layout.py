"""The tutorial's figures: words lie free of each other, inside the page, and can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from pagedattn.calculator import concept as benchmark_results
from pagedattn.report.concepts import (
    attention_flow,
    block_sharing,
    block_structure,
    kv_cache_problem,
    memory_comparison,
    performance_comparison,
)
from pagedattn.report.concepts.drawing import concept_style

LEAST_PIXELS = 10.5  # of a letter's em where a figure is shown at half its width
LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3
SLACK = 0.5  # pixels
SCENES = {
    "attention_flow": (attention_flow, {}),
    "attention_flow-long": (attention_flow, {"num_tokens": 12}),
    "benchmark_results": (benchmark_results, {}),
    "block_sharing": (block_sharing, {}),
    "block_sharing-far": (block_sharing, {"freed_order": (1, 5, 3, 0, 2, 4)}),
    "block_structure": (block_structure, {}),
    "block_structure-other": (block_structure, {"freed_order": (7, 6, 5, 4, 3, 2, 1, 0)}),
    "kv_cache_problem": (kv_cache_problem, {}),
    "memory_comparison": (memory_comparison, {"max_steps": 2500}),
    "performance_comparison": (performance_comparison, {"rates": (1.0, 2.0), "max_steps": 1500}),
}


@pytest.fixture(scope="module", params=SCENES)
def figure(request):
    module, settings = SCENES[request.param]
    return rendered(module, **settings)


def rendered(module, **settings):
    with concept_style():
        figure = module.draw(module.scene(**settings))
    figure.canvas.draw()
    return figure


def words_of(figure):
    """Every text that is seen; those of an axis only where its ticks are."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += axes.texts
        if not axes.axison:
            continue
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        legend = axes.get_legend()
        found += legend.get_texts() if legend else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def box_of(text):
    """Where a text's letters are: matplotlib's box without the room above and below them."""
    box = text.get_window_extent()
    num_lines = text.get_text().count("\n") + 1
    room = 0.1 * box.height / num_lines
    return Bbox.from_extents(box.x0, box.y0 + room, box.x1, box.y1 - room)


def named(text):
    return " ".join(text.get_text().split())


def crossings(figure):
    """Pairs of words whose boxes overlap, by more than half a pixel."""
    boxes = [(named(text), box_of(text)) for text in words_of(figure)]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > SLACK and min(a.y1, b.y1) - max(a.y0, b.y0) > SLACK
    ]


def outside(figure):
    """Words that leave the page, or come nearer to its edge than 8 pixels."""
    width, height = figure.canvas.get_width_height()
    return [
        named(text)
        for text in words_of(figure)
        if (box := box_of(text)).x0 < 8 or box.y0 < 8 or box.x1 > width - 8 or box.y1 > height - 8
    ]


def cut_by_outlines(figure):
    """Words through which the outline of a box goes; those on a ground of their own hide it."""
    found = []
    for axes in figure.axes:
        patches = [patch for patch in axes.patches if not isinstance(patch, FancyArrowPatch)]
        outlines = [patch.get_window_extent() for patch in patches]
        for text in axes.texts:
            if text.get_bbox_patch() is not None:
                continue
            box = box_of(text)
            for outline in outlines:
                is_inside = (
                    outline.x0 <= box.x0
                    and outline.x1 >= box.x1
                    and outline.y0 <= box.y0
                    and outline.y1 >= box.y1
                )
                if box.overlaps(outline) and not is_inside:
                    found.append(named(text))
    return found


def crossed_by_lines(figure):
    """Words of the page through which an arrow or a line goes."""
    page = figure.axes[0]
    shapes = [patch for patch in page.patches if isinstance(patch, FancyArrowPatch)]
    shapes += [line for line in page.lines if len(line.get_xdata()) > 1]
    paths = [shape.get_transform().transform_path(shape.get_path()) for shape in shapes]
    # one by one: matplotlib sees a line from the end of one part of a path to the next part's
    parts = [Path(part) for path in paths for part in path.to_polygons(closed_only=False)]
    return [
        named(text)
        for text in words_of(figure)
        if any(part.intersects_bbox(box_of(text), filled=False) for part in parts)
    ]


def luminance(colour):
    parts = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in to_rgb(colour)
    ]
    return np.dot([0.2126, 0.7152, 0.0722], parts)


def ground_of(axes, text):
    """The colour that words are written on: of their own box, or of the box they lie in."""
    if text.get_bbox_patch() is not None:
        return text.get_bbox_patch().get_facecolor()
    box = box_of(text)
    middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    ground, layer = "white", -1.0
    for patch in axes.patches:
        colour = to_rgba(patch.get_facecolor())
        if colour[3] == 0 or isinstance(patch, FancyArrowPatch) or patch.get_zorder() < layer:
            continue
        if patch.get_window_extent().contains(*middle):
            ground, layer = colour, patch.get_zorder()
    return ground


def test_no_two_words_overlap(figure):
    assert crossings(figure) == []


def test_no_word_leaves_the_page(figure):
    assert outside(figure) == []


def test_no_box_cuts_a_word(figure):
    assert cut_by_outlines(figure) == []


def test_no_line_or_arrow_crosses_a_word(figure):
    assert crossed_by_lines(figure) == []


def test_words_can_be_read_at_half_the_width(figure):
    for text in words_of(figure):
        assert text.get_fontsize() / 72 * figure.dpi / 2 >= LEAST_PIXELS, named(text)


def test_words_stand_out_from_their_ground(figure):
    for axes in figure.axes:
        for text in axes.texts:
            one, other = sorted(map(luminance, (text.get_color(), ground_of(axes, text))))
            assert (other + 0.05) / (one + 0.05) >= LEAST_CONTRAST, named(text)


def test_a_figure_is_opaque_and_shown_at_half_its_width_on_any_page(figure):
    assert 1400 <= figure.canvas.get_width_height()[0] < 1800
    assert to_rgba(figure.get_facecolor()) == (1, 1, 1, 1)


def test_these_checks_find_what_they_look_for():
    figure = Figure(figsize=(10, 5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(0.5, 0.5, "one")
    axes.text(0.52, 0.51, "two")
    axes.text(0.98, 0.2, "three")
    axes.text(0.2, 0.2, "four")
    axes.bar([0.19], [0.21], width=0.05)
    axes.text(0.3, 0.8, "five")
    axes.plot([0.1, 0.9], [0.81, 0.81])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.canvas.draw()
    assert crossings(figure) == [("one", "two")]
    assert outside(figure) == ["three"]
    assert cut_by_outlines(figure) == ["four"]
    assert crossed_by_lines(figure) == ["five"]
