"""Converts Hugging Face's config.json to ModelConfig and back. Absent keys mean what they mean to transformers."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from launchers.counted import counted
from qwen_moe.checkpoint.huggingface.dual_chunk import KEY as DUAL_CHUNK
from qwen_moe.checkpoint.huggingface.dual_chunk import read_dual_chunk, write_dual_chunk
from qwen_moe.checkpoint.huggingface.fp8 import check_quantization
from qwen_moe.checkpoint.huggingface.rope import read_rope, write_rope
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.config.families import FAMILIES, Family
from qwen_moe.config.fields import whole_number
from qwen_moe.errors import UserError

# Keys that do not change what the model computes here, or that have their own checks.
_UNUSED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        DUAL_CHUNK,
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "is_causal",
        "layer_types",
        "max_window_layers",
        "mlp_only_layers",
        "model_type",
        "num_local_experts",
        "original_max_position_embeddings",
        "output_router_logits",
        "pad_token_id",
        "partial_rotary_factor",
        "quantization_config",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "router_aux_loss_coef",
        "sliding_window",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_sliding_window",
    ]
)
_SILU = ("silu", "swish")  # two names of one function
# Keys of classifiers, as transformers calls reward models, which name the scores.
_LABELS = ("id2label", "label2id", "num_labels", "problem_type")


@dataclass(frozen=True)
class Interpretation:
    """The model that a config.json describes, and notes for the user."""

    config: ModelConfig
    notes: tuple[str, ...]


_MAPPING, _LIST, _TEXT, _TRUTH = (dict, "a mapping"), (list, "a list"), (str, "a string"), (bool, "true or false")
_TYPES: dict[str, tuple[type, str]] = {
    "architectures": _LIST,
    "model_type": _TEXT,
    "hidden_act": _TEXT,
    "id2label": _MAPPING,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "layer_types": _LIST,
    "mlp_only_layers": _LIST,
    "quantization_config": _MAPPING,
    "rope_parameters": _MAPPING,
    "rope_scaling": _MAPPING,
    "is_causal": _TRUTH,
    "use_sliding_window": _TRUTH,
}
# Sizes and switches, by a default: `ModelConfig` reads them in recipes, too, where text such as "16" is a number.
_SETTINGS = {"head_dim": 0} | {key: value for row in FAMILIES.values() for key, value in row.hf_defaults.items()}
_WINDOW, _MAX_WINDOW_LAYERS = 4096, 28  # transformers' values for keys that config.json lacks
_NUMBERS = ("rope_theta", "num_experts", "num_local_experts", "attention_dropout")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_types(values: dict[str, Any], where: str) -> None:
    """Raise UserError if a key that is read here has the wrong type. ModelConfig checks sizes."""

    def refuse(key: str, value: Any, expected: str) -> NoReturn:
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
        raise UserError(f"{where}: {key} is {shown}, expected {expected}")

    for key, (kind, expected) in _TYPES.items():
        if values.get(key) is not None and not isinstance(values[key], kind):
            refuse(key, values[key], expected)
    for key in _NUMBERS:
        if values.get(key) is not None and not _is_number(values[key]):
            refuse(key, values[key], "a number")
    for key, default in _SETTINGS.items():
        if isinstance(values.get(key), str):
            refuse(key, values[key], "true or false" if isinstance(default, bool) else "a number")
    for key in ("architectures", "layer_types"):
        if not all(isinstance(item, str) for item in values.get(key) or []):
            refuse(key, values[key], "a list of names")
    for layer in values.get("mlp_only_layers") or []:
        if not isinstance(layer, int) or isinstance(layer, bool):
            refuse("mlp_only_layers", values["mlp_only_layers"], "a list of layers' indices")
    for key in ("rope_parameters", "rope_scaling"):
        theta = (values.get(key) or {}).get("rope_theta")
        if theta is not None and not _is_number(theta):
            refuse(f"{key}.rope_theta", theta, "a number")


def _family(values: dict[str, Any], where: str) -> str:
    families = {row.architecture: name for name, row in FAMILIES.items()}
    supported = ", ".join(families) + ", and ...ForSequenceClassification of each"
    families |= {row.classifier: name for name, row in FAMILIES.items()}
    named, model_type = values.get("architectures") or [], values.get("model_type")
    if not named:
        if model_type not in FAMILIES:
            raise UserError(f"{where} has model_type {model_type!r} and no architectures: supported are {supported}")
        return str(model_type)
    if not isinstance(named, list) or len(named) != 1 or named[0] not in families:
        raise UserError(f"{where} is of architecture {named!r}, which is not supported: supported are {supported}")
    family = families[named[0]]
    if "model_type" in values and model_type != family:
        raise UserError(f"{where} has architecture {named[0]} but model_type {values['model_type']!r}: one is wrong")
    return family


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    other = sorted({str(kind) for kind in values.get("layer_types") or [] if kind != "full_attention"})
    if other:
        raise UserError(f"{where}: layer_types has {', '.join(other)}: only full_attention is supported")
    if not values.get("is_causal", True):
        raise UserError(
            f"{where}: is_causal is {json.dumps(values['is_causal'])}, so every token sees those after it, as in models "
            "that embed texts: only causal attention is supported"
        )
    if values.get("hidden_act", "silu") not in _SILU:
        raise UserError(f"{where}: hidden_act is {values['hidden_act']!r}: only 'silu' is supported")
    if values.get("quantization_config"):
        check_quantization(values["quantization_config"], where)


def _refuse_windows(values: dict[str, Any], features: Family, layers: Any, where: str) -> None:
    """Raise UserError if transformers would give any of ``layers`` layers a sliding window. `layer_types` that name one are
    refused before."""
    if not values.get("use_sliding_window"):
        return
    window, last = values.get("sliding_window", _WINDOW), values.get("max_window_layers", _MAX_WINDOW_LAYERS)
    for key, value in (("sliding_window", window), ("max_window_layers", last)):
        if type(value) is not int and not (key == "sliding_window" and value is None):
            raise UserError(f"{where}: {key} is {json.dumps(value)[:100]}, expected a whole number")
    if features.windows == "all":
        count, why = layers if window is not None else 0, f"sliding_window {window}"
    elif values.get("layer_types") is not None:
        return
    elif features.windows == "lower":
        count, why = (min(layers, max(last, 0)) + 1) // 2, f"max_window_layers {last}"
    else:
        count, why = 0 if window is None else layers - min(layers, max(last, 0)), f"max_window_layers {last}"
    if count:
        raise UserError(
            f"{where}: use_sliding_window is true, which gives {count} of {counted(layers, 'layer')} a sliding window "
            f"({why}): only "
            "full attention is supported"
        )


def _criteria(values: dict[str, Any], family: str, where: str) -> tuple[str, ...]:
    """The names of the scores if it is a classifier: transformers' defaults are two labels, LABEL_0 and LABEL_1."""
    if (values.get("architectures") or []) != [FAMILIES[family].classifier]:
        return ()
    count = values.get("num_labels")
    if count is not None and (type(count) is not int or not 0 < count <= 10_000):
        raise UserError(f"{where}: num_labels is {str(count)[:100]}, expected a number of scores")
    labels = values.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{index}" for index in range(2 if count is None else count))
    expected = [str(index) for index in range(len(labels))]
    if sorted(map(str, labels)) != sorted(expected) or not all(isinstance(name, str) for name in labels.values()):
        raise UserError(f"{where}: id2label is {str(labels)[:100]}, expected names for 0, 1 and so on")
    if count is not None and count != len(labels):
        raise UserError(
            f"{where}: num_labels is {count} but id2label has {counted(len(labels), 'name')}: correct one of them"
        )
    by_index = {str(index): name for index, name in labels.items()}
    return tuple(by_index[index] for index in expected)


