"""Snapshots that are damaged, foreign or contradict themselves are refused, in one sentence."""

import gc
import io
import zipfile

import numpy as np
import pytest

from pagedattn import BlockManager, Snapshot, SnapshotError

from .managers import busy_manager


def changed(snapshot, **arrays):
    return Snapshot(snapshot.settings, {**snapshot.arrays, **arrays})


def refuse(path, match="is not a block manager's snapshot"):
    with pytest.raises(SnapshotError, match=match) as caught:
        Snapshot.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0.2, 0.5])
def test_a_file_with_damaged_contents_is_refused(path, place):
    busy_manager(seed=b"seed").snapshot().save(path)
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda info: info.compress_size)
    data = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len(entry.filename) + 20  # behind the entry's header
    data[start + int(place * entry.compress_size)] ^= 0xFF
    data[start] ^= 0xFF  # its first byte: not even a deflate stream
    path.write_bytes(data)
    refuse(path)


def test_a_damaged_file_is_closed(path):
    path.write_bytes(b"PK\3\4")
    refuse(path)
    gc.collect()  # a file left open would be a warning here, and that an error


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, share):
    busy_manager().snapshot().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refuse(path)


@pytest.mark.parametrize(
    "data",
    [b"hello", b"\0" * 100, b"PK\3\4", b"PK\5\6" + b"\0" * 18, b"\x80\4]q\0."],
    ids=["text", "zeros", "zip-magic", "empty-zip", "pickle"],
)
def test_a_file_that_is_no_snapshot_is_refused(path, data):
    path.write_bytes(data)
    refuse(path)


def test_a_lone_array_is_refused(path):
    with open(path, "wb") as file:
        np.save(file, np.arange(5))
    refuse(path)


def test_a_zip_of_other_files_is_refused(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("settings", "{}")
    refuse(path)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("name", ["settings", "blocks"])
def test_a_pickle_in_a_file_is_not_loaded(path, name):
    snapshot = busy_manager().snapshot()
    arrays = {**snapshot.arrays, "settings": np.frombuffer(b'{"format": 1}', np.uint8)}
    arrays[name] = np.array([Bomb()], object)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    refuse(path)


def test_a_pickle_instead_of_a_file_is_not_loaded(path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], object), allow_pickle=True)
    path.write_bytes(buffer.getvalue())
    refuse(path)


@pytest.mark.parametrize(
    "settings",
    [b"", b"{", b"[1]", b"5", b'"format"', b"{}", b"\xff\xfe", b"null"],
    ids=["none", "half", "list", "number", "text", "no-format", "no-utf8", "null"],
)
def test_settings_that_cannot_be_read_are_refused(path, settings):
    with open(path, "wb") as file:
        np.savez(file, settings=np.frombuffer(settings, np.uint8))
    refuse(path)


def test_a_file_without_settings_is_refused(path):
    with open(path, "wb") as file:
        np.savez(file, blocks=np.arange(3))
    refuse(path)


@pytest.mark.parametrize("version", [0, 2, "1", None], ids=repr)
def test_another_version_is_refused_by_its_number(path, version):
    snapshot = busy_manager().snapshot()
    Snapshot({**snapshot.settings, "format": version}, snapshot.arrays).save(path)
    refuse(path, f"has format {version}; this version reads 1")


def test_a_file_that_is_not_there_is_an_error_of_the_system(path):
    with pytest.raises(FileNotFoundError):
        Snapshot.load(path)


def contradict(snapshot):
    with pytest.raises(SnapshotError, match=r"^the snapshot contradicts itself: ") as caught:
        BlockManager.restore(snapshot)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(busy_manager().snapshot().arrays))
def test_a_snapshot_that_lacks_an_array_is_refused(name):
    snapshot = busy_manager().snapshot()
    arrays = {other: array for other, array in snapshot.arrays.items() if other != name}
    contradict(Snapshot(snapshot.settings, arrays))


@pytest.mark.parametrize("name", list(busy_manager().snapshot().settings))
def test_a_snapshot_that_lacks_a_setting_is_refused(path, name):
    snapshot = busy_manager().snapshot()
    settings = {other: value for other, value in snapshot.settings.items() if other != name}
    if name == "format":
        Snapshot(settings, snapshot.arrays).save(path)
        refuse(path)
        return
    contradict(Snapshot(settings, snapshot.arrays))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 0},
        {"num_blocks": 12},
        {"num_blocks": "24"},
        {"block_size": 0},
        {"block_size": 2},
        {"num_host_blocks": 0},
        {"num_host_blocks": 2},
        {"windows": []},
        {"windows": [None]},
        {"windows": 5},
        {"watermark": 2},
        {"seed": "xyz"},
        {"seed": 5},
        {"counters": {}},
    ],
    ids=str,
)
def test_settings_that_contradict_the_arrays_are_refused(settings):
    snapshot = busy_manager().snapshot()
    contradict(Snapshot({**snapshot.settings, **settings}, snapshot.arrays))


def doubled(array):
    return np.concatenate([array, array])


def one_more(array):
    array = array.copy()
    array[0] += 1
    return array


