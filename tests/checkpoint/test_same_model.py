"""Which settings of a model may change when a run starts from another run's weights."""

from pathlib import Path

import pytest

from launchers.folder.atomic import write_json
from qwen_moe.checkpoint.distributed import WITHOUT_WEIGHTS, check_same_model
from qwen_moe.checkpoint.manifest import MODEL_CONFIG
from qwen_moe.errors import UserError
from tests.small import small_model


def test_a_model_may_be_stretched_to_longer_texts(tmp_path: Path) -> None:
    write_json(tmp_path / MODEL_CONFIG, small_model().model_dump(mode="json"))
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    chunks = {"chunk_size": 64, "local_size": 8}
    longer = small_model(rope_theta=5e6, rope_scaling=yarn, max_position_embeddings=262144, dual_chunk=chunks)
    check_same_model(tmp_path, longer, WITHOUT_WEIGHTS)
    for name in WITHOUT_WEIGHTS:
        with pytest.raises(UserError, match=name):
            check_same_model(tmp_path, longer)
    with pytest.raises(UserError, match="hidden_size"):
        check_same_model(tmp_path, small_model(hidden_size=32), WITHOUT_WEIGHTS)
