"""Reading a conversation set back: from its folder, a Parquet file, or the Hub; and joining and keeping sets."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

from .folder import MANIFEST, WRITTEN, ConversationFolder, Part, cover
from .provenance import FORMAT, describe, read_provenance
from .rows import kind_of_targets
from .targets import TARGETS

_ROWS_PER_PART = 1024


def load_self_study(
    name: str | Path, *, revision: str | None = None, token: str | None = None, targets: str | None = None
) -> Dataset:
    """A conversation set, with what it says of itself (`read_provenance`, `read_report`).

    Args:
        name: A folder that `SelfStudySynthesizer`, `cartridges synthesize`, the trainer or `save_self_study` wrote, also
            one where a run is still under way; a Parquet file, or a folder of them; a folder made by `save_to_disk`; or
            the name of a data set on the Hub.
        revision: Branch, tag or commit, of a data set on the Hub.
        token: For a private one, where you are not logged in.
        targets: `hidden_states`, `top_k` or `live` (rows without targets); by default the first of them that is there.

    Returns:
        Rows mapped from disk. `with_fast_targets` reads the targets as tensors, as the trainer does: as Python lists of
        numbers they are slow.

    Raises:
        FileNotFoundError: there is no such folder, and it is no name on the Hub.
        HubError: the Hub has no such data set, refuses it, or cannot be reached.
        ValueError: it is no conversation set, has no such targets, or a file is damaged.

    Warns:
        UserWarning: the run that writes it has not ended.
    """
    if targets is not None and targets not in TARGETS:
        raise ValueError(f"`targets` is {targets!r}; there are: {', '.join(TARGETS)}.")
    path = Path(name)
    if not path.exists():
        from .hub import fetch_self_study

        path = fetch_self_study(str(name), revision=revision, token=token)
    folder = ConversationFolder(path)
    if folder.stages():
        dataset = _from_folder(folder, targets)
    elif (path / "dataset_info.json").is_file():
        dataset = load_from_disk(str(path))
    else:
        dataset = _from_parquet(path)
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"{name} is no conversation set: it has the columns {', '.join(dataset.column_names)}.")
    if targets == "live":
        columns = [column for kind in TARGETS.values() for column in kind if column in dataset.column_names]
        dataset = dataset.remove_columns(columns)
    elif targets is not None and kind_of_targets(dataset) != targets:
        raise ValueError(f"{name} has no {targets!r} targets but {kind_of_targets(dataset)!r}: score it anew.")
    return dataset


def read_parts(
    folder: ConversationFolder, stage: str, parts: Sequence[Part], left_out: Collection[str] = ()
) -> Dataset:
    """Some parts in order, mapped from disk, without the rows whose `id` is among `left_out`."""
    shown = tqdm(parts, desc="Opening", unit=" parts", delay=2, leave=False)
    dataset = concatenate_datasets([folder.read(stage, part) for part in shown])
    return without_rows(dataset, left_out)


def without_rows(dataset: Dataset, left_out: Collection[str]) -> Dataset:
    """The rows whose `id` is not among `left_out`."""
    if not left_out:
        return dataset
    ids = dataset.select_columns("id").with_format("arrow")[:]["id"]
    kept = pc.invert(pc.is_in(ids, value_set=_array(left_out)))
    return dataset.select(pc.indices_nonzero(kept).to_pylist())


def merge_self_study(datasets: Iterable[Dataset]) -> Dataset:
    """Several conversation sets of one model as one, each conversation once.

    Raises:
        ValueError: there is none, they come from different models or tokenizers, or have different targets.
    """
    sets = list(datasets)
    if not sets:
        raise ValueError("`datasets` is empty: nothing to merge.")
    provenances = [read_provenance(one) for one in sets]
    for name in ("model_fingerprint", "tokenizer_fingerprint"):
        if len({found.get(name) for found in provenances}) > 1:
            named = ", ".join(str(found.get("base_model")) for found in provenances)
            raise ValueError(f"The sets come from different base models or tokenizers ({named}; `{name}` differs).")
    kinds = [kind_of_targets(one) for one in sets]
    if len(set(kinds)) > 1:
        raise ValueError(f"The sets have different targets ({', '.join(kinds)}): load them with one `targets`.")
    common = [name for name in sets[0].column_names if all(name in one.column_names for one in sets)]
    joined = concatenate_datasets([one.with_format(None).select_columns(common) for one in sets])
    first: dict[str, int] = {}
    for row, name in enumerate(joined["id"]):
        first.setdefault(name, row)
    if len(first) < len(joined):
        joined = joined.select(list(first.values()))
    return describe(joined, _merged(provenances, len(joined)))


def save_self_study(dataset: Dataset, output_dir: str | Path) -> Path:
    """Keeps a set (one that was filtered, selected or merged) as a folder that `load_self_study` reads.

    Raises:
        ValueError: it is no conversation set or has no rows, or `output_dir` holds one already.
    """
    missing = [name for name in ("id", "input_ids", "completion_mask", "origin") if name not in dataset.column_names]
    if missing:
        raise ValueError(f"`dataset` is no conversation set: it lacks the columns {', '.join(missing)}.")
    if not len(dataset):
        raise ValueError("`dataset` has no rows: there is nothing to save.")
    folder = ConversationFolder(output_dir)
    if folder.manifest() is not None:
        raise ValueError(f"`output_dir` ({output_dir}) holds a conversation set already: give another folder.")
    for stage in folder.stages():  # of a save that was stopped
        shutil.rmtree(folder.path / stage)
    provenance = read_provenance(dataset)
    ids = hashlib.sha256(json.dumps(dataset["id"][:]).encode()).hexdigest()
    chosen = f"{len(dataset)} conversations of {provenance.get('address')} ({ids[:16]})"
    address = hashlib.sha256(chosen.encode()).hexdigest()
    kind = kind_of_targets(dataset)
    plain = dataset.with_format(None)
    for number, start in enumerate(tqdm(range(0, len(plain), _ROWS_PER_PART), desc="Saving", delay=2, leave=False)):
        rows = plain.select(range(start, min(start + _ROWS_PER_PART, len(plain)))).flatten_indices()
        part = Part(number, 0, len(rows))
        folder.write(WRITTEN if kind == "live" else kind, part, rows, {})
    # The manifest comes last: without it the folder is no set.
    folder.write_manifest(
        {"report": {}, **provenance, "address": address, "decided_by": {"rows": chosen}, "left_out": {}}
    )
    return folder.path


def _from_folder(folder: ConversationFolder, targets: str | None) -> Dataset:
    manifest = folder.manifest()
    if manifest is None:
        raise ValueError(f"{folder.path} has shards but no {MANIFEST}: it was not written to the end, write it anew.")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder.path} was written by another version of peft-cartridges (format {manifest.get('format')}, this "
            f"one has {FORMAT}): load it with that version."
        )
    stages = folder.stages()
    wanted = [targets] if targets not in (None, "live") else [*TARGETS, WRITTEN]
    if targets == "live":
        wanted = [WRITTEN, *TARGETS]
    # `top_k` with another k than the default is a stage of its own, `top_k-8`.
    found = [stage for kind in wanted for stage in stages if stage == kind or stage.startswith(f"{kind}-")]
    if not found:
        raise ValueError(f"{folder.path} has no {targets!r} targets but {', '.join(stages)}: score it anew.")
    parts = cover(folder.parts(found[0]))
    behind = len(set(cover(folder.parts(WRITTEN))) - set(parts)) if found[0] != WRITTEN else 0
    if "report" not in manifest or behind:
        unscored = f", {behind} more are written and not scored" if behind else ""
        warnings.warn(
            f"The run that writes {folder.path} has not ended: {len(parts)} parts are finished{unscored}. The same "
            "command carries it on.",
            stacklevel=3,
        )
    dataset = read_parts(folder, found[0], parts, manifest.get("left_out", {}))
    if found[0] == WRITTEN:  # what an engine gave along is no stage of its own
        columns = [column for kind in TARGETS.values() for column in kind if column in dataset.column_names]
        dataset = dataset.remove_columns(columns)
    return describe(dataset, without_bulk(manifest))


def without_bulk(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it stands in a data set's description: without the list of what is left out."""
    return {key: value for key, value in manifest.items() if key != "left_out"}


