"""A run's conversations or pairs: prepared as the recipe asks, opened as rows, and how many steps its epochs take."""

from pathlib import Path
from typing import TYPE_CHECKING

from launchers.counted import counted
from qwen_moe.config import Dataset, RunConfig, stage_runs
from qwen_moe.config.run import NAMES
from qwen_moe.data.chat_rows import Rules
from qwen_moe.data.chat_tokenizer import trained_chat_tokenizer
from qwen_moe.data.manifest import check_prefix_name, read_manifest
from qwen_moe.data.output import OtherDataThere
from qwen_moe.data.prepare_chat import chat_request, prepare_chat
from qwen_moe.data.rows import ExampleSet, Order, open_sets, training_rows
from qwen_moe.errors import UserError, wrong

if TYPE_CHECKING:  # the command asks for the number of steps before it starts the processes that need torch
    from qwen_moe.data.examples import PackedExamples


def prepare_conversations(config: RunConfig) -> None:
    """Prepare the conversations or pairs that `data.prepare` describes, unless they exist. Raises UserError."""
    wanted = config.data.prepare
    assert wanted is not None
    check_prefix_name(wanted.output, "data.prepare.output")
    tokenizer = config.data.tokenizer
    if wanted.train_tokenizer:
        tokenizer = trained_chat_tokenizer(wanted.input, wanted.vocab_size, wanted.output)
    assert tokenizer is not None
    longest = max(run.data.sequence_length for run in stage_runs(config))
    rules = Rules(tokenizer=tokenizer, learn=wanted.learn, length=longest, too_long=wanted.too_long)
    try:
        prepare_chat(chat_request(wanted.input, rules), wanted.output)
    except OtherDataThere:
        raise UserError(
            f"{wanted.output}.bin was prepared from other inputs or with other settings than data.prepare and "
            "data.sequence_length say now: give another data.prepare.output, or restore what it was made from"
        ) from None


def train_sets(datasets: tuple[Dataset, ...]) -> list[ExampleSet]:
    """The sets of a blend. Weights that are all 1 mean that each set is read in passes."""
    weighted = any(one.weight != 1 for one in datasets)
    return [
        ExampleSet(prefix=one.prefix, epochs=one.passes, weight=one.weight if weighted else None) for one in datasets
    ]


def order_of(config: RunConfig) -> Order:
    """How a run's examples become rows; its epochs, or as many as its steps need."""
    training = config.training
    return Order(
        length=config.data.sequence_length,
        seed=config.data.seed,
        epochs=training.epochs,
        least_rows=0 if training.epochs else config.train_steps * training.global_batch_size,
        rows_per_step=training.global_batch_size,
        longer="leave out" if config.data.too_long == "drop" else "error",
    )


def with_epochs(config: RunConfig, datasets: tuple[Dataset, ...]) -> RunConfig:
    """``config`` with the `training.train_tokens` that its epochs take, from the data, which must be there. Raises UserError
    if the recipe gives both and they differ."""
    training = config.training
    if not training.epochs:
        return config
    sets, order = train_sets(datasets), order_of(config)
    opened = open_sets(sets, [], order)
    check_kind(config, [one.prefix for one in sets])
    tokens = len(training_rows(sets, opened, order)) * order.length
    if training.train_tokens not in (0, tokens):
        raise UserError(
            f"training.epochs {training.epochs} of this data take {tokens} tokens with padding, and "
            f"training.train_tokens is {training.train_tokens}: leave one of them out"
        )
    settings = config.model_dump()
    settings["training"]["train_tokens"] = tokens
    try:
        return RunConfig(**settings)
    except ValueError as error:
        text = "; ".join(wrong(item) for item in error.errors())  # type: ignore[attr-defined]
        epochs = counted(training.epochs, "epoch of this data is", "epochs of this data are")
        raise UserError(f"{epochs} {tokens} tokens with padding: {text}") from None


def check_kind(config: RunConfig, prefixes: list[Path]) -> None:
    """Raise UserError if data are not of the kind that the objective reads."""
    wanted = config.objective.reads
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        kind = manifest.kind if manifest is not None else "documents"
        if kind != wanted:
            verb = "data prepare" if wanted == "documents" else "data chat"
            raise UserError(
                f"{prefix} holds {NAMES[kind]}, and objective.kind {config.objective.kind} reads {NAMES[wanted]}: give data "
                f"that `qwen-moe {verb}` made of {NAMES[wanted]}, or another objective"
            )


def open_examples(config: RunConfig, datasets: tuple[Dataset, ...], cache: Path) -> "PackedExamples":
    """The rows of a run. All ranks call it together."""
    from qwen_moe.data.examples import PackedExamples

    validation = [one.prefix for one in config.data.validation]
    sets = train_sets(datasets)
    check_kind(config, [*(one.prefix for one in sets), *validation])
    examples = PackedExamples(
        sets, order_of(config), vocab_size=config.model.vocab_size, cache=cache, validation=validation
    )
    if config.model.criteria:
        examples.judge_by(config.model.criteria)
    return examples


def said(examples: "PackedExamples") -> str:
    """One line about the rows."""
    facts = examples.facts()
    found = counted(facts["examples"], NAMES[examples.kind].removesuffix("s"))
    text = f"{found} in {counted(facts['rows'], 'row')}, {facts['padding']:.1%} padding"
    return text + (f"; {counted(facts['left_out'], 'longer one')} left out" if facts["left_out"] else "")
