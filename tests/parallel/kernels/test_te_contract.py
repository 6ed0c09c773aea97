"""Everything that our provider uses of Transformer Engine exists, under that name, in every release that we claim.

What we use is read from our source, what exists from the sources in the wheels on the package index. Where the index
cannot be reached, and nothing is in pytest's cache, the tests are skipped.
"""

import ast
import inspect
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel.kernels.transformer_engine import SUPPORTED
from tests.parallel.kernels import fake_te
from tests.parallel.kernels.te_sources import (
    PYTORCH,
    RECIPES,
    Sources,
    Uses,
    accepted,
    fetch,
    pattern,
    positional,
    required,
    uses,
)

ROOT = Path(__file__).parents[3]
PROVIDER = ROOT / "parallel" / "kernels" / "transformer_engine.py"
BENCHMARK = ROOT / "benchmarks" / "gpu_contenders.py"
# Variables of the provider that hold Transformer Engine's objects without being assigned from `te.X(...)`.
STATE = "DelayedScalingRecipeState"
ALIASES = {
    "te_module": {"Linear", "GroupedLinear"},
    "te_forward": {STATE},
    "te_backward": {STATE},
    "te_state": {STATE},
}


def our_uses(source: str | None = None) -> Uses:
    return uses(PROVIDER.read_text(encoding="utf-8") if source is None else source, ALIASES)


@pytest.fixture(scope="module")
def wheels(request: pytest.FixtureRequest) -> dict[str, Path | str]:
    folder = request.config.cache.mkdir("transformer_engine")
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(SUPPORTED, pool.map(lambda version: fetch(version, folder), SUPPORTED)))


def sources(wheels: dict[str, Path | str], version: str) -> Sources:
    wheel = wheels[version]
    if isinstance(wheel, str):
        pytest.skip(f"the package index gives no transformer-engine {version}: {wheel}")
    return Sources(wheel)


def locate(name: str) -> tuple[str, str]:
    module = {"te": PYTORCH, "te_recipe": RECIPES}[name.split(".")[0]]
    return module, name.split(".")[1]


def where(kind: str) -> tuple[str, str]:
    return (f"{PYTORCH}.quantization", kind) if kind == STATE else (PYTORCH, kind)


def problems(found: Uses, real: Sources) -> list[str]:
    """What ``found`` uses that ``real`` does not have."""
    wrong = []
    for name in sorted(found.names):
        module, first = locate(name)
        known = real.attributes(module, first)
        if real.find(module, first) is None or (name.count(".") == 2 and name.split(".")[2] not in known):
            wrong.append(f"{name} does not exist")
    for kind, attribute in sorted(found.attributes):
        if attribute not in real.attributes(*where(kind)) | {"weight", "bias"}:
            wrong.append(f"{kind} has no {attribute}")
    for call in found.calls:
        if (wrong_call := _wrong_call(call.what, call.count, call.keywords, real)) is not None:
            wrong.append(f"line {call.line}: {wrong_call}")
    for kind, lent in found.lent.items():
        missing = lent - _read_by_name(kind, real)
        if missing:
            wrong.append(f"{kind} does not read {sorted(missing)} when it is called")
    return wrong


def _wrong_call(what: str, count: int, keywords: tuple[str, ...], real: Sources) -> str | None:
    if what.startswith(("te.", "te_recipe.")):
        module, name = locate(what)
        definition = real.find(module, name)
        if definition is None:
            return None  # reported as a name
        if isinstance(definition[1], ast.FunctionDef):
            signatures, bound = [definition[1].args], False
        elif module == RECIPES:
            allowed = real.fields(module, name)
            unknown = [k for k in keywords if k not in allowed]
            return f"{what} has no field {unknown}" if unknown or count > len(allowed) else None
        else:
            signatures, bound = real.methods(module, name, "__init__"), True
    else:
        kind, _, method = what.removesuffix("()").partition(".")
        signatures, bound = real.methods(*where(kind), method or "forward"), True
    if not signatures:
        return f"{what} cannot be called"
    if count > len(positional(signatures[0], bound)):
        return f"{what} takes {len(positional(signatures[0], bound))} arguments by position, not {count}"
    missing = [n for n in required(signatures[0], bound)[count:] if n not in keywords]
    if missing:
        return f"{what} is not given {missing}"
    for keyword in keywords:
        for arguments in signatures:  # a keyword that only **kwargs takes goes on to the base class
            if keyword in accepted(arguments, bound):
                break
            if arguments.kwarg is None:
                return f"{what} has no argument {keyword}"
        else:
            return f"{what} has no argument {keyword}"
    return None


