"""FlashInfer's modules are compiled in the background, and who waits is told how far it is."""

import sys
import threading

import pytest

from pagedattn.peers.flashinfer import Build, modules

SPEC = modules.Spec("json", "dumps", ())


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that prints what ninja prints, and goes on when it is let."""
    go_on = threading.Event()
    monkeypatch.setattr(modules, "TELL_EVERY", 0.01)

    def compile_all(specs, jobs, note):
        del specs, jobs
        note("[3/40] nvcc decode.cu\n")
        note("decode.cu(7): warning\n")
        assert go_on.wait(10)

    monkeypatch.setattr(modules, "compile_all", compile_all)
    yield go_on
    go_on.set()


def test_who_waits_is_told_how_far_it_is_until_it_is_done(compiler):
    told = []

    def tell(sentence):
        told.append(sentence)
        if len(told) == 3:
            compiler.set()

    Build([SPEC]).start().wait(tell)
    assert len(told) >= 3
    assert told[2] == "waiting for FlashInfer to be compiled: 3 of 40 steps are done"


def test_nothing_is_told_where_nobody_has_to_wait(compiler):
    compiler.set()
    told = []
    build = Build([SPEC]).start()
    build.wait()
    build.wait(told.append)
    assert told == []


def test_modules_are_ready_once_all_are_compiled(compiler):
    build = Build([SPEC]).start()
    assert not build.is_ready(within=0.01)
    compiler.set()
    assert build.is_ready(within=60)


def test_modules_of_which_one_cannot_be_compiled_are_never_ready(monkeypatch):
    broken = modules.Spec("json", "loads", ())
    monkeypatch.setattr(modules, "compile_all", lambda *_: None)
    monkeypatch.setitem(modules._failures, broken, "it does not compile")
    assert not Build([SPEC, broken]).start().is_ready(within=60)
    assert Build([SPEC]).start().is_ready(within=60)
    assert Build([]).start().is_ready(within=60)


def test_what_keeps_the_compiler_from_running_is_raised(monkeypatch):
    def compile_all(*_):
        raise FileNotFoundError("there is no ninja")

    monkeypatch.setattr(modules, "compile_all", compile_all)
    with pytest.raises(FileNotFoundError, match="there is no ninja"):
        Build([SPEC]).start().wait()


@pytest.fixture
def described(tmp_path, monkeypatch):
    """Function that makes a module with some lines, which describes another to be compiled."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(lines):
        (tmp_path / "describing.py").write_text(lines)
        return modules.Spec("describing", "make", ())

    yield make
    sys.modules.pop("describing", None)


def test_what_describes_modules_is_imported_by_the_thread_whose_warnings_tests_set(
    compiler, described
):
    Build([described("import threading\nTHREAD = threading.current_thread()\n")]).start()
    compiler.set()
    assert sys.modules["describing"].THREAD is threading.current_thread()


@pytest.fixture
def no_compiler(monkeypatch):
    """A compiler that must not be called."""

    def compile_all(*_):
        raise AssertionError("it was called")

    monkeypatch.setattr(modules, "compile_all", compile_all)


@pytest.mark.usefixtures("no_compiler")
def test_where_nothing_is_needed_nothing_is_compiled():
    Build([]).start().wait()


@pytest.mark.usefixtures("no_compiler")
def test_what_keeps_flashinfer_from_being_imported_is_raised_to_who_waits(described):
    build = Build([described("raise ValueError('it is for another version')\n")]).start()
    assert not build.is_ready(within=60)
    with pytest.raises(ValueError, match="it is for another version"):
        build.wait()
