"""Whether data were made with the tokenizer that a run uses, and all of a run's data with the same."""

from collections.abc import Sequence
from pathlib import Path

from qwen_moe.config import Dataset
from qwen_moe.data.manifest import PreparedData, read_manifest
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_hash, tokenizer_identity
from qwen_moe.errors import UserError


def check_tokenizers(directory: Path | None, datasets: Sequence[Dataset]) -> None:
    """Raises UserError where the tokenizer in ``directory`` is not what made a dataset, or, without one, where two
    datasets were made with different ones. Data without a manifest are taken as they are."""
    made = [(d.prefix, found) for d in datasets if (found := read_manifest(d.prefix)) is not None]
    if directory is not None:
        # Read once, and only where the files differ: a large one takes a second.
        identity = ""
        for prefix, manifest in made:
            if tokenizer_hash(directory) == manifest.tokenizer_sha256:
                continue
            identity = identity or tokenizer_identity(load_tokenizer(directory))
            if identity != _identity(manifest):
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


def _identity(manifest: PreparedData) -> str:
    """What decides the tokens of the tokenizer behind a manifest. Manifests of earlier versions do not say it: then it is
    read from the tokenizer, where that is still there, and else stands for itself."""
    if manifest.tokenizer_identity:
        return manifest.tokenizer_identity
    directory = Path(manifest.tokenizer)
    if (directory / "tokenizer.json").is_file() and tokenizer_hash(directory) == manifest.tokenizer_sha256:
        return tokenizer_identity(load_tokenizer(directory))
    return manifest.tokenizer_sha256
