"""Each system's reservation: its own rule in numbers, and what must hold for all of them."""

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedattn.reservation import (
    FlexGen,
    KVUse,
    OrcaMax,
    OrcaOracle,
    OrcaPow2,
    Paged,
    RequestError,
    Transformers,
    make_reservation,
    reservation_names,
)

NAMES = reservation_names()


def handles(*values):
    return np.array(values, dtype=np.int64)


def rows_of(system):
    return {name: value.tolist() for name, value in vars(system._rows).items() if name != "_unused"}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=settings().max_examples // 2)  # of up to 40 operations, on each system
@given(data=st.data())
def test_every_slot_has_one_use_after_every_operation(name, data):
    most = data.draw(st.integers(8, 64), label="max_model_len")
    slots = data.draw(st.integers(3 * most, 700), label="num_slots")
    system = make_reservation(name, slots, most, block_size=data.draw(st.sampled_from([1, 4, 16])))
    running = {}  # handle: [stored, final], in order of arrival
    for _ in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()):
            prompt = data.draw(st.integers(1, most - 1))
            output = data.draw(st.integers(1, most - prompt))
            generated = data.draw(st.integers(0, output - 1))
            before = rows_of(system), system.use()
            try:
                handle = system.admit(prompt, output, generated)
            except RequestError:
                assert not running
                handle = None
            if handle is None:
                assert (rows_of(system), system.use()) == before
            else:
                assert handle not in running
                running[handle] = [prompt + generated, prompt + output]
        elif running:
            gone = system.advance(handles(*running))
            for handle in gone.tolist():
                del running[handle]
            for tokens in running.values():
                tokens[0] += 1
            done = [handle for handle, (stored, final) in running.items() if stored == final]
            if done:
                system.finish(handles(*done))
            for handle in done:
                del running[handle]
        system.check_integrity()
        use = system.use()
        assert min(use.shares().values()) >= -1e-12
        assert sum(use.shares().values()) == pytest.approx(1)
        assert use.token_states == sum(stored for stored, _ in running.values())
        assert use.num_slots == pytest.approx(getattr(system, "num_slots", slots))
    while running:
        system.finish(handles(*running))
        running = {}
    assert system.use() == KVUse(0, 0, 0, 0, system.num_slots)
    assert system.offloaded() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_request_longer_than_the_model_allows_is_refused(name):
    system = make_reservation(name, 1000, 100)
    before = deepcopy(rows_of(system))
    for lengths in [(60, 41), (0, 5), (5, 0), (5, 5, 6), (5, 5, -1)]:
        with pytest.raises(RequestError):
            system.admit(*lengths)
    assert rows_of(system) == before
    assert system.admit(60, 40) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_never_fits_is_refused_when_it_is_alone(name):
    system = (
        FlexGen(50, 100, num_host_slots=20)
        if name == "flexgen"
        else make_reservation(name, 70, 100)
    )
    with pytest.raises(RequestError, match=r"in 70 slots$"):
        system.admit(60, 40)
    system.check_integrity()


@pytest.mark.parametrize(
    ("system", "slots", "internal", "rounding"),
    [
        (OrcaMax, 2048, 2048 - 125, 0),
        (OrcaPow2, 100 + 32, 7, 256 - 132),  # an output of 25 gets 32
        (OrcaOracle, 100 + 25, 0, 128 - 125),
    ],
)
def test_orca_keeps_a_chunk_from_the_beginning(system, slots, internal, rounding):
    orca = system(8192, 2048)
    handle = orca.admit(100, 25)
    use = orca.use()
    assert use == KVUse(100, 25, internal, rounding, 8192 - slots - rounding)
    for _ in range(25):
        assert orca.advance(handles(handle)).size == 0
    assert orca.use() == KVUse(125, 0, internal, rounding, 8192 - slots - rounding)


def test_a_static_batch_holds_its_memory_until_its_last_request_ends():
    system = make_reservation("fastertransformer", 15_728, 2048)
    batch = [system.admit(100, 10 * (1 + number)) for number in range(7)]
    assert system.admit(100, 10) is None  # 7 times 2048 is all that fits
    assert system.use() == KVUse(700, 280, 7 * 2048 - 980, 0, 15_728 - 7 * 2048)
    system.advance(handles(*batch))
    system.finish(handles(*batch[:6]))
    assert system.admit(100, 10) is None
    assert system.use() == KVUse(101, 69, 7 * 2048 - 170, 0, 15_728 - 7 * 2048)
    system.finish(handles(batch[6]))
    assert system.admit(100, 10) is not None


