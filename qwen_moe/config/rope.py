"""How RoPE is stretched to longer texts than a model was trained on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import PositiveFloat, Section, Size

_OF_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


class RopeScaling(Section):
    """Hugging Face's rope_parameters; names and defaults are transformers'.

    ``linear`` divides every position by ``factor``. ``dynamic`` raises the base with the length of the text, beyond
    max_position_embeddings (NTK). ``yarn`` (arXiv 2309.00071) divides frequencies that turn fewer than ``beta_slow`` times
    in the original length by ``factor``, keeps those that turn more than ``beta_fast`` times, and blends between; the logits
    are multiplied by the square of ``attention_factor`` (0.1 ln factor + 1 if it is not given).

    ``original_max_position_embeddings``: the length that the model was trained on, by default max_position_embeddings.
    ``factor``: for yarn by default the ratio of the two.
    """

    type: Literal["linear", "dynamic", "yarn"]
    factor: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type != "yarn":
            defaults = {name: field.default for name, field in type(self).model_fields.items()}
            odd = [n for n in (*_OF_YARN, "original_max_position_embeddings") if getattr(self, n) != defaults[n]]
            if odd:
                raise ValueError(f"{', '.join(odd)}: only type yarn has these, and type is {self.type}; leave them out")
            if self.factor is None:
                raise ValueError(f"type {self.type} needs a factor: give how many times longer texts may become")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast {self.beta_fast:g} is not above beta_slow {self.beta_slow:g}: they are turns in the original "
                "length, above which a frequency is kept and below which it is divided (by default 32 and 1)"
            )
        return self
