"""Blended, shuffled, resumable batches over `.bin/.idx` files, through megatron-core's datasets.

A sample is `sequence_length` tokens and the one that follows. Samples are numbered over the whole run: global batch k
begins with sample k * global_batch_size, whatever the number of ranks, so a resumed run needs only its step.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.sequence import Batch
from qwen_moe.config import DataConfig, Dataset
from qwen_moe.data.content import Content, check_prefix, document_lengths, verify_content
from qwen_moe.data.index_cache import IndexCache
from qwen_moe.data.lengths import ALL, Mix, check_parts, has_validation, long_and_short, long_samples, used_split
from qwen_moe.data.manifest import bin_path, idx_path, read_manifest
from qwen_moe.data.order import begin_alike
from qwen_moe.data.ranks import same_on_all_ranks, verified_on_all_ranks
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.errors import UserError


class _MegatronTokenizer:
    """What megatron-core needs of a tokenizer. It has no padding id, so that no token counts as padding."""

    pad = -1

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.vocab_size = None
        self.unique_identifiers = {"eod": eod}


def describe_prefix(prefix: Path, check: bool = False) -> dict[str, Any]:
    """Documents, tokens and, if there is a manifest, the tokenizer of a prefix. ``check``: hash both files completely."""
    documents, tokens = check_prefix(prefix)
    facts: dict[str, Any] = {"prefix": str(prefix), "documents": documents, "tokens": tokens}
    manifest = read_manifest(prefix)
    if manifest is not None:
        facts |= {"tokenizer": manifest.tokenizer, "vocab_size": manifest.vocab_size, "text_bytes": manifest.text_bytes}
        if manifest.kind != "documents":
            facts |= {"kind": manifest.kind} | manifest.counts
    if check:
        content = verify_content(prefix, whole=True)
        facts |= {"bin_sha256": content.bin_sha256, "idx_sha256": content.idx_sha256}
        facts["checked"] = "as prepared" if manifest is not None else "no manifest to compare with"
    return facts


def _fingerprint_of_earlier_versions(prefix: Path, content: Content) -> str:
    """The manifest's hash of the .bin or, without a manifest, a hash of the .idx and the size of the .bin."""
    if read_manifest(prefix) is not None:
        return content.bin_sha256
    digest = hashlib.sha256(idx_path(prefix).read_bytes())
    digest.update(str(bin_path(prefix).stat().st_size).encode())
    return digest.hexdigest()


