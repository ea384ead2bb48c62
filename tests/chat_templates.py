"""Chat templates in the manner of well-known models, and tokenizers of several kinds that know their special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + _CHATML
)
_CHATML_THAT_NEEDS_A_USER = (  # Qwen 3.5
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found') }}{% endif %}" + _CHATML
)
_MERGING_TURNS = (
    "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% set first, rest = '', messages %}" + _MERGING_TURNS
)
_GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first, rest = messages[0]['content'] + '\n\n', messages[1:] %}"
    "{% else %}{% set first, rest = '', messages %}{% endif %}" + _MERGING_TURNS
)
_MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_V3 = (  # the system message stands in the last user message
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system, rest = messages[0]['content'] + '\n\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "[INST] {{ system if loop.last else '' }}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system, rest = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ system if loop.first else '' }}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = (  # marks that are no special tokens
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

CHAT_TEMPLATES = {
    "ChatML": _CHATML,
    "ChatML with a default": _CHATML_WITH_DEFAULT,
    "ChatML that needs a user": _CHATML_THAT_NEEDS_A_USER,
    "Gemma 2": _GEMMA_2,
    "Gemma 3": _GEMMA_3,
    "Mistral v1": _MISTRAL_V1,
    "Mistral v3": _MISTRAL_V3,
    "Llama 2": _LLAMA_2,
    "Zephyr": _ZEPHYR,
}

_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
_TEXTS = [
    "What does the old captain say? Nothing, he said: “aye”. The ship is red and the sea is blue.",
    "[INST] What is the sea? [/INST] user\nWhat is a ship?\n\nA ship is a boat. model\nsystem\nBe kind.",
] * 3


def byte_level(vocabulary: int, special: Sequence[str] = _SPECIAL) -> Tokenizer:
    """As GPT-2's: a space is a part of the word behind it. Without merges every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _sentence_piece(*normalizer: Any) -> Tokenizer:
    """As Llama 2's (with a space that is put in front of every text) and Gemma's (without)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "▁")])
    words, lines = pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, lines])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    )
    return tokenizer


def _with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHAT_TOKENIZERS = {
    "byte-level BPE": _with_special_tokens(byte_level(420)),
    "bytes": _with_special_tokens(byte_level(256 + len(_SPECIAL))),
    "as Gemma's": _with_special_tokens(_sentence_piece()),
    "as Llama 2's": _with_special_tokens(_sentence_piece(normalizers.Prepend("▁"))),
}
