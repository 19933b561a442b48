"""Where a test saves a block manager's state."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.npz"
