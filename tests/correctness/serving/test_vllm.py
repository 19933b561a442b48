"""vLLM for real: a model that answers, and memory that is what this project says it is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedattn.memory import KVMemory
from pagedattn.report.results import load
from pagedattn.serving.benchmark import predict
from pagedattn.serving.clients import run_clients
from pagedattn.serving.load import synthetic_load
from pagedattn.serving.memory import MemoryWatch
from pagedattn.serving.settings import EngineSettings

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.vllm,
    *([pytest.mark.gpu] if ON_GPU else []),  # vLLM runs on the GPU where there is one
    # vLLM and what it imports warn of their own affairs
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).resolve().parents[3]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
PROMPTS = (
    "The capital of France is",
    "A page table maps",
    "def fibonacci(n):",
    "Water boils at",
    "In 1969, two astronauts",
    "List three reasons why memory is fragmented:",
)


@pytest.fixture(scope="module")
def smollm2():
    if not SMOLLM2.is_dir():  # tox -e vllm-cpu, which CI runs, fetches it before, or fails
        pytest.skip("there is no real model here: run python tools/fetch_model.py")
    return SMOLLM2


@pytest.fixture(scope="module")
def engine(smollm2):
    from pagedattn.serving.vllm_engine import VllmEngine

    started = VllmEngine(
        EngineSettings(
            str(smollm2),
            dtype="float32",
            block_size=32,
            max_model_len=1024,
            gpu_memory_utilization=0.3 if ON_GPU else None,
            enforce_eager=True,
        )
    )
    yield started
    started.close()


def test_greedy_tokens_are_those_of_transformers(engine, smollm2):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    answers = engine.generate(prompts, 32)
    device = "cuda" if ON_GPU else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.to(device).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = torch.tensor([prompt], device=device)
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == out[0, len(prompt) :].tolist()


def test_the_number_of_blocks_is_the_calculators(engine):
    predicted = predict(engine)
    said = engine.memory
    assert said.kv_pool is not None
    # on a CPU it does not say its weights
    assert (said.weights is None) != ON_GPU
    if ON_GPU:
        assert predicted.weights == pytest.approx(said.weights, rel=0.02)
    # vLLM prints its pool in GiB with two decimals
    block = KVMemory(engine.model, 32, "float32").bytes_per_block
    assert abs(predicted.blocks_of_pool - said.num_blocks) <= 0.005 * 2**30 / block + 1


@pytest.mark.parametrize("shared_prefix", [0, 100])
def test_vllm_and_the_block_manager_hold_the_same_blocks_at_every_step(engine, shared_prefix):
    requests = synthetic_load(
        12,
        prompt_tokens=(10, 90),
        output_tokens=(3, 40),
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
        shared_prefix=shared_prefix,
        seed=shared_prefix,
    )
    engine.reset_prefix_cache()
    before = engine.prefix_hits()
    watch = MemoryWatch.of(engine, engine.memory, prefix_caching=True)
    seen = run_clients(engine, requests.requests, 8, watch=watch)
    assert seen.completed == 12
    compared = [sample for sample in watch.samples if sample.mirrored is not None]
    assert len(compared) > 20
    assert [s.blocks for s in compared] == [s.mirrored for s in compared]
    lookups, hits = (b - a for a, b in zip(before, engine.prefix_hits(), strict=True))
    ours = watch.manager.statistics()
    assert (ours.num_lookup_tokens, ours.num_hit_tokens) == (lookups, hits)
    assert (hits > 0) == (shared_prefix > 0)
    watch.manager.check_integrity()


def test_the_command_measures_the_real_model_and_writes_what_the_report_reads(smollm2, tmp_path):
    results = tmp_path / "results.json"
    command = [
        *(sys.executable, "tools/vllm_real_benchmark.py", "--model", str(smollm2)),
        *("--json", str(results), "--out", str(tmp_path / "plots"), "--formats", "png"),
        *("--requests", "6", "--users", "1,3", "--enforce-eager", "--max-model-len", "512"),
        *("--prompt-tokens", "16-64", "--output-tokens", "8-24"),
        *("--gpu-memory-utilization", "0.3"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    for title in ("6 requests at once", "concurrent users", "memory"):
        assert title in answer.stdout
    frame = load(results)
    assert sorted(frame["operation"]) == ["memory", "throughput", "users", "users"]
    assert (frame["output_tokens_per_s"] > 0).all()
    memory = frame[frame["operation"] == "memory"].iloc[0]
    assert memory["equal_steps"] == memory["compared_steps"] > 0
    assert (tmp_path / "plots" / "serving.png").stat().st_size > 10_000
    assert (tmp_path / "plots" / "serving_memory.png").stat().st_size > 10_000
    assert "nan" not in json.dumps(json.loads(results.read_text())).lower()


def test_several_engines_are_compared_one_after_the_other(smollm2, tmp_path):
    results = tmp_path / "results.json"
    command = [
        *(sys.executable, "tools/vllm_real_benchmark.py", "--model", str(smollm2)),
        *("--compare", "prefix-caching", "--test", "throughput", "--no-plot", "--enforce-eager"),
        *("--requests", "6", "--prompt-tokens", "16-32", "--output-tokens", "8-16"),
        *("--json", str(results), "--gpu-memory-utilization", "0.3", "--max-model-len", "512"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    frame = load(results).set_index("implementation")
    off, on = frame.loc["vllm, prefix caching off"], frame.loc["vllm, prefix caching on"]
    assert np.isnan(off["prefix_hit_rate"]) or off["prefix_hit_rate"] == 0
    assert on["prefix_hit_rate"] > 0.3


def test_an_unknown_model_is_told_in_one_sentence():
    command = [
        *(sys.executable, "tools/vllm_real_benchmark.py", "--no-plot"),
        *("--model", "llama-9", "--load-format", "dummy"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.returncode == 2
    assert "preset must be one of" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
