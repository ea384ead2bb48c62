"""`Gate`: how much a request speaks the language of a cartridge's text.

A text has words of its own. For each word of a request, the gate knows how much more often the text says it than language
at large does; a request is let through to the cartridge where the mean of these log ratios reaches a threshold. The
threshold is set when the gate is made, by requests that have nothing to do with any text.

That takes no model and no tokenizer, so every engine can do it, in microseconds, before a request is put into tokens.
`benchmarks/gate.py` measures it against the model's own states and its first token.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import regex
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..chat import get_tokenizer
from .prompts import GENERAL_REQUESTS, TEXT_QUESTIONS

# What a user says: a text, or a conversation that ends with it.
Request: TypeAlias = str | Sequence[Mapping[str, Any]]

GATE_FILE = "gate.safetensors"
_FORMAT = "1"
_MAX_BYTES = 16 << 20
_FIELDS = ("absent", "threshold", "general_rejected", "num_general")

# Words are told apart by so many first letters: "experiment", "experiments" and "experimental" are one.
_LETTERS = 4
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\w--[{_UNSPACED}]]+", regex.V1)
# Of what is said about a text: the share in the text's own words, and in those of any question about a text ("the author",
# "the passage"); the rest is language at large.
_TEXT_SHARE, _QUESTION_SHARE = 0.7, 0.2
# Zipf's law for the place of a word's token in the vocabulary, which is in the order of how often pairs were merged.
_ZIPF_OFFSET = 50
# A message of fewer words is a part of what was asked before it.
_FOLLOW_UP_WORDS = 5


@dataclass(frozen=True, eq=False)
class Gate:
    """Tells which requests are for a cartridge.

    ```python
    model, tokenizer = load_cartridge("user/handbook")
    gate = Gate.from_pretrained("user/handbook")
    inputs = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True, …)
    model.generate(**inputs, adapter_names=gate.adapter_names(conversations))
    ```

    Args:
        words: `[num_words]`, int64: the hashes of the words that the text (or any question about a text) says.
        weights: `[num_words]`, float32: the log ratio of each, in nats.
        absent: That of every other word.
        threshold: What the mean over a request's words must reach.
        general_rejected: The share of the general requests below it.
        num_general: How many there were.
    """

    words: Tensor
    weights: Tensor
    absent: float
    threshold: float
    general_rejected: float = math.nan
    num_general: int = 0

    @classmethod
    def make(
        cls,
        text: str | Iterable[str],
        processing_class: Any,
        *,
        general: Sequence[str] = GENERAL_REQUESTS,
        reject_general: float = 0.85,
    ) -> Gate:
        """The gate of a text.

        Args:
            text: The cartridge's text, or its parts. Parts that are the same count once.
            processing_class: The base model's tokenizer, whose vocabulary says how common a word is.
            general: Requests that have nothing to do with the text; they set the threshold.
            reject_general: The share of them that is to be kept from the cartridge.

        Raises:
            ValueError: the text has no word, there is no general request, or `reject_general` is not within 0 and 1.
        """
        parts = [text] if isinstance(text, str) else list(dict.fromkeys(text))
        if not 0 < reject_general < 1:
            raise ValueError(f"`reject_general` is {reject_general}: it must lie between 0 and 1.")
        if not general:
            raise ValueError("`general` is empty: give requests that have nothing to do with the text.")
        counts = Counter(word for part in parts for word in split_words(part))
        if not counts:
            raise ValueError("`text` has no word: a gate is made of the text that the cartridge stands in for.")
        asked = Counter(word for question in TEXT_QUESTIONS for word in split_words(question))
        common = _language_at_large([*counts, *asked], processing_class)
        ratios: dict[str, float] = {}
        rest = 1 - _TEXT_SHARE - _QUESTION_SHARE
        for shares, words in ((_TEXT_SHARE, counts), (_QUESTION_SHARE, asked)):
            for word, count in words.items():
                unit = word[:_LETTERS]
                ratios[unit] = ratios.get(unit, 0.0) + shares * count / words.total() / common[unit]
        hashes, weights = zip(*sorted((_hash(unit), math.log(r + rest)) for unit, r in ratios.items()), strict=True)
        made = cls(torch.tensor(hashes), torch.tensor(weights, dtype=torch.float32), math.log(rest), -math.inf)
        scores = sorted(made.score(request) for request in general)
        threshold = scores[min(math.ceil(reject_general * len(scores)), len(scores) - 1)]
        below = sum(score < threshold for score in scores) / len(scores)
        return cls(made.words, made.weights, made.absent, threshold, below, len(scores))

    # -- decisions ---------------------------------------------------------------------------------------------------

    def __call__(self, requests: Request | Sequence[Request]) -> list[bool]:
        """Whether each request is one for the cartridge.

        Args:
            requests: Texts or conversations (lists of messages), or one of either.
        """
        return [self.accepts(request) for request in _as_list(requests)]

    def accepts(self, request: Request) -> bool:
        """Whether a request is one for the cartridge."""
        return self.score(request) >= self.threshold

    def score(self, request: Request) -> float:
        """The mean log ratio of a request's words, in nats; that of a word which the text never says, where there is none.

        Of a conversation its last user message counts; one of a few words ("And why?") with the one in front of it.
        """
        words = _words_of(request)
        ratios = [self._ratios.get(_hash(word[:_LETTERS]), self.absent) for word in words]
        return sum(ratios) / len(ratios) if ratios else self.absent

    def adapter_names(self, requests: Sequence[Request], adapter_name: str = "default") -> list[str]:
        """For `generate(…, adapter_names=…)`: each row's adapter, `"__base__"` where the gate rejects the request.

        Args:
            requests: One for each row.
            adapter_name: What the cartridge is called in the model.
        """
        return [adapter_name if accepted else "__base__" for accepted in self(requests)]

    @cached_property
    def _ratios(self) -> dict[int, float]:
        return dict(zip(self.words.tolist(), self.weights.tolist(), strict=True))

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_options: Any) -> Gate:
        """The gate beside a cartridge.

        Args:
            name_or_path: The cartridge: a folder, or a name on the Hub.
            hub_options: Of `pull_cartridge` (`revision`, `token`, …).

        Raises:
            FileNotFoundError: the cartridge has no gate; `cartridges gate` makes one.
            ValueError: the file is damaged, too large, or of another version.
            HubError: as `pull_cartridge`.
        """
        from ..hub.pull import find_cartridge

        folder = find_cartridge(name_or_path, **hub_options)
        gate = load_gate(folder)
        if gate is None:
            raise FileNotFoundError(f"{name_or_path} has no gate ({GATE_FILE}): make one with `cartridges gate`.")
        return gate

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `gate.safetensors` into a cartridge's folder, complete or not at all."""
        path = Path(folder) / GATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in _FIELDS}
        metadata = {"format": _FORMAT, "gate": json.dumps(fields)}
        with tempfile.TemporaryDirectory(prefix=".gate-", dir=path.parent) as staging:
            save_file({"words": self.words, "weights": self.weights}, Path(staging) / GATE_FILE, metadata=metadata)
            os.replace(Path(staging) / GATE_FILE, path)
        return path


