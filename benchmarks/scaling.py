"""What a self-study costs as the corpus, the cartridge and the number of conversations grow.

    python -m benchmarks.scaling

One of the three is varied at a time, the others stay at the first value of their list; synthesis and training seconds of
this package, and a plot beside the JSON (needs matplotlib, which the `eval` extra brings).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import self_study
from benchmarks.harness import base_parser, median, print_table, run_in_turns, save, worker_settings


def main() -> None:
    parser = base_parser(__doc__)
    self_study.add_arguments(parser)
    parser.set_defaults(rounds=1)
    parser.add_argument("--corpus-lengths", type=int, nargs="+", default=[4000, 1000, 2000])
    parser.add_argument("--cartridge-lengths", type=int, nargs="+", default=[256, 64, 1024])
    parser.add_argument("--numbers", type=int, nargs="+", default=[64, 32, 128])
    args = parser.parse_args()
    axes = {
        "document_tokens": args.corpus_lengths,
        "num_tokens": args.cartridge_lengths,
        "conversations": args.numbers,
    }
    first = {name: values[0] for name, values in axes.items()}
    measured: dict[tuple[int, ...], dict[str, float | None]] = {}
    points: list[dict[str, Any]] = []
    for axis, values in axes.items():
        for value in sorted(values):
            chosen = {**first, axis: value}
            if (key := tuple(chosen.values())) not in measured:
                settings = worker_settings(args, **chosen)
                rounds = run_in_turns("benchmarks.self_study", ["ours"], settings, args.rounds)["ours"]
                measured[key] = {part: median(rounds, f"{part}_seconds") for part in ("synthesis", "training")}
            points.append({"axis": axis, "value": value, **measured[key]})
    print_table(
        ["varied", "value", "synthesis, s", "training, s"],
        [[point["axis"], point["value"], point["synthesis"], point["training"]] for point in points],
    )
    path = save(args, "scaling", {"first": first, "points": points})
    _plot(points, path.with_suffix(".png"))


def _plot(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = {
        "document_tokens": "tokens of the corpus",
        "num_tokens": "tokens of the cartridge",
        "conversations": "conversations",
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3, sharey=True), names, strict=True):
        chosen = [point for point in points if point["axis"] == axis]
        for part in ("synthesis", "training"):
            axes.plot([point["value"] for point in chosen], [point[part] for point in chosen], marker="o", label=part)
        axes.set_xlabel(names[axis])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].set_ylim(bottom=0)  # of all three: they share it
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
    print(f"Plot in {path}")


if __name__ == "__main__":
    main()
