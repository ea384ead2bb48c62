"""`evaluate_cartridge`: what a cartridge is worth on its text, what it changes off it, and what it costs, beside the
same figures for the full text in context and whatever else one would do instead."""

from __future__ import annotations

import functools
import importlib.metadata
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peft import PeftModel
from torch import nn

from ..gate import Gate
from .baselines import Bench, get_baseline
from .config import EvaluationConfig
from .documents import Question, question_from_row
from .gated import gated_result
from .instructions import Instruction, instructions_from_rows
from .judge import Judge
from .measurements import Material, Measuring
from .report import EvaluationReport, SystemResult
from .scoring import row_of_conversation
from .speed import measure_speed
from .system import NotApplicable, System, cartridge_system

# Rows, or what they are made into.
Rows = Sequence[Any]
DEFAULT_BASELINES = ("no_context", "full_text", "first_tokens")


def evaluate_cartridge(
    model: PeftModel,
    processing_class: Any,
    *,
    text: str,
    questions: Rows,
    conversations: Any = None,
    general: Sequence[Mapping[str, Any]] = (),
    general_choices: Rows = (),
    instructions: Rows = (),
    unanswerable: Rows = (),
    baselines: Sequence[str] = DEFAULT_BASELINES,
    bench: Mapping[str, Any] | None = None,
    base_processing_class: Any = None,
    judge: Judge | None = None,
    gate: Gate | None = None,
    args: EvaluationConfig | None = None,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Measures a cartridge and what it stands in for.

    Args:
        model: A PEFT model with an active cartridge.
        processing_class: Its tokenizer or processor, as `load_cartridge` gives it.
        text: The text that the cartridge stands in for.
        questions: On it: `Question`s, or rows with `question` and `answer` (or `answers`; or `options` and `correct`).
        conversations: Held-out rows of a self-study data set, on which the KL to the text in context is measured; by
            default the answers that the model with the text in context gives to `questions`.
        general: Rows of `prompt` and `answer` that have nothing to do with the text.
        general_choices: Multiple choice that has nothing to do with it (MMLU's form: `question`, `options`, `correct`).
        instructions: Prompts with rules that can be checked (IFEval's form).
        unanswerable: Questions that the text does not answer.
        baselines: What to measure beside it; `list_baselines()`. `no_context` and `full_text` always are.
        bench: Other fields of `Bench` for the baselines: `conversations` for LoRA, `kvpress_python`, `encoder`, ….
        base_processing_class: The base model's own tokenizer, for what is measured without the cartridge; by default
            `processing_class`, whose chat template may lack the default system prompt.
        judge: Grades generated answers.
        gate: The cartridge's: the report then has it a second time, with the bare model where the gate rejects.
        args: What is measured, and how much of it.
        command: Kept in the report.
        progress: Called with each system's name as it begins.

    Raises:
        ValueError: there is no question with an answer, a row is malformed, a baseline is unknown, or the model has no
            cartridge.
        ImportError: a metric needs a package that is not installed.
    """
    system = cartridge_system(model, processing_class)
    made = Bench(model, base_processing_class or processing_class, text, system.num_tokens, **(bench or {}))
    return evaluate_systems(
        [system], made, questions=questions, conversations=conversations, general=general,
        general_choices=general_choices, instructions=instructions, unanswerable=unanswerable, baselines=baselines,
        judge=judge, gates={} if gate is None else {system.name: gate}, args=args, command=command, progress=progress,
    )  # fmt: skip


def evaluate_systems(
    systems: Sequence[System],
    bench: Bench,
    *,
    questions: Rows,
    conversations: Any = None,
    general: Sequence[Mapping[str, Any]] = (),
    general_choices: Rows = (),
    instructions: Rows = (),
    unanswerable: Rows = (),
    baselines: Sequence[str] = DEFAULT_BASELINES,
    judge: Judge | None = None,
    gates: Mapping[str, Gate] | None = None,
    args: EvaluationConfig | None = None,
    command: str = "",
    progress: Callable[[str], None] | None = None,
    kept: Mapping[str, SystemResult] | None = None,
    finished: Callable[[str, SystemResult], None] | None = None,
) -> EvaluationReport:
    """As `evaluate_cartridge`, of any systems and the baselines of a bench. A baseline that cannot be measured stands in
    the report with the reason.

    Args:
        gates: By the name of a system: it stands in the report a second time, behind its gate.
        kept: Results of an earlier run with the same arguments, by the names that `finished` was called with; they are
            taken as they are.
        finished: Called with each result as it is there, to keep it.

    Raises:
        ValueError: as `evaluate_cartridge`.
    """
    for name in baselines:
        get_baseline(name)  # refused before anything is computed
    measuring = prepare_measuring(
        bench, questions=questions, conversations=conversations, general=general, general_choices=general_choices,
        instructions=instructions, unanswerable=unanswerable, judge=judge, args=args,
    )  # fmt: skip
    return measure_systems(
        measuring, systems, bench, baselines=baselines, gates=gates, command=command, progress=progress, kept=kept,
        finished=finished,
    )  # fmt: skip


def prepare_measuring(
    bench: Bench,
    *,
    questions: Rows,
    conversations: Any = None,
    general: Sequence[Mapping[str, Any]] = (),
    general_choices: Rows = (),
    instructions: Rows = (),
    unanswerable: Rows = (),
    judge: Judge | None = None,
    args: EvaluationConfig | None = None,
) -> Measuring:
    """What systems are measured with, and the two references that they are held against: computed once for any number of
    `measure_systems` on the same text.

    Raises:
        ValueError, ImportError: as `evaluate_cartridge`.
    """
    args = args or EvaluationConfig()
    asked = [question for question in _questions(questions) if question.answers]
    if not asked:
        raise ValueError("`questions` has no question with a gold answer: nothing can be measured.")
    if args.answer_metrics and args.generate:
        _check_answer_metrics(args)
    rules = list(instructions)
    if rules and not isinstance(rules[0], Instruction):
        rules = instructions_from_rows(rules)
    preamble = bench.codec.preamble
    material = Material(
        text=bench.text,
        questions=_some(asked, args.max_questions, args.seed),
        conversations=[row_of_conversation(row, preamble) for row in conversations or ()],
        general=_general(_some(general, args.max_general_prompts, args.seed)),
        general_choices=_some(_questions(general_choices), args.max_general_prompts, args.seed),
        instructions=_some(rules, args.max_general_prompts, args.seed),
        unanswerable=_some(_questions(unanswerable), args.max_questions, args.seed),
    )
    bare = get_baseline("no_context")(bench)
    try:
        return Measuring(material, args, bare, get_baseline("full_text")(bench), judge=judge)
    except NotApplicable as error:
        return Measuring(material, args, bare, reason=str(error), judge=judge)


def measure_systems(
    measuring: Measuring,
    systems: Sequence[System],
    bench: Bench,
    *,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    gates: Mapping[str, Gate] | None = None,
    command: str = "",
    progress: Callable[[str], None] | None = None,
    kept: Mapping[str, SystemResult] | None = None,
    finished: Callable[[str, SystemResult], None] | None = None,
) -> EvaluationReport:
    """The report of `evaluate_systems`, with references that are there already.

    Raises:
        ValueError: a baseline is unknown.
    """
    args = measuring.args
    say = progress or (lambda name: None)
    wanted = {name: get_baseline(name) for name in dict.fromkeys(["no_context", "full_text", *baselines])}
    done = dict(kept or {})
    made: dict[str, Callable[[], System]] = {
        "no_context": lambda: measuring.bare,
        "full_text": lambda: _there(measuring.full_text, measuring.reason),
    }
    made |= {system.name: functools.partial(_there, system, "") for system in systems}
    of_tokens = [name for name in wanted if name not in made]
    none = "the cartridge is states alone, and has no tokens that a baseline could have as many of"
    made |= {
        name: functools.partial(wanted[name], bench) if bench.num_tokens else functools.partial(_there, None, none)
        for name in of_tokens
    }
    for name, make in made.items():
        if name in done:
            continue
        say(name)
        try:
            done[name] = _measure(make(), measuring, args)
        except NotApplicable as error:
            done[name] = SystemResult(name.replace("_", " "), reason=str(error))
        if finished is not None:
            finished(name, done[name])
    results = []
    for name in made:
        results.append(done[name])
        if name in (gates or {}) and done[name].reason is None:
            results.append(gated_result(done[name], done["no_context"], (gates or {})[name], measuring))
    return EvaluationReport(
        results, len(bench.text_ids), {**asdict(args), "dtype": str(next(bench.model.parameters()).dtype)},
        _versions(bench.model), command,
    )  # fmt: skip


def _there(system: System | None, reason: str) -> System:
    if system is None:
        raise NotApplicable(reason)
    return system


def _measure(system: System, measuring: Measuring, args: EvaluationConfig) -> SystemResult:
    result = SystemResult(
        system.name, system.num_tokens, system.kv_bytes, round(system.seconds, 3), system.flops, system.note,
        {**measuring.on_context(system), **measuring.off_context(system)},
    )  # fmt: skip
    if args.speed and system.engine is None:
        speed = measure_speed(system, measuring.material.questions[0].question, clock=measuring.clock)
        result.first_token_seconds, result.tokens_per_second = speed.first_token_seconds, speed.tokens_per_second
    return result


def _questions(given: Rows) -> list[Question]:
    found = []
    for number, row in enumerate(given):
        try:
            found.append(row if isinstance(row, Question) else question_from_row(row))
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from error
    return found


def _general(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    for number, row in enumerate(rows):
        if not row.get("prompt") or not row.get("answer"):
            raise ValueError(f"`general[{number}]` needs a `prompt` and an `answer`, it has {sorted(row)}.")
    return [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]


def _some(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of them (0: all), the same ones for the same seed, in their order."""
    if not count or len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _check_answer_metrics(args: EvaluationConfig) -> None:
    """Raises what a missing package raises, before anything is computed."""
    from .answers import ANSWER_METRICS

    for name in args.answer_metrics:
        ANSWER_METRICS[name]("a", ["a"])


def _versions(model: nn.Module) -> dict[str, str]:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = ("peft-cartridges", "torch", "transformers", "peft")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"model": str(base.config._name_or_path or type(base).__name__), **found}
