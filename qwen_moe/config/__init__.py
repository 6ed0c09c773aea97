"""The settings of a run (`run`), and how they are read from a recipe (`load`)."""

from qwen_moe.config.data import DataConfig, Dataset
from qwen_moe.config.dual_chunk import DualChunk
from qwen_moe.config.load import (
    dump_config,
    find_recipe,
    load_config,
    load_stage,
    parse_config,
    parse_model,
    read_recipe,
    refuse_stages,
)
from qwen_moe.config.model import ModelConfig
from qwen_moe.config.objective import ObjectiveConfig
from qwen_moe.config.precision import Fp8Config, PrecisionConfig
from qwen_moe.config.rollout import ServerConfig
from qwen_moe.config.rope import RopeScaling
from qwen_moe.config.run import RunConfig, StageRun, stage_runs
from qwen_moe.config.stages import Place, StageConfig
from qwen_moe.config.system import LoggingConfig, ParallelConfig, WandbConfig
from qwen_moe.config.training import BalanceConfig, OptimizerConfig, Recompute, ScheduleConfig, TrainingConfig

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "Dataset",
    "DualChunk",
    "Fp8Config",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Place",
    "PrecisionConfig",
    "Recompute",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "ServerConfig",
    "StageConfig",
    "StageRun",
    "TrainingConfig",
    "WandbConfig",
    "dump_config",
    "find_recipe",
    "load_config",
    "load_stage",
    "parse_config",
    "parse_model",
    "read_recipe",
    "refuse_stages",
    "stage_runs",
]
