"""Prompts: what asks the model, with a chunk in context, to open a conversation about it; and recitations.

The five types are those of the paper (arXiv 2506.06266, section on self-study); the phrasings are ours. All are
agnostic of the corpus. A new type is a row in `SEED_PROMPTS`.

Recitations, whose answer is a passage of the chunk itself, are not in the paper. They cost no generation, and the
teacher, who has the passage in context, is sure of every token, so a step carries more of the text than one on a free
conversation.
"""

from __future__ import annotations

import random

from ..corpus.sentences import count_words, first_words, last_words, split_sentences

_FORMATS = ("JSON", "YAML", "a Markdown table", "a bulleted list", "a numbered outline", "a timeline")

SEED_PROMPTS: dict[str, tuple[str, ...]] = {
    "structuring": (
        "Write one request that asks an assistant to put some facts of the text above into {format}. Say which facts.",
        "Ask for a part of the text above to be written as {format}. Name the part. Reply with the request only.",
        "Think of details in the text above that belong together. Write a request to list them as {format}.",
        "Write a short message that asks for the names, numbers or dates of one section of the text as {format}.",
        "Ask an assistant to sort what the text says about one subject into {format}. Write only that message.",
    ),
    "summarization": (
        "Write one request for a short summary of one part of the text above. Name the part.",
        "Ask an assistant to sum up what the text says about one of its subjects. Reply with the request only.",
        "Pick a section of the text above and write a message that asks for its main points.",
        "Write a request for a summary, in two sentences, of something specific in the text above.",
        "Ask for an explanation in simple words of one thing that the text above describes.",
    ),
    "question": (
        "Write one question about a specific fact in the text above. Reply with the question only.",
        "Ask a question that can be answered with one sentence of the text above. Name what it is about.",
        "Pick a name, a number or a date in the text above and write a question whose answer it is.",
        "Write a question about a detail near the end of the text above. It must make sense on its own.",
        "Write a question about a detail in the middle of the text above. It must make sense on its own.",
        "Ask who did something, when it happened, or why, according to the text above. One question only.",
        "Write a question that tests whether someone has read the text above carefully.",
    ),
    "use_case": (
        "Think of a person who needs the text above for a practical task. Write the question that this person asks.",
        "Write a question of someone who has to act on what the text above says. Name what it is about.",
        "Imagine a newcomer who has not read the text above. Write one practical question that it answers.",
        "Write a message from someone who faces a problem that the text above helps with.",
        "Think of a job for which the text above is useful and write a question that comes up in it.",
    ),
    "creative": (
        "Write a playful or unusual request about something specific in the text above.",
        "Ask an assistant to imagine a short scene with people or things from the text above. Name them.",
        "Write a request that needs details of the text above in a poem, a letter or an advertisement.",
        "Write a question that compares two things in the text above.",
        "Ask what would change if one fact of the text above were different. Name the fact.",
    ),
}

PAPER_TYPES = tuple(SEED_PROMPTS)


_FOCUS = (
    "Look at this part of the text: “{passage}”\n\n{prompt}",
    "“{passage}”\n\nThis stands in the text above. {prompt} It must be about this part.",
    "{prompt} Make it about this part of the text: “{passage}”",
)


# What the asking side is told after an answer, and what a question ends with that wants its answer reasoned out.
FOLLOW_UPS = (
    "Now ask a further question about the text above that builds on this answer. Reply with the question only.",
    "Ask about something that this answer leaves open and the text above tells. One question only.",
    "Write a follow-up question on another detail of the text above. It must make sense in this conversation.",
    "Ask for more details on one thing that this answer mentions. Reply with the question only.",
)
CHAIN_OF_THOUGHT = (
    "Think step by step, then answer.",
    "First recall what the text says about this, then conclude.",
    "Explain your reasoning before you answer.",
    "List the relevant facts first, and then give the answer.",
)


