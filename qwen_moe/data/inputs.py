"""A run's data on one rank: prepares it if asked, opens it, checks it against the model, makes micro-batches."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted
from parallel.mesh import Axis
from qwen_moe.config import Dataset, RunConfig, stage_runs
from qwen_moe.config.data import split_weights
from qwen_moe.data.content import document_lengths
from qwen_moe.data.corpus import Reading
from qwen_moe.data.lengths import has_validation, long_and_short
from qwen_moe.data.made_with import check_tokenizers
from qwen_moe.data.manifest import check_prefix_name, trained_tokenizer_path
from qwen_moe.data.output import OtherDataThere
from qwen_moe.data.prepare import Request, prepare
from qwen_moe.data.tokenizer import copy_tokenizer, end_of_document_id, end_with_turn, load_tokenizer, vocabulary_size
from qwen_moe.errors import UserError

if TYPE_CHECKING:  # the command prepares inputs before it starts the processes that need torch
    from parallel.sequence import Batch
    from qwen_moe.data.samples import Ordered, Samples

TOKENIZER = "tokenizer"
CACHE = "data_cache"


def tokenizer_directory(config: RunConfig) -> Path | None:
    """The directory of the run's tokenizer, or None if the recipe names none."""
    if config.data.prepare is not None and config.data.prepare.train_tokenizer:
        return trained_tokenizer_path(config.data.prepare.output)
    return config.data.tokenizer


def train_datasets(config: RunConfig) -> tuple[Dataset, ...]:
    prepared = (Dataset(prefix=config.data.prepare.output),) if config.data.prepare is not None else ()
    return prepared + config.data.train


def prepare_inputs(config: RunConfig) -> None:
    """Prepare the data that `data.prepare` describes, unless they exist, and check the tokenizer against the model."""
    wanted = config.data.prepare
    if wanted is not None:
        _check_room(config)
        if config.objective.reads == "documents":
            _prepare_text(config)
        else:
            from qwen_moe.data.epochs import prepare_conversations

            prepare_conversations(config)
    directory = tokenizer_directory(config)
    for run in stage_runs(config):
        check_tokenizers(directory, [*train_datasets(run), *run.data.all_validation])
        check_mix(run)
        check_longest(run)
    if directory is None:
        if config.sample_prompt:
            raise UserError(
                "sample_prompt is set but the recipe has no tokenizer: give data.tokenizer, or leave it out"
            )
        return
    size = vocabulary_size(load_tokenizer(directory))
    if size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {directory} has {size} tokens but model.vocab_size is {config.model.vocab_size}: raise it to at "
            f"least {size}"
        )


def tell_of_data(config: RunConfig) -> None:
    """Say what is likely to be a mistake in prepared data: those named twice, and validation that is lost."""
    notes = []
    for run in stage_runs(config):
        prefixes = [dataset.prefix for dataset in train_datasets(run)]
        # megatron-core reads both in one order, so each sample would come twice in a row.
        notes += [
            f"data.train names {prefix} twice, so its documents are read twice as often: give it once, with the sum of "
            "the weights, unless you want that"
            for number, prefix in enumerate(prefixes)
            if prefix in prefixes[:number]
        ]
        if run.data.validation or run.objective.reads != "documents" or not split_weights(run.data.split)[1]:
            continue
        counts = ((prefix, len(document_lengths(prefix))) for prefix in prefixes)
        small = next((one for one in counts if not has_validation(run.data.split, [one[1]])), None)
        if small is not None:
            notes.append(
                f"there is no validation: the share that data.split {run.data.split!r} gives it is no document of "
                f"{small[0]}, which has {counted(small[1], 'document')}: give it a larger share, or data.validation"
            )
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)


