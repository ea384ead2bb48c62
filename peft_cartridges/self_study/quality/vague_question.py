"""Questions that say nothing of what they are about."""

from __future__ import annotations

import re

from .base import Candidate, QualityFilter
from .duplicate import words

# Words that are as much at home in a question about any other text.
_ANYWHERE = frozenset(
    words("""
    about above according after again also another answer answers article asked author because been before being
    below between both briefly chapter characters complete content could create data describe described describes
    detail details different discuss document does each event events example examples explain explained fact facts
    find first five following form format four from give given have help here idea important include included
    information into key kind last least like list listed main make many mean mentioned message more most much name
    named names need number numbers only order other outline over overall paragraph part parts passage people person
    piece place please point points provide question questions read request role said same says second section
    sections sentence sentences several short should show simple some something specific story subject such
    summarize summary table tell text than that their them then there these they thing things this those three
    time times title topic topics under used using want were what when where which while whole will with within
    words work would write written your json yaml markdown bullet bulleted numbered timeline
    """)
)
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai: scripts without spaces


class VagueQuestion(QualityFilter):
    """Drops a conversation whose first question shares no telling word with the chunk ("What is the text about?"):
    without the text in front nobody could know what is asked, and the cartridge learns nothing of the chunk from it.

    Telling are words of four letters and more, and numbers, that are not at home in any question (an English list);
    in scripts without spaces, pairs of characters.
    """

    def drops(self, candidate: Candidate) -> bool:
        if not candidate.messages or candidate.seed_type == "recitation":
            return False
        return not (telling_terms(candidate.questions[0]) & telling_terms(candidate.context))


def telling_terms(text: str) -> set[str]:
    """Words, numbers and (in scripts without spaces) pairs of characters that can tell what a text is about."""
    terms: set[str] = set()
    for word in words(text):
        if _UNSPACED.search(word):
            terms.update(word[i : i + 2] for i in range(len(word) - 1))
        elif any(character.isdigit() for character in word) or (len(word) >= 4 and word not in _ANYWHERE):
            terms.add(word)
    return terms
