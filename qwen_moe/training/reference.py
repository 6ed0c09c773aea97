"""The log-probabilities of a run's pairs under the weights that it begins with: computed once, kept in the run folder.

`RUN/reference/` (`reference_2/` for the second of a run's stages, and so on) holds for each data set a file with a value for
each of its tokens (that of the token's label), and reference.json, which is written last: hashes of the files, of the data
and of the weights.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from launchers.folder.atomic import write_json
from parallel.collectives import all_reduce_sum
from parallel.data import local
from parallel.sequence import Batch
from qwen_moe.config import RunConfig
from qwen_moe.data.content import sha256
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.inputs import OrderedInputs
from qwen_moe.data.manifest import read_manifest
from qwen_moe.data.ranks import same_on_all_ranks
from qwen_moe.data.rows import OpenSet, Rows
from qwen_moe.data.samples import rank_samples
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError
from qwen_moe.progress import style
from qwen_moe.sharding.model import ParallelModel
from qwen_moe.training.log_probs import Frozen, label_log_probs
from qwen_moe.training.step import Trainer

Say = Callable[[str], None]
LoadStart = Callable[[RunConfig, ParallelModel, Say], None]
FOLDER, FACTS = "reference", "reference.json"
COLUMN = "reference_log_probs"
LOAD_FROM, REWARD_MODEL, MODELS = "checkpoint.load_from", "rollout.reward_model", "other_models.json"


def provide_reference(
    config: RunConfig, trainer: Trainer, inputs: OrderedInputs, say: Say, load_start: LoadStart | None = None
) -> None:
    """Let the batches of ``inputs`` have the reference that the objective reads, if it reads one. All ranks must call it.

    Without ``load_start`` the run begins, and ``trainer`` has the weights that it begins with. With it the run is resumed: a
    reference that is kept is used, and one that is gone is computed again from those weights, which ``load_start`` loads.
    """
    if COLUMN not in trainer.objective.fields or not isinstance(inputs.batches, PackedExamples):
        return
    if config.checkpoint.load_from is None:
        raise UserError(
            f"objective.kind {config.objective.kind} compares with the model that it begins from: give "
            "checkpoint.load_from, a checkpoint, a run directory or a Hugging Face directory"
        )
    reference = Reference(config, inputs)
    if load_start is not None:
        if reference.found():
            return
        say(f"{reference.folder} is gone, damaged or of other data: it is computed again")
        load_start(config, trainer.model, say)
    weights = weights_hash(trainer)
    keep_or_compare(config, {LOAD_FROM: weights}, begins=load_start is None)
    if not reference.found(weights):
        say("computing the reference: the log-probabilities that the first weights give to the data")
        reference.compute(trainer, weights)


def use_reference(config: RunConfig, inputs: OrderedInputs) -> None:
    """Let the batches of ``inputs`` have the reference that `provide_reference` has provided for the stage ``config``, if
    its objective reads one. All ranks must call it."""
    if config.objective.kind != "dpo" or not isinstance(inputs.batches, PackedExamples):
        return
    reference = Reference(config, inputs)
    if not reference.found():
        raise UserError(
            f"{reference.folder} is gone or damaged since the run began: start it again, and it is computed again"
        )


def keep_or_compare(config: RunConfig, models: Mapping[str, str], begins: bool) -> None:
    """Keep hashes of the models that a run needs beside its own: those of the settings ``models``. Where it does not begin
    but goes on, raise UserError if they are not those that were kept: from here on it would need another model. All ranks
    must call it."""
    path = config.run_dir / MODELS
    given = {LOAD_FROM: config.checkpoint.load_from, REWARD_MODEL: config.rollout and config.rollout.reward_model}

    def run() -> None:
        kept: dict[str, Any] = {}
        if not begins and path.exists():  # a run that began before this was kept has no such file
            where = f"{path} (delete it to go on without comparing)"
            kept = json_object(read_text(path, "the run's", "what the run wrote"), where)
        changed = [f"{name} {given[name]}" for name, found in models.items() if kept.get(name, found) != found]
        if changed:
            raise UserError(
                f"{' and '.join(changed)} is not the model that {config.run_dir} began with, and later steps need the same: "
                "restore it to continue the run, or use another run_dir"
            )
        write_json(path, {**kept, **models})

    same_on_all_ranks(run)


class Reference:
    """The reference of the inputs of one run or stage, whose settings are ``config``. ``folder``: where it is kept."""

    def __init__(self, config: RunConfig, inputs: OrderedInputs) -> None:
        assert isinstance(inputs.batches, PackedExamples)
        number = config.place.index + 1
        self.folder = config.run_dir / (FOLDER if number == 1 else f"{FOLDER}_{number}")
        self._inputs, self._examples = inputs, inputs.batches
        self._sets = list(self._examples.opened.values())

    def found(self, weights: str | None = None) -> bool:
        """Use the reference that is kept, if it is whole and of this data, and with ``weights`` given, of weights with this
        hash. Returns whether it is used. All ranks must call it."""
        if not same_on_all_ranks(lambda: self._is_whole(weights)):
            return False
        self._use()
        return True

    def compute(self, trainer: Trainer, weights: str) -> None:
        """Compute it with the weights of ``trainer``, whose hash is ``weights``, and use it. All ranks must call it."""
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        length = self._inputs.config.data.sequence_length
        engine = trainer.engine_for(length)  # that of the trainer, unless the inputs are those of an earlier stage
        writes = torch.distributed.get_rank() == 0
        arrays: list[np.ndarray] = []
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            arrays = [
                np.memmap(partial / f"{number}.bin", mode="w+", dtype=_dtype(trainer), shape=(len(one.tokens),))
                for number, one in enumerate(self._sets)
            ]
        for rows, ranges, batches in self._missing():
            values = label_log_probs(trainer, batches, Frozen(trainer.model, engine))
            if writes:
                self._store(rows, ranges, values, arrays)
        same_on_all_ranks(lambda: self._finish(partial, arrays, weights))
        self._use()

    def _missing(self) -> Iterator[tuple[Rows, list[list[int]], list[Batch]]]:
        """Steps of training and of validation in which a document occurs for the first time: the rows of each micro-batch of
        every data-parallel rank, and this rank's micro-batches, the same as in training."""
        training, dp = self._inputs.config.training, self._inputs.dp
        met: set[tuple[int, int]] = set()
        examples = self._examples
        sides = [(examples.rows, examples.train_batch, training.global_batch_size)]
        if examples.validation_rows is not None:
            sides.append((examples.validation_rows, examples.validation_batch, training.micro_batch_size * dp.size))
        steps = sum(-(-len(rows) // size) for rows, _, size in sides)
        shown = torch.distributed.get_rank() == 0
        with tqdm(total=steps, desc="reference", unit="step", delay=1.0, disable=not shown, **style()) as bar:
            for rows, batch_of, size in sides:
                for step in range(-(-len(rows) // size)):
                    placed = [one for row in range(step * size, (step + 1) * size) for one in rows.placed(row)]
                    here = {(id(rows.sets[one.dataset]), one.document) for one in placed}
                    if here - met:
                        met |= here
                        ranges = [
                            rank_samples(step, size, training.micro_batch_size, index, dp.size)
                            for index in range(dp.size)
                        ]
                        of_rank = [[first for first, _ in found] for found in ranges]
                        yield rows, of_rank, [batch_of(first, count) for first, count in ranges[dp.index]]
                    bar.update()

    def _store(self, rows: Rows, ranges: list[list[int]], values: list[torch.Tensor], arrays: list[np.ndarray]) -> None:
        """Put log-probabilities ``[dp, b, S]`` of each micro-batch at the places of their tokens."""
        numbers = {id(one): number for number, one in enumerate(self._sets)}
        for index, everywhere in enumerate(values):
            for rank, of_rank in enumerate(everywhere):
                for place, row in enumerate(of_rank):
                    for one in rows.placed(ranges[rank][index] + place):
                        of = rows.sets[one.dataset]
                        arrays[numbers[id(of)]][of.at(one.document)] = row[one.start : one.start + one.length].numpy()

    def _finish(self, partial: Path, arrays: list[np.ndarray], weights: str) -> None:
        files = {}
        for number, array in enumerate(arrays):
            array.flush()  # type: ignore[attr-defined]  # it is a memmap
            files[f"{number}.bin"] = sha256(partial / f"{number}.bin")
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(partial, self.folder)
        facts = {"weights": weights, "data": self._of_data(), "dtype": str(arrays[0].dtype), "files": files}
        write_json(self.folder / FACTS, facts)

    def _of_data(self) -> list[str]:
        return [_content(one) for one in self._sets]

    def _is_whole(self, weights: str | None) -> bool:
        try:
            facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            if facts["data"] != self._of_data() or (weights is not None and facts["weights"] != weights):
                return False
            names = [f"{number}.bin" for number in range(len(self._sets))]
            return facts["files"] == {name: sha256(self.folder / name) for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _use(self) -> None:
        """Let batches have the reference as a field."""
        dtype = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))["dtype"]
        for number, one in enumerate(self._sets):
            one.columns[COLUMN] = np.memmap(self.folder / f"{number}.bin", mode="r", dtype=dtype)


def _dtype(trainer: Trainer) -> type[np.floating]:
    return np.float64 if trainer.config.precision.compute == "fp64" else np.float32


def _content(one: OpenSet) -> str:
    """A hash of a set's tokens and of what is learned of them."""
    manifest = read_manifest(one.prefix)
    assert manifest is not None
    return hashlib.sha256(
        repr([manifest.bin_sha256, manifest.idx_sha256, sorted(manifest.columns.items())]).encode()
    ).hexdigest()


def weights_hash(trainer: Trainer, model: ParallelModel | None = None) -> str:
    """A hash of the weights and of routers' biases, equal in every layout. All ranks must call it. ``model``: of the
    trainer's layout, by default its own."""
    model = trainer.model if model is None else model
    total = torch.zeros(2, dtype=torch.int64, device=trainer.device)
    for part, stage in zip(model.parts, model.stages, strict=True):
        for name, parameter in part.named_parameters():
            if model.counts_in_norm(name, stage):
                total += _number(name) * _bits(local(parameter.detach()))
        if trainer.grids.stage.index == 0:  # every rank of a stage has the same buffers
            for name, buffer in part.named_buffers():
                total += _number(name) * _bits(buffer)
    return "{:016x}{:016x}".format(*(value % 2**64 for value in all_reduce_sum(total, trainer.grids.world).tolist()))


def _number(name: str) -> int:
    """An odd number for a name, by which its sums are multiplied."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") | 1


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Sums of an array's bits, taken as whole numbers, and of their squares, both modulo 2**64: no order of adding changes
    them."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values.contiguous().view(kinds[values.element_size()]).long()
    return torch.stack([bits.sum(), (bits * bits).sum()])
