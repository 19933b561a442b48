"""What is wrong is told in one sentence before anything is started."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pagedattn.serving import cli

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_VLLM = importlib.util.find_spec("vllm") is None


def refused(capsys, *arguments):
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--test", "speed"], "invalid choice"),
        (["--compare", "weather"], "invalid choice"),
        (["--dataset", "foo"], "--dataset must be one of synthetic, sharegpt, azure, mooncake"),
        (["--dataset", "azure"], "needs one file"),
        (["--dataset", "azure", "/does/not/exist"], "there is no file"),
        (["--dataset", "synthetic", "x"], "takes no file"),
        (["--block-size", "0"], "must be 1 or more"),
        (["--max-model-len", "many"], "invalid"),
        (["--gpu-memory-utilization", "nan"], "above 0 and at most 1"),
        (["--gpu-memory-utilization", "1.5"], "above 0 and at most 1"),
        (["--users", "1,two"], "numbers as 1,8,64"),
        (["--prompt-tokens", "9-3"], "must rise"),
        (["--output-tokens", "a-b"], "must be A-B"),
        (["--seed", "-1"], "0 or more"),
        (["--formats", "gif"], "png, svg"),
        (["--json", "/does/not/exist/results.json"], "there is no folder"),
        (["--no-such-option"], "unrecognized"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, *arguments)


def test_a_folder_is_no_results_file(capsys, tmp_path):
    assert "is a folder" in refused(capsys, "--json", str(tmp_path))


@pytest.mark.skipif(not WITHOUT_VLLM, reason="vLLM is installed here")
def test_without_vllm_the_next_step_is_said(capsys):
    assert "pip install vllm" in refused(capsys)


def test_the_help_starts_at_once_and_has_no_torch():
    code = (
        "import sys; from pagedattn.serving.cli import make_parser; make_parser().format_help(); "
        "print([n for n in ('torch', 'vllm', 'pandas', 'matplotlib') if n in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert answer.stdout.strip() == "[]"
