"""What states are worth: cartridges of small hybrid and recurrent models, with states and without, at equal bytes.

    python -m benchmarks.hybrid                  # trains the models (kept in benchmarks/results/hybrid), then measures
    python -m benchmarks.hybrid --join           # how the states of two cartridges are best made one

The models are transformers' own classes in a small size: a Gated-DeltaNet hybrid (Qwen3.5), a Mamba-2 hybrid (Bamba) and
Mamba-2. They learn one thing, to look up in their context: a document is facts, a key and a value each, all of them drawn
anew in every row; after `ASK` a key is followed by its value. Then each gets cartridges of documents that it never saw,
twice as long as the longest of those that it was trained on. As in self-study a cartridge learns from questions about parts of
the document, answered by the model with that part in context. What is measured is the negative log-likelihood of the
values, each asked for by itself, as the share that is closed of the gap between no context and the right part in context.

Models, and every measurement by itself, are kept: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge, shared_prefix
from peft_cartridges.atomic_files import write_bytes, write_text
from peft_cartridges.quiet import quiet_libraries

BOS, ASK, FIRST = 1, 2, 8
KEYS, VALUES = 32, 16
LONGEST = 16  # facts of a document in training
FACTS, PART = 32, 16  # of a document that becomes a cartridge, and of what its teacher has in context at a time
WIDTH = 64
TOKENS = 8  # of keys and values beside the states
FOLDER = Path(__file__).parent / "results" / "hybrid"

_COMMON = {
    "vocab_size": FIRST + KEYS + VALUES, "hidden_size": WIDTH, "num_hidden_layers": 4,
    "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 3,
}  # fmt: skip
_ATTENTION = {
    "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
_DELTA_NET = {
    **_ATTENTION, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
_BAMBA = {
    **_ATTENTION, "mamba_n_heads": 4, "mamba_d_head": WIDTH // 2, "mamba_d_state": 32, "mamba_chunk_size": 16,
    "initializer_range": 0.1,
}  # fmt: skip
_MAMBA = {"num_heads": 4, "head_dim": WIDTH // 2, "state_size": 64, "n_groups": 1, "chunk_size": 16}
# Name -> class, options of its configuration, rows of a batch and learning rate in training.
MODELS: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "Gated-DeltaNet hybrid (Qwen3.5)": (
        "Qwen3_5TextConfig", {**_DELTA_NET, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 32, 3e-3
    ),
    "Mamba-2 hybrid (Bamba)": ("BambaConfig", {**_BAMBA, "attn_layer_indices": [2]}, 32, 4e-3),
    "Mamba-2": ("Mamba2Config", _MAMBA, 64, 3e-3),
}  # fmt: skip


# -- the task ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Keys and values `[rows, facts]`, token ids."""

    keys: Tensor
    values: Tensor

    @classmethod
    def draw(cls, rows: int, number: int, generator: torch.Generator, keys: range = range(KEYS)) -> Facts:
        """No key twice in a row."""
        drawn = torch.rand(rows, len(keys), generator=generator).argsort(1)[:, :number] + keys.start
        values = torch.randint(VALUES, (rows, number), generator=generator)
        return cls(drawn + FIRST, values + FIRST + KEYS)

    def chosen(self, number: int, rows: int, generator: torch.Generator) -> Facts:
        """Some of each row's facts in any order; of a single row, drawn anew for each of `rows`."""
        keys, values = self.keys.expand(rows, -1), self.values.expand(rows, -1)
        order = torch.rand(keys.shape, generator=generator).argsort(1)[:, :number]
        return Facts(keys.gather(1, order), values.gather(1, order))

    def ids(self) -> Tensor:
        """`[rows, 2 * facts]`."""
        return torch.stack([self.keys, self.values], -1).flatten(1)


def asked(facts: Facts) -> Tensor:
    """Rows that ask for facts, `[rows, 1 + 2 * facts]`: the values are the odd tokens after `ASK`."""
    return torch.cat([torch.full((len(facts.keys), 1), ASK), facts.ids()], 1)


def document(facts: Facts) -> Tensor:
    """`[rows, 1 + 2 * facts]`."""
    return torch.cat([torch.full((len(facts.keys), 1), BOS), facts.ids()], 1)


