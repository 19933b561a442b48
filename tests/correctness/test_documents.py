"""The documents do what they say: their code runs, their links lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagedattn.attention import registry
from pagedattn.testing.documents import read_fences, run_document

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [document.name for document in DOCUMENTS]


def runs(*things):
    """One case for each document and each of these things that parts of it need."""
    for document in DOCUMENTS:
        fences = [f for f in read_fences(document.read_text(encoding="utf-8")) if f.runs]
        for needs in dict.fromkeys(fence.needs for fence in fences if fence.needs in things):
            marks = [getattr(pytest.mark, needs)] if needs else []
            if needs == "vllm" and torch.cuda.is_available():
                marks.append(pytest.mark.gpu)  # vLLM runs on the GPU where there is one
            yield pytest.param(document, needs, id=document.name, marks=marks)


def repository_in(folder):
    """Lay the repository out in a folder that commands may write into."""
    for entry in ROOT.iterdir():
        if entry.name == "figures":
            shutil.copytree(entry, folder / entry.name)
        elif not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def model_hub(tmp_path_factory):
    """Return a Hugging Face cache in which facebook/opt-125m is a small model, weights random.

    So the documents' vLLM code runs as it stands, without a network: the same architecture,
    heads and window, 2 layers for 12, and a token for each byte. Texts mean nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import OPTConfig, OPTForCausalLM

    hub = tmp_path_factory.mktemp("huggingface")
    model = hub / "hub" / "models--facebook--opt-125m"
    folder = model / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(folder.name)
    torch.manual_seed(0)
    config = OPTConfig(num_hidden_layers=2, ffn_dim=768, vocab_size=260, dtype="float16")
    OPTForCausalLM(config).half().save_pretrained(folder)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return hub


@pytest.mark.parametrize(("document", "needs"), list(runs(None, "gpu")))
def test_a_documents_code_runs_and_prints_what_it_says(document, needs, monkeypatch, tmp_path):
    folder = repository_in(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_made", dict(registry._made))
    torch.manual_seed(0)
    run_document(document, needs, folder=folder)


@pytest.mark.parametrize(("document", "needs"), list(runs("vllm")))
def test_a_documents_vllm_code_runs_and_prints_what_it_says(document, needs, model_hub, tmp_path):
    # in a process of its own: an engine leaves threads, warnings and settings behind
    settings = {
        "HF_HOME": str(model_hub),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process may have used CUDA before
    }
    environment = {**os.environ, **settings}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override what a document asks for
    command = [sys.executable, "-m", "pagedattn.testing.documents", str(document)]
    done = subprocess.run(
        [*command, "--needs", needs],
        cwd=repository_in(tmp_path),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_says_what_each_tool_is_for():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith("| `tools/` |"))
    assert {path.name for path in (ROOT / "tools").glob("*.py")} == set(re.findall(r"\w+\.py", row))


def prose(document):
    """Return a document without its code."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^    .*$|`[^`\n]*`", "", text, flags=re.M)


def anchors(document):
    """Return the anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = []
    for heading in re.findall(r"^#{1,6} (.*)$", text, flags=re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip()
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = found.count(slug)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def broken_links(document, root=ROOT):
    """Return the links of a document that lead to no file, or to no heading, of the repository."""
    text = prose(document)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    targets += re.findall(r"^\[[^\]]+\]: *(\S+)", text, flags=re.M)
    targets += re.findall(r"""\b(?:src|srcset|href)=["']([^"']+)["']""", text)
    broken = []
    for target in targets:
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if (
            not file.exists()
            or not file.is_relative_to(root)
            or (anchor and file.suffix == ".md" and anchor not in anchors(file))
        ):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_a_documents_links_lead_to_files_and_headings(document):
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `heading`, twice\n\n# A heading, twice\n")
    document = tmp_path / "document.md"
    links = {
        "other.md": True,
        "other.md#a-heading-twice": True,
        "other.md#a-heading-twice-1": True,
        "other.md#a-heading-twice-2": False,
        "missing.md": False,
        "figures/missing.png": False,
        "../": False,
        "#its-own": True,
        "#not-its-own": False,
        "https://example.org/": True,
    }
    fence = "```text\n[in code](missing.md)\n# A heading that is none\n```\n"
    text = "".join(f"![text]({link})\n" for link in links)
    document.write_text(f"## Its own\n\n{text}\n`[code](x)`\n\n{fence}")
    expected = [link for link, good in links.items() if not good]
    assert broken_links(document, tmp_path) == expected
    document.write_text('<img src="missing.svg">\n\n[here][1]\n\n[1]: missing.txt\n')
    assert broken_links(document, tmp_path) == ["missing.txt", "missing.svg"]