def load_gate(folder: str | Path) -> Gate | None:
    """The gate in a cartridge's folder; None where there is none.

    Raises:
        ValueError: the file is damaged, too large, or of another version.
    """
    path = Path(folder) / GATE_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES:,} bytes: it is no gate.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} has format {metadata.get('format')!r}, this version reads {_FORMAT!r}: upgrade "
                    "peft-cartridges, or make it anew with `cartridges gate`."
                )
            if set(file.keys()) != {"words", "weights"}:
                raise ValueError(f"{path} has the tensors {', '.join(file.keys())}, expected words and weights.")
            words, weights = file.get_tensor("words"), file.get_tensor("weights")
        fields = {name: json.loads(metadata["gate"])[name] for name in _FIELDS}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again, or make it anew.") from error
    sound = words.dtype == torch.int64 and weights.dtype == torch.float32 and words.shape == weights.shape
    numbers = [value for name, value in fields.items() if name != "general_rejected"]
    sound = sound and words.dim() == 1 and bool(weights.isfinite().all())
    if not sound or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
        raise ValueError(f"{path} is damaged: its words and weights do not go together, or are not finite.")
    return Gate(words, weights, **fields)


def any_accepts(gates: Sequence[Gate | None], request: Request) -> bool:
    """Whether a request is one for a composition of cartridges: for any of them. Those without a gate take all."""
    return not gates or any(gate is None or gate.accepts(request) for gate in gates)


def split_words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation; in scripts without spaces, its characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _words_of(request: Request) -> list[str]:
    """The words that a request is judged by."""
    if isinstance(request, str):
        return split_words(request)
    said = [split_words(_text_of(message)) for message in request if message.get("role") == "user"]
    words: list[str] = []
    while said and len(words) < _FOLLOW_UP_WORDS:
        words = said.pop() + words
    return words


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, also where its content comes in parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def _as_list(requests: Request | Sequence[Request]) -> list[Request]:
    if isinstance(requests, str) or (requests and isinstance(requests[0], Mapping)):
        return [requests]  # type: ignore[list-item]
    return list(requests)  # type: ignore[arg-type]


def _language_at_large(words: Sequence[str], processing_class: Any) -> dict[str, float]:
    """How often language at large says the words that begin alike, by their first letters: by Zipf's law, from the place
    of the most common one's token. A word that takes several tokens is as rare as the last of the vocabulary."""
    tokenizer = get_tokenizer(processing_class)
    size = len(tokenizer)
    # Tokenizers tell beginnings of words, and capitals, apart.
    forms = [form for word in words for form in (f" {word}", word, f" {word.capitalize()}")]
    encoded = tokenizer(forms, add_special_tokens=False)["input_ids"]
    places: dict[str, int] = {}
    for number, ids in enumerate(encoded):
        unit = words[number // 3][:_LETTERS]
        known = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        places[unit] = min(places.get(unit, size), ids[0] if known else size)
    return {unit: 1 / (math.log(size) * (place + _ZIPF_OFFSET)) for unit, place in places.items()}


def _hash(unit: str) -> int:
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "big", signed=True)
