"""Generation by vLLM in this process; its prefix caching shares a chunk among all conversations about it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...chat import ChatCodec
from ...conversations.targets import top_k_of_tables
from .engine import Engine, Generation, Outcome, Request


class VLLMEngine(Engine):
    """A `vllm.LLM`. Requests of any chunks are under way together, and new ones join as others end.

    Args:
        model: Name or path of the model, or a `vllm.LLM` (made with `max_logprobs` of at least `top_k`).
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        top_k: Log-probabilities to ask for per position; 0 for none.
        engine_options: Arguments of `vllm.LLM`, where `model` is a name (`tensor_parallel_size` and others).

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, model: Any, processing_class: Any, *, top_k: int = 20, **engine_options: Any) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError(
                "The engine `vllm` needs vLLM, in an environment of its own: pip install 'peft-cartridges[vllm]'."
            ) from None
        self._sampling = vllm.SamplingParams
        if isinstance(model, str):
            options = {"enable_prefix_caching": True, "max_logprobs": max(top_k, 1), **engine_options}
            model = vllm.LLM(model=model, **options)
        self.llm = model
        config = model.llm_engine.model_config
        self.model_name, self.max_length = str(config.model), config.max_model_len
        self.end_ids = ChatCodec.of(None, processing_class).end_ids
        self.k, self.gives_top_k = top_k, top_k > 0
        # A few more than run at a time wait inside the engine, so that it never waits for us.
        self._most = 2 * model.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._names = itertools.count()
        self._under_way: dict[str, Request] = {}

    @contextlib.contextmanager
    def running(self, wake: threading.Event) -> Iterator[None]:
        try:
            yield
        finally:
            if self._under_way:
                self.llm.llm_engine.abort_request(list(self._under_way))
                self._under_way.clear()

    def room(self) -> int:
        return self._most - len(self._under_way)

    @property
    def works_here(self) -> bool:
        return bool(self._under_way)

    def begin(self, requests: Sequence[Request]) -> None:
        for request in requests:
            name = f"cartridges-{next(self._names)}"
            self._under_way[name] = request
            prompt = {"prompt_token_ids": [*request.context, *request.prompt]}
            self.llm.llm_engine.add_request(name, prompt, self._parameters(request))

    def step(self) -> list[Outcome]:
        if not self._under_way:
            return []
        outcomes = []
        for output in self.llm.llm_engine.step():
            if output.finished and output.request_id in self._under_way:
                request = self._under_way.pop(output.request_id)
                outcomes.append(Outcome(request, self._read(request, output)))
        return outcomes

    def _parameters(self, request: Request) -> Any:
        if request.scored:
            return self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=self.k, detokenize=False)
        return self._sampling(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=self.k if self.gives_top_k else None,
            stop_token_ids=sorted(self.end_ids),
            detokenize=False,
        )

    def _read(self, request: Request, output: Any) -> Generation:
        """vLLM's log-probabilities are those before the temperature."""
        if request.scored:
            tables = [_table(position) for position in output.prompt_logprobs[-request.scored :]]
            return Generation([], top_k_of_tables(tables, self.k))
        found = output.outputs[0]
        top_k = top_k_of_tables([_table(p) for p in found.logprobs], self.k) if self.gives_top_k else None
        return Generation(list(found.token_ids), top_k)


def _table(position: Mapping[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}
