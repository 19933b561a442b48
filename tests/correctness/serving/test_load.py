"""Loads: the same seed gives the same requests, and none is longer than the model takes."""

import json

import numpy as np
import pytest

from pagedattn.serving.load import FIRST_TOKEN, LoadError, sharegpt_load, synthetic_load, trace_load

SIZES = {"prompt_tokens": (3, 9), "output_tokens": (2, 5), "vocab_size": 50, "max_model_len": 64}


def mooncake(tmp_path, *requests):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": i, "input_length": n, "output_length": out, "hash_ids": ids}
        for i, (n, out, ids) in enumerate(requests)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def azure(tmp_path, *sizes):
    path = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:46.000000{i},{n},{out}" for i, (n, out) in enumerate(sizes)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path


def test_synthetic_lengths_and_tokens_keep_to_their_bounds():
    load = synthetic_load(300, **SIZES)
    lengths = [len(request.prompt) for request in load.requests]
    assert (min(lengths), max(lengths)) == (3, 9)
    outputs = [request.output_tokens for request in load.requests]
    assert (min(outputs), max(outputs)) == (2, 5)
    tokens = np.concatenate([request.prompt for request in load.requests])
    assert tokens.min() >= FIRST_TOKEN
    assert tokens.max() < 50
    assert load.prompt_tokens == tokens.size
    assert load.output_tokens == sum(outputs)


def test_a_seed_decides_everything():
    first, again, other = (synthetic_load(20, **SIZES, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(first.requests, again.requests, strict=True):
        assert a.prompt.tolist() == b.prompt.tolist()
        assert a.output_tokens == b.output_tokens
    assert first.requests[0].prompt.tolist() != other.requests[0].prompt.tolist()


def test_a_shared_prefix_is_shared_and_nothing_else_is():
    load = synthetic_load(5, **SIZES, shared_prefix=7)
    prompts = [request.prompt.tolist() for request in load.requests]
    assert all(prompt[:7] == prompts[0][:7] for prompt in prompts)
    assert len({tuple(prompt[7:10]) for prompt in prompts}) == 5


def test_a_synthetic_load_that_cannot_fit_is_refused():
    with pytest.raises(
        LoadError, match=r"65 tokens \(51 shared, 9 in, 5 out\); the model takes 64"
    ):
        synthetic_load(5, **SIZES, shared_prefix=51)
    synthetic_load(5, **SIZES, shared_prefix=50)
    with pytest.raises(LoadError, match="1 request or more"):
        synthetic_load(0, **SIZES)


def test_mooncake_prompts_that_name_a_block_share_its_tokens(tmp_path):
    path = mooncake(tmp_path, (600, 9, [1, 2]), (1000, 9, [1, 3]), (512, 9, [1]))
    load = trace_load(path, 9, kind="mooncake", vocab_size=900, max_model_len=2000)
    prompts = [request.prompt for request in load.requests]
    assert [len(prompt) for prompt in prompts] == [600, 1000, 512]
    assert prompts[0][:512].tolist() == prompts[1][:512].tolist() == prompts[2].tolist()
    assert prompts[0][512:600].tolist() != prompts[1][512:600].tolist()


def test_long_requests_of_a_trace_are_cut_and_that_is_said(tmp_path):
    path = azure(tmp_path, (50, 10), (90, 10), (5, 500))
    load = trace_load(path, 9, kind="azure", vocab_size=90, max_model_len=64, max_output_tokens=20)
    sizes = [(len(request.prompt), request.output_tokens) for request in load.requests]
    assert sizes == [(50, 10), (54, 10), (5, 20)]
    assert "2 of 3 cut to fit" in load.note


def test_a_trace_of_the_other_kind_or_none_is_refused(tmp_path):
    sizes = {"vocab_size": 90, "max_model_len": 64}
    with pytest.raises(LoadError, match="no azure trace"):
        trace_load(mooncake(tmp_path, (6, 9, [1])), 9, kind="azure", **sizes)
    with pytest.raises(LoadError, match="no mooncake trace"):
        trace_load(azure(tmp_path, (6, 9)), 9, kind="mooncake", **sizes)
    with pytest.raises(LoadError, match="cannot be read"):
        trace_load(tmp_path / "none.csv", 9, kind="azure", **sizes)


def words(text):
    return [len(word) for word in text.split()]


def sharegpt(tmp_path, content):
    path = tmp_path / "sharegpt.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_sharegpt_gives_first_turns_and_as_many_tokens_as_were_answered(tmp_path):
    entries = [
        {"conversations": [{"value": "a bb ccc"}, {"value": "dd e"}, {"value": "more"}]},
        {"conversations": [{"value": "asked, never answered"}]},
        {"conversations": [{"value": "q"}, {"value": ""}]},
        {"conversations": [{"value": "x yy"}, {"value": "z z z"}]},
    ]
    load = sharegpt_load(sharegpt(tmp_path, entries), 9, encode=words, max_model_len=64)
    assert [request.prompt.tolist() for request in load.requests] == [[1, 2, 3], [1, 2]]
    assert [request.output_tokens for request in load.requests] == [2, 3]
    one = sharegpt_load(sharegpt(tmp_path, entries), 1, encode=words, max_model_len=64)
    assert len(one.requests) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "must hold JSON"),
        ({"a": 1}, "a list of conversations"),
        ([3], "a list of conversations"),
        ([{"conversations": "x"}], "a list of conversations"),
        ([{"conversations": [{"value": 3}, {"value": "x"}]}], "no conversation with an answer"),
        ([], "no conversation with an answer"),
    ],
)
def test_a_broken_sharegpt_file_is_refused_in_a_sentence(tmp_path, content, sentence):
    with pytest.raises(LoadError, match=sentence):
        sharegpt_load(sharegpt(tmp_path, content), 9, encode=words, max_model_len=64)
