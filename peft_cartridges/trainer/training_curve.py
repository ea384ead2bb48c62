"""A picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "training_curve.png"


class TrainingCurveCallback(TrainerCallback):
    """Draws `training_curve.png` at the end of training."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and args.output_dir:
            draw_training_curve(state.log_history, Path(args.output_dir) / FILE_NAME)


def draw_training_curve(log_history: Sequence[dict[str, Any]], path: Path) -> bool:
    """The loss and, where it was evaluated, the shares of the gap closed, over the steps.

    Returns:
        Whether the picture was drawn: matplotlib is installed (`pip install peft-cartridges[eval]`), and something was
        logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = _series(log_history, "loss")
    gaps = {
        label: series
        for label, suffix in (("gold answers", "_gold_gap_closed"), ("conversations", "_conversation_gap_closed"))
        if (series := _series(log_history, suffix))
    }
    if not losses and not gaps:
        return False
    figure = Figure(figsize=(9 if losses and gaps else 5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = iter(figure.subplots(1, bool(losses) + bool(gaps), squeeze=False)[0])
    if losses:
        axes = next(all_axes)
        axes.plot(*zip(*losses, strict=True), marker="." if len(losses) < 60 else "")
        axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(0, None))
        axes.grid(alpha=0.3)
    if gaps:
        axes = next(all_axes)
        for label, series in gaps.items():
            axes.plot([step for step, _ in series], [100 * value for _, value in series], marker="o", label=label)
        axes.axhline(100, color="gray", linestyle=":")
        axes.set(xlabel="step", ylabel="in-context gap closed (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def _series(log_history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [
        (entry["step"], value)
        for entry in log_history
        for key, value in entry.items()
        if "step" in entry and (key == name or (name.startswith("_") and key.endswith(name)))
    ]