class TokenBatches:
    """Training and validation samples of a run.

    All ranks construct it together, after torch.distributed is initialized: rank 0 builds megatron-core's index files in
    ``cache``, the others then read them.
    ``validation_samples`` is cut to one pass over the validation data; 0 where there is none.
    """

    def __init__(
        self,
        config: DataConfig,
        train: Sequence[Dataset],
        *,
        train_samples: int,
        validation_samples: int,
        vocab_size: int,
        end_of_document: int | None,
        cache: Path,
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        if end_of_document is None and (config.respect_document_boundaries or config.mask_end_of_document):
            raise UserError(
                "data.respect_document_boundaries and data.mask_end_of_document need to know the end-of-document token: "
                "give data.tokenizer"
            )
        self.end_of_document = -1 if end_of_document is None else end_of_document
        prefixes = list(dict.fromkeys(d.prefix for d in (*train, *config.validation)))
        self._contents = verified_on_all_ranks(prefixes, vocab_size, cache / "verified.json")
        for prefix in prefixes:
            manifest = read_manifest(prefix)
            if manifest is not None and manifest.kind != "documents":
                raise UserError(
                    f"{prefix} holds {'pairs of answers' if manifest.kind == 'pairs' else 'conversations'}, and reading it "
                    "as text would ignore which of its tokens are learned: give data that `qwen-moe data prepare` made"
                )
        check_parts(config, train)
        self._datasets, self._cache, self._validation_wanted = tuple(train), cache, validation_samples
        self.fingerprint, self._earlier_fingerprint = self._fingerprints(train_samples)
        self.train_tokens = sum(self._contents[d.prefix].tokens for d in train)
        self._train, self._validation = self._open(train_samples)
        self.validation_samples = 0
        if self._validation is not None:
            self.validation_samples = min(validation_samples, self._samples_in_validation())

    def _fingerprint(self, contents: list[str], train: Sequence[Dataset], train_samples: int) -> str:
        """A hash of everything that decides the training samples. Checkpoints hold it, so that resuming on other data is
        refused."""
        config = self.config
        parts: list[Any] = [config.sequence_length, config.seed, config.split, train_samples]
        parts += [config.respect_document_boundaries, config.mask_end_of_document, bool(config.validation)]
        parts += [(content, dataset.weight) for content, dataset in zip(contents, train, strict=True)]
        if not config.validation and used_split(config.split, self._documents) not in (config.split, ALL):
            parts.append("documents of the test are left out")  # earlier versions trained on them
        if config.long_share:
            parts.append(f"long_share {config.long_share!r}")
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _fingerprints(self, train_samples: int) -> tuple[str, str]:
        """The fingerprint of this data in the order for ``train_samples``, and the one that earlier versions computed."""
        train, contents = self._datasets, [self._contents[d.prefix] for d in self._datasets]
        earlier = [_fingerprint_of_earlier_versions(d.prefix, c) for d, c in zip(train, contents, strict=True)]
        return (
            self._fingerprint([c.sha256 for c in contents], train, train_samples),
            self._fingerprint(earlier, train, train_samples),
        )

    def is_of_this_data(self, fingerprint: str, train_samples: int | None = None) -> bool:
        """Whether ``fingerprint`` is that of this data, also as earlier versions computed it. With ``train_samples``: in the
        order for another number of samples."""
        if train_samples is None:
            return fingerprint in (self.fingerprint, self._earlier_fingerprint)
        return fingerprint in self._fingerprints(train_samples)

    def begins_as(self, train_samples: int, samples: int) -> bool:
        """Whether a run of ``train_samples`` reads the same first ``samples``. All ranks must call this."""
        other, _ = self._open(train_samples)
        return same_on_all_ranks(lambda: begin_alike(self._train, other, samples))

    @property
    def _documents(self) -> list[int]:
        return [len(document_lengths(dataset.prefix)) for dataset in self._datasets]

    def _open(self, train_samples: int) -> tuple[Any, Any]:
        """Training and validation datasets, from index arrays that rank 0 makes once."""
        folder = self._cache / self._fingerprints(train_samples)[0][:16]
        index_cache = IndexCache(folder, [content.sha256 for content in self._contents.values()])
        same_on_all_ranks(index_cache.clear_unless_whole)
        built = self._build(self._datasets, train_samples, self._validation_wanted, folder)
        same_on_all_ranks(index_cache.seal)
        return built

    def _build(
        self,
        train: Sequence[Dataset],
        train_samples: int,
        validation_samples: int,
        cache: Path,
    ) -> tuple[Any, Any]:
        from qwen_moe.data.megatron import GPTDataset, LongDocuments, ShortDocuments

        share = self.config.long_share
        if not share:
            built = self._megatron(GPTDataset, train, (train_samples, validation_samples), cache)
            return built[0], built[1] if built[1] is not None and validation_samples else None
        long, short = long_and_short(self.config, train)
        from_long = long_samples(share, train_samples)
        parts = [
            self._megatron(kind, used, (count, None), cache)[0] if count else None
            for kind, used, count in (
                (LongDocuments, long, from_long),
                (ShortDocuments, short, train_samples - from_long),
            )
        ]
        validation = self._megatron(GPTDataset, train, (None, validation_samples), cache)[1]
        return Mix(parts[0], parts[1], share, train_samples), validation if validation_samples else None

    def _megatron(
        self, kind: Any, train: Sequence[Dataset], samples: tuple[int | None, int | None], cache: Path
    ) -> tuple[Any, Any]:
        """megatron-core's datasets for at least so many training and validation samples; None of a part without a number, or
        without data."""
        from qwen_moe.data.megatron import BlendedMegatronDatasetBuilder, GPTDatasetConfig

        config = self.config
        wanted = [count is not None for count in samples]
        if config.validation:
            blends = [_blend(train) if wanted[0] else None, _blend(config.validation) if wanted[1] else None, None]
            where: dict[str, Any] = {"blend_per_split": blends}
        else:
            documents = self._documents
            where = {"blend": _blend(train), "split": used_split(config.split, documents)}
            wanted[1] = wanted[1] and has_validation(config.split, documents)
        settings = GPTDatasetConfig(
            random_seed=config.seed,
            sequence_length=config.sequence_length,
            path_to_cache=str(cache),
            tokenizer=_MegatronTokenizer(self.end_of_document),
            reset_position_ids=config.respect_document_boundaries,
            reset_attention_mask=False,
            eod_mask_loss=config.mask_end_of_document,
            create_attention_mask=False,
            mid_level_dataset_surplus=0.02,
            **where,
        )
        if not config.validation and not all(count is not None for count in samples):
            kept = zip(settings.split_matrix, (*wanted, False), strict=True)
            settings.split_matrix = [part if keep else None for part, keep in kept]
        sizes = [samples[0] or 0, (samples[1] or 0) if wanted[1] else 0, 0]
        try:
            built = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, settings).build()
        except Exception as error:
            # The builder hides an error such as a full disk behind a generic exception.
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise
        return built[0], built[1] if wanted[1] else None

    def _samples_in_validation(self) -> int:
        """Whole samples in one pass over the validation documents."""
        parts = getattr(self._validation, "datasets", [self._validation])
        return sum(part._get_num_tokens_per_epoch() - 1 for part in parts) // self.config.sequence_length

    @property
    def epochs(self) -> float:
        """Number of passes that the run makes over the training files."""
        return len(self._train) * self.config.sequence_length / self.train_tokens

    def train_batch(self, first: int, count: int) -> Batch:
        """``count`` training samples from number ``first`` on, as one micro-batch (see `_collate`)."""
        return self._collate([self._train[index] for index in range(first, first + count)])

    def validation_batch(self, first: int, count: int) -> Batch:
        """Validation samples as one micro-batch. Samples past the last one are padding and masked out."""
        last = self.validation_samples
        batch = self._collate([self._validation[min(index, last - 1)] for index in range(first, first + count)])
        for row, index in enumerate(range(first, first + count)):
            if index >= last:
                batch["labels"][row] = IGNORE
        return batch

    def _collate(self, samples: list[dict[str, Any]]) -> Batch:
        """``input_ids [b, S]`` and ``labels [b, S]`` (the next token, or -100 if masked); with respect_document_boundaries
        also ``position_ids`` (from 0 in each document) and ``document_starts``."""
        tokens = torch.stack([sample["tokens"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        smallest, largest = int(tokens.min().minimum(labels.min())), int(tokens.max().maximum(labels.max()))
        if smallest < 0:
            raise UserError(f"the data holds token id {smallest}: no token id is negative; prepare the data again")
        if largest >= self.vocab_size:
            raise UserError(f"the data holds token id {largest} but model.vocab_size is {self.vocab_size}: raise it")
        counted = torch.stack([sample["loss_mask"] for sample in samples]) > 0
        batch = {"input_ids": tokens, "labels": labels.masked_fill(~counted, IGNORE)}
        if self.config.respect_document_boundaries:
            batch |= documents_of(tokens == self.end_of_document)
        return batch


def _blend(datasets: Sequence[Dataset]) -> tuple[list[str], list[float] | None]:
    # Without a weight, megatron-core reads a single dataset directly instead of as a blend of one.
    weights = [d.weight for d in datasets] if len(datasets) > 1 else None
    return [str(d.prefix.resolve()) for d in datasets], weights
