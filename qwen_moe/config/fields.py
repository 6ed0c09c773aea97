"""Types of setting values, and the frozen section that groups settings.

Every number is finite and not a boolean (Python counts ``true`` as 1), and every path is valid. Limits are far above any
real training run; beyond them sums overflow or a command never ends.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**63 - 1
# Token ids are stored in at most 32 bits, and no dim of a tensor is larger.
LARGEST_SIZE = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # megatron-core shuffles documents with numpy's RandomState, which takes 32 bits
MOST_LAYERS = 10_000
MOST_PROCESSES = 2**20


def whole_number(value: Any) -> Any:
    """Accept 2e6, which YAML reads as text, and 2.0e+6, which it reads as a float, as whole numbers."""
    if isinstance(value, str) and value.isascii():
        try:
            return int(value)
        except ValueError:
            pass
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number: give one")
    if isinstance(value, str):
        try:
            return float(value) if value.isascii() else value
        except ValueError:
            return value
    return value


def _path(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError(f"{value!r} is not a path: give one (. for the current folder), or leave it out")
    return value


def _prefix(value: Any) -> Any:
    if isinstance(value, (str, Path)) and not Path(value).name:
        raise ValueError(
            f"{str(value)!r} is not a prefix: give a folder and the beginning of a name, such as data/train"
        )
    return _path(value)


def _criteria(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{list(names)} has a name twice: give each criterion its own")
    for name in names:
        if not name.isprintable() or name != name.strip() or not 0 < len(name) <= 60:
            raise ValueError(f"{name[:80]!r} is not the name of a criterion: give up to 60 characters on one line")
    return names


PositiveInt = Annotated[int, BeforeValidator(whole_number), Field(gt=0, le=LARGEST, strict=True)]
NonNegativeInt = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=LARGEST, strict=True)]
Size = Annotated[int, BeforeValidator(whole_number), Field(gt=0, le=LARGEST_SIZE, strict=True)]
OptionalSize = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=LARGEST_SIZE, strict=True)]
Layers = Annotated[int, BeforeValidator(whole_number), Field(gt=0, le=MOST_LAYERS, strict=True)]
OptionalLayers = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=MOST_LAYERS, strict=True)]
Degree = Annotated[int, BeforeValidator(whole_number), Field(gt=0, le=MOST_PROCESSES, strict=True)]
Seed = Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=LARGEST_SEED, strict=True)]
PositiveFloat = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
ShareBelowOne = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, allow_inf_nan=False)]
Criteria = Annotated[tuple[str, ...], AfterValidator(_criteria)]  # names of a reward model's scores
GivenPath = Annotated[Path, BeforeValidator(_path)]
GivenPrefix = Annotated[Path, BeforeValidator(_prefix)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
