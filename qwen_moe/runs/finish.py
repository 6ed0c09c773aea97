"""Work after the last step: pictures, a Hugging Face directory, and text that transformers samples from it."""

import sys
from pathlib import Path
from typing import Any

from launchers.folder.atomic import write_text
from launchers.folder.run_folder import CHECKPOINTS
from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.config import RunConfig
from qwen_moe.runs.report import as_text, draw_if_possible, summarize

SAMPLE = "sample.txt"
HF = "hf"


def finish_run(config: RunConfig) -> dict[str, Any]:
    """Write the outputs of a finished run and print its summary to stderr. Safe to repeat: an existing export is kept."""
    run_dir = config.run_dir
    facts = summarize(run_dir)
    facts["pictures"] = draw_if_possible(run_dir)
    checkpoint = step_directory(run_dir / CHECKPOINTS, config.train_steps)
    facts["checkpoint"] = str(checkpoint)
    print(as_text(facts), file=sys.stderr)
    print(f"  checkpoint        {checkpoint}", file=sys.stderr)
    if config.checkpoint.export_hf:
        hf_dir = run_dir / HF
        if not hf_dir.exists():
            from qwen_moe.checkpoint.huggingface.convert import convert_to_hf

            convert_to_hf(checkpoint, hf_dir)
        facts["hf_dir"] = str(hf_dir)
        print(f"  Hugging Face      {hf_dir}", file=sys.stderr)
        if config.sample_prompt:
            text = sample_with_transformers(hf_dir, config.sample_prompt, config.seed)
            write_text(run_dir / SAMPLE, text)
            facts["sample"] = text
            print(f"\ntext sampled by transformers from {hf_dir} ({run_dir / SAMPLE}):\n\n{text}\n", file=sys.stderr)
    return facts


def sample_with_transformers(hf_dir: Path, prompt: str, seed: int, new_tokens: int = 160) -> str:
    """Text that `transformers` generates from a Hugging Face directory, as an independent check of the export."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, trust_remote_code=False)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=50,  # at a lower temperature, a model that has read little repeats one token
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
