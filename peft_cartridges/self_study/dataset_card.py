"""The card of a self-study data set, and its way to the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .synthesis_report import format_report, read_report

_CARD = """\
# Self-study conversations about {corpus}

A model, `{model}`, wrote these conversations about a text that it had in its context, and what it would have said of
each token is kept with them. They train a cartridge: a small KV cache that stands in for the text
([arXiv 2506.06266](https://arxiv.org/abs/2506.06266)). Made by
peft-cartridges {version}.

```python
from datasets import load_dataset
from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudyTrainer

trainer = SelfStudyTrainer(
    model={model!r},
    args=SelfStudyConfig(output_dir="cartridge"),
    train_dataset=load_dataset({repo_id!r}, split="train"),
    peft_config=CartridgeConfig(num_tokens=2048),
)
trainer.train()
```

## What came of it

```
{report}
```

## Columns

| column | what it holds |
| --- | --- |
{columns}

The texts in `context` are passages of the corpus: whatever licence the corpus has holds for them too, and for what the
model wrote about them the licence of the model may have its say.

## How it was made

```json
{details}
```
"""

_COLUMNS = {
    "messages": "the conversation",
    "input_ids": "its token ids as the student sees them behind its cartridge",
    "completion_mask": "1 where a token is learned",
    "chunk_id": "the passage it is about, `document:start-end` in tokens",
    "context": "the text in the teacher's context",
    "seed_type": "what it began with",
    "teacher_hidden_states": "the teacher's final hidden states for the learned tokens, flat `[learned * hidden_size]`",
    "teacher_top_k_ids": "the teacher's likeliest tokens, flat `[learned * k]`",
    "teacher_top_k_logprobs": "their log-probabilities, flat `[learned * k]`",
    "usefulness": "KL of the teacher from itself without the passage, nats per learned token",
}


def make_dataset_card(dataset: Dataset, repo_id: str) -> str:
    """The card's text, with the metadata that the Hub reads.

    Raises:
        ValueError: the data set carries no description of a run.
    """
    description = read_report(dataset)
    return _metadata(description) + _CARD.format(
        corpus=description["corpus"]["name"],
        model=description["base_model"],
        version=description["versions"].get("peft-cartridges", ""),
        repo_id=repo_id,
        report=format_report(description),
        columns="\n".join(f"| `{name}` | {_COLUMNS.get(name, '')} |" for name in dataset.column_names),
        details=json.dumps({key: value for key, value in description.items() if key != "report"}, indent=2),
    )


def push_self_study(dataset: Dataset, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Pushes a data set with its card to the Hub; gives its address. Private unless you say otherwise: it holds
    passages of your corpus.

    Raises:
        ValueError: the data set carries no description of a run.
    """
    from huggingface_hub import DatasetCard

    card = make_dataset_card(dataset, repo_id)
    dataset.push_to_hub(repo_id, private=private, token=token)
    # What `push_to_hub` wrote into the card (sizes, splits) stays; our text and tags come to it.
    pushed = DatasetCard.load(repo_id, token=token)
    ours = DatasetCard(card)
    for name in ("dataset_info", "configs"):
        ours.data[name] = pushed.data.get(name)
    ours.push_to_hub(repo_id, token=token)
    return f"https://huggingface.co/datasets/{repo_id}"


def _metadata(description: Mapping[str, Any]) -> str:
    lines = ["---", "tags:", "- cartridges", "- self-study", "- context-distillation", "- synthetic"]
    model = description["base_model"]
    if model.count("/") == 1 and not model.startswith((".", "/")):
        lines += ["base_model:", f"- {model}"]
    return "\n".join([*lines, "---", ""]) + "\n"
