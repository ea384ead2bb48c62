"""A real vLLM with cartridges: its answers are those of transformers, whatever the cache has to go through."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own: make test-vllm)")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from peft_cartridges import Gate
from peft_cartridges.adapter_folder import read_cartridge, write_cartridge
from peft_cartridges.composition import NamedCartridge, join_cartridges
from peft_cartridges.serving import CartridgeLLM
from tests.serving.models import SHAPES, answers, save_base, save_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

# Blocks have 32 tokens: shorter than one, no multiple, and a multiple of it.
LENGTHS = (5, 37, 64, 100)
STEPS = 8
PROMPTS = [token_ids(length, seed=length).tolist() for length in (1, 7, 40)]
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=2)


class Setup:
    """A base model, its cartridges, and an engine that has them."""

    def __init__(self, folder: Path, architecture: str, **engine: Any) -> None:
        self.architecture, base = architecture, folder / "base"
        save_base(base, architecture)
        self.folders: dict[str | None, Path | None] = {None: None}
        for length in LENGTHS:
            self.folders[f"c{length}"] = save_cartridge(
                folder / f"c{length}", self.model(), length, seed=length, base=str(base)
            )
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}
        cartridges = {name: path for name, path in self.folders.items() if name and path}
        self.llm = CartridgeLLM(str(base), cartridges, **{**options, "disable_log_stats": False, **engine})

    def model(self) -> PreTrainedModel:
        return tiny_model(self.architecture, **SHAPES[self.architecture])

    def check(self, requests: Sequence[tuple[str | None, list[int]]], params: SamplingParams = GREEDY) -> list[Any]:
        """Every request's tokens and their log-probabilities are those of transformers."""
        outputs = self.generate(requests, params)
        for (name, prompt), output in zip(requests, outputs, strict=True):
            tokens, logprobs = answers(self.model(), self.folders[name], prompt, params.max_tokens or 0)
            assert output.prompt_token_ids == prompt
            assert list(output.outputs[0].token_ids) == tokens, name
            for step, (token, found) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True)):
                assert found[token].logprob == pytest.approx(float(logprobs[step, token]), abs=2e-4), name
        return outputs

    def generate(self, requests: Sequence[tuple[str | None, list[int]]], params: SamplingParams) -> list[Any]:
        prompts = [{"prompt_token_ids": prompt} for _, prompt in requests]
        return self.llm.generate(prompts, params, cartridge=[name for name, _ in requests], use_tqdm=False)

    def counted(self, name: str) -> int:
        return int(sum(metric.value for metric in self.llm.get_metrics() if metric.name == name))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    setup = Setup(tmp_path_factory.mktemp("llama"), "llama", gpu_memory_utilization=0.05)
    yield setup
    setup.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """Sliding windows of 8 tokens in two of three layers, prefill in chunks, 12 blocks of cache in all, and room for
    one cartridge in host memory."""
    setup = Setup(
        tmp_path_factory.mktemp("gemma"), "gemma3", num_gpu_blocks_override=12, max_num_batched_tokens=32,
        max_num_seqs=8, host_bytes=250_000, gpu_memory_utilization=0.05,
    )  # fmt: skip
    yield setup
    setup.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def everything(setup: Setup) -> list[tuple[str | None, list[int]]]:
    return [(name, prompt) for prompt in PROMPTS for name in setup.folders]


def test_answers_are_those_of_transformers(llama: Setup) -> None:
    """All cartridges and the bare base in one batch; then again, from the prefix cache."""
    outputs = llama.check(everything(llama))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 12
    llama.check(everything(llama))


def test_a_cartridge_is_shared_among_its_requests(llama: Setup) -> None:
    prompts = [token_ids(9, seed=100 + index).tolist() for index in range(6)]
    names = ("vllm:external_prefix_cache_hits", "vllm:prefix_cache_hits")
    llama.check([("c100", prompts[0])])
    before = [llama.counted(name) for name in names]
    llama.check([("c100", prompt) for prompt in prompts])
    external, local = (llama.counted(name) - old for name, old in zip(names, before, strict=True))
    # Three full blocks of 32 are found in the cache; the four tokens that share a block with a prompt are written.
    assert (external, local) == (6 * 4, 6 * 96)


