"""Questions that the model asks and answers itself."""

from __future__ import annotations

import torch

from peft_cartridges import KVPrefix
from peft_cartridges.chat import ChatCodec
from peft_cartridges.initialization.self_questions import _continue, ask_and_answer
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))


@torch.no_grad()
def test_what_is_written_is_what_greedy_decoding_with_the_whole_text_in_context_gives() -> None:
    model, codec = tiny_model(), ChatCodec(None, tiny_tokenizer())
    ids = codec.encode_context(TEXT)
    prompts = [codec.encode_request([{"role": "user", "content": text}]) for text in ("who says w50 ?", "w60")]
    written = _continue(model, codec, KVPrefix.from_input_ids(model, ids), prompts, 6)
    for prompt, text in zip(prompts, written, strict=True):
        row = [*ids, *prompt]
        for _ in range(6):
            following = int(model(torch.tensor([row])).logits[0, -1].argmax())
            if following in codec.end_ids:
                break
            row.append(following)
        assert text == codec.read(row[len(ids) + len(prompt) :]).strip()


def test_each_conversation_is_a_question_of_another_beginning_and_an_answer() -> None:
    model, codec = tiny_model(), ChatCodec(None, tiny_tokenizer())
    ids = codec.encode_context(TEXT)
    prefix = KVPrefix.from_input_ids(model, ids)
    rows = ask_and_answer(model, codec, prefix, ids[1:], number=3)
    assert len(rows) == 3 and all(len(row) > 0 for row in rows)
    assert rows == ask_and_answer(model, codec, prefix, ids[1:], number=3)  # nothing is drawn
    assert ask_and_answer(model, codec, prefix, ids[1:], number=0) == []
    assert len(ask_and_answer(model, codec, prefix, ids[1:4], number=1)) == 1  # shorter than a passage


def test_without_a_chat_template_nothing_is_asked() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = None
    codec = ChatCodec(None, tokenizer)
    ids = list(range(10, 40))
    assert ask_and_answer(model, codec, KVPrefix.from_input_ids(model, ids), ids, number=2) == []
