"""What a run is of, kept in its folder, so that nobody carries it on as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import write_text
from ..conversations import read_provenance
from ..conversations.provenance import differences

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer

RUN_FILE = "_run.json"  # pushes to the Hub leave out what begins with an underscore: it tells of the corpus
# A run may be carried on with another number of steps, another batch size (of another machine) or another learning rate
# (after it diverged), but these are what it is.
_SETTINGS = (
    "initialization",
    "initialization_kwargs",
    "loss_type",
    "jsd_beta",
    "loss_temperature",
    "prompt_loss_weight",
    "on_policy_fraction",
    "off_context_share",
    "key_learning_rate",
    "value_learning_rate",
)


def describe_run(trainer: SelfStudyTrainer) -> dict[str, Any]:
    """All that decides what the cartridge learns: JSON-ready, in the form that `differences` compares."""
    model: Any = trainer.model
    config = model.peft_config[model.active_adapter]
    if trainer.study is not None:
        if not trainer.study.decided_by:
            trainer.study.check(model)
        learned = trainer.study.decided_by
    else:
        known = read_provenance(trainer.train_dataset)
        learned = {"conversations": known["address"]} if "address" in known else {}
    return {
        "decided_by": {
            **learned,
            "num_tokens": config.num_tokens,
            **json.loads(json.dumps({name: getattr(trainer.args, name) for name in _SETTINGS}, default=str)),
        }
    }


def check_run(trainer: SelfStudyTrainer) -> None:
    """Whether what lies in `output_dir`, if anything does, may be carried on.

    Raises:
        ValueError: it is a run of something else; the message names what differs.
    """
    folder = trainer.args.output_dir or "."
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): use another `output_dir`.") from None
    if differing := differences(describe_run(trainer), found):
        raise ValueError(
            f"`output_dir` ({folder}) holds the run of another cartridge: {'; '.join(differing.values())}. Give that to "
            "carry it on, or another `output_dir`."
        )


def keep_run(trainer: SelfStudyTrainer) -> None:
    """Says in `output_dir` what the run is of."""
    if trainer.args.should_save:
        write_text(Path(trainer.args.output_dir or ".") / RUN_FILE, json.dumps(describe_run(trainer), indent=2))
