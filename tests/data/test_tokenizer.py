"""The trained tokenizer: Qwen's conventions, lossless, deterministic, readable by transformers."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm

from qwen_moe.data.corpus import ReadCounts, read_documents
from qwen_moe.data.sources import find_corpus
from qwen_moe.data.tokenizer import (
    CONTROL_TOKENS,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from qwen_moe.errors import UserError

SIZE = 1000


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(_texts(), SIZE, path)
    return path


def _texts() -> list[str]:
    sources = find_corpus(["python-stdlib"]).sources[:40]
    return [text for source in sources for text in read_documents(source, ReadCounts())]


def test_training_shows_what_it_has_read_and_what_it_does_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a busy machine a tokenizer for 31 MB takes minutes."""
    monkeypatch.setattr("qwen_moe.data.tokenizer.tqdm", _at_once)
    texts = ["one two three four five " * 50, "six seven eight nine ten " * 50]
    train_tokenizer(texts, 290, tmp_path / "trained")
    shown = capsys.readouterr().err
    assert "tokenizer: 2.45k characters" in shown and "all read; choosing tokens" in shown


def _at_once(**settings: Any) -> Any:
    return tqdm(**settings | {"delay": 0, "mininterval": 0})


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def test_control_tokens_have_the_last_ids_in_qwens_order(tokenizer: Tokenizer) -> None:
    assert len(CONTROL_TOKENS) == 22
    assert [tokenizer.token_to_id(t) for t in CONTROL_TOKENS] == list(range(SIZE - 22, SIZE))
    assert vocabulary_size(tokenizer) == SIZE


@given(text=st.text())
def test_decoding_gives_the_text_back(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_a_control_token_written_in_a_corpus_stays_text(tokenizer: Tokenizer) -> None:
    control = {tokenizer.token_to_id(t) for t in CONTROL_TOKENS}
    for token in CONTROL_TOKENS:
        text = f"see {token} and {token}{token}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not control & set(ids), token
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not control & set(tokenizer.encode_batch([text], add_special_tokens=False)[0].ids)


@given(text=st.text(alphabet=st.characters(codec="utf-8", categories=("L", "N", "P", "Z", "Cc")), max_size=60))
def test_words_are_cut_as_transformers_qwen2_cuts_them(text: str, tokenizer: Tokenizer) -> None:
    reference = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    ours = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in ours] == [piece for piece, _ in reference.pre_tokenize_str(text)]


def test_transformers_reads_it_alike(directory: Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "def expert(x):\n    return x + 12345  # déjà vu\n\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
    assert theirs.eos_token == "<|endoftext|>" and theirs.pad_token == "<|endoftext|>" and len(theirs) == SIZE
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "alpha"}]
    marked = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"]) if mask]
    assert theirs.decode(learned) == "alpha<|im_end|>"
    assert theirs(chat)["input_ids"][0] == theirs.convert_tokens_to_ids("<|im_start|>")


def test_the_same_text_gives_the_same_tokenizer(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(_texts(), SIZE, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_impossible_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 278"):
        train_tokenizer(["text"], 277, tmp_path / "t")
    with pytest.raises(UserError, match="at most 10,000,000"):
        train_tokenizer(["text"], 10**12, tmp_path / "t")
    with pytest.raises(UserError, match=r"only 2[78][0-9] tokens, not 5000"):
        train_tokenizer(["aaaa bbbb"], 5000, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_unreadable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist: give a directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)


def saved_with(directory: Path, target: Path, **changes: object) -> Path:
    target.mkdir()
    content = json.loads((directory / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    return target


TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "!",
}


def test_truncation_and_padding_that_are_saved_do_not_count(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = load_tokenizer(saved_with(directory, tmp_path / "t", truncation=TRUNCATION, padding=PADDING))
    for text in ("a word", "many different words " * 50):
        assert other.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False).ids
        assert (
            other.encode_batch([text, "x"], add_special_tokens=False)[0].ids
            == tokenizer.encode(text, add_special_tokens=False).ids
        )


def test_a_tokenizer_is_known_by_what_it_does(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = saved_with(directory, tmp_path / "same", truncation=TRUNCATION, padding=PADDING)
    assert tokenizer_hash(same) != tokenizer_hash(directory)
    assert tokenizer_identity(load_tokenizer(same)) == tokenizer_identity(tokenizer)
    train_tokenizer(
        ["quite another text, in which other words are frequent " * 9, *_texts()[5:30]], SIZE, tmp_path / "o"
    )
    assert tokenizer_identity(load_tokenizer(tmp_path / "o")) != tokenizer_identity(tokenizer)
    other = saved_with(directory, tmp_path / "normal", normalizer=None)
    assert tokenizer_identity(load_tokenizer(other)) != tokenizer_identity(tokenizer)


def test_added_tokens_of_white_space_stay_words(directory: Path, tmp_path: Path) -> None:
    """As GPT-NeoX's vocabulary has them for indentation."""
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.add_tokens([AddedToken("        ", normalized=False), AddedToken("<mine>", normalized=True)])
    (tmp_path / "t").mkdir()
    plain.save(str(tmp_path / "t" / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "t")
    ids = loaded.encode("x        y <mine>", add_special_tokens=False).ids
    assert plain.token_to_id("        ") in ids and plain.token_to_id("<mine>") not in ids


def test_a_copied_tokenizer_has_the_files_of_its_source_alone(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.mkdir()
    (target / "added_tokens.json").write_text("{}")
    (target / "mine.txt").write_text("stays")
    copy_tokenizer(directory, target)
    assert {p.name for p in target.iterdir()} == {"mine.txt", *(p.name for p in directory.iterdir())}
    assert tokenizer_hash(target) == tokenizer_hash(directory)
    copy_tokenizer(target, target)
    assert tokenizer_hash(target) == tokenizer_hash(directory)
