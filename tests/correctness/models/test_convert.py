"""A GGUF file's weights and tokenizer come out as they went in, made up and real."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagedattn.config import ModelConfig
from pagedattn.models import FetchError, convert, default_folder

ROOT = Path(__file__).parents[3]
MISSING = [name for name in convert.PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
LAYERS, HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, FFN = 2, 4, 2, 16, 64, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
# The most likely token is ahead of the next by at least 0.8 as far as the continuation goes and by
# 3.5 as far as the answer does (logits, float32). Near 25, bfloat16 numbers are 0.125 apart, so
# that a lead of 0.1 falls to one token on one processor and to the other on another.
PROMPT, CONTINUATION = "The capital of France is", " Paris.\n\nThe"
QUESTION, ANSWER = "What is the opposite of hot?", "The opposite of hot is cold"

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages about each other


def byte_letters():
    """The 256 letters that stand for bytes in a GPT-2 vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i, _ in enumerate(others)]


def pair_halves(weight, num_heads):
    """Put a head's two rotary halves beside each other, as GGUF stores queries and keys."""
    rows = weight.reshape(num_heads, 2, HEAD_SIZE // 2, HIDDEN)
    return rows.transpose(1, 2).reshape(weight.shape)


def made_up_weights():
    """Weights by their names in transformers, and as (name, tensor) of GGUF."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = 256 + len(SPECIAL) + 1
    shapes = {
        "self_attn.q_proj": ("attn_q", HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.k_proj": ("attn_k", KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.v_proj": ("attn_v", KV_HEADS * HEAD_SIZE, HIDDEN),
        "self_attn.o_proj": ("attn_output", HIDDEN, HEADS * HEAD_SIZE),
        "mlp.gate_proj": ("ffn_gate", FFN, HIDDEN),
        "mlp.up_proj": ("ffn_up", FFN, HIDDEN),
        "mlp.down_proj": ("ffn_down", HIDDEN, FFN),
        "input_layernorm": ("attn_norm", HIDDEN),
        "post_attention_layernorm": ("ffn_norm", HIDDEN),
    }
    ours = {
        "model.embed_tokens": ("token_embd", vocabulary, HIDDEN),
        "model.norm": ("output_norm", HIDDEN),
    }
    for layer in range(LAYERS):
        for name, (theirs, *shape) in shapes.items():
            ours[f"model.layers.{layer}.{name}"] = (f"blk.{layer}.{theirs}", *shape)
    return {
        f"{name}.weight": (f"{theirs}.weight", torch.randn(shape, generator=generator))
        for name, (theirs, *shape) in ours.items()
    }


def write_gguf(path):
    """Write a Llama of two layers in 8 bits; return the weights that it means, float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("made up")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256 + len(SPECIAL) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *byte_letters(), "ab"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    meant = {}
    for name, (theirs, weight) in made_up_weights().items():
        stored = weight
        if "q_proj" in name or "k_proj" in name:
            stored = pair_halves(weight, len(weight) // HEAD_SIZE)
        if weight.dim() == 1:
            writer.add_tensor(theirs, stored.numpy())
            meant[name] = weight
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(theirs, gguf.quantize(stored.numpy(), kind), raw_dtype=kind)
        meant[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A converted folder, and the weights that went in."""
    above = tmp_path_factory.mktemp("made_up")
    meant = write_gguf(above / "Tiny.Q8_0.gguf")
    (above / "model").mkdir()
    convert.convert_gguf(above / "Tiny.Q8_0.gguf", above / "model")
    return above / "model", meant


@needs_packages
def test_the_weights_are_the_dequantised_ones_in_bfloat16(made_up):
    from safetensors.torch import load_file

    folder, meant = made_up
    found = load_file(folder / "model.safetensors")
    assert found.keys() == meant.keys()
    for name, weight in meant.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name


@needs_packages
def test_the_config_is_a_plain_llamas_and_names_the_model(made_up):
    folder, _ = made_up
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert config["rope_theta"] == 50000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    model = ModelConfig.from_hf(folder)
    assert (model.name, model.dtype, model.max_model_len) == ("Tiny", "bfloat16", 128)
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads) == (2, 4, 2)
    assert (model.head_size, model.hidden_size) == (16, 64)


@needs_packages
def test_the_tokenizer_has_its_special_tokens_its_merges_and_its_chat_template(made_up):
    from transformers import AutoTokenizer

    folder, _ = made_up
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["chat_template"] == TEMPLATE
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_max_length"] == 128
    assert not {"local_files_only", "is_local"} & set(written)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert list(tokenizer("ab")) == ["input_ids", "attention_mask"]
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    tokens = tokenizer.encode("<|im_start|>abc 12\u00e9")
    assert tokens[:2] == [1, 259]
    assert tokenizer.decode(tokens) == "<|im_start|>abc 12\u00e9"
    assert tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == (
        "<|im_start|>a<|im_end|>"
    )


@needs_packages
@pytest.mark.parametrize("wrong", ["eos", "a token before every text"])
def test_a_tokenizer_that_was_read_wrongly_is_refused(tmp_path, monkeypatch, wrong):
    import transformers

    read = transformers.AutoTokenizer.from_pretrained

    def misread(*arguments, **options):
        tokenizer = read(*arguments, **options)
        if wrong == "eos":
            tokenizer.eos_token = "<|im_start|>"
        else:
            monkeypatch.setattr(tokenizer, "encode", lambda _: [1])
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", misread)
    write_gguf(tmp_path / "Tiny.gguf")
    with pytest.raises(FetchError, match="reads the model's tokenizer wrongly; run pip install"):
        convert.convert_gguf(tmp_path / "Tiny.gguf", tmp_path)


@needs_packages
def test_a_file_that_is_no_gguf_is_told_in_one_sentence(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(FetchError, match=r"could not convert bad\.gguf \(.*\); try pip install"):
        convert.convert_gguf(tmp_path / "bad.gguf", tmp_path)


def run(code, *arguments):
    """Run Python code in a process of its own; return what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def real():
    """The real model's folder in this checkout, fetched if it is not there."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    tool = ROOT / "tools" / "fetch_model.py"
    subprocess.run([sys.executable, tool], check=True)
    return default_folder(ROOT)


@pytest.mark.vllm
def test_transformers_goes_on_writing_with_the_real_model(real):
    code = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer(sys.argv[2], return_tensors="pt")
tokens = model.generate(**given, max_new_tokens=24, do_sample=False)[0]
print(json.dumps([str(model.dtype), tokenizer.decode(tokens[given.input_ids.shape[1]:])]))
"""
    dtype, text = run(code, str(real), PROMPT)
    assert dtype == "torch.bfloat16"
    assert text.startswith(CONTINUATION)


@pytest.mark.vllm
def test_vllm_goes_on_writing_with_the_real_model(real):
    code = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=256, enforce_eager=True)
greedy = SamplingParams(temperature=0, max_tokens=24)
text = llm.generate([sys.argv[2]], greedy)[0].outputs[0].text
question = [{"role": "user", "content": sys.argv[3]}]
print()
print(json.dumps([text, llm.chat(question, greedy)[0].outputs[0].text]))
"""
    text, answer = run(code, str(real), PROMPT, QUESTION)
    assert text.startswith(CONTINUATION)
    assert answer.startswith(ANSWER)


@pytest.mark.vllm
def test_the_real_model_is_the_preset(real):
    found = ModelConfig.from_hf(real)
    preset = ModelConfig.preset("smollm2-135m")
    assert found.num_parameters == preset.num_parameters
    assert found.max_model_len == preset.max_model_len
    assert (found.num_layers, found.num_kv_heads) == (preset.num_layers, preset.num_kv_heads)
