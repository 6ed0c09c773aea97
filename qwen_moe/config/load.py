"""Reads a recipe: YAML, `section.key=value` overrides, and one message for all mistakes. Also writes settings as YAML."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qwen_moe.config.model import ModelConfig
from qwen_moe.config.presets import preset_values
from qwen_moe.config.recipe_verbs import verb_of
from qwen_moe.config.run import RunConfig, stage_runs
from qwen_moe.config.stage_presets import with_stages
from qwen_moe.config.writers import RECIPES
from qwen_moe.documents import read_text, yaml_mapping, yaml_value
from qwen_moe.errors import UserError, shown, wrong


def shorten(text: str) -> str:
    """``text`` for a message, cut off if it is long."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _valid_keys(path: tuple[str | int, ...], whole: type[BaseModel]) -> list[str]:
    """The keys that are valid in the section of ``path``, the path of an unknown key of ``whole``."""
    section = whole
    for part in path[:-1]:
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
                break
    return list(section.model_fields) + (["preset"] if section is ModelConfig else [])


def explain(
    error: ValidationError, source: str, root: tuple[str, ...] = (), whole: type[BaseModel] = RunConfig
) -> UserError:
    """One message for all mistakes in ``source``, which holds a ``whole``; ``root``: the section that ``error`` is about."""
    lines = []
    unknown = [
        str(item["loc"][0]) for item in error.errors() if item["type"] == "extra_forbidden" and len(item["loc"]) == 1
    ]
    if not root and (verb := verb_of(unknown)):
        return UserError(
            f"{source}: this is a recipe for `{verb}`, with {', '.join(unknown)}: give it to that command. Here the keys "
            f"are {', '.join(whole.model_fields)}"
        )
    for item in error.errors():
        path = root + tuple(item["loc"])
        dotted = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), _valid_keys(path, whole), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(_valid_keys(path, whole))}"
            lines.append(f"unknown key {dotted!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{dotted!r} is missing: give it in the recipe or as {dotted}=VALUE")
        elif item["type"] == "value_error":
            lines.append(f"{dotted}: {wrong(item)}" if dotted else wrong(item))
        else:
            lines.append(f"{dotted} = {shorten(shown(item['input']))}: {wrong(item)}")
    return UserError(f"{source}: " + "; ".join(lines))


def parse_model(values: dict[str, Any], source: str) -> ModelConfig:
    """ModelConfig from plain values. `preset: NAME` is resolved, and the other keys override it."""
    values = dict(values)
    if "preset" in values:
        values = preset_values(str(values.pop("preset"))) | values
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        raise explain(error, source, ("model",)) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    node = values
    *parents, leaf = key.split(".")
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if isinstance(child, list) and part == "stages" and node is values:
            child = {str(stage["name"]): stage for stage in child if isinstance(stage, dict) and "name" in stage}
            if parents[1:2] and parents[1] not in child:
                raise UserError(f"override {override!r}: no stage has this name; the stages are {', '.join(child)}")
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a section")
        node = child
    node[leaf] = yaml_value(text, f"override {shorten(override)!r}") if text else ""


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `section.key=value` overrides into ``values``. Raises UserError."""
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if given.setdefault(key, override) != override:
            raise UserError(f"{key} is given twice, as {shorten(given[key])} and as {shorten(override)}: keep one")
        _apply_override(values, override)


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """RunConfig from plain values. Raises one UserError with all problems."""
    values = with_stages(values, source)
    if isinstance(values.get("model"), dict) and "preset" in values["model"]:
        values["model"] = parse_model(values["model"], source).model_dump()
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise explain(error, source) from None


def find_recipe(path: Path) -> Path:
    """``path`` itself if it exists, else the packaged recipe of that name (`demo` or `recipes/demo.yaml`), if there is one,
    else ``path``."""
    if os.path.exists(path) or path.parent not in (Path(), Path("recipes")) or path.suffix not in ("", ".yaml"):
        return path
    ours = RECIPES / f"{path.stem}.yaml"
    return ours if os.path.isfile(ours) else path


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe, from a file or from the package (`find_recipe`). Raises UserError."""
    expected = f"the path of a YAML file, or one of {', '.join(sorted(file.stem for file in RECIPES.glob('*.yaml')))}"
    source = find_recipe(path)
    if source != path and path.suffix:
        print(f"{path} does not exist: reading {source}, which comes with qwen-moe", file=sys.stderr)
    return yaml_mapping(read_text(source, "recipe", expected), f"recipe {path}")


Recipe = TypeVar("Recipe", bound=BaseModel)


def load_as(cls: type[Recipe], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of another kind than a run's, strictly, as `load_config` does. Raises UserError naming every problem."""
    values = read_recipe(path)
    apply_overrides(values, overrides)
    try:
        return cls(**values)
    except ValidationError as error:
        raise explain(error, str(path), whole=cls) from None
    except TypeError as error:  # a key that is no text
        raise UserError(f"{path}: {error}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `section.key=value` overrides (values are YAML). Raises UserError naming every problem."""
    values = with_stages(read_recipe(path), str(path))
    apply_overrides(values, overrides)
    return parse_config(values, str(path))


def load_stage(path: Path, overrides: Sequence[str] = (), name: str = "") -> RunConfig:
    """Like `load_config`; of a run of stages, the one called ``name``, by default the last of those with the longest
    sequences, which it says on stderr. Raises UserError for a name that no stage has."""
    config = load_config(path, overrides)
    runs = stage_runs(config)
    if name:
        found = next((run for run in runs if run.place.name == name), None)
        if found is None:
            names = (
                f"its stages are {', '.join(run.place.name for run in runs)}" if config.stages else "it has no stages"
            )
            raise UserError(f"{path}: there is no stage {name!r}: {names}")
        return found
    if not config.stages:
        return config
    found = max(runs, key=lambda run: (run.data.sequence_length, run.place.index))
    print(
        f"{path}: of its stages, this is {found.place.name}, with the longest sequences, of "
        f"{found.data.sequence_length:,} tokens (--stage NAME takes another)",
        file=sys.stderr,
    )
    return found


def refuse_stages(config: RunConfig, verb: str) -> None:
    """Raise UserError if ``config`` has stages, which ``verb`` cannot read."""
    if config.stages:
        names = ", ".join(stage.name for stage in config.stages)
        raise UserError(
            f"`{verb}` reads recipes of one stage, and this one has stages ({names}): leave stages out, and give the "
            "settings of the stage that you mean"
        )


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)
