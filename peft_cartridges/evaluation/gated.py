"""A cartridge behind its gate: what it accepts is answered by the cartridge, what it rejects by the bare model.

Nothing is computed anew: each item of a metric is that of the one or of the other.
"""

from __future__ import annotations

from ..gate import Gate
from .measurements import Items, Measuring
from .report import SystemResult

# Of questions that the text does not answer no gate can tell: they are about it.
_NOT_BY_ITEM = ("abstained", "abstained_wrongly", "abstention_separation")


def gated_result(cartridge: SystemResult, bare: SystemResult, gate: Gate, measuring: Measuring) -> SystemResult:
    """The figures of a cartridge behind its gate, with `gate_accepted` (of the questions on the text) and `gate_rejected`
    (of the general prompts).

    Args:
        cartridge: Its figures.
        bare: Those of the model that has read nothing, of the same run.
        gate: The cartridge's.
        measuring: What they were measured with.
    """
    material = measuring.material
    questions, general = gate([q.question for q in material.questions]), gate([p["prompt"] for p in material.general])
    decisions = {
        "gold_nll": questions,
        "choice_accuracy": [a for a, q in zip(questions, material.questions, strict=True) if q.options],
        "general_choice_accuracy": gate([q.question for q in material.general_choices]),
        "instructions_followed": gate([instruction.prompt for instruction in material.instructions]),
        **dict.fromkeys(("teacher_kl", "teacher_agreement"), gate([row.prompt for row in measuring.rows])),
        **dict.fromkeys(("general_kl", "general_agreement", "general_nll", "contamination"), general),
        **dict.fromkeys((*measuring.args.answer_metrics, "judged_right"), questions),
    }
    items = {
        name: _mixed(found, bare.items[name], decisions[name])
        for name, found in cartridge.items.items()
        if name not in _NOT_BY_ITEM and name in bare.items
    }
    items["gate_accepted"] = Items.of(questions)
    if general:
        items["gate_rejected"] = Items.of([not accepted for accepted in general])
    name = f"{cartridge.name}, gated"
    return SystemResult(
        name, cartridge.num_tokens, cartridge.kv_bytes, cartridge.seconds, cartridge.flops, cartridge.note, items
    )


def _mixed(cartridge: Items, bare: Items, accepted: list[bool]) -> Items:
    pairs = [(c if use else b) for use, c, b in zip(accepted, _pairs(cartridge), _pairs(bare), strict=True)]
    return Items([value for value, _ in pairs], [weight for _, weight in pairs])


def _pairs(items: Items) -> list[tuple[float, float]]:
    return list(zip(items.values, items.weights, strict=True))