def _from_parquet(path: Path) -> Dataset:
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if not files or files[0].suffix != ".parquet":
        raise ValueError(f"{path} is no conversation set: it has neither shards nor Parquet files.")
    dataset = Dataset.from_parquet([str(file) for file in files])
    manifest = ConversationFolder(path).manifest() if path.is_dir() else None
    return describe(dataset, without_bulk(manifest)) if manifest else dataset


def _merged(provenances: Sequence[Mapping[str, Any]], kept: int) -> dict[str, Any]:
    """The provenance of a merged set; its report only where every set has one."""
    first = provenances[0]
    addresses = sorted({str(found.get("address")) for found in provenances})
    merged: dict[str, Any] = {
        **{name: first.get(name) for name in ("format", "base_model", "model_fingerprint", "tokenizer_fingerprint")},
        "address": hashlib.sha256(json.dumps(addresses).encode()).hexdigest(),
        "decided_by": {"merged": addresses},
        "merged_from": [
            {key: found.get(key) for key in ("address", "corpus", "synthesis", "versions")} for found in provenances
        ],
    }
    corpora = [found["corpus"] for found in provenances if "corpus" in found]
    if corpora:
        digest = hashlib.sha256(json.dumps([corpus["sha256"] for corpus in corpora]).encode()).hexdigest()
        merged["corpus"] = {
            "name": " + ".join(dict.fromkeys(corpus["name"] for corpus in corpora)),
            "documents": sum(corpus["documents"] for corpus in corpora),
            "characters": sum(corpus["characters"] for corpus in corpora),
            "sha256": digest,
        }
    reports = [found["report"] for found in provenances if found.get("report")]
    if len(reports) == len(provenances):
        dropped: Counter[str] = Counter()
        for report in reports:
            dropped.update(report["dropped"])
        made = sum(report["made"] for report in reports)
        merged["report"] = {
            "made": made,
            "kept": kept,
            "dropped": dict(dropped),
            "acceptance": round(kept / made, 4) if made else None,
            "generated_tokens": sum(report["generated_tokens"] for report in reports),
            "off_context": sum(report.get("off_context", 0) for report in reports),
            "chunks": sum(report["chunks"] for report in reports),
            "coverage": {name: cover for report in reports for name, cover in report["coverage"].items()},
            "per_chunk": [row for report in reports for row in report.get("per_chunk", [])],
        }
    return merged


def _array(values: Iterable[str]) -> Any:
    import pyarrow as pa

    return pa.array(list(values), type=pa.string())
