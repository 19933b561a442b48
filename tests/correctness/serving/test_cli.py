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
        (["--block-size", "0"], "must be a whole number of 1 or more, not '0'"),
        (["--max-model-len", "many"], "must be a whole number of 1 or more, not 'many'"),
        (["--gpu-memory-utilization", "nan"], "above 0 and at most 1"),
        (["--gpu-memory-utilization", "1.5"], "above 0 and at most 1"),
        (["--prompt-tokens", "9-3"], "must rise"),
        (["--output-tokens", "a-b"], "must be A-B"),
        (["--seed", "-1"], "0 or more"),
        (["--formats", "gif"], "png, svg"),
        (["--json", "/does/not/exist/results.json"], "there is no folder"),
        (["--json", "/proc/results.json", "--no-plot"], "--json /proc/results.json cannot be"),
        (["--out", "/proc/plots"], "--out /proc/plots cannot be written"),
        (["--requests", "many"], "--requests: must be a whole number of 1 or more, not 'many'"),
        (["--users", "1,x"], "--users: must be whole numbers of 1 or more as 1,8,64, not '1,x'"),
        (["--seed", "0.5"], "--seed: must be a whole number of 0 or more"),
        (["--gpu-memory-utilization", "all"], "must be above 0 and at most 1, not 'all'"),
        (["--prompt-tokens", "8-x"], "must be A-B, whole numbers of 1 or more as 100-1024"),
        (["--no-such-option"], "unrecognized"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("azure", "a,b\n1,2\n", "the first line must be the header"),
        (
            "mooncake",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,3\n",
            "is no mooncake trace",
        ),
        ("sharegpt", "a,b\n", "must hold JSON"),
        ("sharegpt", "[]", "holds no conversation with an answer"),
    ],
)
def test_a_file_of_requests_is_read_before_an_engine_is_started(
    capsys, tmp_path, kind, text, sentence
):
    path = tmp_path / "requests"
    path.write_text(text)
    assert sentence in refused(capsys, "--dataset", kind, str(path))


def test_a_folder_is_no_results_file(capsys, tmp_path):
    assert "is a folder" in refused(capsys, "--json", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["--dataset", "azure", "t.csv", "--json", "t.csv"], "t.csv"),
        (["--dataset", "azure", "serving.svg", "--out", ".", "--formats", "png"], "serving.svg"),
        (["--model", "m", "--json", "m/config.json"], "m/config.json"),
        (["--model", "m", "--json", "m/model.safetensors"], "m/model.safetensors"),
    ],
    ids=["dataset", "plot", "config", "weights"],
)
def test_what_is_read_is_not_written_over(capsys, tmp_path, monkeypatch, words, target):
    monkeypatch.chdir(tmp_path)
    for name in ("t.csv", "serving.svg"):
        Path(name).write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,3\n")
    Path("m").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("m", name).write_text("{}")
    message = refused(capsys, *words)
    assert message == f"{target} is read: what is written needs another name.\n"


def test_a_folder_without_a_model_and_a_name_too_long_are_told(capsys, tmp_path):
    told = refused(capsys, "--model", str(tmp_path))
    assert f"--model {tmp_path} is a folder that has no config.json" in told
    assert "cannot be read (File name too long)" in refused(capsys, "--model", "m" * 300)


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
