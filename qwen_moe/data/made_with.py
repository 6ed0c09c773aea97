"""Checks that all of a run's data were made with one tokenizer, the one that the run uses, and compares it with another."""

from collections.abc import Sequence
from pathlib import Path

from qwen_moe.config import Dataset
from qwen_moe.data.manifest import PreparedData, read_manifest
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash, tokenizer_identities, tokenizer_identity
from qwen_moe.errors import UserError


def check_tokenizers(directory: Path | None, datasets: Sequence[Dataset]) -> None:
    """Raises UserError if a dataset was not made with the tokenizer in ``directory`` or, without ``directory``, if two
    datasets were made with different tokenizers. Data without a manifest are not checked."""
    made = [(d.prefix, found) for d in datasets if (found := read_manifest(d.prefix)) is not None]
    if directory is not None:
        # Read the tokenizer once, and only if the files differ, because a large one takes a second.
        identities: tuple[str, ...] = ()
        for prefix, manifest in made:
            if tokenizer_hash(directory) == manifest.tokenizer_sha256:
                continue
            identities = identities or tokenizer_identities(load_tokenizer(directory))
            if _identity(manifest) not in identities:
                raise UserError(
                    f"{prefix} was made with tokenizer {manifest.tokenizer} ({manifest.tokenizer_sha256[:12]}), but the "
                    f"recipe's tokenizer is {directory} ({tokenizer_hash(directory)[:12]}): its token ids mean other text. "
                    "Name the tokenizer that made the data, or prepare the data with this one"
                )
    for prefix, manifest in made[1:]:
        first_prefix, first = made[0]
        same_file = manifest.tokenizer_sha256 == first.tokenizer_sha256
        if not same_file and _identity(manifest) != _identity(first):
            raise UserError(
                f"{first_prefix} was made with tokenizer {first.tokenizer} ({first.tokenizer_sha256[:12]}), but {prefix} "
                f"with {manifest.tokenizer} ({manifest.tokenizer_sha256[:12]}): one token id would mean two things. "
                "Prepare them with one tokenizer"
            )


def ids_with_other_text(mine: Path, others: Path) -> tuple[int, int]:
    """(how many token ids mean other text in the tokenizer ``others`` than in ``mine``, how many ids both have)."""
    if tokenizer_hash(mine) == tokenizer_hash(others):
        return 0, 0
    first, second = (
        {number: token for token, number in load_tokenizer(one).get_vocab(with_added_tokens=True).items()}
        for one in (mine, others)
    )
    shared = first.keys() & second.keys()
    return sum(first[number] != second[number] for number in shared), len(shared)


def _identity(manifest: PreparedData) -> str:
    """The identity of the tokenizer that a manifest names. Manifests of earlier versions lack it: then it is computed from
    the tokenizer if that still exists, and otherwise its file hash stands for it."""
    if manifest.tokenizer_identity:
        return manifest.tokenizer_identity
    directory = Path(manifest.tokenizer)
    if (directory / "tokenizer.json").is_file() and tokenizer_hash(directory) == manifest.tokenizer_sha256:
        return tokenizer_identity(load_tokenizer(directory))
    return manifest.tokenizer_sha256