# What opens a conversation that has nothing to do with the corpus: kinds of requests, and what they may be about.
_GENERAL = (
    "Write one question that someone might ask an assistant about {subject}. Reply with the question only.",
    "Write a short request to an assistant that has to do with {subject}. Reply with the request only.",
    "Ask for an explanation of something about {subject} that a beginner would not know. One question only.",
    "Ask for advice on {subject}. Write only what the person would say.",
    "Write an instruction that asks for a short text (a story, a poem, an email, a slogan) about {subject}.",
    "Write an instruction that asks for a list or a plan concerning {subject}. Reply with the instruction only.",
    "Write a small exercise about {subject} that has one right answer. Reply with the exercise only.",
    "Write one sentence about {subject}, and in front of it the request to rewrite, translate or correct it.",
    "Write an instruction that gives some words to do with {subject} and asks to sort or classify them.",
    "Ask for a comparison of two things to do with {subject}. One question only.",
    "Write a request for a few lines of code, or a formula, that has to do with {subject}.",
    "Write a friendly message to an assistant that mentions {subject} and asks something.",
)
_SUBJECTS = (
    "cooking for many guests", "a bread recipe", "healthy breakfasts", "running a marathon", "sleeping better",
    "back pain at a desk", "learning a language", "English grammar", "French words", "spelling", "letters to a landlord",
    "a job interview", "a birthday card", "an apology to a friend", "saving money", "taxes for beginners",
    "percentages and prices", "adding fractions", "the area of a circle", "prime numbers", "probability and dice",
    "sorting a list in Python", "a loop in JavaScript", "an SQL query", "a spreadsheet", "passwords", "a slow computer",
    "photography at night", "playing the guitar", "jazz", "a film for the family", "a detective novel", "a short poem",
    "a fairy tale about a fox", "chess openings", "card games", "football rules", "a camping trip", "a week in Italy",
    "trains and timetables", "houseplants", "a vegetable garden", "keeping a cat", "training a dog", "birds in winter",
    "dinosaurs", "volcanoes", "the planets", "how rain forms", "magnets", "electric cars", "bridges", "the human heart",
    "vaccines", "vitamins", "the Roman Empire", "explorers and ships", "the printing press", "capital cities", "rivers",
    "elections", "recycling", "a small business", "a product review", "customer complaints", "meetings that take too long",
    "raising children", "a present for a colleague", "moving house", "repairing a bicycle", "painting a room", "dreams",
    "honesty", "jokes and puns", "synonyms and opposites", "a news headline",
)  # fmt: skip
# What the asking side is told after an answer in such a conversation.
GENERAL_FOLLOW_UPS = (
    "Now ask a further question that builds on this answer. Reply with the question only.",
    "Ask about something that this answer leaves open. One question only.",
    "Ask for an example of one thing that this answer mentions. Reply with the question only.",
)


_CONTINUE = (
    "How does the text go on after this? “{cue}”",
    "Continue the text from here, word for word: “{cue}”",
    "“{cue}” What comes next in the text?",
    "Quote what follows this passage: “{cue}”",
)
_QUOTE = (
    "Quote the passage of the text that begins with “{cue}”.",
    "Recite the part of the text that starts “{cue}”.",
    "What does the text say, word for word, from “{cue}” on?",
)
_FILL = (
    "Between “{cue}” and “{end}” the text says something. Quote it.",
    "What stands in the text after “{cue}” and before “{end}”? Answer word for word.",
    "Fill the gap with the words of the text: “{cue} … {end}”",
)


def draw_seed_prompt(seed_type: str, rng: random.Random, *, passage: str | None = None) -> str:
    """One phrasing of a type, about a passage of the chunk if one is given.

    Raises:
        ValueError: the type is unknown.
    """
    check_seed_types([seed_type])
    prompt = rng.choice(SEED_PROMPTS[seed_type]).format(format=rng.choice(_FORMATS))
    return prompt if passage is None else rng.choice(_FOCUS).format(passage=passage, prompt=prompt)


def draw_general_prompt(rng: random.Random) -> str:
    """What opens a conversation that is about no text."""
    return rng.choice(_GENERAL).format(subject=rng.choice(_SUBJECTS))


def check_seed_types(seed_types: list[str] | tuple[str, ...]) -> None:
    """Raises:
    ValueError: a type is unknown, or there is none.
    """
    unknown = [name for name in seed_types if name not in SEED_PROMPTS]
    if unknown or not seed_types:
        raise ValueError(f"`seed_types` has {unknown or 'no type'}; there are: {', '.join(SEED_PROMPTS)}.")


def draw_recitation(text: str, rng: random.Random, *, max_words: int = 60) -> tuple[str, str]:
    """A request and its answer: up to `max_words` words of `text` (characters, in scripts without spaces), cut at
    sentences where there are any. The request names what stands in front of the passage, or on both sides of it, or how
    it begins."""
    sentences = split_sentences(text)
    first = rng.randrange(len(sentences))
    passage, last = sentences[first], first
    for sentence in sentences[first + 1 :]:
        if count_words(passage) + count_words(sentence) > max_words:
            break
        passage, last = passage + sentence, last + 1
    passage = " ".join(passage.split())
    whole, passage = count_words(passage) <= max_words, first_words(passage, max_words)
    way = rng.random()
    if first > 0 and way < 0.5:
        cue = last_words(" ".join(sentences[first - 1].split()), 12)
        if whole and last + 1 < len(sentences) and way < 0.15:
            end = first_words(" ".join(sentences[last + 1].split()), 12)
            return rng.choice(_FILL).format(cue=cue, end=end), passage
        return rng.choice(_CONTINUE).format(cue=cue), passage
    return rng.choice(_QUOTE).format(cue=first_words(passage, 5)), passage