def _num_experts(values: dict[str, Any], where: str) -> Any:
    given = {values[key] for key in ("num_experts", "num_local_experts") if values.get(key) is not None}
    if len(given) == 2:
        raise UserError(
            f"{where}: num_experts is {values['num_experts']} but num_local_experts is "
            f"{values['num_local_experts']}: they are two names of one number; remove the wrong one"
        )
    return given.pop() if given else None


def interpret(values: dict[str, Any], where: str = "config.json") -> Interpretation:
    """The ModelConfig of a parsed config.json, with notes on defaults taken and keys not used.

    Raises UserError for unsupported architectures and features, and for sizes that contradict each other.
    """
    _check_types(values, where)
    family = _family(values, where)
    _refuse_unsupported(values, where)
    notes: list[str] = []
    if values.get("quantization_config"):
        notes.append("FP8 matrices are dequantized")
    theta, scaling = read_rope(values, where, notes)
    fields: dict[str, Any] = {"family": family, "rope_theta": theta, "rope_scaling": scaling}
    fields["dual_chunk"] = read_dual_chunk(values, where, notes)
    fields["criteria"] = _criteria(values, family, where)
    features = FAMILIES[family]
    defaults = features.hf_defaults
    given = dict(values)
    if features.moe:
        experts = _num_experts(values, where)
        if experts is not None:
            given["num_experts"] = experts
    absent = [key for key in defaults if key not in given]
    if absent:
        notes.append("transformers' defaults: " + ", ".join(f"{key}={defaults[key]}" for key in absent))
    for key, default in defaults.items():
        fields["qkv_bias" if key == features.qkv_bias_key else key] = given.get(key, default)
    layer_types, layers = values.get("layer_types"), fields["num_hidden_layers"]
    if layer_types is not None and isinstance(layers, int) and len(layer_types) != layers:
        raise UserError(
            f"{where}: layer_types has {counted(len(layer_types), 'entry')} but num_hidden_layers is {layers}: "
            "correct one of them, "
            "or remove layer_types"
        )
    if isinstance(layers := whole_number(layers), int):
        _refuse_windows(values, features, layers, where)
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    head_dim = given.get("head_dim", defaults.get("head_dim"))
    fields.pop("head_dim", None)
    if head_dim is not None:
        fields["head_dim"] = head_dim
    if features.moe:
        only = given.get("mlp_only_layers") or []
        layers = fields["num_hidden_layers"]
        beyond = [layer for layer in only if isinstance(layers, int) and not 0 <= layer < layers]
        if beyond:
            notes.append(f"mlp_only_layers names {beyond}, which do not exist; they have no effect, as in transformers")
        fields["mlp_only_layers"] = [layer for layer in only if layer not in beyond]
    if given.get("attention_dropout"):
        notes.append(f"attention_dropout {given['attention_dropout']} is not used: attention here has no dropout")
    unknown = sorted(values.keys() - _UNUSED - defaults.keys() - set(_LABELS if fields["criteria"] else ()))
    if unknown:
        notes.append(f"not used: {', '.join(unknown)}")
    return Interpretation(parse_model(fields, where), tuple(notes))


