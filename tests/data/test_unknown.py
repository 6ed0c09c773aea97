"""Text that a tokenizer has no tokens for is named, not lost."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qwen_moe.cli import main
from qwen_moe.data.unknown import Unknown

TEXT = ["def f(x):", "  return x + 1", "user assistant question answer"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(kind: str) -> Tokenizer:
    """bytes: as many tutorials train it, with the bytes of its corpus; all_bytes; metaspace: with or without <unk>."""
    metaspace = kind.startswith("metaspace")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace_unk" else None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    special = [*SPECIAL, "<unk>"] if metaspace else SPECIAL
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "all_bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, "\n"], trainer)
    return tokenizer


def written(kind: str, folder: Path) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained(kind), eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize(
    ("kind", "text", "part"),
    [
        ("bytes", "f(你)", "'你'"),
        ("bytes", "e\u0301x", "'é'"),
        ("metaspace", "x é", "'é'"),
        ("metaspace_unk", "x é", "'é' (in 'x é'), in whose place it writes its unknown token '<unk>'"),
        ("all_bytes", "你 é <unk>", ""),
        ("bytes", "return  x\tf", "'\\t'"),
        ("bytes", "return x\n", ""),
        ("metaspace_unk", "return x", ""),
    ],
)
def test_what_is_lost(kind: str, text: str, part: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    problem = Unknown(tokenizer).problem(text, ids)
    assert (part in problem) if part else not problem
    # Independently: whether decoding gives the text back.
    back = tokenizer.decode(ids, skip_special_tokens=False)
    assert (back.strip() == normalizers.NFC().normalize_str(text).strip()) is not bool(part)


@pytest.mark.parametrize("kind", ["bytes", "metaspace_unk"])
def test_text_without_tokens_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was left out, or learned as <unk>, without a word."""
    tokenizer = written(kind, tmp_path)
    corpus, chats = tmp_path / "corpus.jsonl", tmp_path / "chats.jsonl"
    for answer in ("return x", "你 x"):
        corpus.write_text(json.dumps({"text": answer}), encoding="utf-8")
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        chats.write_text(json.dumps({"messages": turns}), encoding="utf-8")
        for verb, given in (("prepare", corpus), ("chat", chats)):
            command = ["data", verb, "--input", str(given), "--tokenizer", str(tokenizer), "--workers", "1"]
            assert main([*command, "--output", str(tmp_path / f"{answer[:1]}-{verb}")]) == (2 if "你" in answer else 0)
            error = capsys.readouterr().err
            assert "你" not in answer or ("has no tokens for" in error and "256 bytes" in error)


def test_a_tokenizer_without_the_end_of_documents_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = trained("all_bytes")
    content = json.loads(tokenizer.to_str().replace("<|endoftext|>", "</s>"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    command = ["data", "prepare", "--input", "missing.txt", "--tokenizer", str(tmp_path / "t"), "--workers", "2"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "has no <|endoftext|> token" in capsys.readouterr().err
