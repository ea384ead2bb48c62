"""Questions about a text and their answers, which the model writes itself with the text in front.

Short questions, each about another place of the text, as self-study has them (arXiv 2506.06266): what compaction can ask
instead of a recitation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..attention.contexts import shared_prefix
from ..attention.probe import base_model, execution_device
from ..chat import ChatCodec
from ..kv_prefix import KVPrefix, evaluating

_REQUEST = "“{passage}”\n\nAsk one short question about this part of the text. Reply with the question only."
# A small model left to itself praises the passage, and one that has to begin with such a word asks.
_OPENINGS = ("What", "Who", "Why", "How", "When", "Where", "Which")
# Tokens of a passage, a question behind its first word, and an answer.
_PASSAGE, _QUESTION, _ANSWER = 40, 20, 32


def ask_and_answer(
    model: nn.Module, processing_class: Any, prefix: KVPrefix, ids: Sequence[int], *, number: int
) -> list[list[int]]:
    """Conversations about a text, both sides decoded greedily in one batch behind the one copy of its prefix.

    Args:
        model: The model, without an active cartridge.
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        prefix: Keys and values of the text.
        ids: The text's token ids, of which passages at equal distances are asked about.
        number: How many conversations to write.

    Returns:
        Their turns as token ids, at most `number`: questions that the chat template would change are left out. Nothing
        where there is no chat template.
    """
    codec = ChatCodec.of(model, processing_class)
    if number == 0 or not codec.has_template:
        return []
    last = max(0, len(ids) - _PASSAGE)
    starts = [last * place // max(1, number - 1) for place in range(number)]
    openings = [_OPENINGS[place % len(_OPENINGS)] for place in range(number)]
    prompts = []
    for start, opening in zip(starts, openings, strict=True):
        passage = codec.decode(ids[start : start + _PASSAGE]).strip()
        request = codec.encode_request([{"role": "user", "content": _REQUEST.format(passage=passage)}])
        prompts.append([*request, *codec.tokenizer(opening, add_special_tokens=False)["input_ids"]])
    asked = _continue(model, codec, prefix, prompts, _QUESTION)
    questions = [_first_question(f"{opening} {rest}") for opening, rest in zip(openings, asked, strict=True)]
    answers = _continue(model, codec, prefix, [codec.encode_prompt([question]) for question in questions], _ANSWER)
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            exchange = codec.encode_exchange(question, answer)
        except ValueError:
            continue
        rows.append([*exchange[0], *codec.without_end(exchange[1])])
    return rows


def _first_question(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line.split("?")[0].strip() + "?"


@torch.no_grad()
def _continue(
    model: Any, codec: ChatCodec, prefix: KVPrefix, prompts: Sequence[Sequence[int]], length: int
) -> list[str]:
    """What the model writes behind each prompt, up to `length` tokens."""
    width, pad = max(map(len, prompts)), codec.tokenizer.pad_token_id or 0
    device = execution_device(base_model(model).get_input_embeddings())
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    with evaluating(model), shared_prefix(model, prefix):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=length,
            pad_token_id=pad,
            eos_token_id=sorted(codec.end_ids) or None,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
        )
    return [codec.read(row[width:].tolist()).strip() for row in output]
