"""The parts of `make test-gpu` as tests: ``python -m pytest -m gpu`` on a machine with a GPU."""

import sys

import pytest
import torch

from tests.gpu.parts import PARTS
from tests.gpu.report import LIMITS, run_part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str) -> None:
    result = run_part([sys.executable, "-m", "tests.gpu.parts", part, "--device", "cuda"], LIMITS[part])
    assert [row for row in result["rows"] if row["outcome"] == "failed"] == [], "\n".join(result["output"])
