"""Answers that decline to answer."""

from __future__ import annotations

import re

from .base import Candidate, QualityFilter

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid)"
    r"|i (?:can(?:'|no)t|could not|couldn't|do not|don't|am not able to) "
    r"(?:help|assist|answer|provide|access|see|fulfill|comply|comment"
    r"|have (?:access|the ability|any information|enough))"
    r"|as an? (?:ai|artificial intelligence|language model)"
    r"|i apologi[sz]e"
    r"|my apologies"
    r"|unfortunately,? i (?:can|do|am|don))",
    re.IGNORECASE,
)

# A refusal says so at once; "I'm sorry, said the captain" further on is a quotation.
_BEGINNING = 120


class Refusal(QualityFilter):
    """Drops a conversation with an answer that begins by declining (in English). Recitations pass: they quote."""

    def drops(self, candidate: Candidate) -> bool:
        if candidate.seed_type == "recitation":
            return False
        return any(_REFUSAL.search(answer[:_BEGINNING].replace("’", "'")) for answer in candidate.answers)
