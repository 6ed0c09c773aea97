"""The mistakes that the slow tests plant in a rank are planted in code that exists: each replaces a name that is there.

A renamed method would otherwise be found by the slow tests alone.
"""

from types import ModuleType
from typing import Any

import pytest

from tests.verify import test_ep_overlap, test_layouts, test_objectives, test_replay

TABLES: list[ModuleType] = [test_ep_overlap, test_layouts, test_objectives, test_replay]
PLANTED = [
    pytest.param(entry[0], id=f"{module.__name__.rpartition('.')[2]}-{name}")
    for module in TABLES
    for name, entry in module.MISTAKES.items()
]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_mistake_replaces_a_name_that_exists(plant: Any) -> None:
    replaced = []

    def patch(owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        assert value is not before
        replaced.append(name)

    plant(patch)
    assert replaced
