"""What a cartridge is worth, on its text and off it, and what it costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model_cost import Machine, ModelShape
    from ..self_study.making_cost import Making
    from .baselines import Bench, list_baselines, register_baseline
    from .config import EvaluationConfig
    from .context_gap import ContextGap, measure_context_gap
    from .cost import Traffic, compare_costs, measure_machine, questions_until_cheaper
    from .documents import Document, Question
    from .evaluate import evaluate_cartridge, evaluate_systems
    from .gold_answers import gold_answer_nll
    from .instructions import Instruction
    from .intervals import Estimate, bootstrap
    from .judge import Judge
    from .report import EvaluationReport
    from .system import NotApplicable, System, prefix_system
    from .tasks import TASKS, load_task, make_needles

# Imported when they are first used: training asks for no more than likelihoods.
_LAZY = {
    "TASKS": "tasks",
    "Bench": "baselines",
    "ContextGap": "context_gap",
    "Document": "documents",
    "Estimate": "intervals",
    "EvaluationConfig": "config",
    "EvaluationReport": "report",
    "Instruction": "instructions",
    "Judge": "judge",
    "Machine": ".model_cost",
    "Making": ".self_study.making_cost",
    "ModelShape": ".model_cost",
    "NotApplicable": "system",
    "Question": "documents",
    "System": "system",
    "Traffic": "cost",
    "bootstrap": "intervals",
    "compare_costs": "cost",
    "evaluate_cartridge": "evaluate",
    "evaluate_systems": "evaluate",
    "gold_answer_nll": "gold_answers",
    "list_baselines": "baselines",
    "load_task": "tasks",
    "make_needles": "tasks",
    "measure_context_gap": "context_gap",
    "measure_machine": "cost",
    "prefix_system": "system",
    "questions_until_cheaper": "cost",
    "register_baseline": "baselines",
}

__all__ = [
    "TASKS",
    "Bench",
    "ContextGap",
    "Document",
    "Estimate",
    "EvaluationConfig",
    "EvaluationReport",
    "Instruction",
    "Judge",
    "Machine",
    "Making",
    "ModelShape",
    "NotApplicable",
    "Question",
    "System",
    "Traffic",
    "bootstrap",
    "compare_costs",
    "evaluate_cartridge",
    "evaluate_systems",
    "gold_answer_nll",
    "list_baselines",
    "load_task",
    "make_needles",
    "measure_context_gap",
    "measure_machine",
    "prefix_system",
    "questions_until_cheaper",
    "register_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
