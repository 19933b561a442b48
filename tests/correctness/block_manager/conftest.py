"""Where a test saves a block manager's state; asserts of the oracle are explained as a test's."""

import pytest

pytest.register_assert_rewrite(f"{__package__}.manager_oracle")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.npz"
