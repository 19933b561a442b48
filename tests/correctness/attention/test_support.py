"""What each implementation supports, found by running it, for the results file and its report."""

import pytest

from pagedattn.peers import PEERS
from pagedattn.testing import features, probe

pytestmark = pytest.mark.filterwarnings("ignore")  # peers warn of their own affairs


@pytest.mark.implementations("own", "rounding", "peers")
@pytest.mark.parametrize("feature", features())
def test_a_feature_is_right_or_refused(runnable, implementation, device, feature, keep_finding):
    del runnable
    found = probe(implementation, feature, device)
    keep_finding(found)
    if found.status in ("unsupported", "untried"):
        pytest.skip(found.detail)
    if implementation in PEERS and found.status != "passed":
        pytest.xfail(f"{found.status}: {found.detail}")
    assert found.status == "passed", found.detail
