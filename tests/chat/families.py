"""Chat templates that behave like those of well-known models, and what such a model is like.

They are written for these tests: short, but with what matters of the originals (who opens a thought, what happens to
thoughts of earlier answers, what ends a turn, where a system message goes).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.chat_templates import CHAT_TEMPLATES, byte_level

_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = none, messages %}{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}"
    + _SYSTEM
    + "<|start|>system<|sep|>\n\nKnowledge until: 2023\n\n{{ system | trim if system else '' "
    "}}<|eot|>{% for m in rest %}<|start|>{{ m['role'] }}<|sep|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)


def _chatml(answer: str, generation: str, default: str = "") -> str:
    """ChatML with an answer (`text`, and whether it is the last: `last`) and a generation prompt of its own."""
    front = f"<|im_start|>system\n{default}<|im_end|>\n" if default else ""
    return (
        "{% set n = namespace(asked=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set n.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% if n.asked < 0 %}{{ raise_exception('nobody asks') }}{% endif %}"
        "{% if messages[0]['role'] != 'system' %}" + front + "{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% set parts = m['content'].split('</think>') %}{% set text = parts[-1].lstrip('\n') %}"
        "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
        "{% set last = loop.index0 > n.asked %}" + answer + "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + generation + "{% endif %}"
    )


_EMPTY = "<think>\n\n</think>\n\n"
_LAST_KEEPS = "{% if last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
_IF_OFF = "{% if enable_thinking is defined and enable_thinking is false %}" + _EMPTY
_SMOLLM_3 = (
    "{% set on = enable_thinking | default(true) %}" + _SYSTEM + "<|im_start|>system\nMode: {{ '/think' if on else "
    "'/no_think' }}\n\n{{ system if system else 'Be kind.' }}<|im_end|>\n{% for m in rest %}<|im_start|>{{ m['role'] }}\n"
    "{{ '' if on or m['role'] == 'user' else '" + _EMPTY.replace("\n", "\\n") + "' }}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if on else '"
    + _EMPTY.replace("\n", "\\n") + "' }}{% endif %}"
)  # fmt: skip
_R1 = (
    "{{ bos_token }}" + _SYSTEM + "{{ system if system else '' }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "<|User|>{{ m['content'] }}{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_GEMMA_4 = (
    "{{ bos_token }}" + _SYSTEM + "{% set on = enable_thinking | default(false) %}{% if on or system %}<|turn>system\n"
    "{{ '<|think|>\n' if on else '' }}{{ system | trim if system else '' }}<turn|>\n{% endif %}"
    "{% for m in rest %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'].split('<channel|>')[-1] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{{ '' if on else '<|channel>thought\n<channel|>' }}{% endif %}"
)
_PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
_MISTRAL_SMALL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYS]{{ m['content'] }}[/SYS]"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
_GPT_OSS = (
    _SYSTEM + "<|start|>system<|message|>You are a model.<|end|>{% if system %}<|start|>developer<|message|>"
    "# Instructions\n\n{{ system }}<|end|>{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "<|start|>user<|message|>{{ m['content'] }}<|end|>{% else %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m['content'] }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_GRANITE = (
    _SYSTEM + "<|role|>system<|/role|>{{ system if system else 'You are Granite.' }}"
    "{{ ' Think.' if thinking else '' }}<|text|>\n{% for m in rest %}<|role|>{{ m['role'] }}<|/role|>{{ m['content'] }}"
    "<|text|>\n{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}"
)
_GLM = (  # nothing closes an answer: the model ends it by calling the user
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What models of a family have in common.

    Args:
        template: The chat template.
        special: Its special tokens.
        eos: The tokenizer's `eos_token`.
        ends: What the model's generation configuration names besides.
        sampled_end: What the model ends an answer with.
        prompt: The end of what an answer is sampled behind, where thoughts are skipped.
        thinking: The same where it thinks.
        trained: The end of what a (last) answer is trained behind.
        system: Whether a system message stands in front of all turns.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    sampled_end: str
    prompt: str
    ends: tuple[str, ...] = ()
    thinking: str | None = None
    trained: str | None = None
    system: bool = True
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")

    def tokenizer(self, *, merges: bool) -> Any:
        special = list(dict.fromkeys(["<unk>", "<s>", *self.special, self.eos, *self.ends]))
        backend = byte_level(256 + len(special) + (160 if merges else 0), special)
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=self.eos)
        fast.add_tokens(["<think>", "</think>"])  # as Qwen's: one token, but none that decoding leaves out
        fast.chat_template = self.template
        return fast

    def model(self, tokenizer: Any) -> Any:
        ids = [tokenizer.convert_tokens_to_ids(end) for end in (self.eos, *self.ends)]
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids), config=None)


_IM = ("<|im_start|>", "<|im_end|>")
_ASSISTANT = "<|im_start|>assistant\n"
_TURN = ("<start_of_turn>", "<end_of_turn>")


def _gemma(template: str, *, system: bool) -> Family:
    model = "<start_of_turn>model\n"
    return Family(template, _TURN, "<eos>", "<end_of_turn>", model, ("<end_of_turn>",), system=system)


FAMILIES = {
    "Llama 3": Family(
        _LLAMA_3, ("<|start|>", "<|sep|>", "<|eot|>"), "<|end|>", "<|eot|>", "<|start|>assistant<|sep|>\n\n",
        ("<|eot|>", "<|eom|>"),
    ),
    "Qwen 2.5": Family(_chatml("{{ text }}", "", "Be kind."), _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT, ("<|end|>",)),
    "Qwen 3": Family(
        _chatml(_LAST_KEEPS, _IF_OFF + "{% endif %}"), _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT + _EMPTY,
        ("<|end|>",), _ASSISTANT, _ASSISTANT + _EMPTY,
    ),
    "Qwen 3, always thinking": Family(
        _chatml(_LAST_KEEPS, ""), _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT + _EMPTY, (), _ASSISTANT,
        _ASSISTANT + _EMPTY,
    ),
    "Qwen 3.5": Family(
        _chatml(_LAST_KEEPS, _IF_OFF + "{% else %}<think>\n{% endif %}"), _IM, "<|im_end|>", "<|im_end|>",
        _ASSISTANT + _EMPTY, ("<|end|>",), _ASSISTANT + "<think>\n", _ASSISTANT + _EMPTY,
    ),
    "QwQ": Family(
        _chatml("{{ text }}", "<think>\n"), _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT + _EMPTY, ("<|end|>",),
        _ASSISTANT + "<think>\n", _ASSISTANT,
    ),
    "DeepSeek R1 distill": Family(
        _R1, ("<|User|>", "<|Assistant|>", "<|end|>"), "<|end|>", "<|end|>", "<|Assistant|>" + _EMPTY, (),
        "<|Assistant|><think>\n", "<|Assistant|>",
    ),
    "Gemma 2": _gemma(CHAT_TEMPLATES["Gemma 2"], system=False),
    "Gemma 3": _gemma(CHAT_TEMPLATES["Gemma 3"], system=True),
    "Gemma 4": Family(
        _GEMMA_4, ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"), "<eos>", "<turn|>",
        "<|turn>model\n<|channel>thought\n<channel|>", ("<turn|>",), "<|turn>model\n", "<|turn>model\n",
        thought=("<|channel>thought\n", "<channel|>"),
    ),
    "Phi-3": Family(
        _PHI_3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "<|end|>", "<|assistant|>\n",
        ("<|end|>",),
    ),
    "Phi-4": Family(
        _PHI_4, (*_IM, "<|im_sep|>"), "<|endoftext|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>", ("<|im_end|>",)
    ),
    "Mistral 7B": Family(CHAT_TEMPLATES["Mistral v3"], (), "</s>", "</s>", "[/INST]", system=False),
    "Mistral Small": Family(_MISTRAL_SMALL, ("[SYS]", "[/SYS]", "[INST]", "[/INST]"), "</s>", "</s>", "[/INST]"),
    "GPT-OSS": Family(
        _GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), "<|return|>", "<|return|>",
        "<|start|>assistant<|channel|>final<|message|>", ("<|call|>",), "<|start|>assistant",
        "<|start|>assistant<|channel|>final<|message|>",
        thought=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ),
    "Granite": Family(
        _GRANITE, ("<|role|>", "<|/role|>", "<|text|>"), "<|text|>", "<|text|>", "<|role|>assistant<|/role|>"
    ),
    "SmolLM2": Family(CHAT_TEMPLATES["ChatML with a default"], _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT),
    "SmolLM3": Family(
        _SMOLLM_3, _IM, "<|im_end|>", "<|im_end|>", _ASSISTANT + _EMPTY, ("<|end|>",), _ASSISTANT, _ASSISTANT + _EMPTY
    ),
    "GLM": Family(_GLM, ("<|system|>", "<|user|>", "<|assistant|>"), "<|end|>", "<|user|>", "<|assistant|>\n", ("<|user|>",)),
}  # fmt: skip
THINKING = [name for name, family in FAMILIES.items() if family.thinking is not None]
