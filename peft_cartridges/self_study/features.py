"""The columns of a self-study data set."""

from __future__ import annotations

from datasets import Features, List, Value

from .synthesis_config import SynthesisConfig

_COMMON = {
    "messages": List({"role": Value("string"), "content": Value("string")}),
    "input_ids": List(Value("int32")),
    "completion_mask": List(Value("int8")),
    "chunk_id": Value("string"),
    "context": Value("string"),
    "seed_type": Value("string"),
}
_TARGETS = {
    "hidden_states": {"teacher_hidden_states": List(Value("float16"))},
    "top_k": {"teacher_top_k_ids": List(Value("int32")), "teacher_top_k_logprobs": List(Value("float32"))},
}


def make_features(args: SynthesisConfig) -> Features:
    """Columns of what `args` makes: the common ones, the teacher's targets, and `usefulness` if it is measured."""
    measured = args.min_usefulness > 0 or args.oversampling > 1
    useful = {"usefulness": Value("float32")} if measured else {}
    return Features({**_COMMON, **_TARGETS[args.teacher_targets], **useful})


FEATURES = make_features(SynthesisConfig())