DAMAGES = [
    ("pool_ref_counts", one_more),
    ("pool_ref_counts", lambda array: array[:-1]),
    ("pool_ref_counts", lambda array: -array),
    ("pool_empty", lambda array: array[1:]),
    ("pool_empty", one_more),
    ("pool_cached", lambda array: array[:0]),
    ("pool_cached", lambda array: array + 100),
    ("pool_deferred", lambda array: array[:0]),
    ("pool_hashed", lambda array: array[:-1]),
    ("pool_hashed", lambda array: array + 1000),
    ("pool_digests", lambda array: array[:-1]),
    ("pool_digests", lambda array: array[:, :3]),
    ("pool_digests", lambda array: array * np.uint64(0)),
    ("pool_counters", one_more),
    ("pool_counters", lambda array: array[:1]),
    ("host_ref_counts", one_more),
    ("host_empty", doubled),
    ("blocks", lambda array: array[:-1]),
    ("blocks", lambda array: array * 0),
    ("blocks", lambda array: array - 50),
    ("blocks", lambda array: array + 50),
    ("list_first", one_more),
    ("list_first", lambda array: array + 5),
    ("list_ends", lambda array: array[:-1]),
    ("num_tokens", lambda array: array * 0),
    ("num_tokens", lambda array: array + 4),
    ("num_tokens", doubled),
    ("num_known", lambda array: array + 1),
    ("ids", lambda array: array[:-1]),
    ("ids", lambda array: array * 0),
    ("ids", lambda array: array + 1),
    ("next_ids", lambda array: array[:-1]),
    ("unused", one_more),
    ("swapped", lambda array: ~array),
    ("tails", lambda array: array[:, :-1]),
    ("chain", lambda array: array[:, :-1]),
]


@pytest.mark.parametrize(
    ("name", "damage"), DAMAGES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(DAMAGES)]
)
def test_arrays_that_contradict_each_other_are_refused(name, damage):
    manager = busy_manager()
    manager.finish_step(1)
    (hosted,) = manager.allocate([6])
    manager.swap_out([hosted])
    manager.swap_in([hosted])
    manager.free([hosted])
    manager.free(manager.allocate([17]))
    manager.start_step()
    manager.free(manager.admit([[8] * 5]).sequence_ids)
    snapshot = manager.snapshot()
    assert snapshot.arrays[name].size
    contradict(changed(snapshot, **{name: damage(snapshot.arrays[name])}))


@pytest.mark.parametrize("name", ["group", "swapped", "chain", "tails", "num_known", "forked"])
def test_an_array_that_is_too_short_is_refused(name):
    manager = BlockManager(16, 4)
    manager.admit([range(7), range(20, 29)])
    snapshot = manager.snapshot()
    arrays = dict(snapshot.arrays)
    arrays[name] = arrays[name][:1]
    with pytest.raises(SnapshotError, match=f"{name} is not given for each of 2 sequences"):
        BlockManager.restore(Snapshot(snapshot.settings, arrays))


@pytest.mark.parametrize("change", [{"format": 2}, {"media": "x"}, {"media": {"0": 1}}], ids=repr)
def test_settings_of_another_kind_are_refused(change):
    snapshot = BlockManager(16, 4).snapshot()
    with pytest.raises(SnapshotError, match="contradicts itself"):
        BlockManager.restore(Snapshot(dict(snapshot.settings) | change, snapshot.arrays))


@pytest.mark.parametrize(
    ("settings", "arrays", "sentence"),
    [
        ({"newest_step": 2**63}, {}, "contradicts itself"),
        ({}, {"ids": np.int8}, "contradicts itself"),
        ({"block_size": 2**45}, {}, "does not fit into memory"),
        ({"num_blocks": 2**50}, {}, "num_blocks is"),
    ],
    ids=str,
)
def test_numbers_that_are_too_large_are_refused(settings, arrays, sentence):
    snapshot = busy_manager().snapshot()
    others = {name: snapshot.arrays[name].astype(kind) for name, kind in arrays.items()}
    made = Snapshot({**snapshot.settings, **settings}, {**snapshot.arrays, **others})
    with pytest.raises(SnapshotError, match=sentence):
        BlockManager.restore(made)


def forked_manager():
    manager = BlockManager(16, 4, num_host_blocks=4)
    (parent,) = manager.admit([range(6)]).sequence_ids
    manager.fork(parent)
    manager.start_step()
    manager.free(manager.allocate([9]))
    return manager


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays["pool_counters"].__setitem__(0, -(2**30)),
        lambda arrays: arrays["host_counters"].__setitem__(0, 2**30),
        lambda arrays: arrays["forked"].__setitem__(slice(None), False),
        lambda arrays: arrays["next_ids"].__imod__(2**20),
        lambda arrays: arrays["next_ids"].__iadd__(1),
        lambda arrays: arrays["running"].__iadd__(1),
        lambda arrays: arrays["running"].__imul__(0),
        lambda arrays: arrays["pool_deferred_steps"].__iadd__(1),
    ],
    ids=range(8),
)
def test_arrays_that_would_do_harm_later_are_refused(damage):
    snapshot = forked_manager().snapshot()
    BlockManager.restore(snapshot).check_integrity()
    arrays = {name: array.copy() for name, array in snapshot.arrays.items()}
    damage(arrays)
    with pytest.raises(SnapshotError, match="contradicts itself"):
        BlockManager.restore(Snapshot(snapshot.settings, arrays))


@pytest.mark.parametrize("name", ["newest_step", "num_hit_tokens", "num_lookup_tokens"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", None])
def test_counters_are_whole_numbers(name, value):
    snapshot = forked_manager().snapshot()
    with pytest.raises(SnapshotError, match=f"{name} is"):
        BlockManager.restore(Snapshot(dict(snapshot.settings) | {name: value}, snapshot.arrays))
