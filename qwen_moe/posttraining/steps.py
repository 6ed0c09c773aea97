"""The steps of a walk: the inputs of each, the command that it runs, and the figures that it keeps.

A step runs a command of `qwen-moe` as from a shell, so everything that a walk does can also be done by hand.
"""

import hashlib
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import CHECKPOINTS, read_json
from launchers.local.lock import RunLock
from parallel.threads import choose_threads
from qwen_moe.checkpoint.directory import step_directories
from qwen_moe.checkpoint.fingerprint import fingerprint
from qwen_moe.data.manifest import bin_path, idx_path
from qwen_moe.data.tasks import is_tasks
from qwen_moe.posttraining import figures
from qwen_moe.posttraining.process import run_command
from qwen_moe.posttraining.recipe import MEASURED, Rewarded, Section
from qwen_moe.posttraining.walk import Walk
from qwen_moe.rollout.rewards import is_function
from qwen_moe.rollout.store import MANIFEST
from qwen_moe.runs import identity
from qwen_moe.workflow.state import State

THREADS, EPOCHS = "threads.json", "training.epochs"
MEASURE = "measure "  # and the name of the model: the name of a step that measures


@dataclass
class Context:
    """What steps work with. ``commands`` are the ones that the current step has run. ``lock``: of the walk's folder."""

    walk: Walk
    state: State
    lock: RunLock
    commands: list[str] = field(default_factory=list)

    def call(self, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> str:
        """The stdout of a command of `qwen-moe`. Raises Stopped unless it succeeds."""
        self.commands.append(shlex.join(["qwen-moe", *arguments]))
        return run_command(arguments, environment, self.lock.pass_fds)

    def sample(self, output: Path, *arguments: str) -> dict[str, Any]:
        """The summary of `qwen-moe rollout`, which writes to ``output``. One that was stopped goes on with the threads that
        it had, so that its rounding is the same; a training run does so by itself."""
        path, name = self.walk.run_dir / THREADS, output.name
        kept = read_json(path)
        counts: dict[str, int] = kept if isinstance(kept, dict) else {}
        asked = next((run.launch.threads for run in self.walk.runs.values()), 0)
        threads = choose_threads(1, asked, before=int(counts.get(name, 0)) if output.exists() else 0)
        write_json(path, counts | {name: threads.count})
        environment = threads.environment()
        return json.loads(self.call(*arguments, "--output", str(output), "--json", environment=environment))


class Step(ABC):
    """A step by its ``name``. ``output``: the files and folders that it writes."""

    name: str
    what: str
    output: tuple[Path, ...]

    @abstractmethod
    def inputs(self, at: Context) -> dict[str, Any]:
        """What decides the result, by name."""

    @abstractmethod
    def do(self, at: Context) -> dict[str, Any]:
        """Do it, or go on with it, and return its figures."""


_WHAT = {
    "sft": "fine-tune",
    "dpo": "learn from pairs",
    "reward_model": "train a reward model on the pairs",
    "grpo": "learn from own samples",
}


class Training(Step):
    """A training step: writes its recipe and trains it."""

    def __init__(self, walk: Walk, name: str) -> None:
        self.name, self.what = name, _WHAT[name]
        self.output = (walk.recipe_file(name), walk.folder(name))

    def inputs(self, at: Context) -> dict[str, Any]:
        walk, config = at.walk, at.walk.runs[self.name]
        found = identity.flat(config, identity.OF_RESULTS)
        files = [] if config.data.prepare is None else list(config.data.prepare.input)
        if config.rollout is not None:
            files += [*config.rollout.queries, *config.rollout.held_out]
        found |= _files(files) | _made_by(walk, self.name)
        later: dict[str, Any] = {EPOCHS: config.training.epochs} | _folders(files)
        later |= _files(str(path) for one in config.data.train for path in (bin_path(one.prefix), idx_path(one.prefix)))
        later |= _functions(() if config.rollout is None else config.rollout.rewards)
        return found | _known_then(at, self.name, later)

    def do(self, at: Context) -> dict[str, Any]:
        path = at.walk.recipe_file(self.name)
        head = f"# Step {self.name} of {at.walk.source}, written by qwen-moe post-train.\n"
        write_text(path, head + yaml.safe_dump(at.walk.recipes[self.name], sort_keys=False))
        at.call("train", str(path), "--json")
        return figures.of_run(at.walk.runs[self.name])


class Sampling(Step):
    """Samples the answers that pairs are made of."""

    name, what = "rollout", "sample answers to new queries"

    def __init__(self, walk: Walk) -> None:
        self.output = (walk.folder("rollout"),)

    def inputs(self, at: Context) -> dict[str, Any]:
        section = at.walk.config.rollout
        assert section is not None
        found = _settings("rollout", section) | _files([section.queries]) | _made_by(at.walk, "rollout")
        return found | _known_then(at, self.name, _functions(section.rewards))

    def do(self, at: Context) -> dict[str, Any]:
        walk, section = at.walk, at.walk.config.rollout
        assert section is not None
        before = walk.begins_from("rollout")
        assert before is not None
        sampling = ["--samples", str(section.samples), "--temperature", str(section.temperature)]
        arguments = _rollout(walk.model(before), section)
        return at.sample(walk.folder("rollout"), *arguments, *sampling, "--seed", str(section.seed))


class Pairing(Step):
    """Makes the pairs."""

    name, what = "pairs", "pair answers that pass with answers that fail"

    def __init__(self, walk: Walk) -> None:
        self.output = (walk.folder("pairs"),)

    def inputs(self, at: Context) -> dict[str, Any]:
        section = at.walk.config.pairs
        assert section is not None
        return _settings("pairs", section) | _made_by(at.walk, "pairs")

    def do(self, at: Context) -> dict[str, Any]:
        walk, section = at.walk, at.walk.config.pairs
        assert section is not None
        options = {f"--{name.replace('_', '-')}": value for name, value in section.model_dump().items()}
        if not section.length:
            del options["--length"]
        arguments = [text for name, value in options.items() for text in (name, str(value))]
        output = ["--output", str(walk.pairs_prefix), *arguments, "--json"]
        facts = json.loads(at.call("data", "pairs", str(walk.folder("rollout")), *output))
        return {"counts": facts["counts"], "left_out": facts["left_out"]}


class Measuring(Step):
    """Has a model answer the held-out queries greedily."""

    def __init__(self, walk: Walk, model: str) -> None:
        self.model, self.name = model, f"{MEASURE}{model}"
        self.what = f"answer held-out queries with the model {'to start from' if model == 'start' else f'of {model}'}"
        self.output = (walk.measured_folder(model),)

    def inputs(self, at: Context) -> dict[str, Any]:
        section = at.walk.config.measure
        assert section is not None
        found = _settings("measure", section) | _files([section.queries])
        found |= _known_then(at, self.name, _functions(section.rewards))
        return found | {f"the model {self.model} (content)": of_model(at.walk.model(self.model))}

    def do(self, at: Context) -> dict[str, Any]:
        walk, section = at.walk, at.walk.config.measure
        assert section is not None
        folder = walk.measured_folder(self.model)
        at.sample(folder, *_rollout(walk.model(self.model), section), "--samples", "1", "--temperature", "0")
        facts = figures.of_answers(folder, section.shown)
        before = None if self.model == "start" else walk.begins_from(self.model)
        if before is not None:
            facts |= {"before": before} | figures.gain(walk.measured_folder(before), folder)
        return facts


def steps_of(walk: Walk) -> list[Step]:
    """The steps of ``walk`` in order, each model's measurement after it."""
    config = walk.config
    found: list[Step] = [Measuring(walk, "start")] if "start" in config.measured else []
    for name in config.steps:
        if name == "rollout":
            found.append(Sampling(walk))
        elif name == "pairs":
            found.append(Pairing(walk))
        else:
            found.append(Training(walk, name))
            if name in MEASURED and name in config.measured:
                found.append(Measuring(walk, name))
    return found


def that_follow(walk: Walk, first: str) -> list[Step]:
    """The step ``first`` and all that work on its output, or on theirs."""
    names = {first}
    for name in walk.config.steps:
        if names & set(walk.reads(name)):
            names.add(name)
    return [step for step in steps_of(walk) if step.name in names or step.name.removeprefix(MEASURE) in names]


def of_model(path: Path) -> str:
    """A hash that tells a model from another: of the newest checkpoint of a run, or of the files of a directory; empty if
    there is none."""
    steps = step_directories(path) or step_directories(path / CHECKPOINTS)
    directory = list(steps.values())[-1] if steps else path
    return fingerprint(directory) if directory.is_dir() else ""


def _made_by(walk: Walk, step: str) -> dict[str, Any]:
    """Hashes of what ``step`` works on: the model that it begins from, and what earlier steps made."""
    found: dict[str, Any] = {}
    before = walk.begins_from(step) if step != "pairs" else None
    if before is not None:
        found[f"the model that {step} begins from (content)"] = of_model(walk.model(before))
    files = {
        "pairs": walk.pairs_prefix.with_name(f"{walk.pairs_prefix.name}.bin"),
        "rollout": walk.folder("rollout") / MANIFEST,
    }
    for name in walk.reads(step):
        if name in files:
            found |= _files([str(files[name])])
        elif name == "reward_model":
            found["the reward model (content)"] = of_model(walk.folder(name))
    return found


def _settings(name: str, section: Section) -> dict[str, Any]:
    """The settings of a section that decide a result."""
    free = ("shown", "reward_seconds")
    values = section.model_dump(mode="json")
    return {f"{name}.{key}": value for key, value in values.items() if key not in free}


def _files(names: Iterable[str]) -> dict[str, Any]:
    """Hashes of the files ``names``; generated tasks need none."""
    found = {}
    for name in names:
        path = Path(name)
        if not is_tasks(name) and path.is_file():
            with path.open("rb") as file:
                found[f"{name} (content)"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _folders(names: Iterable[str]) -> dict[str, Any]:
    """Hashes of the folders among ``names``, of all files in each."""
    found = {}
    for name in names:
        if not is_tasks(name) and Path(name).is_dir():
            files = sorted(path for path in Path(name).rglob("*") if path.is_file())
            digest = hashlib.sha256(json.dumps(_files(map(str, files))).encode())
            found[f"{name} (content)"] = digest.hexdigest()
    return found


def _functions(rewards: Iterable[str]) -> dict[str, Any]:
    """Hashes of the files of reward functions that are in the current folder."""
    modules = [reward.partition(":")[0] for reward in rewards if is_function(reward)]
    return _files(f"{module.replace('.', '/')}.py" for module in modules)


def _known_then(at: Context, step: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that are compared: all, but not what an earlier version did not record when ``step`` was done."""
    before = at.state.inputs(step)
    return {name: value for name, value in values.items() if not before or name in before}


def _rollout(model: Path, section: Rewarded) -> list[str]:
    """The arguments of `qwen-moe rollout` that sampling and measuring have in common."""
    found = ["rollout", "--checkpoint", str(model), "--input", section.queries]
    found += ["--chat"] if section.chat else []
    found += ["--reward", *section.rewards]
    if section.reward_weights:
        found += ["--reward-weights", *map(str, section.reward_weights)]
    found += ["--on-reward-failure", section.on_reward_failure, "--reward-seconds", str(section.reward_seconds)]
    return [*found, "--max-new-tokens", str(section.max_new_tokens), "--batch-size", str(section.batch_size)]
