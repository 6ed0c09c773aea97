"""How a global batch is cut: the one check that its factors fit."""

from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError


def check_batches(config: RunConfig, data_parallel: int) -> None:
    """Raise UserError unless the global batch splits into whole micro-batches over ``data_parallel`` ranks."""
    training = config.training
    if training.global_batch_size % (training.micro_batch_size * data_parallel):
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {data_parallel} data-parallel processes = "
            f"{training.micro_batch_size * data_parallel}: change one of the three"
        )