def _read_by_name(kind: str, real: Sources) -> set[str]:
    """Parameter names that the class reads with ``getattr(self, name)`` outside of its constructor: these can be lent."""
    names, listed = set(), set()
    for _, node in real.lineage(PYTORCH, kind):
        for part in ast.walk(node):
            if isinstance(part, ast.Assign) and isinstance(part.value, ast.List):
                targets = {t.attr for t in part.targets if isinstance(t, ast.Attribute)}
                if targets & {"weight_names", "bias_names"}:
                    listed |= {pattern(element) for element in part.value.elts}
        for method in (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name != "__init__"):
            for part in ast.walk(method):
                if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "getattr":
                    names.add(pattern(part.args[1]) or ast.unparse(part.args[1]))
    return names | (listed if "name" in names else set())


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_we_use_exists(wheels: dict[str, Path | str], version: str) -> None:
    real = sources(wheels, version)
    found = our_uses()
    # Every kind of use must have been seen, or the test proves nothing.
    assert {"te.Linear", "te.GroupedLinear", "te.autocast", "te_recipe.DelayedScaling"} <= found.names
    assert ("GroupedLinear", "fp8_meta") in found.attributes and found.lent["GroupedLinear"] == {"weight{}"}
    assert {"Linear()", "GroupedLinear()", "Fp8Padding()", "Fp8Unpadding()", "Linear.init_fp8_metadata"} <= {
        call.what for call in found.calls
    }
    assert problems(found, real) == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_the_benchmark_uses_exists(wheels: dict[str, Path | str], version: str) -> None:
    found = uses(BENCHMARK.read_text(encoding="utf-8"), {})
    assert {"te.GroupedLinear", "te.moe_permute", "te.moe_unpermute"} <= found.names
    assert "GroupedLinear()" in {call.what for call in found.calls}
    assert problems(found, sources(wheels, version)) == []


@pytest.mark.parametrize("version", [SUPPORTED[0], SUPPORTED[-1]])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("te.Fp8Padding(", "te.Fp8Pad("), "te.Fp8Pad does not exist"),
        (("amax_history_len=", "amax_history_length="), "has no field ['amax_history_length']"),
        (("te_recipe.Format.E4M3", "te_recipe.Format.E4M4"), "te_recipe.Format.E4M4 does not exist"),
        (('"is_first_microbatch"', '"first_microbatch"'), "Linear() has no argument first_microbatch"),
        (("params_dtype=weight.dtype", "dtype=weight.dtype"), "te.GroupedLinear has no argument dtype"),
        (("amax_reduction_group=", "fp8_group="), "te.autocast has no argument fp8_group"),
        (("te_module.fp8_meta[", "te_module.fp8_state["), "GroupedLinear has no fp8_state"),
        (("te_forward.scale,", "te_forward.scales,"), "DelayedScalingRecipeState has no scales"),
        (('{f"weight{expert}"', '{f"w{expert}"'), "GroupedLinear does not read ['w{}']"),
        (("self.te_padding(x, splits)", "self.te_padding(x, splits, 16)"), "Fp8Padding() takes 2 arguments"),
        (("num_gemms=self.gemms", "gemms=self.gemms"), "has no argument gemms"),
        (("(padded, padded_splits), options", "(padded,), options"), "GroupedLinear() is not given ['m_splits']"),
        (("eps=old.eps", "epsilon=old.eps"), "te.RMSNorm has no argument epsilon"),
    ],
)
def test_a_wrong_name_is_found(
    wheels: dict[str, Path | str], version: str, change: tuple[str, str], complaint: str
) -> None:
    """Each change of our source to something that does not exist is reported."""
    source = PROVIDER.read_text(encoding="utf-8")
    assert change[0] in source
    found = problems(our_uses(source.replace(*change)), sources(wheels, version))
    assert any(complaint in problem for problem in found), found


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_fake_has_the_real_signatures(wheels: dict[str, Path | str], version: str) -> None:
    """The module that other tests put in Transformer Engine's place takes nothing that the real one does not take."""
    real = sources(wheels, version)
    for name in ("Linear", "GroupedLinear", "RMSNorm", "Fp8Padding", "Fp8Unpadding"):
        for method in ("__init__", "forward"):
            ours = list(inspect.signature(getattr(getattr(fake_te, name), method)).parameters)[1:]
            theirs = [n for arguments in real.methods(PYTORCH, name, method) for n in accepted(arguments, True)]
            if not (
                name == "RMSNorm" and method == "forward"
            ):  # the real one is called through Module.__call__'s *args
                assert [n for n in ours if n not in theirs] == [], (name, method)
                assert ours[:1] == theirs[:1]
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available", "autocast"):
        definition = real.find(PYTORCH, name)
        assert definition is not None and definition[1] is not None
        arguments = (
            definition[1].args
            if isinstance(definition[1], ast.FunctionDef)
            else real.methods(PYTORCH, name, "__init__")[0]
        )
        ours = list(inspect.signature(getattr(fake_te, name)).parameters)
        assert set(ours) <= set(accepted(arguments, False)), name
    for name, fields in fake_te.RECIPE_FIELDS.items():
        assert set(fields) <= set(real.fields(RECIPES, name)), name


def test_the_te_extra_asks_for_what_is_supported() -> None:
    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    requirement = Requirement(extras["te"][0])
    assert all(version in requirement.specifier for version in SUPPORTED)
    first, last = (version.split(".") for version in (SUPPORTED[0], SUPPORTED[-1]))
    assert f"{first[0]}.{int(first[1]) - 1}.0" not in requirement.specifier
    assert f"{last[0]}.{int(last[1]) + 1}.0" not in requirement.specifier
