"""Changed or damaged data are noticed, whatever changed, and equal data are not taken for changed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from qwen_moe.config import Dataset
from qwen_moe.data import content
from qwen_moe.data.content import check_prefix, sample_sha256, sha256, verify_content
from qwen_moe.data.made_with import check_tokenizers
from qwen_moe.data.manifest import bin_path, idx_path, manifest_path, write_manifest
from qwen_moe.data.megatron import IndexedDatasetBuilder
from qwen_moe.data.prepare import Request, prepare
from qwen_moe.data.tokenizer import load_tokenizer, tokenizer_identities, tokenizer_identity, train_tokenizer
from qwen_moe.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["alpha beta gamma delta return import"] * 3, 290, path)
    return path


def prepared(folder: Path, tokenizer: Path) -> Path:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"alpha {n} beta " * (n + 1)}) + "\n" for n in range(20)))
    prepare(Request(inputs=(str(corpus),), tokenizer=tokenizer), folder / "out", workers=1)
    return folder / "out"


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit and nothing else: not the time of change either."""
    status = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_one_bit_anywhere_is_noticed(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path, tokenizer)
    before = verify_content(prefix)
    for path in (bin_path(prefix), idx_path(prefix)):
        size = path.stat().st_size
        for position in range(0, size, max(1, size // 60)):
            flip(path, position, position % 8)
            with pytest.raises(UserError, match=r"out\.(bin|idx)"):
                verify_content(prefix)
            flip(path, position, position % 8)
            assert verify_content(prefix).sha256 == before.sha256


def test_an_index_that_contradicts_itself_is_refused_without_a_manifest(tmp_path: Path, tokenizer: Path) -> None:
    """What other tools made has no hashes; but lengths, pointers, documents and the .bin all say the same."""
    prefix = prepared(tmp_path, tokenizer)
    manifest_path(prefix).unlink()
    documents, tokens = check_prefix(prefix)
    assert documents == 20 and tokens * 2 == bin_path(prefix).stat().st_size
    header = 9 + 8 + 1 + 16
    for position in range(header, idx_path(prefix).stat().st_size):
        flip(idx_path(prefix), position, 3)
        with pytest.raises(UserError, match=r"out\.(bin|idx)"):
            check_prefix(prefix)
        flip(idx_path(prefix), position, 3)
    assert check_prefix(prefix) == (documents, tokens)


def test_without_a_manifest_the_content_still_counts(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path, tokenizer)
    manifest_path(prefix).unlink()
    before = verify_content(prefix).sha256
    flip(bin_path(prefix), 5)
    assert verify_content(prefix).sha256 != before
    flip(bin_path(prefix), 5)
    assert verify_content(prefix).sha256 == before


def test_other_document_ends_over_the_same_tokens_are_other_data(tmp_path: Path) -> None:
    for name, lengths in (("a", (3, 5)), ("b", (5, 3))):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for part in torch.arange(8).split(lengths):
            builder.add_item(part)
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    first, second = verify_content(tmp_path / "a"), verify_content(tmp_path / "b")
    assert first.bin_sha256 == second.bin_sha256 and first.sha256 != second.sha256


def test_the_sample_of_a_large_file_has_its_beginning_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_PIECES", 5)
    monkeypatch.setattr(content, "_PIECE_BYTES", 10)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    before = sample_sha256(path)
    seen = set()
    for position in range(200):
        flip(path, position)
        if sample_sha256(path) != before:
            seen.add(position)
        flip(path, position)
    assert path.read_bytes() == bytes(range(200))
    assert {0, 9, 190, 199} <= seen and 20 not in seen and len(seen) == 50
    path.write_bytes(bytes(range(50)))
    assert sample_sha256(path) == sha256(path)


def test_a_large_file_is_hashed_whole_once(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When prepared, and again where its status is another; its sample at every start; and all of it when asked."""
    prefix, record = prepared(tmp_path, tokenizer), tmp_path / "cache" / "verified.json"
    monkeypatch.setattr(content, "WHOLE_BYTES", 100)
    monkeypatch.setattr(content, "_PIECES", 3)
    monkeypatch.setattr(content, "_PIECE_BYTES", 16)
    manifest = content.read_manifest(prefix)
    assert manifest is not None
    # As a large file's manifest has it: the pieces above are smaller than when it was prepared.
    write_manifest(manifest_path(prefix), replace(manifest, bin_sample_sha256=sample_sha256(bin_path(prefix))))
    hashed: list[Path] = []

    def spy(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr(content, "sha256", spy)
    content._hashed.cache_clear()

    def whole() -> bool:
        hashed.clear()
        content._hashed.cache_clear()
        found = verify_content(prefix, record=record)
        assert found.bin_sha256 == manifest.bin_sha256
        return bin_path(prefix) in hashed

    assert not whole()
    os.utime(bin_path(prefix), ns=(1, 1))
    assert whole() and not whole()
    record.write_text(record.read_text()[:-9])
    assert whole() and not whole()
    flip(bin_path(prefix), bin_path(prefix).stat().st_size - 1)
    with pytest.raises(UserError, match="not what was prepared"):
        verify_content(prefix, record=record)
    flip(bin_path(prefix), bin_path(prefix).stat().st_size - 1)
    # Out of the sample: only a whole check sees what kept its status, and a changed status brings one.
    flip(bin_path(prefix), 30)
    assert not whole()
    with pytest.raises(UserError, match="not what was prepared"):
        verify_content(prefix, record=record, whole=True)
    os.utime(bin_path(prefix), ns=(2, 2))
    with pytest.raises(UserError, match="not what was prepared"):
        verify_content(prefix, record=record)


def test_another_tokenizer_of_the_same_size_is_refused_and_both_are_named(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path, tokenizer)
    other = tmp_path / "other"
    train_tokenizer(["quite different words in another text"] * 3, 290, other)
    check_tokenizers(tokenizer, [Dataset(prefix=prefix)])
    with pytest.raises(UserError) as error:
        check_tokenizers(other, [Dataset(prefix=prefix)])
    assert str(tokenizer) in str(error.value) and str(other) in str(error.value) and str(prefix) in str(error.value)
    (tmp_path / "b").mkdir()
    second = prepared(tmp_path / "b", other)
    with pytest.raises(UserError, match="one token id would mean two things"):
        check_tokenizers(None, [Dataset(prefix=prefix), Dataset(prefix=second)])


def test_a_tokenizer_that_was_saved_anew_is_the_same(tmp_path: Path, tokenizer: Path) -> None:
    """Also for manifests that do not have its identity, as long as the tokenizer is where it was."""
    prefix = prepared(tmp_path, tokenizer)
    (tmp_path / "copy").mkdir()
    saved = json.loads((tokenizer / "tokenizer.json").read_text())
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(saved))
    assert tokenizer_identity(load_tokenizer(tmp_path / "copy")) == tokenizer_identity(load_tokenizer(tokenizer))
    check_tokenizers(tmp_path / "copy", [Dataset(prefix=prefix)])
    manifest = content.read_manifest(prefix)
    assert manifest is not None
    write_manifest(manifest_path(prefix), replace(manifest, tokenizer_identity=""))
    check_tokenizers(tmp_path / "copy", [Dataset(prefix=prefix)])


def test_a_tokenizer_that_transformers_saved_is_the_same(tmp_path: Path, tokenizer: Path) -> None:
    """It writes an empty prefix and suffix of the model's tokens in place of none. Data that were made with its file by a
    version that took this for another tokenizer are accepted."""
    saved = tmp_path / "saved"
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(saved)
    assert json.loads((saved / "tokenizer.json").read_text())["model"]["end_of_word_suffix"] == ""
    assert tokenizer_identity(load_tokenizer(saved)) == tokenizer_identity(load_tokenizer(tokenizer))
    prefix = prepared(tmp_path, tokenizer)
    check_tokenizers(saved, [Dataset(prefix=prefix)])
    manifest = content.read_manifest(prefix)
    assert manifest is not None
    earlier = tokenizer_identities(load_tokenizer(saved))[1]
    write_manifest(
        manifest_path(prefix), replace(manifest, tokenizer_sha256="another file", tokenizer_identity=earlier)
    )
    check_tokenizers(saved, [Dataset(prefix=prefix)])
