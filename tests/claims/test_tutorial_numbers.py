"""The tutorial's own headline numbers, from the calculator's defaults on a V100 of 32 GB.

- Waste: standard about 77 %, paged about 0 %. The stated workload: ShareGPT's lengths, scaled so
  that a running request holds 471 tokens on average, of the 2048 that the standard reservation
  keeps. «About 0 %» rounds what is under 4 %.
- Users: standard about 25, paged about 100, with 80 % of 32 GiB for K and V, 0.5 MiB a token, and
  512 tokens held on average.
- A shared prompt: 83 % saved where 100 users share 500 tokens and add 100 each. That counts
  tokens, as 82.5 %; whole blocks save a little less.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "paged_attention_benchmark.py"


def calculate(folder, *arguments):
    path = folder / "numbers.json"
    command = [sys.executable, TOOL, "--no-plot", "--json", path, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return calculate(tmp_path_factory.mktemp("numbers"), "--gpu", "v100-32gb")


def row_of(part, system):
    (row,) = (row for row in part["systems"] if row["system"] == system)
    return row


def test_the_defaults_are_the_stated_workload(numbers):
    settings, memory = numbers["settings"], numbers["memory"]
    assert (settings["model"], settings["max_model_len"]) == ("llama-2-7b", 2048)
    assert settings["gpu_memory_utilization"] == 0.8
    assert memory["bytes_per_token"] == 2**19
    assert memory["budgets"][0]["num_bytes"] == int(0.8 * 32 * 2**30)
    assert numbers["waste"]["mean_tokens"] == pytest.approx(471, abs=0.5)
    assert numbers["users"]["mean_tokens"] == pytest.approx(512, abs=0.5)


def test_a_standard_reservation_wastes_77_percent_and_paged_under_4(numbers):
    standard = row_of(numbers["waste"], "fastertransformer")
    assert standard["waste_of_reserved"] == pytest.approx(0.77, abs=0.005)
    assert standard["waste"] == pytest.approx(0.77, abs=0.01)
    paged = row_of(numbers["waste"], "paged")
    assert 0.005 < paged["waste"] < 0.04  # not 0 %
    assert paged["waste_of_reserved"] == pytest.approx(7.5 / 478.5, abs=0.003)


def test_25_users_fit_with_a_standard_reservation_and_about_100_paged(numbers):
    standard = row_of(numbers["users"], "fastertransformer")["users"]["without-weights"]
    paged = row_of(numbers["users"], "paged")["users"]["without-weights"]
    assert standard == 25
    assert paged == pytest.approx(100, abs=2)
    assert paged / standard == pytest.approx(4, abs=0.1)


def test_what_the_weights_leave_holds_half_as_many(numbers):
    # 25.6 GiB less 12.55 GiB of weights: the headline does not say this
    standard = row_of(numbers["users"], "fastertransformer")["users"]["after-weights"]
    paged = row_of(numbers["users"], "paged")["users"]["after-weights"]
    assert standard == 13
    assert paged == pytest.approx(51, abs=1.5)


def test_a_shared_prompt_saves_83_percent_of_the_tokens_and_81_in_whole_blocks(numbers):
    sharing = numbers["sharing"]
    assert sharing["saved_tokens"] == 1 - 10_500 / 60_000 == 0.825  # printed as 83 %
    last = sharing["by_users"][-1]
    assert (last["num_users"], last["separate"], last["shared"]) == (100, 3800, 731)
    by_size = {row["block_size"]: row["saved"] for row in sharing["by_block_size"]}
    assert by_size[4] == pytest.approx(sharing["saved_tokens"])  # 4 divides 500
    assert by_size[16] == last["saved"] == pytest.approx(0.808, abs=0.0005)


def test_the_headline_repeats_these_numbers(numbers):
    headline = numbers["headline"]
    waste, users = numbers["waste"], numbers["users"]
    expected = {
        "waste_standard": row_of(waste, "fastertransformer")["waste_of_reserved"],
        "waste_paged": row_of(waste, "paged")["waste"],
        "users_standard": row_of(users, "fastertransformer")["users"]["without-weights"],
        "users_paged": row_of(users, "paged")["users"]["without-weights"],
        "saved_tokens": numbers["sharing"]["saved_tokens"],
        "saved_blocks": numbers["sharing"]["by_users"][-1]["saved"],
    }
    assert headline == expected


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_draw_of_requests_gives_them_too(seed, tmp_path):
    headline = calculate(tmp_path, "--gpu", "v100-32gb", "--seed", seed)["headline"]
    assert headline["waste_standard"] == pytest.approx(0.77, abs=0.01)
    assert headline["waste_paged"] < 0.04
    assert headline["users_standard"] == 25
    assert headline["users_paged"] == pytest.approx(100, abs=2)
