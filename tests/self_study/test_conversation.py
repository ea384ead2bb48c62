"""Token-exact conversations: what the chat template renders, with the answers' ids as they were generated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_cartridges.chat import ChatCodec
from peft_cartridges.self_study import SelfStudySynthesizer, SynthesisConfig
from peft_cartridges.self_study.backends.base import Generation
from peft_cartridges.self_study.chunking import Chunk
from peft_cartridges.self_study.conversation import Conversation, Turn
from peft_cartridges.self_study.dialogue import Dialogue, Plan, plan_dialogues
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

SMOLLM2 = Path(".models/SmolLM2-135M-Instruct")

_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# No system role: the text goes into the first user message. The end of turn is followed by nothing.
_INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)


def _trained(model: Any, trainer: Any, template: str, eos: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([runs.TEXT, "What does the old captain say? Nothing, he said: “aye”."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def _byte_level(template: str, eos: str, *, merges: bool = True) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    size = 400 if merges else 256 + len(special)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    return _trained(models.BPE(), trainer, template, eos)


TOKENIZERS: dict[str, Any] = {
    "byte-level BPE, ChatML": _byte_level(_CHATML, "<|im_end|>"),
    "bytes, no system role": _byte_level(_INSTRUCT, "</s>", merges=False),
    "whole words": tiny_tokenizer(),
}
if SMOLLM2.is_dir():
    TOKENIZERS["SmolLM2"] = AutoTokenizer.from_pretrained(SMOLLM2)
# Ids of all tokens but the special ones.
ORDINARY = {name: sorted(set(range(len(one))) - set(one.all_special_ids)) for name, one in TOKENIZERS.items()}


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not in .models/ (make model)")
def test_a_real_tokenizer_is_among_them() -> None:
    assert "SmolLM2" in TOKENIZERS


def _conversation(tokenizer: Any, questions: list[str], answers: list[list[int]]) -> Conversation:
    exchanges = ChatCodec(None, tokenizer).encode_dialogue(questions, answers)
    return Conversation("c", "question", [Turn(q, *exchange) for q, exchange in zip(questions, exchanges, strict=True)])


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rounds=st.integers(1, 3))
def test_ids_are_what_was_generated_and_read_as_the_chat_template_renders(
    name: str, data: st.DataObject, rounds: int
) -> None:
    tokenizer = TOKENIZERS[name]
    ordinary = ORDINARY[name]
    words = st.sampled_from(["the", "captain", "says", "what", "is", "a", "ship", "?", "“aye”", "é", "海"])
    questions = [" ".join(data.draw(st.lists(words, min_size=1, max_size=6))) for _ in range(rounds)]
    # Any ids, also ones that an encoder would never give for their text.
    answers = [
        [*data.draw(st.lists(st.sampled_from(ordinary), min_size=1, max_size=8)), tokenizer.eos_token_id]
        for _ in range(rounds)
    ]
    row = _conversation(tokenizer, questions, answers).to_row(ChatCodec(None, tokenizer))
    assert len(row["input_ids"]) == len(row["completion_mask"])
    learned = [token for token, mark in zip(row["input_ids"], row["completion_mask"], strict=True) if mark]
    assert learned == [token for answer in answers for token in answer], "not what was generated"
    # As text it is what the chat template makes of the messages (compared without what stands between the roles'
    # marks and the contents, where whole-word tokenizers know no spaces).
    texts = [tokenizer.decode(answer[:-1]) for answer in answers]
    messages = [
        message
        for question, text in zip(questions, texts, strict=True)
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": text})
    ]
    if name == "whole words":
        return
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    found = tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False)
    if "\ufffd" not in rendered and all(text == text.strip() for text in texts):
        expected = rendered[: rendered.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        found, expected = found.replace(" ", ""), expected.replace(" ", "")
        assert found == expected


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_cut_answer_is_closed_by_tokens_that_are_not_learned(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    cut, ended = [30, 31], [30, 31, tokenizer.eos_token_id]
    codec, questions = ChatCodec(None, tokenizer), ["what ?", "what ?"]
    assert codec.encode_prompt(questions, [cut]) == codec.encode_prompt(questions, [ended])
    row = _conversation(tokenizer, ["what ?", "who ?"], [cut, ended]).to_row(ChatCodec(None, tokenizer))
    assert sum(row["completion_mask"]) == 5


def test_template_arguments_reach_every_encoding() -> None:
    tokenizer = TOKENIZERS["byte-level BPE, ChatML"]
    silent, thinking = (ChatCodec(None, tokenizer, {"enable_thinking": on}) for on in (False, True))
    assert tokenizer.decode(silent.encode_prompt(["Who?"])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(thinking.encode_prompt(["Who?"])).endswith("assistant\n")
    assert silent.preamble == thinking.preamble
    with pytest.raises(ValueError, match="`chat_template_kwargs` is not JSON"):
        SynthesisConfig(chat_template_kwargs="{thinking}")
    with pytest.raises(ValueError, match="must be a mapping"):
        SynthesisConfig(chat_template_kwargs="[1]")


class _Script:
    """A back end that says what it is told, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, lines: list[str]) -> None:
        self.tokenizer, self.lines, self.asked = tokenizer, iter(lines), []

    def generate(self, prompts: Any, **options: Any) -> list[Generation]:
        self.asked += [self.tokenizer.decode(prompt) for prompt in prompts]
        ids = [self.tokenizer(next(self.lines), add_special_tokens=False)["input_ids"] for _ in prompts]
        return [Generation([*tokens, self.tokenizer.eos_token_id]) for tokens in ids]


