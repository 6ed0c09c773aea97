"""GPUs and networks, each described by a YAML file: shipped with the package, in the user's folder, or at any path."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from qwen_moe.config.fields import NonNegativeFloat, PositiveFloat, Section
from qwen_moe.config.load import shorten
from qwen_moe.documents import read_text, yaml_mapping
from qwen_moe.errors import UserError, shown, wrong

Share = Annotated[PositiveFloat, Field(le=1)]

# The least and the most that a description may say, and the unit. Values beyond them are in another unit: a memory of 3.35
# TB/s, a network of 400 Gbit/s.
_UNITS = {
    "memory_gib": (0.0, 4096.0, "GiB"),
    "peak_tflops": (5.0, 1e5, "10^12 FLOPs per second"),
    "memory_gb_per_second": (20.0, 1e5, "GB (10^9 bytes) per second"),
    "nvlink_gb_per_second": (1.0, 1e4, "GB (10^9 bytes) per second, of one GPU in one direction"),
    "gb_per_second": (0.01, 250.0, "GB (10^9 bytes) per second, of one GPU in one direction: 50 for 400 Gbit/s"),
    "nvlink_latency_us": (0.1, 1e4, "microseconds"),
    "latency_us": (0.1, 1e4, "microseconds"),
    "kernel_launch_us": (0.1, 1e4, "microseconds"),
}


def _check_units(values: Section) -> None:
    """Raises ValueError for a number that only another unit explains."""
    for name, (least, most, unit) in _UNITS.items():
        given = getattr(values, name, {})
        several = {f"{name}.{key}": value for key, value in given.items()} if isinstance(given, dict) else {name: given}
        for key, value in several.items():
            if not least <= value <= most:
                raise ValueError(f"{key} {value:g} is not in {unit}: expected {least:g} to {most:g}")


class Efficiency(Section):
    """The shares of peak rates that are reached. Defaults are for an H100, calibrated in `qwen_moe/planning/published.py`.

    A GEMM of an ``m x k`` with a ``k x n`` matrix runs at ``peak * share * s(m) * s(n) * s(k)`` with
    s(x) = x / (x + gemm_half_size), because small GEMMs leave some of a GPU's units idle.
    """

    gemm: Share = 0.74
    grouped_gemm: Share = 0.64
    fp8_gemm: Share = 0.63
    gemm_half_size: PositiveFloat = 160.0
    attention: Share = 0.46
    memory: Share = 0.76
    nvlink: Share = 0.75
    network: Share = 0.79
    all_to_all: Share = 0.70  # a further factor on `nvlink` and `network` if a token is sent once per expert


class Gpu(Section):
    """One kind of GPU. Bandwidths are per GPU and direction."""

    name: str
    memory_gib: PositiveFloat
    reserved_gib: NonNegativeFloat  # context, communication library, fragmentation
    peak_tflops: dict[str, PositiveFloat]  # by precision (bf16, fp8), without sparsity
    memory_gb_per_second: PositiveFloat
    nvlink_gb_per_second: PositiveFloat
    nvlink_latency_us: PositiveFloat = 8.0
    kernel_launch_us: PositiveFloat = 4.5
    price_per_gpu_hour: NonNegativeFloat = 0.0
    currency: str = "USD"
    efficiency: Efficiency = Efficiency()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "bf16" not in self.peak_tflops or self.peak_tflops.keys() - {"bf16", "fp8"}:
            raise ValueError(
                f"peak_tflops has {', '.join(self.peak_tflops) or 'nothing'}: give bf16, and fp8 if the GPU has it"
            )
        _check_units(self)
        if self.reserved_gib >= self.memory_gib:
            raise ValueError(f"reserved_gib {self.reserved_gib:g} leaves nothing of memory_gib {self.memory_gib:g}")
        return self

    def require(self, precision: str) -> None:
        """Raises UserError if the GPU cannot compute in ``precision``."""
        if precision not in self.peak_tflops:
            raise UserError(
                f"{self.name} does not compute in {precision}: its peak_tflops are of {', '.join(self.peak_tflops)}. "
                f"Plan with precision {next(iter(self.peak_tflops))}, or give another --gpu"
            )

    def leaving(self, margin: float) -> Self:
        """This GPU with the share ``margin`` of its usable memory reserved, too."""
        more = margin * (self.memory_gib - self.reserved_gib)
        return self.model_copy(update={"reserved_gib": self.reserved_gib + more})

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gib - self.reserved_gib) * 2**30


class Network(Section):
    """The network between nodes. ``gb_per_second`` is per GPU and direction."""

    name: str
    gb_per_second: PositiveFloat
    latency_us: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_units(self)
        return self


@dataclass(frozen=True)
class Cluster:
    """Nodes of ``gpus_per_node`` GPUs of one kind, and the network between them."""

    gpu: Gpu
    network: Network
    gpus_per_node: int


def user_folder() -> Path:
    """The folder of a user's own `gpus/NAME.yaml` and `networks/NAME.yaml`, which override the package's."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "qwen-moe" / "hardware"


Kind = TypeVar("Kind", Gpu, Network)


def known(kind: str) -> dict[str, Path]:
    """Names and files of every ``kind`` (gpus, networks). The user's files override the package's."""
    found: dict[str, Path] = {}
    for folder in (Path(__file__).parent / kind, user_folder() / kind):
        found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return found


def _load(schema: type[Kind], kind: str, option: str, name: str) -> Kind:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        files = known(kind)
        name = name if name in files else name.strip().lower()
        if name not in files:
            near = difflib.get_close_matches(name[:100].lower(), files, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(files)}"
            raise UserError(f"{option} {name!r} is not known; {hint} (or give a .yaml file, see docs/plan-time.md)")
        path = files[name]
    where = f"{option} {path}"
    values = yaml_mapping(read_text(path, option, f"a .yaml file or one of {', '.join(known(kind))}"), where)
    try:
        return schema(**values)
    except ValidationError as error:
        problems = "; ".join(
            ": ".join(filter(None, [".".join(map(str, item["loc"])), wrong(item)]))
            + ("" if item["type"] in ("missing", "value_error") else f", found {shorten(shown(item['input']))}")
            for item in error.errors()
        )
        raise UserError(f"{option} {path}: {problems}") from None


def load_gpu(name: str) -> Gpu:
    """The GPU with the given name or file. Raises UserError, which suggests the nearest name."""
    return _load(Gpu, "gpus", "--gpu", name)


def load_network(name: str) -> Network:
    """The network with the given name or file. Raises UserError, which suggests the nearest name."""
    return _load(Network, "networks", "--network", name)
