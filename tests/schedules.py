"""Which pipeline schedules this torch can run."""

import pytest

from parallel.stages import V_SHAPED, splits_backward


def needs(*schedules: str) -> None:
    """Skip the test that calls this where torch cannot run one of ``schedules``."""
    if not splits_backward() and any(schedule in V_SHAPED for schedule in schedules):
        pytest.skip("this torch cannot run V-shaped schedules (2.13 can)")