def answers(model: Any, ids: Tensor, questions: int) -> Tensor:
    """Logits `[rows, questions, vocabulary]` in the places of the last `questions` values of rows that end with them."""
    width = ids.shape[1]
    at = torch.arange(width - 2 * questions, width, 2)
    return model(input_ids=ids, use_cache=False).logits[:, at].float()


# -- the models --------------------------------------------------------------------------------------------------------


def trained_model(name: str, steps: int) -> Any:
    """The model, trained until it knows documents of `LONGEST` facts or for `steps` steps; or as it was kept."""
    class_name, options, batch_size, learning_rate = MODELS[name]
    folder = FOLDER / f"{_slug(name)}-{steps}"
    if (folder / "model.safetensors").is_file():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**_COMMON, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    begin, longest, mean = _continue(folder, model, optimizer) or (0, LONGEST // 2, math.log(VALUES))
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        number = int(torch.randint(2, longest + 1, (1,), generator=generator))
        facts = Facts.draw(batch_size, number, generator)
        questions = min(number, 10)
        front = document(facts)[:, : None if step % 20 else 1]  # at times nothing has been read
        rows = facts.chosen(questions, batch_size, generator)
        logits = answers(model, torch.cat([front, asked(rows)], 1), questions)
        loss = functional.cross_entropy(logits.flatten(0, 1), rows.values.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm_up, decay = min(1.0, (step + 1) / 50), 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * warm_up * decay
        optimizer.step()
        if step % 20:  # longer documents as soon as these are known
            mean = 0.95 * mean + 0.05 * loss.item()
            if mean < 0.6 and longest < LONGEST:
                longest, mean = longest + 1, mean + 0.05
        if step % 50 == 49:
            print(f"{name}: step {step + 1}, {longest} facts, loss {mean:.3f}", flush=True)
            _keep(folder, model, optimizer, (step + 1, longest, mean))
        if longest == LONGEST and mean < 0.03:
            break
    model.save_pretrained(folder)
    return model.eval()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _keep(folder: Path, model: Any, optimizer: torch.optim.Optimizer, progress: tuple[int, int, float]) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    write_bytes(folder / "unfinished.safetensors", save(tensors, {"progress": json.dumps(progress)}))


def _continue(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, int, float] | None:
    """Where training was stopped: the step, the longest document, the mean loss."""
    if not (folder / "unfinished.safetensors").is_file():
        return None
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / "unfinished.safetensors", framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
        for name in file.keys():  # noqa: SIM118
            if name.startswith("optimizer."):
                _, number, part = name.split(".")
                state.setdefault(int(number), {})[part] = file.get_tensor(name)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        step, longest, mean = json.loads(file.metadata()["progress"])
    return step, longest, mean


# -- cartridges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A cartridge to measure: what it holds, and whether it is trained.

    Args:
        states: `recurrent_state` of its configuration.
        tokens: Of keys and values; `None` for as many as have the bytes of the states and `TOKENS`, or the document's.
    """

    states: str
    tokens: int | None
    trained: bool = True


SYSTEMS = {
    "states of the text": System("initialize", 0, trained=False),
    "states, trained": System("train", 0),
    "keys and values, trained": System("skip", None),
    "states of the text; keys and values, trained": System("initialize", TOKENS),
    "states, keys and values, trained": System("train", TOKENS),
    "states and as many keys and values as without, trained": System("train", None),
}


def make_cartridge(model: Any, system: System, facts: Facts) -> PeftModel:
    """A PEFT model with the cartridge as it begins: the first tokens of the document, and the state after all of it."""
    whole = KVPrefix.from_input_ids(model, document(facts))
    per_token = sum(tensor[:, 0].numel() for tensor in (*whole.keys, *whole.values))
    state = sum(tensor.numel() for part in whole.states for tensor in part.values())
    tokens = min(whole.num_tokens, TOKENS + state // per_token) if system.tokens is None else system.tokens
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=tokens, recurrent_state=system.states))
    keys, values = (tuple(tensor[:, :tokens] for tensor in part) for part in (whole.keys, whole.values))
    initialize_cartridge(peft_model, prefix=KVPrefix(keys, values, whole.states, tokens))
    return peft_model


def train_cartridge(peft_model: PeftModel, parts: list[tuple[Facts, KVPrefix]], steps: int, rate: float) -> None:
    """Questions about a part each, ten a row, answered by the model behind that part."""
    generator = torch.Generator().manual_seed(1)
    base = peft_model.get_base_model()
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], betas=(0.9, 0.95))
    for step in range(steps):
        rows, targets = [], []
        for facts, prefix in parts:
            row = asked(facts.chosen(10, 8, generator))
            with torch.no_grad(), peft_model.disable_adapter(), shared_prefix(base, prefix):
                targets.append(answers(base, row, 10).log_softmax(-1))
            rows.append(row)
        student = answers(peft_model, torch.cat(rows), 10).log_softmax(-1)
        loss = functional.kl_div(student, torch.cat(targets), log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = (
            rate * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        optimizer.step()


@torch.no_grad()
def nll(model: Any, facts: Facts) -> float:
    """Of the values of a document's facts, each asked for in a row of its own, nats."""
    rows = Facts(facts.keys.reshape(-1, 1), facts.values.reshape(-1, 1))
    logits = answers(model, asked(rows), 1)
    return functional.cross_entropy(logits.flatten(0, 1), rows.values.flatten()).item()


def split(model: Any, facts: Facts) -> list[tuple[Facts, KVPrefix]]:
    """The parts of a document, each with the prefix that it leaves."""
    cuts = range(0, facts.keys.shape[1], PART)
    parts = [Facts(facts.keys[:, cut : cut + PART], facts.values[:, cut : cut + PART]) for cut in cuts]
    return [(part, KVPrefix.from_input_ids(model, document(part))) for part in parts]


def bounds(model: Any, facts: Facts, parts: list[tuple[Facts, KVPrefix]]) -> dict[str, float]:
    """What is between nothing and everything known."""
    found = {"no context": nll(model, facts)}
    with shared_prefix(model, KVPrefix.from_input_ids(model, document(facts))):
        found["whole document in context"] = nll(model, facts)
    known = []
    for part, prefix in parts:
        with shared_prefix(model, prefix):
            known.append(nll(model, part))
    return {**found, "right part in context": statistics.mean(known)}


def measure_systems(model: Any, seed: int, args: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    """Of one document: every system's likelihood of its values, and bytes."""
    facts = Facts.draw(1, FACTS, torch.Generator().manual_seed(1000 + seed))
    parts = split(model, facts)
    for name, value in bounds(model, facts, parts).items():
        yield {"system": name, "nll": value}
    has_attention = bool(parts[0][1].keys)
    for name, system in SYSTEMS.items():
        if name in known or (system.tokens != 0 and not has_attention):
            continue
        peft_model = make_cartridge(model, system, facts)
        num_bytes = peft_model.base_model.get_kv_prefix().nbytes
        start = time.perf_counter()
        if system.trained:
            train_cartridge(peft_model, parts, args.steps, args.learning_rate)
        found = nll(peft_model.eval(), facts)
        model = peft_model.unload()
        yield {"system": name, "nll": found, "bytes": num_bytes, "seconds": time.perf_counter() - start}


# -- joining -----------------------------------------------------------------------------------------------------------

_JOINT = "that of both texts, read one after the other"
JOINS = {
    "the first one's": lambda first, second: first,
    "the last one's": lambda first, second: second,
    "sum": torch.add,
    "mean": lambda first, second: (first + second) / 2,
}


def measure_joins(model: Any, seed: int, args: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    """Of two documents with keys of their own, half as long: cartridges of each, joined in several ways. Keys and values
    are concatenated; the likelihood is the mean of both documents'."""
    generator = torch.Generator().manual_seed(2000 + seed)
    documents = [Facts.draw(1, PART, generator, keys) for keys in (range(KEYS // 2), range(KEYS // 2, KEYS))]
    parts = [split(model, facts)[0] for facts in documents]
    found = [bounds(model, facts, [part]) for facts, part in zip(documents, parts, strict=True)]
    for name in ("no context", "right part in context"):
        yield {"system": name, "nll": statistics.mean(each[name] for each in found)}
    both = Facts(*(torch.cat([getattr(facts, of) for facts in documents], 1) for of in ("keys", "values")))
    joint = KVPrefix.from_input_ids(model, document(both)).states
    with_keys = bool(parts[0][1].keys)
    system = SYSTEMS["states, keys and values, trained" if with_keys else "states, trained"]
    for trained in (False, True):
        how = "trained" if trained else "of the texts"
        if f"{how}: {_JOINT}" in known:
            continue
        prefixes = []
        for facts, part in zip(documents, parts, strict=True):
            peft_model = make_cartridge(model, system, facts)
            if trained:
                train_cartridge(peft_model, [part], args.steps, args.learning_rate)
            prefixes.append(peft_model.base_model.get_kv_prefix())
            model = peft_model.unload()
        states = {
            f"{conv} of convolutions, {recurrent} of recurrences": tuple(
                {name: JOINS[conv if name.startswith("conv") else recurrent](one[name], other[name]) for name in one}
                for one, other in zip(prefixes[0].states, prefixes[1].states, strict=True)
            )
            for conv in ("the last one's", "sum", "mean")
            for recurrent in JOINS
        }
        states["no state"] = tuple({n: torch.zeros_like(t) for n, t in state.items()} for state in prefixes[0].states)
        states[_JOINT] = joint
        yield {"system": f"{how}: each one's own", "nll": _own(model, prefixes, documents)}
        if with_keys:
            keys_and_values = KVPrefix.concatenate([prefix.without_states() for prefix in prefixes])
            put = {name: replace(keys_and_values, states=state) for name, state in states.items()}
        else:
            put = {name: KVPrefix(states=state, num_tokens=0) for name, state in states.items()}
        for name, prefix in put.items():
            with shared_prefix(model, prefix):
                yield {"system": f"{how}: {name}", "nll": statistics.mean(nll(model, facts) for facts in documents)}


def _own(model: Any, prefixes: list[KVPrefix], documents: list[Facts]) -> float:
    found = []
    for prefix, facts in zip(prefixes, documents, strict=True):
        with shared_prefix(model, prefix):
            found.append(nll(model, facts))
    return statistics.mean(found)


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", action="store_true", help="measure how two cartridges are joined")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--only-train", action="store_true", help="stop when the models are trained")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--model-steps", type=int, default=2000, help="of training a model, at most")
    parser.add_argument("--steps", type=int, default=150, help="of training a cartridge")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    quiet_libraries()
    measure = measure_joins if args.join else measure_systems
    records = []
    for name in args.models:
        model = trained_model(name, args.model_steps).requires_grad_(False)
        if args.only_train:
            continue
        for seed in range(args.documents):
            settings = f"{measure.__name__}-{_slug(name)}-{args.model_steps}-{args.steps}-{args.learning_rate}-{seed}"
            kept = FOLDER / f"{settings}.json"
            found: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
            known = {record["system"] for record in found}
            for record in measure(model, seed, args, known):
                if record["system"] not in known:
                    found.append(record)
                    write_text(kept, json.dumps(found))
            records += [{"model": name, "document": seed, **record} for record in found]
        print_share(name, [record for record in records if record["model"] == name])
    if args.only_train:
        return
    harness.save(args, "hybrid-join" if args.join else "hybrid", records)


def print_share(name: str, records: list[dict[str, Any]]) -> None:
    """A table: means over documents, and the share of the gap that is closed."""
    print(f"\n{name}\n")
    nlls: dict[str, list[float]] = {}
    for record in records:
        nlls.setdefault(record["system"], []).append(record["nll"])
    none, right = nlls["no context"], nlls["right part in context"]
    rows: list[list[Any]] = []
    for system, found in nlls.items():
        closed = [(n - x) / (n - r) for n, x, r in zip(none, found, right, strict=True)]
        sizes = {record["bytes"] for record in records if record["system"] == system and "bytes" in record}
        share = f"{statistics.mean(closed):.0%} ({min(closed):.0%} to {max(closed):.0%})"
        rows.append([system, sizes.pop() if sizes else None, f"{statistics.mean(found):.2f}", share])
    harness.print_table(["", "bytes", "NLL", "share of the gap closed"], rows)


if __name__ == "__main__":
    main()