def model_config_from_hf(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a parsed config.json describes. Raises UserError (see `interpret`)."""
    return interpret(values, where).config


def _fresh(config: ModelConfig) -> dict[str, Any]:
    """A complete config.json that old and new versions of transformers read in the same way."""
    features = config.features
    values: dict[str, Any] = {
        "architectures": [features.classifier if config.criteria else features.architecture],
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "model_type": config.family,
        "use_cache": True,
        "use_sliding_window": False,
    } | write_rope(config)
    for key in features.hf_defaults.keys() - {"num_experts"}:
        values[key] = config.qkv_bias if key == features.qkv_bias_key else getattr(config, key)
    if config.criteria:
        values["id2label"] = {str(index): name for index, name in enumerate(config.criteria)}
        values["label2id"] = {name: index for index, name in enumerate(config.criteria)}
    if features.moe:
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    values |= dict.fromkeys(features.expert_count_keys, config.num_experts) | write_dual_chunk(config, {})
    return dict(sorted(values.items()))


_ROPE_KEYS = ("rope_theta", "rope_parameters", "rope_scaling")


def _keys(field: str, features: Family) -> tuple[str, ...]:
    """The keys of config.json that hold ``field`` of ModelConfig."""
    others = {
        "rope_theta": _ROPE_KEYS,
        "rope_scaling": _ROPE_KEYS,
        "num_experts": features.expert_count_keys,
        "qkv_bias": (features.qkv_bias_key,),
        "criteria": ("architectures", *_LABELS),
    }
    return others.get(field, (field,))


def hf_config(config: ModelConfig, original: dict[str, Any] | None = None, dtype: str | None = None) -> dict[str, Any]:
    """config.json of ``config``. Keeps ``original`` except for keys whose meaning differs; if none differs, returns it
    unchanged.

    ``dtype``: torch's name of the weights' dtype (such as "bfloat16"), or None to keep what ``original`` says.
    """
    fresh = _fresh(config)
    if original is None or _family(original, "the original config.json") != config.family:
        values = fresh
    else:
        values = dict(original)
        old = interpret(original, "the original config.json").config
        for name in ModelConfig.model_fields:
            if getattr(old, name) == getattr(config, name):
                continue
            if name in ("rope_theta", "rope_scaling"):
                for key in (*_ROPE_KEYS, "original_max_position_embeddings"):
                    values.pop(key, None)
            if name == "criteria":
                for key in _LABELS:
                    values.pop(key, None)
            if name == "dual_chunk":
                values.pop(DUAL_CHUNK, None)
                values |= write_dual_chunk(config, original)
            values |= {key: fresh[key] for key in _keys(name, config.features) if key in fresh}
            if name == "num_hidden_layers" and values.get("layer_types"):
                values["layer_types"] = ["full_attention"] * config.num_hidden_layers
            if name == "num_hidden_layers" and values.get("use_sliding_window"):
                values["use_sliding_window"] = False  # it had no effect on the layers of the original
    if dtype is not None:
        present = [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype", "torch_dtype"]
        values |= dict.fromkeys(present, dtype)
    assert model_config_from_hf(values) == config
    return values
