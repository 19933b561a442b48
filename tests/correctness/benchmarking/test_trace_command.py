"""``tools/trace_kernel.py``: what it refuses, and what it prints and writes."""

import subprocess
import sys

import pandas as pd
import pytest
import torch

from pagedattn.benchmarking import tracing
from pagedattn.benchmarking.launch_trace import MOMENTS

from .made_up_marks import trace_of
from .tools import TOOLS, load_tool

TOOL = TOOLS / "trace_kernel.py"


@pytest.fixture(scope="module")
def tool():
    return load_tool("trace_kernel")


@pytest.fixture
def traced(tool, monkeypatch):
    """Trace nothing and find made-up marks; the rows that were asked for."""
    asked = []

    def trace_row(shape):
        asked.append(shape.name)
        traces = tuple(trace_of(seed=seed, idle=(2,)) for seed in range(3))
        return tracing.Tracing(traces, 16.9e-6, 16.7e-6)

    monkeypatch.setattr(tracing, "trace_row", trace_row)
    monkeypatch.setattr(tool, "require_kernels", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return asked


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["decode-B1-8K"], "There is no row 'decode-B1-8K': near it are decode-B1-8k, "),
        (["decode-B1-8k-h9x2"], "decode-B1-8k-h9x2: num_query_heads must be a multiple"),
        (["nothing\nlike it"], "There is no row 'nothing like it': one is decode-B1-8k."),
        (["cpu-decode-B8-1k"], "There is no row 'cpu-decode-B8-1k': near it are decode-B"),
        (["shared-2k-B256"], "shared-2k-B256 is several launches, "),
        ([], "the following arguments are required: ROW; "),
    ],
)
def test_bad_input_is_told_in_one_sentence(tool, traced, tmp_path, capsys, words, sentence):
    assert tool.main([*words, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert not traced
    assert not (tmp_path / "out").exists()


def test_near_rows_are_named_nearest_first(tool, capsys):
    assert tool.main(["decode-B64-4k-blocks1"]) == 2
    near = capsys.readouterr().err.partition("near it are ")[2].rstrip(".\n").split(", ")
    assert near[0] == "decode-B64-4k-block1"
    assert 1 < len(near) <= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_in_one_sentence(tmp_path):
    words = [sys.executable, str(TOOL), "decode-B1-8k", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "A launch can only be traced on a GPU, and torch sees none.\n"
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("traced")
def test_a_row_that_no_cuda_kernel_takes_is_told(tool, monkeypatch, tmp_path, capsys):
    def refuse(_):
        raise ValueError("the CUDA kernels cannot take head_size 72")

    monkeypatch.setattr(tracing, "trace_row", refuse)
    assert tool.main(["decode-B1-8k", "--out", str(tmp_path / "out")]) == 2
    sentence = "decode-B1-8k cannot be traced: the CUDA kernels cannot take head_size 72.\n"
    assert capsys.readouterr().err == sentence


def test_the_tables_are_printed_and_the_picture_and_the_moments_written(
    tool, traced, tmp_path, capsys
):
    assert tool.main(["decode-B1-8k", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert traced == ["decode-B1-8k"]
    assert out.startswith("decode-B1-8k: a launch takes 16.70 µs, and 16.90 µs while it notes")
    for words in (*MOMENTS.values(), "waiting for lengths", "steps of 32 ns"):
        assert words in out
    picture, table = (tmp_path / "out" / f"decode-B1-8k.{suffix}" for suffix in ("png", "csv"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    frame = pd.read_csv(table)
    assert len(frame) == 3 * 12
    assert frame["lengths_known_us"].isna().sum() == 3


def test_a_folder_that_cannot_be_written_is_told(tool, traced, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert tool.main(["decode-B1-8k", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert traced


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["decode-B1-1k", "prefill-16x1k"])
def test_a_row_is_traced_on_a_gpu(tool, row, tmp_path, capsys):
    assert tool.main([row, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert (tmp_path / f"{row}.png").stat().st_size > 10_000
    frame = pd.read_csv(tmp_path / f"{row}.csv")
    assert frame["launch"].nunique() == tracing.LAUNCHES
    assert (frame["started_us"].groupby(frame["launch"]).min() == 0).all()
    assert frame["ended_us"].notna().all()
    assert frame["written_us"].notna().any()
    assert (frame["merged_us"].isna() | frame["written_us"].notna()).all()
