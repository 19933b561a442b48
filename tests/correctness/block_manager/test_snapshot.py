"""A block manager's state as a value: saved, loaded, refused, drawn."""

import gc
import io
import json
import zipfile

import numpy as np
import pytest

from pagedattn import BlockManager, CacheKeys, Snapshot, SnapshotError


def busy_manager(**arguments):
    """A manager with something of everything."""
    manager = BlockManager(24, 4, num_host_blocks=8, windows=(None, 6), **arguments)
    first, second = manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]).sequence_ids
    manager.fork(first)
    (gone,) = manager.admit([[7] * 4], CacheKeys(salt="a")).sequence_ids
    manager.free([gone])
    manager.swap_out([second])
    manager.allocate([3])
    manager.start_step()
    (late,) = manager.admit([[6] * 5]).sequence_ids
    manager.free([late])
    return manager


def assert_equal(one, two):
    assert one.settings == two.settings
    assert one.arrays.keys() == two.arrays.keys()
    for name, array in one.arrays.items():
        assert np.array_equal(array, two.arrays[name]), name
        assert array.dtype == two.arrays[name].dtype, name


def changed(snapshot, **arrays):
    return Snapshot(snapshot.settings, {**snapshot.arrays, **arrays})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.npz"


# -- saved and loaded ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, b"seed", b""], ids=["random", "seed", "empty-seed"])
def test_a_snapshot_is_the_same_after_a_file(path, seed):
    snapshot = busy_manager(seed=seed).snapshot()
    snapshot.save(path)
    assert_equal(Snapshot.load(path), snapshot)
    assert_equal(Snapshot.load(str(path)), snapshot)


def test_a_file_is_written_under_just_the_name_that_was_given(tmp_path):
    BlockManager(4, 4).snapshot().save(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert Snapshot.load(tmp_path / "state").settings["num_blocks"] == 4


def test_a_file_can_be_read_by_numpy_without_pickle(path):
    busy_manager().snapshot().save(path)
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(file["settings"].tobytes())["format"] == 1
        assert all(file[name].dtype != object for name in file.files)


def test_a_restored_manager_is_in_the_same_state():
    snapshot = busy_manager().snapshot()
    assert_equal(BlockManager.restore(snapshot).snapshot(), snapshot)


def test_a_restored_manager_does_what_the_first_would_have_done():
    first = busy_manager()
    second = BlockManager.restore(first.snapshot())
    for manager in (first, second):
        manager.finish_step(1)
        ids = manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [6] * 9]).sequence_ids
        manager.append(ids[:1], 3, token_ids=[1, 2, 3])
        swapped = manager.sequence_ids()
        manager.swap_in(swapped[manager.is_swapped_out(swapped)])
        manager.check_integrity()
    assert_equal(first.snapshot(), second.snapshot())


def test_a_restored_manager_without_a_cache_or_a_host_is_in_the_same_state():
    manager = BlockManager(9, 4, prefix_caching=False)
    manager.admit([[1, 2, 3]])
    snapshot = manager.snapshot()
    assert "seed" not in snapshot.settings
    assert_equal(BlockManager.restore(snapshot).snapshot(), snapshot)


def test_more_sequences_than_a_new_manager_has_rows_are_restored():
    manager = BlockManager(300, 4, windows=(None, 5))
    ids = manager.allocate(np.full(60, 5))
    manager.free(ids[::2])
    snapshot = manager.snapshot()
    assert_equal(BlockManager.restore(snapshot).snapshot(), snapshot)


def test_nothing_that_happens_later_changes_a_snapshot():
    manager = busy_manager()
    snapshot = manager.snapshot()
    kept = {name: array.copy() for name, array in snapshot.arrays.items()}
    settings = json.dumps(dict(snapshot.settings))
    restored = BlockManager.restore(snapshot)
    for each in (manager, restored):
        each.finish_step(1)
        each.drop(each.sequence_ids())
        each.reset_prefix_cache()
        each.admit([[9] * 20])
    assert all(np.array_equal(kept[name], array) for name, array in snapshot.arrays.items())
    assert json.dumps(dict(snapshot.settings)) == settings


