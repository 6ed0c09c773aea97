"""An upcycled model is trained in a layout, exported, and described."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import qwen_moe
from parallel.data import local
from parallel.mesh import Layout
from qwen_moe.checkpoint.distributed import load_weights
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf
from qwen_moe.checkpoint.manifest import manifest_text, read_manifest
from qwen_moe.checkpoint.resolve import model_config
from qwen_moe.checkpoint.upcycle.convert import Upcycled, upcycle
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings
from qwen_moe.config import RunConfig
from qwen_moe.verify.case import layout_overrides
from qwen_moe.verify.compare import compare_pieces
from qwen_moe.verify.ranks import Report, make_trainer, record_step
from tests.checkpoint.huggingface.directories import convert, files_of, tensors_of
from tests.checkpoint.upcycle.cases import FINE, SAME, SHARED, dense, relative, tensors
from tests.distributed import run_distributed
from tests.models.hf_reference import true_float64
from tests.small import exact_run


def _train_from(config: RunConfig, checkpoint: Path) -> Report:
    trainer, report = make_trainer(config), Report()
    load_weights(checkpoint, trainer.model, config.model)
    trainer.on_gradients = lambda: report.gradients.append(
        [
            (name, trainer.model.range_of(name, p)[0], local(p.grad).detach().clone())
            for name, p in trainer.model.named_parameters()
        ]
    )
    record_step(trainer, report, 0)
    return report


@pytest.mark.parametrize("settings", [FINE, SHARED], ids=["fine_grained", "same_function"])
def test_a_layout_trains_it_as_one_process_does(settings: UpcycleSettings, tmp_path: Path) -> None:
    dense(tmp_path / "dense", initializer_range=0.2)
    found = upcycle(tmp_path / "dense", tmp_path / "moe", settings)
    reports = []
    for layout in (Layout(), Layout(tp=2, ep=2)):
        changes = {"parallel": layout_overrides(layout), "training__train_tokens": 96, "balance__scope": "sequence"}
        config = exact_run(found.model, 12, **changes)
        assert config.model == model_config(tmp_path / "moe"), "the printed section describes the checkpoint"
        reports.append(run_distributed(_train_from, layout.world_size, config, tmp_path / "moe"))
    whole, split = reports[0][0], reports[1]
    assert split[0].figures[0]["loss"] == pytest.approx(whole.figures[0]["loss"], rel=1e-12)
    assert split[0].counts == whole.counts
    wrong: list[str] = []
    difference, name = compare_pieces(
        [report.gradients[0] for report in split], {name: grad for name, _, grad in whole.gradients[0]}, wrong
    )
    assert not wrong and difference < 1e-10, name


@pytest.mark.parametrize(("family", "settings"), [("qwen2", FINE), ("qwen3", replace(SAME, method="fine_grained"))])
def test_its_export_computes_the_same_in_transformers(family: str, settings: UpcycleSettings, tmp_path: Path) -> None:
    dense(tmp_path / "dense", family, tie_word_embeddings=True)
    upcycle(tmp_path / "dense", tmp_path / "moe", settings)
    convert_to_hf(tmp_path / "moe", tmp_path / "hf")
    ids = torch.arange(14).view(2, 7)
    with true_float64():
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf",
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        logits = theirs.eval()(input_ids=ids).logits.detach()
    assert not any(report.values()), report
    assert theirs.config.architectures == [f"{'Qwen2' if family == 'qwen2' else 'Qwen3'}MoeForCausalLM"]
    expected = qwen_moe.from_pretrained(tmp_path / "moe", dtype=None)(ids).detach()
    assert relative(logits, expected) < 1e-10
    kept = files_of(tmp_path / "hf")
    assert kept["tokenizer.json"] == files_of(tmp_path / "dense")["tokenizer.json"]


def test_the_export_keeps_special_tokens(tmp_path: Path) -> None:
    dense(tmp_path / "dense", dtype=torch.float32)
    config = tmp_path / "dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 7, "custom": 1}))
    upcycle(tmp_path / "dense", tmp_path / "moe", FINE)
    convert_to_hf(tmp_path / "moe", tmp_path / "hf", dtype="bf16")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["eos_token_id"] == 7 and "custom" not in values and values["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "hf").values()} == {torch.bfloat16}
    convert_from_hf(tmp_path / "dense", tmp_path / "checkpoint")
    upcycle(tmp_path / "checkpoint", tmp_path / "from-checkpoint", FINE)
    assert files_of(tmp_path / "from-checkpoint") == files_of(tmp_path / "moe")


def test_the_command_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dense(tmp_path / "dense", tie_word_embeddings=True)
    arguments = ("upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", 6, "--top-k", 2, "--expert-size", 7)
    arguments = (*arguments, "--shared-expert", 24, "--reinitialize", 0.5)
    assert convert(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "nothing was written (--dry-run)" in said and not (tmp_path / "moe").exists()
    assert "6 of 7 in each MoE layer, from 3 copies of the feed-forward (20 indices)" in said
    assert "the last 18 indices are discarded" in said
    assert "3 of 7 indices of each expert, the same in gate, up and down" in said
    assert convert(*arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    after = qwen_moe.from_pretrained(tmp_path / "moe")
    counted = {"before": model, "after": after}
    for when, one in counted.items():
        assert document["parameters"][when]["total"] == sum(p.numel() for p in one.parameters())
    # A token uses the model without the experts that it does not visit: 4 of 6.
    unused = 2 * 4 * 3 * 7 * 16
    assert document["parameters"]["after"]["activated"] == document["parameters"]["after"]["total"] - unused
    assert document["parameters"]["before"]["activated"] == document["parameters"]["before"]["total"]
    assert document["tensors"] == {"unchanged": 20, "cut": 2 * 5, "new": 2 * 2} and document["copies"] == 3
    assert convert("upcycle", tmp_path / "dense", tmp_path / "plain", *map(str, arguments[3:])) == 0
    found = capsys.readouterr().out
    assert said.splitlines()[1:-1] == found.splitlines()[1:-1], "a dry run says what the run says"


def test_a_result_names_what_it_was_made_of(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    found: Upcycled = upcycle(tmp_path / "dense", tmp_path / "moe", FINE)
    facts = json.loads((tmp_path / "moe" / "manifest.json").read_text())
    assert facts["source"] == "upcycled" and facts["upcycling"]["num_experts"] == 6 and found.plan.copies == 3


def test_master_weights_of_a_bf16_run_are_exported_as_bf16(tmp_path: Path) -> None:
    dense(tmp_path / "dense", dtype=torch.float32)
    convert_from_hf(tmp_path / "dense", tmp_path / "run")
    manifest = read_manifest(tmp_path / "run")
    text = manifest_text(manifest["files"], {"compute_dtype": "bf16"})
    (tmp_path / "run" / "manifest.json").write_text(text)
    upcycle(tmp_path / "run", tmp_path / "moe", FINE)
    weights = {name: one for name, one in tensors(tmp_path / "moe").items() if not name.endswith("expert_bias")}
    assert {one.dtype for one in weights.values()} == {torch.float32}
    convert_to_hf(tmp_path / "moe", tmp_path / "hf")
    assert {one.dtype for one in tensors_of(tmp_path / "hf").values()} == {torch.bfloat16}
