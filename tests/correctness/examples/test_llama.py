"""The example model: its greedy answers are those of transformers, token by token."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedattn import BlockManager

ROOT = Path(__file__).resolve().parents[3]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100)
NEW_TOKENS = 64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = (
    "The capital of France is",
    "A page table maps",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
    "def fibonacci(n):",
    "List three reasons why memory is fragmented:",
    "Water boils at",
    "In 1969, two astronauts",
    "Hello",
)


@pytest.fixture(scope="module")
def llama():
    specification = importlib.util.spec_from_file_location(
        "llama_example", ROOT / "examples" / "llama.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules["llama_example"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def small_folder(transformers, tmp_path_factory):
    """A random model whose head size is not hidden size / heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=199,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=7,
    )
    folder = tmp_path_factory.mktemp("small")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def expected_answers(transformers, folder, prompts, device, num_tokens, *, stop=False):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.eval()
    answers = []
    for prompt in prompts:
        asked = torch.tensor([prompt], device=device)
        out = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=None if stop else num_tokens,
            eos_token_id=model.config.eos_token_id if stop else None,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def random_prompts(lengths=LENGTHS):
    rng = np.random.default_rng(5)
    return [rng.integers(8, 199, length).tolist() for length in lengths]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["torch", "reference", "triton"])
def test_a_ragged_batch_answers_as_transformers_does_one_prompt_at_a_time(
    llama, transformers, small_folder, device, implementation
):
    if (implementation == "triton") != (device == "cuda"):
        pytest.skip("Triton runs on the GPU, the others are compared on the CPU")
    prompts = random_prompts()
    model = llama.Llama.load(small_folder, torch.float32, device)
    answers = llama.generate(
        model, prompts, NEW_TOKENS, implementation=implementation, stop_at_eos=False
    )
    expected = expected_answers(transformers, small_folder, prompts, device, NEW_TOKENS)
    assert answers == expected


def test_the_blocks_may_lie_anywhere_and_are_free_afterwards(llama, transformers, small_folder):
    prompts = random_prompts()
    manager = BlockManager(num_blocks=600, block_size=4)
    held = manager.allocate(np.arange(1, 60))
    manager.free(held[::2])  # the free blocks are scattered
    free = manager.num_free_blocks
    model = llama.Llama.load(small_folder, torch.float32)
    answers = llama.generate(model, prompts, 8, manager=manager, stop_at_eos=False)
    assert answers == expected_answers(transformers, small_folder, prompts, "cpu", 8)
    assert manager.num_free_blocks == free
    manager.check_integrity()


def test_prompts_that_begin_alike_are_computed_once_and_answered_alike(
    llama, transformers, small_folder
):
    first = random_prompts([40])[0]
    prompts = [first, first, [*first[:33], 9, 10]]
    manager = BlockManager(num_blocks=64, block_size=16)
    model = llama.Llama.load(small_folder, torch.float32)
    answers = llama.generate(model, prompts, 12, manager=manager, stop_at_eos=False)
    assert manager.statistics().num_hit_tokens == 64  # two full blocks, twice
    assert answers == expected_answers(transformers, small_folder, prompts, "cpu", 12)


def test_an_answer_ends_with_the_end_token_while_others_go_on(llama, small_folder):
    prompts = random_prompts([3, 9, 27, 31])
    model = llama.Llama.load(small_folder, torch.float32)
    whole = llama.generate(model, prompts, 40, stop_at_eos=False)
    # an end token that one answer has early and another does not have
    end = next(t for t in whole[0][2:] if any(t not in other for other in whole[1:]))
    config = json.loads((small_folder / "config.json").read_text())
    model.config = llama.LlamaConfig.of(config | {"eos_token_id": end})
    answers = llama.generate(model, prompts, 40)
    for answer, long in zip(answers, whole, strict=True):
        cut = long.index(end) + 1 if end in long else len(long)
        assert answer == long[:cut]
    assert len(answers[0]) < 40 == max(map(len, answers))


@pytest.mark.parametrize("device", DEVICES)
def test_smollm2_answers_eight_prompts_in_one_batch_as_transformers_does(
    llama, transformers, device
):
    if not SMOLLM2.is_dir():
        pytest.skip("no real model is here: run python tools/fetch_model.py")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 4
    model = llama.Llama.load(SMOLLM2, torch.float32, device)
    answers = llama.generate(model, prompts, NEW_TOKENS, stop_at_eos=False)
    assert answers == expected_answers(transformers, SMOLLM2, prompts, device, NEW_TOKENS)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
)
def test_a_model_that_is_computed_otherwise_is_refused(llama, change):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
    }
    llama.LlamaConfig.of(config)
    with pytest.raises(ValueError, match=r"not here|only Llama"):
        llama.LlamaConfig.of(config | change)
