"""Settings of dual chunk attention: their limits, and what training does with them."""

from typing import Any

import pytest
from pydantic import ValidationError

from qwen_moe.config import DualChunk, dump_config, load_config, parse_config
from qwen_moe.errors import UserError
from tests.small import changed, model_values, small_model

CHUNKS = {"chunk_size": 48, "local_size": 16, "original_max_position_embeddings": 48}


def recipe(**changes: Any) -> dict[str, Any]:
    values = {
        "run_dir": "unused",
        "model": model_values(max_position_embeddings=4096, dual_chunk=CHUNKS),
        "data": {"train": [{"prefix": "unused"}], "sequence_length": 48},
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "train_tokens": 48 * 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_tokens": 0},
    }
    return changed(values, changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 8, "local_size": 8}, "local_size 8 is not below chunk_size 8"),
        ({"chunk_size": 8, "local_size": 0}, "local_size"),
        ({"chunk_size": 0, "local_size": 1}, "chunk_size"),
        ({"chunk_size": 8, "local_size": 2, "clamp": "paper"}, "clamp"),
        ({"chunk_size": 8, "local_size": 2, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"chunk_size": 8, "local_size": 2, "size": 3}, "size"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        DualChunk(**values)
    assert caught.value.error_count() == 1


def test_a_recipe_with_chunks_trains_plainly_up_to_one_chunk(tmp_path: Any) -> None:
    config = parse_config(recipe(), "test")
    assert config.model.dual_chunk == DualChunk(**CHUNKS) and config.model.reach == 4096
    assert config.model.trainable_length == 48
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__sequence_length": 49}, "49 is larger than 48, up to which model.dual_chunk changes nothing"),
        ({"model__dual_chunk": CHUNKS | {"local_size": 30}}, "sequence_length 48 is larger than 36"),
        ({"model__dual_chunk": CHUNKS | {"original_max_position_embeddings": 20}}, "sequence_length 48 is larger than 20"),
        ({"model__dual_chunk": CHUNKS | {"local_size": 48}}, "model.dual_chunk: local_size 48 is not below chunk_size 48"),
        ({"model__dual_chunk": CHUNKS | {"chunksize": 1}}, "key 'model.dual_chunk.chunksize'; did you mean 'chunk_size'"),
        ({"model__rope_scaling": {"type": "dynamic", "factor": 2}}, "dual_chunk needs angles that do not change"),
    ],
)  # fmt: skip
def test_what_training_cannot_do_is_refused_with_one_message(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(recipe(**changes), "test")
    assert expected in str(caught.value) and str(caught.value).count(";") <= 1


def test_a_model_without_chunks_trains_up_to_its_reach() -> None:
    assert small_model(max_position_embeddings=512).trainable_length == 512
