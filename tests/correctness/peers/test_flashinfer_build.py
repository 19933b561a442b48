"""FlashInfer's modules are compiled in the background, and who waits is told how far it is."""

import threading

import pytest

from pagedattn.peers.flashinfer import Build, modules


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

    Build([]).start().wait(tell)
    assert len(told) >= 3
    assert told[2] == "waiting for FlashInfer to be compiled: 3 of 40 steps are done"


def test_nothing_is_told_where_nobody_has_to_wait(compiler):
    compiler.set()
    told = []
    build = Build([]).start()
    build.wait()
    build.wait(told.append)
    assert told == []


def test_modules_are_ready_once_all_are_compiled(compiler):
    build = Build([]).start()
    assert not build.is_ready(within=0.01)
    compiler.set()
    assert build.is_ready(within=60)


def test_modules_of_which_one_cannot_be_compiled_are_never_ready(monkeypatch):
    broken = modules.Spec("module", "function", ())
    monkeypatch.setattr(modules, "compile_all", lambda *_: None)
    monkeypatch.setitem(modules._failures, broken, "it does not compile")
    assert not Build([broken]).start().is_ready(within=60)
    assert Build([]).start().is_ready(within=60)


def test_what_keeps_the_compiler_from_running_is_raised(monkeypatch):
    def compile_all(*_):
        raise FileNotFoundError("there is no ninja")

    monkeypatch.setattr(modules, "compile_all", compile_all)
    with pytest.raises(FileNotFoundError, match="there is no ninja"):
        Build([]).start().wait()