def _check_room(config: RunConfig) -> None:
    """Raise UserError if the tokenizer that is to be trained has more tokens than the model."""
    wanted = config.data.prepare
    assert wanted is not None
    if wanted.train_tokenizer and wanted.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.prepare.vocab_size {wanted.vocab_size} is larger than model.vocab_size {config.model.vocab_size}: "
            "the model needs a row for every token"
        )


def _prepare_text(config: RunConfig) -> None:
    wanted = config.data.prepare
    assert wanted is not None
    request = Request(
        inputs=wanted.input,
        tokenizer=None if wanted.train_tokenizer else config.data.tokenizer,
        vocab_size=wanted.vocab_size if wanted.train_tokenizer else 0,
        reading=Reading(text_key=wanted.text_key),
    )
    check_prefix_name(wanted.output, "data.prepare.output")
    try:
        prepare(request, wanted.output, without_inputs=True)
    except OtherDataThere:
        raise UserError(
            f"{wanted.output}.bin was prepared from other inputs or with other settings than data.prepare names now: "
            "give another data.prepare.output, or restore what it was made from; `qwen-moe data prepare ... "
            f"--overwrite --output {wanted.output}` replaces it, for all runs that read it"
        ) from None


def check_mix(config: RunConfig) -> None:
    """Raise UserError if the data lack documents that `data.long_share` needs; the message names the stage."""
    if config.data.long_share:
        try:
            long_and_short(config.data, train_datasets(config))
        except UserError as error:
            raise UserError(f"{config.place.label}{error}") from None


def check_longest(config: RunConfig) -> None:
    """Raise UserError if sequences are longer than the model can be trained on and a document in them may be, too."""
    most = config.model.trainable_length
    if config.data.sequence_length <= most:
        return
    for dataset in (*train_datasets(config), *config.data.all_validation):
        longest = int(document_lengths(dataset.prefix).max(initial=0))
        if longest > most:
            of = "max_position_embeddings" if config.model.dual_chunk is None else "dual_chunk"
            raise UserError(
                f"{config.place.label}{dataset.prefix} has a document of {longest:,} tokens, more than the {most:,} that "
                f"model.{of} allows in training, and data.sequence_length {config.data.sequence_length:,} is longer, too: "
                "lower data.sequence_length, or split the document"
            )


