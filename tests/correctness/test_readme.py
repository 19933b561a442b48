"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

from pagedattn.attention import attention, registry

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_its_examples():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_an_example_of_the_readme_runs(place, monkeypatch):
    monkeypatch.setattr(registry, "_made", dict(registry._made))
    names = {"my_kernel": attention}
    exec(compile(BLOCKS[place], f"README.md, example {place}", "exec"), names)
    if "out" in names:
        assert not names["out"].isnan().any()


def test_files_that_the_readme_names_are_there():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (README.parent / path).exists(), path
