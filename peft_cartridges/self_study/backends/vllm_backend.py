"""Generation by vLLM in this process; its prefix caching shares a chunk among all conversations about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..teacher_targets import Targets, top_k_of_tables
from .base import Generation
from .engine_backend import EngineBackend


class VLLMBackend(EngineBackend):
    """A `vllm.LLM` as teacher.

    Args:
        model: Name or path of the model, or a `vllm.LLM` (made with `max_logprobs` of at least `top_k`).
        processing_class: Its tokenizer or processor.
        top_k: Log-probabilities to ask for per position.
        engine_options: Arguments of `vllm.LLM`, where `model` is a name.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, model: Any, processing_class: Any, *, top_k: int = 20, **engine_options: Any) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError(
                "`VLLMBackend` needs vLLM, in an environment of its own: pip install 'peft-cartridges[vllm]'."
            ) from None
        self._sampling = vllm.SamplingParams
        if isinstance(model, str):
            model = vllm.LLM(model=model, **{"enable_prefix_caching": True, "max_logprobs": top_k, **engine_options})
        self.llm = model
        config = model.llm_engine.model_config
        super().__init__(str(config.model), processing_class, top_k=top_k, max_length=config.max_model_len)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """As `ContextSession.generate`; vLLM's log-probabilities are those before the temperature."""
        settings = [
            self._sampling(
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                logprobs=self.k,
                stop_token_ids=sorted(self.end_ids),
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = [request.outputs[0] for request in self._run(prompts, settings)]
        return [
            Generation(list(output.token_ids), top_k_of_tables([_table(p) for p in output.logprobs], self.k))
            for output in outputs
        ]

    def targets(self, rows: Sequence[Sequence[int]], num_predicted: Sequence[int]) -> list[Targets]:
        """As `ContextSession.targets`, by a prefill of each row."""
        settings = self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=self.k, detokenize=False)
        requests = self._run(rows, [settings] * len(rows))
        return [
            top_k_of_tables([_table(position) for position in request.prompt_logprobs[-number:]], self.k)
            for request, number in zip(requests, num_predicted, strict=True)
        ]

    def _run(self, rows: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
        prompts = [{"prompt_token_ids": [*self.context, *row]} for row in rows]
        return self.llm.generate(prompts, list(settings), use_tqdm=False) if prompts else []


def _table(position: Mapping[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}
