"""Generated documents of the passkey task: their wording, their lengths and depths, and how they are prepared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_moe.config import load_config
from qwen_moe.data.content import document_lengths
from qwen_moe.data.corpus import ReadCounts, Reading, read_documents
from qwen_moe.data.inputs import check_longest
from qwen_moe.data.output import OtherDataThere
from qwen_moe.data.passkey import passkey_bytes
from qwen_moe.data.sources import find_corpus
from qwen_moe.data.tokenizer import load_tokenizer
from qwen_moe.errors import UserError
from tests.data.preparation import contents, prepare

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "passkey_demo.yaml"
NAME = "passkey:400:3000"
# As github.com/epfml/landmark-attention writes it, but that noise ends where a sentence ends, and questions are repeated.
DOCUMENT = re.compile(
    r"There is an important info hidden inside a lot of irrelevant text\. Find it and memorize them\. I will quiz you "
    r"about the important information there\.\n"
    r"(?P<before>.*)\n"
    r"The pass key is (?P<key>[1-9]\d{4})\. Remember it\. (?P=key) is the pass key\.\n"
    r"(?P<after>.*)\n"
    r"What is the pass key\? The pass key is (?P=key)\."
    r"(?P<again>(\n.*\nWhat is the pass key\? The pass key is (?P=key)\.)*)"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 100


def documents(name: str = NAME, **reading: str) -> list[str]:
    (source,) = find_corpus([name]).sources
    counts = ReadCounts()
    found = list(read_documents(source, counts, Reading(**reading)))  # type: ignore[arg-type]
    assert counts.bytes == source.bytes and counts.digests == [source.sha256()]
    return found


def test_every_document_is_worded_as_the_task() -> None:
    found = [DOCUMENT.fullmatch(text) for text in documents()]
    assert len(found) == 400 and all(found)
    for match in found:
        assert match is not None
        for noise in (match["before"], match["after"], *match["again"].split("\n")[1::2]):
            assert GARBAGE.startswith(noise) and (not noise or noise.endswith("."))
    assert len({match["key"] for match in found if match}) > 390


def test_lengths_distances_and_numbers_of_questions_are_spread() -> None:
    texts = documents()
    lengths = sorted(map(len, texts))
    assert 2700 < lengths[-1] <= 3000 and lengths[0] < 300
    assert 500 < lengths[200] < 1500
    matches = [match for text in texts if (match := DOCUMENT.fullmatch(text))]
    for part in ("before", "after"):
        of_noise = [len(match[part]) for match in matches]
        assert min(of_noise) == 0 and sum(length > 1000 for length in of_noise) > 10 and max(of_noise) > 1500
    alone = sum(not match["again"] for match in matches)
    assert 80 < alone < 250


def test_a_name_gives_the_same_documents_in_every_process() -> None:
    script = (
        f"from qwen_moe.data.passkey import passkey_bytes; import sys; sys.stdout.buffer.write(passkey_bytes({NAME!r}))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT).stdout
    assert other == passkey_bytes(NAME)
    assert passkey_bytes("passkey:400:3001") != passkey_bytes(NAME)


def test_the_key_of_the_text_in_jsonl_is_of_no_concern() -> None:
    assert documents(text_key="body") == documents()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("passkey:", "passkey:DOCUMENTS:LONGEST"),
        ("passkey:400", "passkey:DOCUMENTS:LONGEST"),
        ("passkey:400:-3000", "passkey:DOCUMENTS:LONGEST"),
        ("passkey:400:3e3", "passkey:DOCUMENTS:LONGEST"),
        ("passkey:400:3000:7", "passkey:DOCUMENTS:LONGEST"),
        ("passkey:0:3000", "0 documents"),
        ("passkey:400:300", "600 to 1,000,000"),
        ("passkey:400:1000001", "600 to 1,000,000"),
        ("passkey:2000000:1000", "2,000,000,000 characters"),
    ],
)
def test_what_is_asked_for_must_be_possible(name: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        find_corpus([name])
    assert name in str(error.value) and part in str(error.value)


def test_prepared_once(tmp_path: Path) -> None:
    prefix = tmp_path / "passkey"
    manifest, done = prepare([NAME], prefix, vocab_size=400)
    assert done and manifest.documents == 400
    before = contents(prefix)
    assert prepare([NAME], prefix, vocab_size=400)[1] is False and contents(prefix) == before
    with pytest.raises(OtherDataThere):
        prepare(["passkey:400:3001"], prefix, vocab_size=400)


def test_the_recipe_reads_words_and_digits_as_single_tokens(tmp_path: Path) -> None:
    config = load_config(RECIPE)
    wanted = config.data.prepare
    assert wanted is not None
    (name,) = wanted.input
    longest = int(name.split(":")[2])
    prepare([f"passkey:1000:{longest}"], tmp_path / "p", vocab_size=wanted.vocab_size)
    tokenizer = load_tokenizer(tmp_path / "p-tokenizer")
    assert tokenizer.encode("The pass key is 40917.").tokens[4:] == ["Ġ", "4", "0", "9", "1", "7", "."]
    noise = GARBAGE[: len(GARBAGE) // 100]
    assert len(tokenizer.encode(noise.strip()).ids) == len(re.findall(r"\w+|\.", noise))
    # The longest document has nearly as many tokens as the model has positions: all distances are trained.
    tokens = int(document_lengths(tmp_path / "p").max())
    assert 0.9 * config.model.max_position_embeddings < tokens <= config.model.max_position_embeddings


def test_sequences_may_be_longer_than_the_model_reaches_if_no_document_is(tmp_path: Path) -> None:
    prepare(["passkey:50:3000"], tmp_path / "p", vocab_size=380)
    longest = int(document_lengths(tmp_path / "p").max())
    overrides = [f"data.prepare.output={tmp_path / 'p'}", "data.sequence_length=4096"]
    check_longest(load_config(RECIPE, [*overrides, f"model.max_position_embeddings={longest}"]))
    with pytest.raises(
        UserError, match=f"a document of {longest} tokens, more than the {longest - 1} that model.max_pos"
    ):
        check_longest(load_config(RECIPE, [*overrides, f"model.max_position_embeddings={longest - 1}"]))
    with pytest.raises(UserError, match=r"data\.sequence_length 4096 is larger than .*respect_document_boundaries"):
        load_config(RECIPE, [*overrides, "data.respect_document_boundaries=false"])
