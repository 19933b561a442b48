"""``tools/paged_attention_benchmark.py``: what it prints and writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagedattn.calculator import cli
from pagedattn.hardware import GPU
from tests.correctness.calculator.command import CONFIG, SMALL, fails

TOOL = Path(__file__).parents[3] / "tools" / "paged_attention_benchmark.py"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_tables_formulas_and_files_come_out(capsys):
    assert cli.main([*SMALL, "--json", "numbers.json", "--out", "new/plots"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    out = captured.out
    assert "smollm2-135m on 1 GiB" in out
    assert "2 x 30 layers x 3 heads x 64 x 2 bytes = 23,040 bytes (bfloat16)" in out
    assert "80 % of 1 GiB - 102.40 MiB of weights" in out
    for title in ("\n1. Requests", "\n2. Users", "\n3. A shared prompt", "\nIn short"):
        assert title in out
    assert "That is a rounding" in out
    assert "tokens: 1 - (50 + 10 x 10) / (10 x 60) = 1 - 150 / 600 = 75.0 %" in out
    assert "counted: 1 - 13 / 40 = 67.5 %" in out
    assert "No throughput: the bandwidth of 1 GiB is not known." in out
    written = ["new/plots/benchmark_results.png", "new/plots/benchmark_results.svg"]
    assert out.endswith(f"Written: {', '.join(written)}, numbers.json\n")
    assert sorted(str(path) for path in Path().rglob("*") if path.is_file()) == [
        *written,
        "numbers.json",
    ]


def test_the_json_has_the_documented_keys(capsys):
    assert cli.main([*SMALL, "--json", "numbers.json", "--no-plot"]) == 0
    numbers = json.loads(Path("numbers.json").read_text(encoding="utf-8"))
    assert sorted(os.listdir()) == ["numbers.json"]
    documented = sys.modules["pagedattn.calculator.result"].__doc__

    def keys_of(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys_of(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys_of(inner)

    budgets_and_systems = {"without-weights", "after-weights"}
    for key in set(keys_of(numbers)) - budgets_and_systems:
        assert f"``{key}``" in documented, key
    assert numbers["schema"] == "pagedattn-calculator-1"
    assert numbers["settings"]["gpu"]["memory_bytes"] == 2**30
    assert numbers["memory"]["bytes_per_token"] == 23_040
    assert [budget["name"] for budget in numbers["memory"]["budgets"]] == [
        "without-weights",
        "after-weights",
    ]
    assert numbers["headline"]["saved_blocks"] == pytest.approx(0.675)
    assert "smollm2-135m" in capsys.readouterr().out


def test_a_config_json_is_a_model(capsys):
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for model in ("mine/config.json", "mine"):
        assert cli.main(["--gpu", "0.1", "--model", model, "--no-plot"]) == 0
        out = capsys.readouterr().out
        assert "2 x 2 layers x 2 heads x 64 x 2 bytes = 1,024 bytes" in out
        assert "1024 reserved" in out  # the model's maximum, as it is below 2048


def test_a_trace_gives_the_lengths(capsys):
    rows = "".join(f"2023-11-16 18:15:{i:02d}.0000000,40,20\n" for i in range(3))
    Path("trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    assert cli.main([*SMALL, "--trace", "trace.csv", "--no-plot"]) == 0
    assert "(trace, 50 tokens held on average)" in capsys.readouterr().out
    arguments = [*SMALL, "--trace", "trace.csv", "--mean-tokens", "100", "--no-plot"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "(trace, 100 tokens held on average)" in out
    assert "Users that fit (trace, 50 tokens held on average)" in out


def test_how_many_requests_were_cut_to_fit_is_told(capsys):
    rows = "".join(f"2023-11-16 18:15:{i:02d}.0000000,{i}00,12\n" for i in range(1, 8))
    Path("trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    words = [*SMALL, "--trace", "trace.csv", "--no-plot", "--json", "numbers.json"]
    assert cli.main([*words, "--mean-tokens", "50"]) == 0
    out = capsys.readouterr().out
    assert "1. Requests of different lengths (trace, 50 tokens held on average)" in out
    # prompts of 600 and 700 tokens became half of 512
    assert "2. Users that fit (trace, 2 of 7 cut to fit 512 tokens, 293 tokens held" in out
    settings = json.loads(Path("numbers.json").read_text(encoding="utf-8"))["settings"]
    assert settings["num_lengths"] == 7
    assert settings["num_cut"] == {"waste": 0, "users": 2}


def test_scales_and_parallelism_are_shown(capsys):
    arguments = ["--gpu", "1", "--model", "llama-3-8b", "--max-model-len", "512"]
    arguments += ["--tensor-parallel-size", "16", "--kv-dtype", "fp8", "--no-plot"]
    arguments += ["--kv-scales", "per-token-head", "--own-tokens", "10"]
    arguments += ["--system-prompt-tokens", "100"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "llama-3-8b on 1 GiB x 16" in out
    assert "2 x 32 layers x 1 heads x (128 x 1 bytes + 4 of scale) = 8,448 bytes" in out
    assert "16 GPUs share 8 KV heads" in out
    assert "they leave no room for a request of the maximum length" in out


def test_layers_without_kv_and_estimates_are_told(capsys):
    hybrid = CONFIG | {
        "model_type": "new",
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
    }
    Path("config.json").write_text(json.dumps(hybrid), encoding="utf-8")
    assert cli.main(["--gpu", "0.1", "--model", "config.json", "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 layers keep no K and V of their own" in out
    assert "are an estimate from its config" in out


def test_unknown_weights_are_told_and_can_be_given(capsys):
    config = {key: value for key, value in CONFIG.items() if key != "vocab_size"}
    Path("config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["--gpu", "0.1", "--model", "config.json", "--no-plot"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "The weights of llama are not known" in out
    assert "after-weights" not in out
    assert cli.main([*arguments, "--weights", "0.05"]) == 0
    assert "after-weights" in capsys.readouterr().out


def test_without_a_name_the_machines_own_gpu_is_used_and_else_a_v100(monkeypatch):
    options = cli.make_parser().parse_args([])
    monkeypatch.setattr(cli, "own_gpu", lambda: None)
    assert cli.read_settings(options).gpu.name == "v100-32gb"
    mine = GPU("mine", 64 * 2**30)
    monkeypatch.setattr(cli, "own_gpu", lambda: mine)
    assert cli.read_settings(options).gpu == mine


def test_defaults_of_means_shrink_with_the_longest_request():
    options = cli.make_parser().parse_args(
        ["--gpu", "v100", "--model", "gpt2", "--own-tokens", "9"]
    )
    settings = cli.read_settings(options)
    assert settings.max_model_len == 1024
    assert settings.waste_requests.mean_tokens == pytest.approx(235.5, rel=2e-3)
    assert settings.user_requests.mean_tokens == pytest.approx(256, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "gpt-5"], ("--model must be the path of a config.json", "'gpt-5'", "opt-13b")),
        (["--model", "absent.json"], ("absent.json", "cannot be read")),
        (["--gpu", "b9000"], ("--gpu must be one of", "v100-32gb", "'b9000'")),
        (["--users", "0"], ("--users must be a positive integer, not 0",)),
        (["--users", "many"], ("argument --users: invalid int value: 'many'",)),
        (["--own-tokens", "500"], ("at most 512", "not 550")),
        (["--max-model-len", "9000"], ("--max-model-len must be 2 to 8192", "9000")),
        (["--max-model-len", "1"], ("--max-model-len must be 2 to", "not 1")),
        (["--block-size", "0"], ("--block-size must be a positive integer, not 0",)),
        (["--kv-dtype", "int4"], ("invalid choice: 'int4'", "fp8")),
        (["--kv-scales", "per-head"], ("--kv-scales must be none for a cache in bfloat16",)),
        (
            ["--tensor-parallel-size", "2"],
            ("--tensor-parallel-size must", "9 query heads and 3 KV heads", "not 2"),
        ),
        (["--gpu-memory-utilization", "1.5"], ("--gpu-memory-utilization", "1.5")),
        (["--gpu-memory-utilization", "nan"], ("must be a finite number",)),
        (["--kv-memory", "0.001"], ("the KV cache must hold a request of 512 tokens",)),
        (["--kv-memory", "-1"], ("above 0", "'-1'")),
        (["--mean-tokens", "400"], ("--mean-tokens must be above", "not 400")),
        (["--seed", "-1"], ("must be 0 or more",)),
        (["--trace", "absent.csv"], ("absent.csv", "cannot be read")),
        (["--formats", "png,jpg"], ("must be png, svg or png,svg", "'png,jpg'")),
        (["--json", "absent/numbers.json"], ("--json must be a file in a folder",)),
        (["--json", "."], ("--json must be a file in a folder",)),
        (["--gpus", "2"], ("unrecognized arguments: --gpus",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told_in_one_sentence(capsys, arguments, parts):
    message = fails(capsys, *SMALL, *arguments)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "must hold JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps(CONFIG | {"num_hidden_layers": -1}), "num_hidden_layers"),
        (json.dumps(CONFIG | {"layer_types": ["chunked_attention"] * 2}), "chunked_attention"),
        (json.dumps({"kv_lora_rank": 512}), "latent attention"),
    ],
    ids=["no JSON", "no object", "no layers", "unknown layers", "latent attention"],
)
def test_a_malformed_config_is_told_in_one_sentence(capsys, content, part):
    Path("config.json").write_text(content, encoding="utf-8")
    assert part in fails(capsys, "--gpu", "v100", "--model", "config.json")


def test_without_matplotlib_the_plot_can_be_left_out(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pagedattn.calculator.plot", None)
    message = fails(capsys, *SMALL)
    assert "pip install 'pagedattn[plot]', or --no-plot" in message
    assert cli.main([*SMALL, "--no-plot"]) == 0
    assert capsys.readouterr().err == ""


def test_an_interrupt_ends_without_a_traceback_or_files(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Calculation, "of", interrupt)
    assert cli.main([*SMALL, "--json", "numbers.json"]) == 130
    assert capsys.readouterr().err == ""
    assert os.listdir() == []


def test_progress_is_shown_on_a_terminal_and_cleared_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main([*SMALL, "--no-plot"]) == 0
    told = capsys.readouterr().err
    assert "\rwaste: paged" in told
    assert "\rsharing: blocks of 16" in told
    assert told.endswith(" \r")
    assert "\n" not in told


def test_help_has_examples_and_loads_no_heavy_package():
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['paged_attention_benchmark.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:\n  python tools/paged_attention_benchmark.py" in done.stdout
    assert done.stdout.endswith("set()\n")
    assert done.stderr == ""


def test_a_named_gpu_needs_no_torch_and_no_pandas():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['pandas'] = None\n"
        f"sys.path.insert(0, {str(TOOL.parents[1])!r})\n"
        "from pagedattn.calculator.cli import main\n"
        f"sys.exit(main({[*SMALL]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "In short" in done.stdout
    assert Path("figures/local/benchmark_results.png").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_the_tool_runs_from_any_folder_and_in_any_encoding(broken):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONIOENCODING"] = "ascii"
    arguments = [*SMALL, "--no-plot", *(["--model", "\u6f22"] if broken else [])]
    done = subprocess.run(
        [sys.executable, TOOL, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == (2 if broken else 0)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == broken


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--kv-memory", "1000000000"], "at most 1024"),
        (["--kv-memory", "much"], "must be a number of GiB"),
        (["--gpu", "1048576"], "GiB up to 1024"),
        (["--seed", "x"], "must be 0 or more"),
        (["--mean-tokens", "0"], "--mean-tokens must be above 1."),
        (["--user-tokens", "5000"], "--user-tokens must be above 1."),
        (["--json", ""], "--json must be a file"),
    ],
)
def test_numbers_that_are_no_use_are_refused_by_the_options_name(capsys, words, sentence):
    assert cli.main(["--no-plot", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert len(told.splitlines()) == 1


def test_requests_of_two_tokens_are_calculated(capsys):
    words = ["--max-model-len", "2", "--system-prompt-tokens", "1", "--own-tokens", "1"]
    words += ["--gpu", "0.3"]  # thousands of requests, each of them placed
    assert cli.main(["--no-plot", *SMALL, *words]) == 0
    assert "In short" in capsys.readouterr().out


def test_a_name_with_control_characters_is_cleaned(tmp_path, capsys):
    config = {"_name_or_path": "a\nb\x1b[31mred", "model_type": "llama", "hidden_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    cli.main(["--no-plot", "--model", str(path)])
    assert "\x1b" not in capsys.readouterr().out
