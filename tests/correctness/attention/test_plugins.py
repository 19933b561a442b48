"""Implementations of installed packages are found by name, loaded late and told apart."""

import os
import subprocess
import sys
import textwrap

import pytest

from pagedattn.attention import clashes, get_implementation, implementation_names, register
from pagedattn.attention import registry as registry_module
from pagedattn.attention.plugins import plugins
from pagedattn.attention.torch_impl import TorchImplementation

MODULE = """
    from pagedattn.attention.torch_impl import TorchImplementation

    class Own(TorchImplementation):
        name = "own"

    class Misnamed(TorchImplementation):
        name = "other"

    class Half:
        name = "half"

        def attention(self, call):
            pass

    made = Own()
    made.name = "made"
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Function that installs a package: files beside each other, and its entry points."""
    monkeypatch.setattr(registry_module, "_made", {})
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package, entries, module=MODULE):
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(module))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {package}:{attribute}" for name, attribute in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[pagedattn.attention]", *lines, ""]))
        plugins.cache_clear()

    yield install
    plugins.cache_clear()


def test_a_package_s_implementations_are_known_by_name_and_imported_on_first_use(site):
    site("first_package", {"own": "Own", "made": "made"})
    assert {"own", "made"} < set(implementation_names())
    assert "first_package" not in sys.modules
    assert get_implementation("own").name == "own"
    assert get_implementation("made").name == "made"
    assert get_implementation("own") is get_implementation("own")
    assert clashes() == []


@pytest.mark.parametrize(
    ("module", "attribute", "sentence"),
    [
        ("import no_such_module", "Own", "from 'broken:Own': ModuleNotFoundError: No module named"),
        ("1 / 0", "Own", "ZeroDivisionError: division by zero"),
        ("", "Own", "AttributeError: module 'broken' has no attribute 'Own'"),
        (MODULE, "Misnamed", "says that its name is 'other'; its entry point must have the same"),
        (MODULE, "Half", "has no method unsupported and no write_kv"),
        ("class Own:\n    def __init__(self, size): pass", "Own", "TypeError"),
    ],
)
def test_a_broken_package_is_named_in_one_sentence_and_disturbs_no_other(
    site, module, attribute, sentence
):
    sys.modules.pop("broken", None)
    site("broken", {"bad": attribute}, module)
    site("whole", {"own": "Own"})
    with pytest.raises(ImportError, match=rf"'bad' of the package broken.*{sentence}") as caught:
        get_implementation("bad")
    assert "\n" not in str(caught.value)
    assert get_implementation("own").name == "own"
    assert get_implementation("torch").name == "torch"


def test_two_packages_with_one_name_are_told_and_neither_is_used(site):
    site("left", {"own": "Own"})
    site("right", {"own": "Own", "made": "made"})
    (sentence,) = clashes()
    assert sentence == (
        "the packages left and right both offer an implementation 'own', so neither can be used: "
        "uninstall all but one"
    )
    assert "own" not in implementation_names()
    with pytest.raises(ImportError, match="left and right both offer an implementation 'own'"):
        get_implementation("own")
    assert get_implementation("made").name == "made"


def test_a_package_cannot_replace_what_is_built_in(site):
    site("greedy", {"torch": "Own"})
    assert type(get_implementation("torch")) is TorchImplementation
    assert implementation_names().count("torch") == 1
    (sentence,) = clashes()
    assert "the package greedy offers an implementation 'torch', which is built in" in sentence


def test_a_name_that_a_package_offers_cannot_be_registered(site):
    site("offering", {"own": "Own"})
    mine = TorchImplementation()
    mine.name = "own"
    with pytest.raises(ValueError, match="'own' exists already: the package offering offers it"):
        register(mine)


def test_an_unknown_name_is_told_with_the_names_of_packages_among_the_known(site):
    site("known", {"own": "Own"})
    with pytest.raises(ValueError, match=r"no implementation 'fast'; known are cuda, .*, own"):
        get_implementation("fast")


def test_names_are_found_without_importing_the_packages_that_offer_them(site, tmp_path):
    site("costly", {"own": "Own"}, "raise SystemExit(7)")
    code = "from pagedattn.attention import implementation_names; print(implementation_names())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert "'own'" in done.stdout
