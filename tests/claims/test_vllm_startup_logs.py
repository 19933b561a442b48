"""What vLLM prints at its start: «Available KV cache memory» and «GPU KV cache size».

Both lines of three start-up logs, with blocks of 16 in bfloat16. The memory is printed with two
decimals, so the logged tokens must lie between what 0.005 GiB less and 0.005 GiB more hold.
"""

import dataclasses
import json

import pytest

from pagedattn.calculator.cli import main as calculate
from pagedattn.config import ModelConfig
from pagedattn.memory import KVMemory

GIB = 2**30

LOGS = [
    ("smollm2-135m", 70.45, 3_283_168),
    ("qwen3-0.6b", 68.98, 645_792),
    ("llama-3-8b", 54.31, 444_896),
]
# few long requests fill such memories sooner than many short ones; a GPU of 80 GiB without a known
# bandwidth serves no queue
QUICK = ["--no-plot", "--max-model-len", "8192", "--mean-tokens", "4000", "--user-tokens", "4000"]


def num_tokens(model, gib):
    return 16 * KVMemory(model, block_size=16, dtype="bfloat16").num_blocks_in(gib * GIB)


@pytest.mark.parametrize(("name", "gib", "logged"), LOGS)
def test_the_logged_tokens_fit_in_the_logged_memory(name, gib, logged):
    model = ModelConfig.preset(name)
    least, most = num_tokens(model, gib - 0.005), num_tokens(model, gib + 0.005)
    assert least <= logged <= most
    assert logged % 16 == 0
    assert most - least < 0.0002 * logged


@pytest.mark.parametrize(("name", "gib", "logged"), LOGS)
def test_a_model_with_another_kv_head_would_not_fit_them(name, gib, logged):
    model = ModelConfig.preset(name)
    heads = model.num_kv_heads + 1
    other = dataclasses.replace(model, num_kv_heads=heads, num_query_heads=heads)
    assert not num_tokens(other, gib - 0.005) <= logged <= num_tokens(other, gib + 0.005)


def test_a_head_size_of_hidden_size_over_heads_would_miss_qwen3():
    model = dataclasses.replace(ModelConfig.preset("qwen3-0.6b"), head_size=1024 // 16)
    assert num_tokens(model, 68.98) > 1.9 * 645_792


@pytest.mark.parametrize(("name", "gib", "logged"), LOGS)
def test_the_calculator_itself_says_so(name, gib, logged, tmp_path):
    counted = []
    for number, memory in enumerate((gib - 0.005, gib + 0.005)):
        path = tmp_path / f"{number}.json"
        arguments = ["--gpu", "80", "--model", name, "--kv-memory", f"{memory:.3f}"]
        assert calculate([*arguments, *QUICK, "--json", str(path)]) == 0
        (budget,) = json.loads(path.read_text(encoding="utf-8"))["memory"]["budgets"]
        counted.append(budget["num_tokens"])
    assert counted[0] <= logged <= counted[1]
