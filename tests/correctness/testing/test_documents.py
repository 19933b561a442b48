"""The runner of documents: what it runs, in what order, and what it refuses."""

import subprocess
import sys
import traceback

import pytest

from pagedattn.testing.documents import DocumentError, read_fences, run_document


def document(folder, text):
    path = folder / "document.md"
    path.write_text(text, encoding="utf-8")
    return path


def fence(language, text, *directives):
    above = "".join(f"<!-- {directive} -->\n" for directive in directives)
    return f"{above}```{language}\n{text}\n```\n"


def test_fences_of_one_document_share_one_namespace_in_order(tmp_path):
    text = fence("python", "a = 2") + "then\n" + fence("python", "print(a + 1)")
    assert run_document(document(tmp_path, text)) == ["", "3\n"]


@pytest.mark.parametrize("gap", ["", "\n", "\n\n\n"])
def test_text_right_after_code_is_compared_with_what_it_prints(tmp_path, gap):
    code = fence("python", "print(1)\nprint('two')")
    run_document(document(tmp_path, code + gap + fence("text", "1\ntwo")))
    run_document(document(tmp_path, code + gap + fence("text", "...two")))
    with pytest.raises(DocumentError, match=r"(?s)line 2: the document says\n1\nthree\nbut"):
        run_document(document(tmp_path, code + gap + fence("text", "1\nthree")))


def test_text_after_a_sentence_is_not_compared(tmp_path):
    run_document(document(tmp_path, fence("python", "print(1)") + "As in\n" + fence("text", "2")))


def test_what_a_fence_needs_decides_whether_it_runs(tmp_path):
    text = fence("python", "print('any')") + fence("python", "print('some')", "needs: vllm")
    path = document(tmp_path, text)
    assert run_document(path) == ["any\n"]
    assert run_document(path, "gpu") == ["any\n"]
    assert run_document(path, "vllm") == ["any\n", "some\n"]


def test_a_shell_fence_runs_only_where_the_document_says_so(tmp_path):
    silent, loud = fence("sh", "echo made > silent"), fence("sh", "echo made > loud", "run")
    run_document(document(tmp_path, silent + loud), folder=tmp_path)
    assert not (tmp_path / "silent").exists()
    assert (tmp_path / "loud").read_text() == "made\n"


def test_a_console_fence_holds_what_its_commands_print(tmp_path):
    text = "$ echo one \\\n    two\none two\n$ true\n$ echo three\n{}"
    good = document(tmp_path, fence("console", text.format("three"), "run"))
    assert run_document(good) == ["one two\nthree\n"]
    with pytest.raises(DocumentError, match="but it prints\nthree"):
        run_document(document(tmp_path, fence("console", text.format("four"), "run")))


def test_a_command_that_fails_is_an_error(tmp_path):
    with pytest.raises(DocumentError, match="exit code 3"):
        run_document(document(tmp_path, fence("sh", "exit 3", "run")))


def test_python_in_a_shell_fence_is_the_one_that_runs_the_document(tmp_path):
    text = fence("sh", 'python -c "import sys; print(sys.prefix)"', "run")
    assert run_document(document(tmp_path, text)) == [f"{sys.prefix}\n"]


def test_an_error_names_the_documents_line(tmp_path):
    text = "# A heading\n\n" + fence("python", "a = 1\nb = a / 0", "needs: gpu")
    path = document(tmp_path, text)
    with pytest.raises(ZeroDivisionError) as caught:
        run_document(path, "gpu")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.line) == (str(path), 6, "b = a / 0")


def test_a_tensor_named_out_that_holds_nan_is_an_error(tmp_path):
    text = fence("python", "import torch\nout = torch.tensor([{}])")
    run_document(document(tmp_path, text.format("0.0")))
    with pytest.raises(DocumentError, match="`out` holds NaN"):
        run_document(document(tmp_path, text.format("torch.nan")))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1. a list\n   ```python\n", "line 2: a fence must not be indented"),
        ("```python\na = 1\n", "line 1: this fence is not closed"),
        ("```py\na = 1\n```\n", "line 1: a fence must be one of python"),
        ("```\na\n```\n", "line 1: a fence must be one of python"),
        ("<!-- need: vllm -->\n```python\n```\n", "line 1: <!-- need: vllm --> directs nothing"),
    ],
    ids=["indented", "open", "unknown-language", "no-language", "unknown-directive"],
)
def test_a_malformed_fence_is_refused(text, sentence):
    with pytest.raises(DocumentError) as caught:
        read_fences(text)
    assert sentence in str(caught.value)


def test_a_document_runs_from_the_command_line(tmp_path):
    def run(path):
        command = [sys.executable, "-m", "pagedattn.testing.documents", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(document(tmp_path, fence("python", "print(1)")))
    assert (done.returncode, done.stdout) == (0, "1\n")
    done = run(document(tmp_path, fence("python", "print(1)") + fence("text", "2")))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "but it prints" in done.stderr
    assert run(tmp_path / "missing.md").returncode == 2
