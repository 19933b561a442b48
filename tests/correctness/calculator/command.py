"""The calculator's command line, as its tests call it."""

from pathlib import Path

from pagedattn.calculator import cli

SMALL = ("--gpu", "1", "--model", "smollm2-135m", "--max-model-len", "512", "--users", "10")
SMALL += ("--system-prompt-tokens", "50", "--own-tokens", "10", "--weights", "0.1")
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


def fails(capsys, *arguments):
    """Run the command, which must fail with one sentence and write nothing; return it."""
    before = sorted(Path().rglob("*"))
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1
    assert ". " not in captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err