def test_compositions(llama: Setup, tmp_path: Path) -> None:
    parts = [NamedCartridge(name, *read_cartridge(llama.folders[name])) for name in ("c37", "c5")]  # type: ignore[arg-type]
    write_cartridge(tmp_path, *join_cartridges(parts))
    tokens, _ = answers(llama.model(), tmp_path, PROMPTS[1], STEPS)
    reversed_tokens, _ = answers(llama.model(), llama.folders["c37"], PROMPTS[1], STEPS)
    (joined,) = llama.generate([("c37+c5", PROMPTS[1])], GREEDY)
    assert list(joined.outputs[0].token_ids) == tokens != reversed_tokens


def test_n_and_penalties(llama: Setup) -> None:
    """A penalty on the prompt's tokens sees the client's tokens, and no placeholder."""
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, repetition_penalty=1.7)
    (output,) = llama.generate([("c64", PROMPTS[2])], params)
    model, ids = llama.model(), list(PROMPTS[2])
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, llama.folders["c64"])
    for _ in range(STEPS):
        with torch.no_grad():
            logits = peft_model(input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        ids.append(int(logits.argmax()))
    assert list(output.outputs[0].token_ids) == ids[len(PROMPTS[2]) :]
    several = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=STEPS, ignore_eos=True)
    (output,) = llama.generate([("c64", PROMPTS[2])], several)
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    assert output.prompt_token_ids == PROMPTS[2]


def test_a_request_that_shuns_the_prefix_cache_keeps_its_cartridge(llama: Setup) -> None:  # house-ok: `check` asserts
    params = SamplingParams(
        temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=2, skip_reading_prefix_cache=True
    )
    llama.check([("c100", PROMPTS[1])], params)


def test_chat_has_the_same_ids_as_the_tokenizer(llama: Setup) -> None:
    messages = [{"role": "user", "content": "what is the sea ?"}]
    output = llama.llm.chat(messages, GREEDY, cartridge="c64", use_tqdm=False)[0]  # type: ignore[arg-type]
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert output.prompt_token_ids == ids
    assert list(output.outputs[0].token_ids) == answers(llama.model(), llama.folders["c64"], ids, STEPS)[0]


def test_what_the_gate_rejects_is_answered_by_the_base(llama: Setup, tmp_path: Path) -> None:
    """In a batch with others, each behind its own chat template; `lora_request` names what answered."""
    folder = save_cartridge(tmp_path / "gated", llama.model(), 50, seed=50, base=llama.llm.cartridges.base.name)
    Gate.make("what is the sea ? the sea , the sea .", tiny_tokenizer()).save_pretrained(folder)
    entry = llama.llm.cartridges.load("gated", str(folder))
    entry.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    about, other = "what is the sea ?", "write a haiku now"
    own = {text: tiny_tokenizer()(f"{text} ", add_special_tokens=False)["input_ids"] for text in (about, other)}

    def chat(**options: Any) -> list[Any]:
        conversations = [[{"role": "user", "content": text}] for text in (other, about, about)]
        return llama.llm.chat(
            conversations, [GREEDY] * 3, cartridge=["gated", "c64", "gated"], use_tqdm=False, **options
        )

    def answered(output: Any, path: Path | None, name: str | None) -> None:
        assert (output.lora_request.lora_name if output.lora_request else None) == name
        assert list(output.outputs[0].token_ids) == answers(llama.model(), path, output.prompt_token_ids, STEPS)[0]

    rejected, ungated, accepted = chat()
    answered(rejected, None, None)
    answered(ungated, llama.folders["c64"], "c64")
    answered(accepted, folder, "gated")
    assert accepted.prompt_token_ids == own[about] and rejected.prompt_token_ids != own[other]
    assert entry.decisions == {"accepted": 1, "rejected": 1}
    regardless, *_ = chat(gate=False)
    answered(regardless, folder, "gated")
    assert regardless.prompt_token_ids == own[other]
    prompts = [other, {"prompt": about}, {"prompt_token_ids": own[other]}]  # token ids say nothing to a gate
    outputs = llama.llm.generate(prompts, GREEDY, cartridge="gated", use_tqdm=False)
    for output, path in zip(outputs, (None, folder, folder), strict=True):
        answered(output, path, path and "gated")
    assert entry.decisions == {"accepted": 2, "rejected": 2}
    llama.llm.cartridges.unload("gated")