def test_two_rounds_are_asked_and_answered_in_turn() -> None:
    tokenizer = TOKENIZERS["byte-level BPE, ChatML"]
    script = _Script(tokenizer, ["<think>Hm.</think> “Who sails?”", "The captain.", "Where to?", "To sea."])
    dialogue = Dialogue(script, ChatCodec(None, tokenizer), SynthesisConfig(num_rounds=2))
    plan = Plan("question", "Ask a question.", "Think step by step.", 3)
    (conversation,) = dialogue.hold(Chunk("c", "d", 0, 1, "text"), [plan])
    assert [message["content"] for message in conversation.messages(ChatCodec(None, tokenizer))] == [
        "Who sails? Think step by step.", "The captain.", "Where to? Think step by step.", "To sea.",
    ]  # fmt: skip
    first_question, first_answer, second_question, second_answer = script.asked
    assert "Ask a question." in first_question and "Ask a question." not in first_answer
    # The asking side has the questions as its own and the answers as the user's …
    assert second_question.index("Ask a question.") < second_question.index("assistant\nWho sails?")
    assert second_question.index("assistant\nWho sails?") < second_question.index("user\nThe captain.\n\n")
    # … and the answering side the other way round.
    asked = "user\nWhere to? Think step by step.<|im_end|>\n<|im_start|>assistant\n"
    assert second_answer.endswith(f"{asked}<think>\n\n</think>\n\n")
    assert "user\nWho sails?" in second_answer and "assistant\nThe captain.<|im_end|>" in second_answer
    assert all(turn.question_ended and turn.answer_ended for turn in conversation.turns)


def test_an_empty_question_ends_a_conversation() -> None:
    tokenizer = TOKENIZERS["byte-level BPE, ChatML"]
    script = _Script(tokenizer, ["", "Who?", "Me.", ""])
    dialogue = Dialogue(script, ChatCodec(None, tokenizer), SynthesisConfig(num_rounds=2))
    plans = [Plan("question", "Ask.", "", seed) for seed in range(2)]
    empty, short = dialogue.hold(Chunk("c", "d", 0, 1, "text"), plans)
    assert empty.turns == [] and len(short.turns) == 1


def test_seed_prompts_of_ones_own() -> None:
    chunk, args = Chunk("c", "d", 0, 1, "the sea . the ship ."), SynthesisConfig(chain_of_thought_share=0.5)
    plans = plan_dialogues(chunk, 200, random.Random(0), args, ["Ask this.", "Ask that."])
    assert {plan.prompt for plan in plans} == {"Ask this.", "Ask that."} and {p.seed_type for p in plans} == {"custom"}
    assert 60 < sum(bool(plan.reasoning) for plan in plans) < 140
    called = plan_dialogues(chunk, 2, random.Random(0), args, lambda chunk, rng: f"About {chunk.text[:7]}")
    assert called[0].prompt == "About the sea"
    with pytest.raises(ValueError, match="`seed_prompts` gave '' for the chunk c"):
        plan_dialogues(chunk, 2, random.Random(0), args, lambda chunk, rng: "")
    dataset = runs.synthesize(None, num_conversations=4, seed_prompts=["the sea ?"])
    assert set(dataset["seed_type"]) == {"custom"}


def test_types_are_used_alike_often_and_seeds_differ() -> None:
    chunk, args = Chunk("c", "d", 0, 1, "the sea . the ship ."), SynthesisConfig()
    plans = plan_dialogues(chunk, 50, random.Random(0), args)
    counts = {plan.seed_type: sum(p.seed_type == plan.seed_type for p in plans) for plan in plans}
    assert set(counts.values()) == {10} and len({plan.seed for plan in plans}) == 50


def test_a_system_prompt_stands_in_front_of_chunk_and_student() -> None:
    tokenizer, args = tiny_tokenizer(), runs.settings(num_conversations=8, system_prompts=["yes captain", "no ship"])
    dataset = SelfStudySynthesizer(tiny_model(), tokenizer, args).synthesize(runs.TEXT)
    used = set()
    for row in dataset:
        prompt = row["context"].split("\n\n")[0]
        used.add(prompt)
        preamble = ChatCodec(None, tokenizer).encode_context(prompt)
        assert row["input_ids"][: len(preamble)] == preamble and not any(row["completion_mask"][: len(preamble)])
    assert used == {"yes captain", "no ship"}
