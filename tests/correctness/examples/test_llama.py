"""The example model: its greedy answers are those of transformers, token by token."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedattn import BlockManager, OutOfBlocksError

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
    sys.path.insert(0, str(ROOT / "examples"))  # as for the script, its neighbour can be imported
    specification = importlib.util.spec_from_file_location(
        "llama_example", ROOT / "examples" / "llama.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules["llama_example"] = module
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def small_folder(transformers, tmp_path_factory):
    """A random model whose head size is not hidden size / heads."""
    folder = tmp_path_factory.mktemp("small")
    small_model(transformers, folder)
    return folder


def small_model(transformers, folder, **changes):
    torch.manual_seed(0)
    values = {
        "num_hidden_layers": 3,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 199,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "eos_token_id": 7,
    }
    config = transformers.LlamaConfig(**(values | changes))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


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
    memory = llama.Memory.of(model, manager)
    answers = llama.generate(model, prompts, 8, memory=memory, stop_at_eos=False)
    assert answers == expected_answers(transformers, small_folder, prompts, "cpu", 8)
    assert manager.num_free_blocks == free
    manager.check_integrity()


def test_prompts_that_begin_alike_are_computed_once_and_answered_alike(
    llama, transformers, small_folder
):
    first = random_prompts([40])[0]
    prompts = [first, first, [*first[:33], 9, 10]]
    model = llama.Llama.load(small_folder, torch.float32)
    memory = llama.Memory.of(model, BlockManager(num_blocks=64, block_size=16))
    answers = llama.generate(model, prompts, 12, memory=memory, stop_at_eos=False)
    assert memory.manager.statistics().num_hit_tokens == 64  # two full blocks, twice
    assert answers == expected_answers(transformers, small_folder, prompts, "cpu", 12)


def test_a_later_batch_finds_in_the_memory_what_an_earlier_one_wrote(
    llama, transformers, small_folder
):
    prompts = random_prompts([40, 33, 100])
    model = llama.Llama.load(small_folder, torch.float32)
    memory = llama.Memory.of(model, BlockManager(num_blocks=64, block_size=16))
    first = llama.generate(model, prompts, 12, memory=memory, stop_at_eos=False)
    before = memory.manager.statistics().num_hit_tokens
    asked = [[*prompt, *answer] for prompt, answer in zip(prompts, first, strict=True)]
    second = llama.generate(model, asked, 12, memory=memory, stop_at_eos=False)
    assert memory.manager.statistics().num_hit_tokens - before == 48 + 32 + 96
    assert second == expected_answers(transformers, small_folder, asked, "cpu", 12)


@pytest.mark.parametrize("failing_step", [1, 2, 5])
def test_a_step_that_fails_leaves_no_block_held_and_nothing_unwritten_to_be_found(
    llama, transformers, small_folder, monkeypatch, failing_step
):
    prompts = random_prompts([40, 33])
    model = llama.Llama.load(small_folder, torch.float32)
    memory = llama.Memory.of(model, BlockManager(num_blocks=16, block_size=16))
    memory.cache.storage.fill_(torch.nan)
    forward, steps = model.forward, iter(range(1, 100))

    def fail(*arguments):
        if next(steps) == failing_step:
            raise RuntimeError("the step failed")
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="the step failed"):
        llama.generate(model, prompts, 12, memory=memory, stop_at_eos=False)
    assert memory.manager.num_free_blocks == 16
    memory.manager.check_integrity()
    answers = llama.generate(model, prompts, 12, memory=memory, stop_at_eos=False)
    assert answers == expected_answers(transformers, small_folder, prompts, "cpu", 12)


def test_the_smallest_pool_holds_a_prompt_and_its_answer_but_for_the_last_token(
    llama, small_folder
):
    model = llama.Llama.load(small_folder, torch.float32)
    prompt = random_prompts([33])
    expected = llama.generate(model, prompt, 16, stop_at_eos=False)
    fits = llama.Memory.of(model, BlockManager(num_blocks=3, block_size=16))  # 33 + 16 - 1 = 48
    assert llama.generate(model, prompt, 16, memory=fits, stop_at_eos=False) == expected
    small = llama.Memory.of(model, BlockManager(num_blocks=2, block_size=16))
    with pytest.raises(OutOfBlocksError):
        llama.generate(model, prompt, 16, memory=small, stop_at_eos=False)
    assert small.manager.num_free_blocks == 2


@pytest.mark.parametrize(
    ("lengths", "new_tokens"), [([], 4), ([3, 0], 4), ([3], 0), ([509], 4)], ids=str
)
def test_what_the_model_cannot_answer_is_refused_before_a_block_is_taken(
    llama, small_folder, lengths, new_tokens
):
    model = llama.Llama.load(small_folder, torch.float32)
    memory = llama.Memory.of(model, BlockManager(num_blocks=64, block_size=16))
    with pytest.raises(ValueError, match=r"at least 1 token each|the model allows 512"):
        llama.generate(model, random_prompts(lengths), new_tokens, memory=memory)
    assert memory.manager.statistics().num_lookup_tokens == 0
    model_limit = [random_prompts([508])[0]]
    assert len(llama.generate(model, model_limit, 4, stop_at_eos=False)[0]) == 4


def test_an_answer_ends_with_the_end_token_while_others_go_on(llama, small_folder):
    prompts = random_prompts([3, 9, 27, 31])
    model = llama.Llama.load(small_folder, torch.float32)
    whole = llama.generate(model, prompts, 40, stop_at_eos=False)
    # an end token that one answer has early and another does not have
    end = next(t for t in whole[0][2:] if any(t not in other for other in whole[1:]))
    model.config = dataclasses.replace(model.config, eos_tokens=frozenset([end]))
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
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=str,
)
def test_llamas_of_other_shapes_answer_as_transformers_does(llama, transformers, tmp_path, change):
    small_model(transformers, tmp_path, **change)
    prompts = random_prompts([1, 17, 33])
    model = llama.Llama.load(tmp_path, torch.float32)
    answers = llama.generate(model, prompts, 24, stop_at_eos=False)
    assert answers == expected_answers(transformers, tmp_path, prompts, "cpu", 24)


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "awq"}},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_a_model_that_is_computed_otherwise_is_refused(llama, change):
    llama.LlamaConfig.of(CONFIG)
    with pytest.raises(ValueError, match=r"not here|only Llama"):
        llama.LlamaConfig.of(CONFIG | change)


def test_the_end_tokens_are_the_chat_models(llama, transformers, tmp_path):
    small_model(transformers, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert llama.Llama.load(tmp_path).config.eos_tokens == {5, 9}


# -- the command ---------------------------------------------------------------------------


def command(*arguments):
    words = [sys.executable, str(ROOT / "examples" / "llama.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("transformers")
def test_the_command_answers_each_prompt():
    if not SMOLLM2.is_dir():
        pytest.skip("no real model is here: run python tools/fetch_model.py")
    ran = command("The capital of France is", "Hello", "--max-new-tokens", 4)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.strip().split("\n\nHello|")
    assert first.startswith("The capital of France is| Paris")
    assert second


def broken(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no model"),
        (broken("config.json", "{"), "config.json"),
        (broken("config.json", "[1]"), "config.json"),
        (broken("config.json", '{"model_type": "gpt2"}'), "gpt2"),
        (broken("model.safetensors", "no"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "have no model.embed_tokens"),
        (lambda _: None, "tokenizer"),
    ],
    ids=["no config", "half", "a list", "gpt2", "no safetensors", "no weights", "no tokenizer"],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_sentence(
    llama, transformers, tmp_path, capsys, spoil, sentence
):
    small_model(transformers, tmp_path)
    spoil(tmp_path)
    capsys.readouterr()  # of the progress bar when the model was saved
    assert llama.main(["a", "--model", str(tmp_path), "--max-new-tokens", "2"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(
    "words", [[], ["a", "--max-new-tokens", "many"], ["a", "--implementation", "none"]], ids=str
)
def test_a_wrong_command_line_is_told_in_one_sentence(llama, capsys, words):
    assert llama.main(words) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "--help" in said.err