# -- refused -------------------------------------------------------------------------------


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


# -- drawn ---------------------------------------------------------------------------------


LEGEND = "A-Z a sequence group, small where its last block has room; 2-9 named by so many tables"


def test_the_picture_of_a_small_pool_is_as_drawn_by_hand():
    manager = BlockManager(20, 4, num_host_blocks=4)
    first, second = manager.admit([[1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 2, 2, 2]]).sequence_ids
    manager.fork(first, 2)
    manager.append([first])  # the copy of its last block
    manager.free(manager.admit([[3, 3, 3, 3, 3, 3, 3, 3]]).sequence_ids)
    (moved,) = manager.allocate([8])
    manager.swap_out([moved])
    manager.allocate([9])
    manager.start_step()
    manager.free([second])
    assert str(manager.snapshot()) == (
        "20 blocks of 4 tokens: 7 used by 4 sequences, 2 cached ░, 1 deferred ▒, 10 empty ·\n"
        " 0 332▒a░░B Bb······ ····\n"
        "4 blocks on the host: 2 used by 1 sequences\n"
        "0 CC··\n" + LEGEND
    )


def test_lines_of_a_picture_are_as_long_as_asked_and_numbered():
    manager = BlockManager(11, 4)
    manager.allocate([9])
    assert manager.snapshot().draw(columns=4).splitlines()[1:-1] == [
        " 0 AAa·",
        " 4 ····",
        " 8 ···",
    ]
    assert manager.snapshot().draw(10).splitlines()[1:-1] == [" 0 AAa····· ··", "10 ·"]


def test_a_picture_of_nothing_is_empty():
    assert str(BlockManager(3, 4).snapshot()) == (
        "3 blocks of 4 tokens: 0 used by 0 sequences, 0 cached ░, 0 deferred ▒, 3 empty ·\n0 ···\n"
        + LEGEND
    )


def test_a_digit_says_how_many_tables_name_a_block_and_letters_begin_again():
    manager = BlockManager(40, 4)
    (parent,) = manager.allocate([4])
    manager.fork(parent, 8)
    manager.allocate(np.full(27, 4))
    drawn = manager.snapshot().draw(40).splitlines()[1]
    assert drawn == " 0 9BCDEFGH IJKLMNOP QRSTUVWX YZAB···· ········"
    manager.fork(parent, 5)
    assert manager.snapshot().draw().splitlines()[1][3] == "9"


def test_every_layer_group_of_a_sequence_is_drawn_with_its_letter():
    manager = BlockManager(8, 4, windows=(None, 4))
    manager.admit([[5] * 3, [6] * 8])
    assert manager.snapshot().draw().splitlines()[1] == "0 aaBBBB··"


def test_a_swapped_out_group_is_drawn_on_the_host_alone():
    manager = BlockManager(8, 4, num_host_blocks=6)
    (parent,) = manager.allocate([7])
    (fork,) = manager.fork(parent)
    manager.append([fork])  # two blocks of seven and eight tokens behind one that they share
    manager.allocate([4])
    manager.swap_out([parent])
    assert manager.snapshot().draw(4).splitlines()[1:-1] == [
        "0 ···B",
        "4 ····",
        "6 blocks on the host: 3 used by 2 sequences",
        "0 2aA·",
        "4 ··",
    ]


def test_the_last_blocks_number_says_how_wide_numbers_are():
    drawn = BlockManager(10, 4).snapshot().draw(5).splitlines()[:-1]
    assert drawn[1:] == ["0 ·····", "5 ·····"]


def test_a_restored_manager_lets_freed_blocks_wait_for_the_steps_that_run():
    manager = busy_manager()
    restored = BlockManager.restore(manager.snapshot())
    waiting = restored.num_deferred_blocks
    restored.free(restored.sequence_ids())
    assert restored.num_deferred_blocks > waiting
    manager.free(manager.sequence_ids())
    assert_equal(restored.snapshot(), manager.snapshot())


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