def test_refused_before_the_engine_hears_of_it(llama: Setup) -> None:
    with pytest.raises(ValueError, match=r"no cartridge 'other'. There are: c5, c37"):
        llama.generate([("other", PROMPTS[0])], GREEDY)
    with pytest.raises(ValueError, match="has 1 names for 2 requests"):
        llama.llm.generate(["the", "sea"], GREEDY, cartridge=["c64"])
    with pytest.raises(VLLMValidationError, match="has 200 tokens and cartridge 'c64' 64"):
        llama.generate([("c64", token_ids(200).tolist())], GREEDY)
    with pytest.raises(VLLMValidationError, match="Log-probabilities of the prompt"):
        llama.generate([("c64", PROMPTS[0])], SamplingParams(prompt_logprobs=1))
    # The longest that there is room for; its answer is cut where the context ends.
    (output,) = llama.generate([("c64", token_ids(190).tolist())], GREEDY)
    assert len(output.outputs[0].token_ids) == 2 and output.outputs[0].finish_reason == "length"


def test_a_request_by_hand_that_is_wrong_fails_alone(llama: Setup) -> None:
    entry = llama.llm.cartridges.find("c64")
    assert entry is not None
    placeholders = entry.stored.placeholder_ids(llama.llm._alphabet)
    wrong = [
        ("0" * 64, placeholders + PROMPTS[1]),  # no such cartridge
        ("../../../etc/passwd", placeholders + PROMPTS[1]),
        (entry.stored.digest, [*placeholders[:-1], 9, *PROMPTS[1]]),  # not its placeholders
        (entry.stored.digest, token_ids(80).tolist()),
    ]
    for digest, ids in wrong:
        params = SamplingParams(
            temperature=0, max_tokens=STEPS, extra_args={"kv_transfer_params": {"cartridge": digest}}
        )
        (output,) = llama.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        assert output.outputs[0].finish_reason == "error" and not output.outputs[0].token_ids
    llama.check([("c64", PROMPTS[1]), (None, PROMPTS[1])])


def test_a_file_that_is_damaged_under_the_engine_fails_its_requests_only(llama: Setup, tmp_path: Path) -> None:
    folder = save_cartridge(tmp_path / "late", llama.model(), 45, seed=45, base=llama.llm.cartridges.base.name)
    entry = llama.llm.cartridges.load("late", str(folder))
    path = llama.llm.cartridges.store.path(entry.stored.digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    late, other = llama.generate([("late", PROMPTS[1]), ("c37", PROMPTS[1])], GREEDY)
    assert late.outputs[0].finish_reason == "error"
    assert list(other.outputs[0].token_ids) == answers(llama.model(), llama.folders["c37"], PROMPTS[1], STEPS)[0]
    path.write_bytes(whole)
    (late,) = llama.generate([("late", PROMPTS[1])], GREEDY)
    assert list(late.outputs[0].token_ids) == answers(llama.model(), folder, PROMPTS[1], STEPS)[0]


def test_a_vllm_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a newer one than was tested is warned of."""
    spec = importlib.util.find_spec("peft_cartridges.serving.connector")
    assert spec is not None and spec.loader is not None
    monkeypatch.setattr("vllm.__version__", "0.31.9+cpu")
    with pytest.raises(ImportError, match=r"need vLLM 0\.32 or newer, and this is 0\.31\.9.*pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    warned: list[str] = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args: warned.append(text % args))
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)  # dataclasses look their module up
    spec.loader.exec_module(again)
    assert len(warned) == 1 and "tested with vLLM 0.32, not with 0.33.0" in warned[0]


def test_sliding_windows_and_chunked_prefill(gemma: Setup) -> None:  # house-ok: `check` asserts
    gemma.check(everything(gemma))


def test_preemption_and_eviction(gemma: Setup) -> None:
    """More requests than the cache has room for, of cartridges that push each other out, on the device and in host
    memory: what was preempted gets its cartridge again."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
    requests = [(name, PROMPTS[1] + [8 + index]) for index in range(3) for name in ("c100", "c37", "c64", None)]
    gemma.check(requests, params)
    assert gemma.counted("vllm:num_preemptions") > 0
    assert gemma.counted("vllm:cartridge_host_evictions") > 0


# house-ok: `check` asserts
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2},
        # On CPU, vLLM's second stage needs a warm-up run, which it leaves out where nothing is traced.
        {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}},
    ],
    ids=["heads", "layers"],
)
def test_parallel_ranks_take_their_part(
    parallel: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks of vLLM on CPU want two cores")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    setup = Setup(tmp_path, "llama", distributed_executor_backend="mp", **parallel)
    try:
        setup.check(everything(setup))
    finally:
        setup.llm.llm_engine.engine_core.shutdown()
