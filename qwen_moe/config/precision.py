"""The precision section: dtypes, FP8, who computes matmuls, compilation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import NonNegativeInt, OptionalLayers, PositiveInt, Section


class Fp8Config(Section):
    """Scaling of the operands of FP8 matmuls (docs/fp8.md); used with ``compute`` fp8 only.

    ``recipe``: ``delayed`` (one scale per tensor, from its amax in earlier steps), ``current`` (from the current tensor),
    ``blockwise`` (1 x 128 tiles, weights 128 x 128) or ``mxfp8`` (1 x 32 blocks), as Transformer Engine defines them.
    ``format`` auto means hybrid (gradients in E5M2) for the first two and e4m3 for the others. ``amax_history_len`` (steps),
    ``amax_compute_algo`` and ``margin`` (the scale is divided by 2^margin) apply to ``delayed`` only.
    ``first_layers_in_bf16`` and ``last_layers_in_bf16``: numbers of decoder layers without FP8.
    """

    recipe: Literal["delayed", "current", "blockwise", "mxfp8"] = "blockwise"
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    amax_history_len: Annotated[PositiveInt, Field(le=1_000_000)] = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    margin: Annotated[NonNegativeInt, Field(le=64)] = 0
    first_layers_in_bf16: OptionalLayers = 0
    last_layers_in_bf16: OptionalLayers = 0

    @property
    def hybrid(self) -> bool:
        return self.format == "hybrid" or (self.format == "auto" and self.recipe in ("delayed", "current"))

    def plain_layers(self, layers: int) -> tuple[int, ...]:
        """The indices of the layers without FP8, out of ``layers`` decoder layers."""
        last = layers - self.last_layers_in_bf16
        return tuple(i for i in range(layers) if i < self.first_layers_in_bf16 or i >= last)


class PrecisionConfig(Section):
    """``compute``: dtype of matmuls and activations. ``master``: dtype of the weights that the optimizer updates.

    With ``compute`` fp8 the matmuls of attention's projections, feed-forward and experts have FP8 operands (``fp8``), and
    everything else is bf16. ``kernels``: ``torch``, ``te`` (Transformer Engine) or ``auto``, which is te for fp8 if it can
    be imported and the GPU has FP8, else torch. ``compile``: whether torch.compile fuses each elementwise chain into a
    kernel; auto does so on GPUs, and on CPUs in runs long enough to make up for the half minute of compilation.
    """

    compute: Literal["fp64", "fp32", "bf16", "fp8"] = "bf16"
    master: Literal["fp64", "fp32", "bf16"] = "fp32"
    fp8: Fp8Config = Fp8Config()
    kernels: Literal["auto", "torch", "te"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        width = {"fp8": 16, "bf16": 16, "fp32": 32, "fp64": 64}
        if self.compute != "fp8" and self.fp8 != Fp8Config():
            raise ValueError(
                f"precision.fp8 is given but precision.compute is {self.compute}: set precision.compute to fp8, or leave "
                "precision.fp8 out"
            )
        if self.fp8.recipe != "delayed":
            for name in ("amax_history_len", "amax_compute_algo", "margin"):
                if getattr(self.fp8, name) != Fp8Config.model_fields[name].default:
                    raise ValueError(
                        f"precision.fp8.{name} is only used by recipe delayed, not {self.fp8.recipe}: leave it out"
                    )
        if width[self.master] < width[self.compute]:
            raise ValueError(
                f"precision.master {self.master} is narrower than precision.compute {self.compute}: "
                "the optimizer would lose precision that the model computes; use the same dtype or a wider one"
            )
        if self.compute == "fp64" and self.compile == "always":
            raise ValueError("precision.compile always is for fp32, bf16 and fp8, not fp64: leave it out")
        if self.compute == "fp64" and self.master != "fp64":
            raise ValueError("precision.compute fp64 needs precision.master fp64")
        return self
