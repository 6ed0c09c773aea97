"""Chat templates of several shapes, over the special tokens of our tokenizers, with and without the generation marker."""

import re
import shutil
from pathlib import Path

from qwen_moe.data.chat_template import CHAT_TEMPLATE

# A default system prompt, tools, and tool calls: the shape of Qwen2.5's.
_QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You help.' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{%- generation %}{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif message.role == 'user' or not tools %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# A token that begins the text, headers of their own tokens, and trimmed contents: the shape of Llama 3's.
_LLAMA = """{{- '<|endoftext|>' }}{%- for message in messages %}
{{- '<|box_start|>' + message.role + '<|box_end|>\\n\\n' }}
{%- if message.role == 'assistant' %}{%- generation %}{{- (message.content or '') | trim }}
{%- for call in message.tool_calls or [] %}{{- (call.function or call).name + (call | tojson) }}{%- endfor %}
{{- '<|quad_end|>' }}{%- endgeneration %}
{%- else %}{{- message.content | trim + '<|quad_end|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|box_start|>assistant<|box_end|>\\n\\n' }}{%- endif %}"""
# No generation prompt; the answer begins after a space, and only its end is a token: the shape of Llama 2's.
_INST = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- ' ' }}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- '[INST] ' + message.content + ' [/INST]' }}{%- endif %}{%- endfor %}"""
_TURN_END = "{{- '<|im_end|>' }}{%- endgeneration %}"
# Earlier turns lose what they thought: the shape of Qwen3's.
THINKING = """{%- set last = namespace(user=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}
{%- if message.role == 'assistant' and loop.index0 < last.user %}
{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

TEMPLATES = {"ours": CHAT_TEMPLATE, "qwen": _QWEN, "llama": _LLAMA, "inst": _INST}
WITH_SYSTEM = ("ours", "qwen", "llama")
WITH_TOOLS = ("ours", "qwen")
# The marker leaves out the token that ends a turn (TRL #5988: the model never stops).
assert _TURN_END in _QWEN
END_OUTSIDE = _QWEN.replace(_TURN_END, "{%- endgeneration %}{{- '<|im_end|>' }}")


def unmarked(template: str) -> str:
    return re.sub(r"\{%- (end)?generation %\}", "", template)


def with_template(tokenizer: Path, template: str, target: Path) -> Path:
    """A copy of a tokenizer that has this chat template."""
    shutil.copytree(tokenizer, target)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    return target
