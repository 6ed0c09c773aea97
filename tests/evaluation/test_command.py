"""The verb on a tiny model: what it writes, and one message for what it cannot do."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.checkpoint.fingerprint import fingerprint
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, from_pretrained, save_pretrained
from qwen_moe.cli import main
from qwen_moe.evaluation import command as command_module
from qwen_moe.evaluation.model import CompleterOptions, open_completer
from qwen_moe.evaluation.picture import draw
from qwen_moe.generation.open import HowToRead, Opened, on_one_device
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.text import generate_text
from tests.evaluation.solver import Solver, misses_depths
from tests.models.hf_reference import draw_weights
from tests.small import small_model

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    model = draw_weights(small_model(vocab_size=2800, max_position_embeddings=4096), 3, torch.float32)
    save_pretrained(model, path, tokenizer=tokenizer)
    return path


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Callable[..., Solver]:
    """Let the verb ask a `Solver` instead of the checkpoint."""

    def replace(**changes: Any) -> Solver:
        solver = Solver(tokenizer, **changes)
        monkeypatch.setattr(command_module, "_completer", lambda args: solver)
        return solver

    return replace


def test_passkey_of_a_checkpoint(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With our own format, in the default folder; the model knows nothing, so its score is 0."""
    convert_from_hf(hf, tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", "passkey", "--checkpoint", "ours", "--lengths", "200,120", "--depths", "2", "--json"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    results = json.loads(said)
    out = tmp_path / "evaluation" / "passkey-ours"
    assert results == json.loads((out / "results.json").read_text())
    assert [cell["length"] for cell in results["by_length"]] == [120, 200]
    assert results["asked"]["context_extension"] == "auto" and results["asked"]["digits"] == 5
    assert (out / "heatmap.png").read_bytes()[:4] == PNG
    assert {path.name for path in out.iterdir()} == {"settings.json", "answers-0.jsonl", "results.json", "heatmap.png"}
    (out / "heatmap.png").unlink()
    assert main(arguments) == 0 and capsys.readouterr().out == said and (out / "heatmap.png").is_file()


def test_completions_are_those_of_generate(hf: Path, tokenizer: Any) -> None:
    completer = open_completer(hf, CompleterOptions(dtype="fp32"))
    prompts = ["The grass is green.", "One of the special magic numbers"]
    found: dict[int, str] = {}
    encoded = [completer.encode(prompt) for prompt in prompts]
    completer.complete(encoded, 4096, 12, lambda index, tokens: found.update({index: completer.decode(tokens)}))
    greedy = Sampling(max_new_tokens=12, temperature=0)
    assert [found[0], found[1]] == [generate_text(hf, text, greedy, dtype="fp32").completion for text in prompts]
    assert open_completer(hf, CompleterOptions(context_extension="none")).reach == 4096


def test_end_tokens_end_a_completion(hf: Path) -> None:
    completer: Any = open_completer(hf, CompleterOptions(dtype="fp32"))
    prompt = completer.encode("The grass is green.")
    found: list[list[int]] = []
    completer.complete([prompt], 4096, 12, lambda index, tokens: found.append(tokens))
    completer._opened.end_tokens = [found[0][5]]
    completer.complete([prompt], 4096, 12, lambda index, tokens: found.append(tokens))
    assert found[1] == found[0][: found[0].index(found[0][5])]


def test_a_model_is_known_by_its_weights(hf: Path, tmp_path: Path) -> None:
    model = from_pretrained(hf)
    tokenizer = open_completer(hf, CompleterOptions())._opened.tokenizer  # type: ignore[attr-defined]
    save_pretrained(model, tmp_path / "same", tokenizer=tokenizer)
    assert fingerprint(tmp_path / "same") == fingerprint(hf)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_pretrained(model, tmp_path / "other", tokenizer=tokenizer)
    assert fingerprint(tmp_path / "other") != fingerprint(hf)


def test_ruler_prints_a_table(
    solved: Callable[..., Solver], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solved()
    out = tmp_path / "out"
    essay = tmp_path / "essay.txt"
    essay.write_text("The sea was calm. We rowed on! " * 40)
    arguments = ["evaluate", "ruler", "--checkpoint", "any", "--lengths", "400,800", "--samples", "2", "--output", str(out),
                 "--essay", str(essay)]  # fmt: skip
    assert main([*arguments, "--tasks", "niah_multivalue,niah_single_2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "ruler: scores in percent (RULER's), 2 prompts for each cell"
    assert [line.split() for line in said[1:5]] == [
        ["tokens", "400", "800"], ["niah_single_2", "100.0", "100.0"], ["niah_multivalue", "100.0", "100.0"],
        ["mean", "100.0", "100.0"],
    ]  # fmt: skip
    assert said[5] == f"written: {out / 'results.json'}, {out / 'heatmap.png'}"
    settings = json.loads((out / "settings.json").read_text())
    assert settings["essay"] == "essay.txt" and settings["tasks"] == ["niah_single_2", "niah_multivalue"]
    essay.write_text("The sea was rough. " * 40)
    assert main([*arguments, "--tasks", "niah_multivalue,niah_single_2"]) == 2
    assert "holds the answers to another evaluation (essay_sha256:" in capsys.readouterr().err


def test_shards_of_the_verb(solved: Callable[..., Solver], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver = solved(misses=misses_depths(0, 0.3))
    arguments = [
        "evaluate",
        "passkey",
        "--checkpoint",
        "any",
        "--lengths",
        "200",
        "--depths",
        "5",
        "--output",
        str(tmp_path),
    ]
    assert main([*arguments, "--shard", "1/2"]) == 0
    assert capsys.readouterr().out == f"shard 1 of 2 is done; the last to end writes {tmp_path / 'results.json'}\n"
    assert solver.count == 2 and main([*arguments, "--shard", "0/2"]) == 0
    assert "depth 100%   100.0" in capsys.readouterr().out and solver.count == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("passkey --lengths 1e2,abc", "'abc': expected a whole number, 1 or more"),
        ("passkey --lengths 0", "'0': expected a whole number, 1 or more"),
        ("passkey --lengths 200,200", "a length is given twice"),
        ("passkey --lengths 200 --depths 0", "'0': expected a whole number, 1 or more and at most 1,000"),
        ("passkey --lengths 200 --digits 0", "'0': expected a whole number, 1 or more"),
        ("passkey --lengths 30", "--lengths 30 is too short, in this tokenizer's tokens, for passkey (at least"),
        (
            "passkey --lengths 4097 --context-extension none",
            "--lengths 4097 is beyond the model's reach of 4096 tokens",
        ),
        (
            "passkey --lengths 200,5000 --chunk-size 4097",
            "--chunk-size 4097: give 2 to 4096, the length that the model",
        ),
        ("passkey --lengths 200 --shard 2/2", "the index counts from 0 and must be less than 2"),
        ("passkey --lengths 200 --shard 2", "expected INDEX/COUNT, such as 0/4"),
        ("passkey --lengths 200 --checkpoint nowhere", "nowhere does not exist: give a checkpoint"),
        ("ruler --lengths 4000 --tasks niah_single_4", "'niah_single_4' is no task of RULER: did you mean niah_single"),
        ("ruler --lengths 4000 --tasks qa_2", "task qa_2 needs a file: give --hotpot FILE"),
        (
            "ruler --lengths 4000 --squad nothing.json",
            "--squad nothing.json does not exist: give SQuAD's dev-v2.0.json",
        ),
        ("ruler --lengths 4000 --essay nothing.txt", "--essay nothing.txt does not exist: give a text file"),
        ("ruler --lengths 300", "--lengths 300 is too short, in this tokenizer's tokens, for niah_single_3 (at least"),
        ("books --lengths 300", "invalid choice: 'books'"),
    ],
)
def test_bad_input(
    arguments: str, message: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    verb, *rest = arguments.split()
    assert main(["evaluate", verb, "--checkpoint", str(hf), *rest]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(from_pretrained(hf), tmp_path / "bare")
    assert main(["evaluate", "passkey", "--checkpoint", str(tmp_path / "bare"), "--lengths", "300"]) == 2
    assert "bare has no tokenizer (no tokenizer.json or vocab.json)" in capsys.readouterr().err


@pytest.mark.parametrize("extension", ["auto", "dca", "yarn", "plain"])
def test_lengths_beyond_the_models_reach(extension: str, hf: Path) -> None:
    completer = open_completer(hf, CompleterOptions(context_extension=extension, attention="sparse"))
    answers: dict[int, list[int]] = {}
    completer.complete([[1] * 100, [2] * 4200], 4203, 3, answers.__setitem__)
    assert answers.keys() == {0, 1} and all(len(tokens) <= 3 for tokens in answers.values())
    assert completer.reach is None and completer.reading() == {}  # too short to leave keys out


@pytest.mark.parametrize("extension", ["auto", "dca"])
def test_chunks_of_another_size_are_for_lengths_that_need_them(extension: str, hf: Path) -> None:
    """A shorter length of the same evaluation is read as without the option."""
    found: dict[tuple[int | None, int], list[int]] = {}
    prompt = [1 + i % 50 for i in range(100)]
    for chunk in (None, 64):
        options = CompleterOptions(context_extension=extension, chunk_size=chunk, dtype="fp64")
        completer = open_completer(hf, options)
        for length in (4096, 4097):
            completer.complete([prompt], length, 20, lambda _, new, at=(chunk, length): found.update({at: new}))
    assert found[64, 4096] == found[None, 4096] != found[64, 4097]


@pytest.mark.parametrize("extension", ["auto", "yarn", "plain"])
def test_the_other_prompts_do_not_decide_how_one_is_read(extension: str, hf: Path) -> None:
    """Two prompts of one --lengths, of which one alone is beyond the model's reach: a call may hold either or both, as
    shards and stops decide."""
    completer = open_completer(hf, CompleterOptions(context_extension=extension, dtype="fp64"))
    prompts = [[1 + i % 50 for i in range(count)] for count in (4080, 4100)]

    def answers(some: list[list[int]]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        completer.complete(some, 4110, 9, found.__setitem__)
        return [found[i] for i in range(len(some))]

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_the_share_of_attention_to_keep_is_part_of_the_question(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate",
        "passkey",
        "--checkpoint",
        str(hf),
        "--lengths",
        "500",
        "--depths",
        "1",
        "--kept-share",
        "0.5",
    ]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--kept-share 0.5 is for sparse attention: add --attention sparse" in capsys.readouterr().err
    assert main([*command, "--attention", "sparse"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["asked"]["kept_share"] == 0.5
    how = HowToRead(attention="sparse", kept_share=0.5)
    engine = Opened(hf).engine(how, 10, on_one_device("fp32", "cpu"))
    assert engine._sparse is not None and engine._sparse.settings.kept_share == 0.5


def test_results_without_a_picture(
    solved: Callable[..., Solver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    solved()
    assert main(["evaluate", "passkey", "--checkpoint", "any", "--lengths", "200", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "no picture: matplotlib is not installed: pip install 'qwen-moe[plot]'" in said.err
    assert "depth 100%   100.0" in said.out and not (tmp_path / "heatmap.png").exists()


def test_the_picture_shows_the_scores(tmp_path: Path) -> None:
    """Its colors: green where all were found, red where none was, at the right places."""
    from matplotlib.image import imread

    scores = [
        {"task": "passkey", "length": length, "depth": depth, "score": 100.0 * (depth == 0), "samples": 1}
        for length in (512, 1024)
        for depth in (0.0, 1.0)
    ]
    picture = imread(draw({"kind": "passkey", "scores": scores}, tmp_path / "heatmap.png"))
    middle = picture[:, picture.shape[1] // 3]
    green = [row for row, (r, g, b, *_) in enumerate(middle) if g > 0.35 > r and b < 0.4]
    red = [row for row, (r, g, b, *_) in enumerate(middle) if r > 0.6 and g < 0.1]
    assert len(green) > 20 and len(red) > 20 and max(green) < min(red)