def ordered_steps(config: RunConfig, length: int | None = None) -> int:
    """Number of optimizer steps for which the order of samples is drawn: for ``length`` tokens, or as the recipe says."""
    if length is None:
        length = max(config.data.order_tokens, config.training.train_tokens)
    return -(-length // config.tokens_per_step)


@dataclass
class OrderedInputs:
    """What a run reads on this data-parallel rank, and in which order."""

    config: RunConfig
    dp: Axis
    batches: "Ordered"
    tokenizer: Path | None

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def is_of_this_data(self, fingerprint: str) -> bool:
        """True if a checkpoint with this fingerprint was trained on this data in this order."""
        return self.batches.is_of_this_data(fingerprint)

    def length_with(self, fingerprint: str, lengths: Iterable[int]) -> int | None:
        """The first of ``lengths`` (in tokens) whose order of this data has the fingerprint; None if there is none."""
        return next((n for n in lengths if self.batches.is_of_this_data(fingerprint, self._samples(n))), None)

    def begins_as(self, length: int, steps: int) -> bool:
        """Whether the first ``steps`` have the same batches in the order for ``length`` tokens. All ranks must call this."""
        return self.batches.begins_as(self._samples(length), steps * self.config.training.global_batch_size)

    def _samples(self, length: int) -> int:
        return ordered_steps(self.config, length) * self.config.training.global_batch_size

    @property
    def ordered_steps(self) -> int:
        """Number of optimizer steps for which the order of samples is drawn."""
        return ordered_steps(self.config)


@dataclass
class RunInputs(OrderedInputs):
    """This data-parallel rank's micro-batches, by step. Ranks that share its tokens read the same micro-batches."""

    batches: "Samples"

    @property
    def has_validation(self) -> bool:
        return self.batches.validation_samples > 0

    def train_micro_batches(self, step: int) -> "list[Batch]":
        """All micro-batches of this rank in optimizer step ``step``."""
        from qwen_moe.data.samples import rank_samples

        training = self.config.training
        ranges = rank_samples(step, training.global_batch_size, training.micro_batch_size, self.dp.index, self.dp.size)
        return [self.batches.train_batch(first, count) for first, count in ranges]

    def validation_micro_batches(self) -> "list[Batch]":
        """The same number of micro-batches on every rank; padding samples in the last one are masked out."""
        size = self.config.training.micro_batch_size
        stretch = size * self.dp.size
        rounds = -(-self.batches.validation_samples // stretch)
        return [self.batches.validation_batch(r * stretch + self.dp.index * size, size) for r in range(rounds)]


def open_inputs(config: RunConfig, dp: Axis) -> RunInputs:
    """Open the data on every rank. Rank 0 prepares them first if they do not exist."""
    import torch.distributed as dist

    prepared_on_all_ranks(config)
    directory = tokenizer_directory(config)
    kept = None
    if directory is not None:
        kept = config.run_dir / TOKENIZER
        if dist.get_rank() == 0:
            copy_tokenizer(directory, kept)
            if config.objective.reads != "documents":
                from qwen_moe.data.chat import Chat

                end_with_turn(kept, Chat(directory).end)
    return RunInputs(config, dp, _samples(config, directory, config.run_dir / CACHE), kept)


def open_validation_sets(config: RunConfig, dp: Axis) -> dict[str, RunInputs]:
    """The sets of `data.validation_sets` by name, each as if it were the only data. All ranks call it together, after
    `open_inputs`. Raises UserError for a set that is smaller than a sequence."""
    directory = tokenizer_directory(config)
    found = {}
    for name, datasets in config.data.validation_sets.items():
        alone: dict[str, Any] = {"train": datasets, "validation": datasets, "tokenizer": directory}
        alone |= {"validation_sets": {}, "prepare": None, "long_share": 0.0}
        one_step = {"train_tokens": config.tokens_per_step, "epochs": 0}  # nobody trains on them
        run = config.model_copy(
            update={
                "data": config.data.model_copy(update=alone),
                "training": config.training.model_copy(update=one_step),
            }
        )
        samples = _samples(run, directory, config.run_dir / CACHE / f"validation-{name}")
        found[name] = RunInputs(run, dp, samples, directory)
        if not found[name].has_validation:
            raise UserError(
                f"data.validation_sets.{name} has less than one sequence of {config.data.sequence_length:,} tokens: give "
                "more data, or leave it out"
            )
    return found


def prepared_on_all_ranks(config: RunConfig) -> None:
    """`prepare_inputs` on rank 0; its UserError is one on all ranks."""
    from qwen_moe.data.ranks import same_on_all_ranks

    same_on_all_ranks(lambda: prepare_inputs(config))


def _samples(config: RunConfig, tokenizer: Path | None, cache: Path) -> "Samples":
    datasets = train_datasets(config)
    if config.objective.reads != "documents":
        from qwen_moe.data.epochs import open_examples

        return open_examples(config, datasets, cache)
    from qwen_moe.data.batches import TokenBatches

    training = config.training
    return TokenBatches(
        config.data,
        datasets,
        train_samples=ordered_steps(config) * training.global_batch_size,
        validation_samples=training.validation_sequences,
        vocab_size=config.model.vocab_size,
        end_of_document=None if tokenizer is None else end_of_document_id(load_tokenizer(tokenizer), tokenizer),
        cache=cache,
    )


def with_length(config: RunConfig) -> RunConfig:
    """``config`` with the tokens that its epochs take. The data must be prepared."""
    if not config.training.epochs:
        return config
    from qwen_moe.data.epochs import with_epochs

    return with_epochs(config, train_datasets(config))
