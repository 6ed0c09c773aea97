"""A plugin of pytest: hypothesis ends with the first example that fails. Looking for a smaller one takes minutes, and a
planted mistake needs no smaller one."""

import hypothesis
import pytest
from hypothesis import Phase


def pytest_configure(config: pytest.Config) -> None:  # after tests/conftest.py was read, before the tests are
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    hypothesis.settings.register_profile("unshrunk", hypothesis.settings.get_profile("default"), phases=phases)
    hypothesis.settings.load_profile("unshrunk")
