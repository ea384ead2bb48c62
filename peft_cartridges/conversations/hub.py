"""The way of a conversation set to the Hub and back, and its card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..hub_errors import HubError, hub_errors
from .folder import MANIFEST
from .loading import load_self_study
from .provenance import publishable, read_report
from .report import format_report

_SHARD_BYTES = 500_000_000

_CARD = """\
# Self-study conversations about {corpus}

A model, `{model}`, wrote these conversations about a text that it had in its context, and what it would have said of
each token is kept with them. They train a cartridge: a small KV cache that stands in for the text
([arXiv 2506.06266](https://arxiv.org/abs/2506.06266)). Made by
peft-cartridges {version}.

```python
from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudyTrainer, load_self_study

trainer = SelfStudyTrainer(
    model={model!r},
    args=SelfStudyConfig(output_dir="cartridge"),
    train_dataset=load_self_study({repo_id!r}),
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
    "id": "names the conversation",
    "messages": "the conversation",
    "input_ids": "its token ids as the student sees them behind its cartridge",
    "completion_mask": "1 where a token is learned",
    "turns_start": "where what the teacher sees too begins in `input_ids`, behind what stands in front without a text",
    "chunk_id": "the passage it is about, `document:start-end` in tokens; null in general conversations",
    "context": "the text in the teacher's context; null in general conversations, whose teacher has none",
    "seed_type": "what it began with",
    "origin": "where the row comes from: the set's address, model and tokenizer",
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
    description = publishable(read_report(dataset))
    report = description["report"]
    return _metadata(description) + _CARD.format(
        corpus=description["corpus"]["name"],
        model=description["base_model"],
        version=description.get("versions", {}).get("peft-cartridges", ""),
        repo_id=repo_id,
        report=format_report(description) if report else f"{len(dataset)} conversations",
        columns="\n".join(f"| `{name}` | {_COLUMNS.get(name, '')} |" for name in dataset.column_names),
        details=json.dumps({key: value for key, value in description.items() if key != "report"}, indent=2),
    )


def push_self_study(
    dataset: Dataset | str | Path, repo_id: str, *, private: bool = True, token: str | None = None
) -> str:
    """Pushes a conversation set with its card and its manifest to the Hub, in one commit; gives its address. Private
    unless you say otherwise, also where the repository exists: the set holds passages of your corpus.

    Args:
        dataset: A set, or its folder.
        repo_id: `OWNER/NAME`; made if it is not there.
        private: Whether only you may see it.
        token: By default the one you are logged in with.

    Raises:
        ValueError: the data set carries no description of a run, or `repo_id` cannot be a name.
        HubError: the repository exists and is public, or the Hub refuses the push or cannot be reached. Nothing of the
            set is lost or half there: push again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not isinstance(dataset, Dataset):
        dataset = load_self_study(dataset)
    card = make_dataset_card(dataset, repo_id)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        _make_repository(api, repo_id, private)
        shards = max(1, -(-(dataset.data.nbytes) // _SHARD_BYTES))
        names = [f"data/train-{number:05d}-of-{shards:05d}.parquet" for number in range(shards)]
        operations: list[Any] = []
        plain = _with_publishable_origins(dataset.with_format(None))
        for number, name in enumerate(tqdm(names, desc="Uploading", unit=" shards", delay=2)):
            with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
                plain.shard(shards, number, contiguous=True).to_parquet(file.name)
                operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.name)
                api.preupload_lfs_files(repo_id, [operation], repo_type="dataset", num_threads=1)
            operations.append(operation)
        manifest = json.dumps(publishable(read_report(dataset)), indent=2, ensure_ascii=False).encode()
        for name, content in ((MANIFEST, manifest), ("README.md", card.encode())):
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
        there = api.dataset_info(repo_id).siblings or []
        stale = [file.rfilename for file in there if file.rfilename.startswith("data/") and file.rfilename not in names]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        api.create_commit(repo_id, operations, commit_message="Upload conversations", repo_type="dataset")
    return f"{api.endpoint}/datasets/{repo_id}"


def fetch_self_study(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Brings a set's manifest and Parquet files into the Hub's cache; gives their folder.

    Raises:
        FileNotFoundError: `repo_id` is neither a folder nor a name on the Hub.
        HubError: the Hub has no such data set, refuses it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {repo_id}, and it is no name on the Hub (`user/name`).")
    with hub_errors(repo_id, revision):
        folder = snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            token=token,
            allow_patterns=[MANIFEST, "*.parquet", "data/*.parquet"],
        )
    return Path(folder)


def _with_publishable_origins(dataset: Dataset) -> Dataset:
    if "origin" not in dataset.column_names:
        return dataset
    origins = dataset.select_columns("origin").with_format("arrow")[:]["origin"].to_pylist()
    shown = {one: json.dumps(publishable(json.loads(one))) if one else one for one in dict.fromkeys(origins)}
    if all(one == told for one, told in shown.items()):
        return dataset
    replaced = dataset.remove_columns("origin").add_column("origin", [shown[one] for one in origins])
    return replaced.select_columns(dataset.column_names).cast(dataset.features)


def _make_repository(api: Any, repo_id: str, private: bool) -> None:
    """Raises:
    HubError: a repository that is to be private is public.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        found = api.repo_info(repo_id, repo_type="dataset")
    if private and not found.private:
        raise HubError(
            f"`{repo_id}` exists and is public, and the conversations hold passages of your corpus: make it private in "
            "its settings, push under another name, or say that everyone may read them (`private=False`, `--public`)."
        )


def _metadata(description: Mapping[str, Any]) -> str:
    lines = ["---", "tags:", "- cartridges", "- self-study", "- context-distillation", "- synthetic"]
    lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: data/train-*"]
    model = description["base_model"]
    if "/" in model:
        lines += ["base_model:", f"- {model}"]
    return "\n".join([*lines, "---", ""]) + "\n"