@pytest.mark.parametrize(("copies", "batch"), [(1.0, 3), (1 / 40, 7)])
def test_a_growing_cache_needs_room_for_its_copy(copies, batch):
    system = Transformers(15_728, 2048, copies)
    admitted = [system.admit(10 + number, 5) for number in range(batch)]
    assert system.admit(10, 5) is None
    system.advance(handles(*admitted))
    column = 10 + batch - 1 + 1  # as long as the longest, and one step
    stored = sum(10 + number + 1 for number in range(batch))
    use = system.use()
    assert use.token_states == stored
    assert use.internal == batch * column - stored  # padding
    assert use.external == pytest.approx(batch * column * copies)


def test_flexgen_keeps_what_does_not_fit_the_gpu_elsewhere():
    system = FlexGen(1000, 2048, num_host_slots=2000, num_disk_slots=1000)
    admitted = [system.admit(300, 100), system.admit(200, 100)]
    assert system.offloaded() == 0
    admitted.append(system.admit(100, 200))  # now each row has 300 + 200
    assert system.offloaded() == 500
    assert system.use() == KVUse(600, 400, 500, 0, 2500)
    assert system.admit(1500, 100) is None
    assert system.offloaded() == 500
    system.finish(handles(*admitted))
    assert system.offloaded() == 0


def test_tgi_pads_its_batch_to_the_longest():
    system = make_reservation("tgi", 1000, 512)
    first = system.admit(100, 20)  # may come to 132
    assert system.use() == KVUse(100, 20, 12, 0, 868)
    second = system.admit(10, 60)  # to 74; in a batch with the first: 2 rows of 100 + 64
    assert system.use() == KVUse(110, 80, 2 * 164 - 190, 0, 1000 - 328)
    assert system.admit(400, 100) is None  # 3 rows of 400 + 112
    system.advance(handles(first, second))
    system.finish(handles(first))
    assert system.use() == KVUse(11, 59, 4, 0, 926)


def test_paged_wastes_less_than_a_block_a_request():
    system = Paged(1000, 512, block_size=16, watermark=0)
    admitted = [system.admit(length, 100) for length in (1, 15, 16, 17)]
    use = system.use()
    assert use.token_states == 49
    assert use.reservation + use.internal == 80 - 49  # 5 blocks
    assert use.free == 1000 - 80
    assert system.manager.num_free_blocks == 62 - 5
    system.finish(handles(*admitted[1:]))
    assert system.use().token_states == 1


def test_where_paged_runs_out_the_last_to_come_goes():
    system = Paged(4 * 16, 64, block_size=16, watermark=0)
    first, second, third = (system.admit(16, 30) for _ in range(3))
    assert system.admit(17, 1) is None
    gone = system.advance(handles(first, second, third))  # each needs a second block
    assert gone.tolist() == [third]
    assert system.use().token_states == 34
    system.check_integrity()


def test_as_many_go_as_must():
    system = Paged(4 * 16, 64, block_size=16, watermark=0)
    admitted = [system.admit(16, 30) for _ in range(4)]
    assert system.advance(handles(*admitted)).tolist() == admitted[2:]
    assert system.use().token_states == 34
    system.check_integrity()


def test_orca_keeps_no_more_than_the_model_allows():
    orca = OrcaPow2(4096, 2048)
    orca.admit(1500, 520)  # 1500 and 1024 would be more
    assert orca.use() == KVUse(1500, 520, 28, 0, 2048)


def test_the_watermark_keeps_blocks_from_new_requests():
    system = Paged(100 * 16, 2048, block_size=16, watermark=0.1)
    assert None not in (system.admit(8, 8), system.admit(8, 8))
    assert system.admit(89 * 16 - 1, 1) is None
    assert system.admit(88 * 16 - 1, 1) is not None


def test_an_unknown_system_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'vllm' is none of fastertransformer, orca-max"):
        make_reservation("vllm", 100, 10)
