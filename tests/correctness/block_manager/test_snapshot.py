"""A block manager's state as a value: saved, loaded, and gone on with."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pagedattn import BlockManager, Snapshot

from .managers import busy_manager


def assert_equal(one, two):
    assert one.settings == two.settings
    assert one.arrays.keys() == two.arrays.keys()
    for name, array in one.arrays.items():
        assert np.array_equal(array, two.arrays[name]), name
        assert array.dtype == two.arrays[name].dtype, name


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


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    BlockManager(4, 4).snapshot().save(path)
    path.chmod(0o600)

    def fill_the_disk(file, **_):
        file.write(b"PK")
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(np, "savez_compressed", fill_the_disk)
        with pytest.raises(OSError, match="no space"):
            BlockManager(8, 4).snapshot().save(path)
    assert Snapshot.load(path).settings["num_blocks"] == 4
    BlockManager(8, 4).snapshot().save(path)
    assert Snapshot.load(path).settings["num_blocks"] == 8
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("state.npz")
    BlockManager(4, 4).snapshot().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Snapshot.load(tmp_path / "state.npz").settings["num_blocks"] == 4


def test_what_is_no_ordinary_file_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((tmp_path / "pipe").read_bytes)
        BlockManager(4, 4).snapshot().save(tmp_path / "pipe")
        (tmp_path / "state.npz").write_bytes(reading.result(timeout=60))
    assert (tmp_path / "pipe").is_fifo()
    assert Snapshot.load(tmp_path / "state.npz").settings["num_blocks"] == 4


def test_a_file_in_a_folder_that_cannot_be_written_is_written_in_place(tmp_path, monkeypatch):
    path, access = tmp_path / "state.npz", os.access
    path.touch()
    monkeypatch.setattr(os, "access", lambda at, mode: at != tmp_path and access(at, mode))
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("it is replaced"))
    BlockManager(4, 4).snapshot().save(path)
    assert Snapshot.load(path).settings["num_blocks"] == 4


def test_a_folder_that_is_not_there_is_told_by_the_name_that_was_given(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/state\.npz"):
        BlockManager(4, 4).snapshot().save(tmp_path / "missing" / "state.npz")


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


def test_a_restored_manager_lets_freed_blocks_wait_for_the_steps_that_run():
    manager = busy_manager()
    restored = BlockManager.restore(manager.snapshot())
    waiting = restored.num_deferred_blocks
    restored.free(restored.sequence_ids())
    assert restored.num_deferred_blocks > waiting
    manager.free(manager.sequence_ids())
    assert_equal(restored.snapshot(), manager.snapshot())
