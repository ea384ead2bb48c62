"""`cartridges cost --model … --text-tokens … --num-tokens …`: what a cartridge costs, and when it is cheaper than what one
would do instead. Needs the model's configuration only, unless the machine is to be measured."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..atomic_files import write_text
from ..chat import ChatCodec
from ..evaluation.cost import Cost, Traffic, compare_costs, measure_machine, questions_until_cheaper
from ..evaluation.report import markdown_table, pyplot
from ..model_cost import Machine, ModelShape
from ..self_study.making_cost import Making
from .machine_options import add_machine_arguments, machine_from

_GROUPS: dict[str, Any] = {"making": Making, "traffic": Traffic}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="name or folder of the base model (only its configuration is read)"
    )
    parser.add_argument("--text-tokens", type=int, help="length of the text")
    parser.add_argument("--corpus", nargs="+", metavar="FILE", help="instead: the text itself")
    parser.add_argument(
        "--num-tokens", type=int, nargs="+", default=[512], help="lengths of the cartridge (default: 512)"
    )
    parser.add_argument("--dtype-bytes", type=int, default=2, help="of a number (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot seconds in all against questions, e.g. cost.png"
    )

    machine = add_machine_arguments(parser)
    machine.add_argument("--measure", action="store_true", help="instead: time the model on this machine")

    for prefix, kind in _GROUPS.items():
        group, hints, defaults = parser.add_argument_group(prefix), get_type_hints(kind), kind()
        about = _documented(kind)
        for field in fields(kind):
            value = getattr(defaults, field.name)
            group.add_argument(
                f"--{prefix}-{field.name.replace('_', '-')}", type=hints[field.name], default=value,
                help=f"{about[field.name]} (default: {value})".replace("%", "%%"),
            )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(args.model)
    shape = ModelShape.of(config, dtype_bytes=args.dtype_bytes)
    machine, tokens = _machine(args), _text_tokens(args)
    making, traffic = (_settings(args, prefix, kind) for prefix, kind in _GROUPS.items())
    found = {
        size: compare_costs(shape, machine, text_tokens=tokens, num_tokens=size, making=making, traffic=traffic)
        for size in args.num_tokens
    }
    print(
        f"{args.model}: {shape.parameters / 1e9:.2f}B parameters a token, {shape.kv_bytes(1) / 1e3:,.1f} KB of keys and "
        f"values a token; {machine.name}: {machine.flops:.2e} FLOP/s, {machine.bandwidth:.2e} B/s; text of {tokens:,} tokens"
    )
    for size, costs in found.items():
        print(f"\nCartridge of {size:,} tokens\n\n{cost_table(costs)}")
    if args.output:
        record = {
            "model": args.model, "text_tokens": tokens, "machine": asdict(machine), "making": asdict(making),
            "traffic": asdict(traffic), "costs": {str(size): [asdict(c) for c in costs] for size, costs in found.items()},
        }  # fmt: skip
        write_text(args.output, json.dumps(record, indent=1) + "\n")
        print(f"\nWritten to {args.output}")
    if args.plot:
        try:
            plot_costs(found[args.num_tokens[0]], args.plot)
        except ImportError as error:
            raise ValueError(str(error)) from error
        print(f"Plotted in {args.plot}")


def cost_table(costs: list[Cost]) -> str:
    """Markdown: making, a question, memory, and from how many questions on the first row is the cheapest way."""
    ours = costs[0]
    head = [
        "",
        "to make",
        "FLOPs to make",
        "a question",
        "FLOPs a question",
        "KV size",
        "cartridge cheaper from (time)",
        "(FLOPs)",
    ]
    rows = [
        [
            cost.name, _time(cost.making_seconds), f"{cost.making_flops:.2e}", _time(cost.seconds), f"{cost.flops:.2e}",
            f"{cost.kv_bytes / 1e6:,.1f} MB",
            *("" if cost is ours else _count(questions_until_cheaper(ours, cost, unit)) for unit in ("seconds", "flops")),
        ]
        for cost in costs
    ]  # fmt: skip
    return markdown_table(head, rows)


def plot_costs(costs: list[Cost], path: str | Path) -> None:
    """Seconds in all against questions, one line a way.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = pyplot()
    ends = [questions_until_cheaper(costs[0], other) for other in costs[1:]]
    longest = 10 * max([end for end in ends if math.isfinite(end)] or [1000.0])
    counts = [longest ** (step / 100) for step in range(101)]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for cost in costs:
        axes.plot(counts, [cost.total(count) for count in counts], label=cost.name)
    axes.set(xscale="log", yscale="log", xlabel="questions", ylabel="machine seconds in all, making included")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _machine(args: argparse.Namespace) -> Machine:
    if args.measure:
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        return measure_machine(model.eval())
    return machine_from(args)


def _text_tokens(args: argparse.Namespace) -> int:
    if (args.text_tokens is None) == (args.corpus is None):
        raise ValueError("give one of --text-tokens and --corpus.")
    if args.text_tokens is not None:
        return int(args.text_tokens)
    text = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in args.corpus)
    return len(ChatCodec(None, AutoTokenizer.from_pretrained(args.model)).encode_context(text))


def _settings(args: argparse.Namespace, prefix: str, kind: Any) -> Any:
    return kind(**{field.name: getattr(args, f"{prefix}_{field.name}") for field in fields(kind)})


def _documented(kind: type) -> dict[str, str]:
    """What a data class's docstring says of each field; of two that share a line, both have it."""
    lines = [line.strip() for line in (kind.__doc__ or "").splitlines() if line.startswith("        ")]
    found: dict[str, str] = {}
    for line in lines:
        names, colon, text = line.partition(": ")
        if colon and all(name.replace("_", "").isalpha() for name in names.split(", ")):
            found |= dict.fromkeys(names.split(", "), text.rstrip("."))
    return found


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _count(questions: float) -> str:
    return "never" if math.isinf(questions) else f"{questions:,.0f}"
