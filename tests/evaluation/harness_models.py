"""A small model with a byte-level tokenizer for the tests of lm-evaluation-harness, and tasks with every kind of request."""

import json
from pathlib import Path
from typing import Any

import torch

from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.data.tokenizer import train_tokenizer
from tests.models.hf_reference import draw_weights
from tests.small import small_model

WORDS = "the pass key of a dog and the cat sort reverse abc cab bca question answer is Python returns a list of names"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean}}]
metadata: {{version: 2.5}}
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def model_folder(folder: Path, seed: int = 3, **changes: Any) -> Path:
    """A Hugging Face directory in float32 that reads 48 tokens."""
    train_tokenizer([WORDS] * 3, 300, folder / "tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = CHAT
    # Weights large enough that answers differ.
    config = small_model(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 48, "initializer_range": 0.3} | changes
    )
    save_pretrained(draw_weights(config, seed, torch.float32), folder / "hf", tokenizer=tokenizer)
    return folder / "hf"


def documents() -> list[dict[str, Any]]:
    words = WORDS.split()
    rows = []
    for i in range(14):
        text = " ".join(words[(i * k) % len(words)] for k in range(1, 3 + 3 * (i % 7))) + (" " if i % 5 == 4 else "")
        choices = [words[i], f"{words[i + 2]} {words[i + 3]}", "x", words[(i * 5) % 20] + "!"]
        rows.append({"text": text, "choices": choices, "answer": i % 4})
    # Longer than the model reads: the beginning is cut off.
    rows.append({"text": " ".join(words * 4), "choices": ["the", "dog", "a list of names", "x"], "answer": 1})
    return rows


def write_tasks(folder: Path) -> list[str]:
    """YAML files of three tasks, one of each kind."""
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    names = []
    for name, text in (("own_choice", CHOICE), ("own_text", ROLLING), ("own_answer", GENERATE)):
        path = folder / f"{name}.yaml"
        path.write_text(text.format(name=name, rows=rows))
        names.append(str(path))
    return names
