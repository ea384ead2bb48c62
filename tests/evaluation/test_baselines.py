"""Baselines against their own libraries' direct calls, and the reasons of those that cannot be measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from peft_cartridges import KVPrefix
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import Bench, NotApplicable, System, list_baselines, register_baseline
from peft_cartridges.evaluation.answers import generate_answers
from peft_cartridges.evaluation.baselines import BASELINES, get_baseline
from peft_cartridges.evaluation.baselines.lora import equal_rank
from peft_cartridges.evaluation.baselines.presses import PRESSES
from peft_cartridges.evaluation.baselines.retrieval import OwnStates, choose_passages, split_passages
from peft_cartridges.evaluation.scoring import row_of_answer, score_rows
from peft_cartridges.evaluation.system import bare_system, cartridge_system, prefix_system
from tests.exactness import cartridge_model
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = " ".join(f"w{index}" for index in range(50, 120)) + " the old captain says yes . the new ship is red ."
CODEC = ChatCodec(None, TOKENIZER)
ROWS = [row_of_answer(CODEC, "what is the ship ?", "the ship is red ."), row_of_answer(CODEC, "who ?", "yes .")]


def _bench(num_tokens: int = 16, **options: Any) -> Bench:
    return Bench(tiny_model(), TOKENIZER, TEXT, num_tokens, **options)


def _nll(system: System) -> list[float]:
    return [score.nll for score in score_rows(system, ROWS)]


def _behind_text(text: str, max_tokens: int | None = None) -> list[float]:
    model = tiny_model()
    return _nll(prefix_system("x", model, CODEC, KVPrefix.from_text(model, CODEC, text, max_tokens=max_tokens)))


def test_texts_in_context() -> None:
    bench = _bench()
    assert _nll(get_baseline("full_text")(bench)) == pytest.approx(_behind_text(TEXT), abs=1e-4)
    first = get_baseline("first_tokens")(bench)
    assert _nll(first) == pytest.approx(_behind_text(TEXT, 16), abs=1e-4) and first.num_tokens == 16
    assert _nll(get_baseline("no_context")(bench)) == pytest.approx(_nll(bare_system(tiny_model(), CODEC)), abs=1e-4)


def test_a_summary_is_what_the_model_writes_behind_the_text() -> None:
    bench = _bench()
    system = get_baseline("summary")(bench)
    assert 0 < system.num_tokens <= 16 and system.seconds > 0
    request = (
        "Write a summary of the whole text above, with all facts, names and numbers that a reader may ask about, in "
    )
    whole = get_baseline("full_text")(bench)
    ids = generate_answers(whole, [request + "at most 10 words."], max_new_tokens=16)[0]
    assert _nll(system) == pytest.approx(_behind_text(CODEC.decode(ids), 16), abs=1e-4)


def test_passages_are_the_text() -> None:
    passages = split_passages(TOKENIZER, TEXT, 10)
    assert "".join(passages) == TEXT and len(passages) == 9
    assert all(len(TOKENIZER(passage)["input_ids"]) <= 10 for passage in passages)
    assert choose_passages(["a ", "b ", "c "], [2, 0, 1], lambda text: len(text) <= 4) == "a\n\nc"
    assert choose_passages(["long "], [0], lambda text: False) == "long"


def test_bm25_ranks_as_the_library_does() -> None:
    bm25s = pytest.importorskip("bm25s")
    longer = Bench(tiny_model(), TOKENIZER, " ".join([TEXT] + ["w9 w10 w11"] * 60 + ["harbor light keeper"]), 60)
    passages = split_passages(CODEC, longer.text)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, stopwords="en", show_progress=False), show_progress=False)
    query = bm25s.tokenize(["what is the ship ?"], stopwords="en", show_progress=False)
    ranking = index.retrieve(query, k=len(passages), show_progress=False)[0][0].tolist()
    best = passages[ranking[0]]
    assert "ship" in best
    row = ROWS[:1]
    (score,) = score_rows(get_baseline("bm25")(longer), row)
    model = tiny_model()
    plain = prefix_system("x", model, CODEC, KVPrefix.from_text(model, CODEC, best, max_tokens=60))
    assert score.nll == pytest.approx(score_rows(plain, row)[0].nll, abs=1e-4)


class _Encoder:
    """Embeds a text by how often it has each of three words."""

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([[text.count(word) + 0.01 for word in ("ship", "light", "w9")] for text in texts])


def test_dense_passages_are_the_nearest() -> None:
    text = " ".join(["w9 w10 w11"] * 32 + ["light harbor keeper"] * 32 + ["ship captain red"] * 32)
    model = tiny_model()
    system = get_baseline("dense")(Bench(model, TOKENIZER, text, 100, encoder=_Encoder()))
    best = split_passages(CODEC, text)[2]
    assert "ship" in best
    plain = prefix_system("x", model, CODEC, KVPrefix.from_text(model, CODEC, best, max_tokens=100))
    assert score_rows(system, ROWS[:1])[0].nll == pytest.approx(score_rows(plain, ROWS[:1])[0].nll, abs=1e-4)
    assert system.kv_bytes == 100 * KVPrefix.from_input_ids(model, [1]).nbytes


def test_without_an_encoder_the_models_own_states_are_averaged() -> None:
    bench = _bench(16)
    texts = ["the ship is red .", "w9 w10"]
    with torch.no_grad():
        states = [
            bench.model.model(torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state[0] for text in texts
        ]
    expected = torch.stack([state.mean(0) for state in states]).numpy()
    assert OwnStates(bench).encode(texts) == pytest.approx(expected, abs=1e-5)
    assert get_baseline("dense")(bench).name == "dense passages, the model's own states"


def test_an_encoder_by_name_is_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.models")  # 6 has moved it, and knows the old name
    bench = _bench(16)
    bench.model.save_pretrained(tmp_path / "plain")
    without_template = tiny_tokenizer()  # with one, sentence-transformers embeds a text as a user's message
    without_template.chat_template = None
    without_template.save_pretrained(tmp_path / "plain")
    reader = modules.Transformer(str(tmp_path / "plain"))
    pooling = modules.Pooling(bench.model.config.hidden_size, "mean")
    direct = library.SentenceTransformer(modules=[reader, pooling], device="cpu")
    own = OwnStates(bench).encode(["the ship is red ."])
    assert own == pytest.approx(direct.encode(["the ship is red ."]), abs=1e-4)
    direct.save(str(tmp_path / "encoder"))
    bench.encoder = str(tmp_path / "encoder")
    system = get_baseline("dense")(bench)
    assert system.name == "dense passages, encoder"
    passages = split_passages(CODEC, TEXT)
    found = library.util.semantic_search(direct.encode([ROWS[0].prompt]), direct.encode(passages), top_k=1)
    best = passages[int(found[0][0]["corpus_id"])]
    assert _nll(system)[0] == pytest.approx(_behind_text(best.strip(), 16)[0], abs=1e-3)


def test_untrained_cartridges() -> None:
    bench = _bench(unrelated_text="sea " * 40)
    systems = {name: get_baseline(name)(bench) for name in list_baselines() if name.startswith("untrained")}
    assert "untrained_most_attended" in systems and all(system.num_tokens == 16 for system in systems.values())
    assert len({round(_nll(system)[0], 3) for system in systems.values()}) == len(systems)
    assert _nll(systems["untrained_unrelated_text"]) == pytest.approx(_behind_text("sea " * 40, 16), abs=1e-4)
    # They are made beside a cartridge too, which stays as it is.
    model = tiny_model()
    bench.model = cartridge_model(model, KVPrefix.from_text(model, CODEC, TEXT)[:4])
    before = _nll(cartridge_system(bench.model, CODEC))
    beside = get_baseline("untrained_most_attended")(bench)
    assert _nll(beside) == pytest.approx(_nll(systems["untrained_most_attended"]), abs=1e-3)
    assert _nll(cartridge_system(bench.model, CODEC)) == before and list(bench.model.peft_config) == ["default"]


@pytest.mark.parametrize("bits", [4, 2])
def test_a_quantized_cache_is_read_as_transformers_reads_it(bits: int) -> None:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantizedCache

    bench = _bench()
    system = get_baseline(f"quantized_{bits}bit")(bench)
    model = tiny_model()
    cache = QuantizedCache(backend="quanto", config=model.config, nbits=bits)
    with torch.no_grad():
        model(input_ids=torch.tensor([bench.text_ids]), past_key_values=cache)
        logits = model(input_ids=torch.tensor([ROWS[0].ids]), past_key_values=cache).logits[0].log_softmax(-1)
    expected = -sum(logits[-ROWS[0].length - 1 + i, token].item() for i, token in enumerate(ROWS[0].answer_ids))
    assert _nll(system)[0] == pytest.approx(expected, abs=1e-3)
    assert system.kv_bytes < KVPrefix.from_text(model, CODEC, TEXT).nbytes / 4


def test_lora_has_the_bytes_and_learns_the_conversations() -> None:
    model = tiny_model()
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    per_rank = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert equal_rank(model, 3 * per_rank + 1) == 3 and equal_rank(model, 1) == 1
    rows = [
        {"input_ids": row.ids, "completion_mask": [0] * (len(row.ids) - row.length) + [1] * row.length} for row in ROWS
    ]
    bench = _bench(num_tokens=20, conversations=Dataset.from_list(rows * 8), steps=40)
    system = get_baseline("lora")(bench)
    before = _nll(bare_system(tiny_model(), CODEC))
    with torch.no_grad():
        logits = [system.model(torch.tensor([CODEC.preamble + row.ids])).logits[0] for row in ROWS]
    likely = [one.log_softmax(-1)[-row.length - 1 : -1] for one, row in zip(logits, ROWS, strict=True)]
    told = [-p.gather(-1, torch.tensor(row.answer_ids)[:, None]).sum() for p, row in zip(likely, ROWS, strict=True)]
    assert _nll(system) == pytest.approx([float(nll) for nll in told], abs=1e-4)
    assert all(after < start - 0.5 for after, start in zip(_nll(system), before, strict=True))
    assert _nll(get_baseline("no_context")(bench)) == pytest.approx(before, abs=1e-4)  # the model itself is untouched
    # Beside a cartridge it is the same, and the cartridge stays.
    model = tiny_model()
    bench.model = cartridge_model(model, KVPrefix.from_text(model, CODEC, TEXT)[:4])
    with_cartridge = _nll(cartridge_system(bench.model, CODEC))
    assert _nll(get_baseline("lora")(bench)) == pytest.approx(_nll(system), abs=1e-3)
    assert _nll(cartridge_system(bench.model, CODEC)) == with_cartridge


def test_reasons() -> None:
    short = Bench(tiny_model(max_position_embeddings=128), TOKENIZER, TEXT, 8)
    for bench, name, reason in (
        (_bench(encoder="/nowhere/encoder"), "dense", "sentence-transformers|the encoder '/nowhere/encoder' could not"),
        (_bench(), "lora", "needs the self-study conversations"),
        (_bench(), "untrained_unrelated_text", "no unrelated text"),
        (_bench(), "kvpress_kvzip", "--kvpress-python kvpress-env/bin/python"),
        (_bench(kvpress_python="/nowhere/python"), "kvpress_kvzip", "/nowhere/python does not run"),
        (_bench(kvpress_python=sys.executable), "kvpress_kvzip", "No module named 'kvpress'"),
        (short, "full_text", "does not fit"),
        (short, "summary", "does not fit"),
        (short, "quantized_4bit", "does not fit"),
    ):
        with pytest.raises(NotApplicable, match=reason) as raised:
            get_baseline(name)(bench)
        assert "\n" not in str(raised.value)


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bm25s", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotApplicable, match=r"pip install 'peft-cartridges\[eval\]'"):
        get_baseline("bm25")(_bench())
    with pytest.raises(NotApplicable, match=r"pip install 'peft-cartridges\[baselines\]'"):
        get_baseline("dense")(_bench(encoder="some/encoder"))


def test_a_method_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_cartridges.evaluation.baselines.registry.BASELINES", dict(BASELINES))
    register_baseline("mine", lambda bench: bare_system(bench.model, bench.codec, "mine"))
    assert get_baseline("mine")(_bench()).name == "mine"
    with pytest.raises(ValueError, match="`bm25` already"):
        register_baseline("bm25", lambda bench: bare_system(bench.model, bench.codec))
    with pytest.raises(ValueError, match="`num_tokens` must be at least 0"):
        _bench(-1)


_DIRECT = """
import json, sys, torch, kvpress
from transformers import AutoModelForCausalLM, DynamicCache
folder, name, ratio, context, row, length = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
cache = DynamicCache()
with torch.no_grad():
    with getattr(kvpress, name)(compression_ratio=ratio)(model):
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
    logits = torch.cat([  # one by one: kvpress masks what some heads drop, and finds no mask for many queries at once
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position]])).logits[0]
        for position, token in enumerate(row, start=len(context))
    ])
log_probs = logits.log_softmax(-1)
print(-sum(log_probs[-length - 1 + i, token].item() for i, token in enumerate(row[-length:])))
"""


@pytest.mark.parametrize("name", ["knorm", "streaming_llm", "kvzip"])
def test_a_press_is_kvpress_s_own(name: str, tmp_path: Path) -> None:
    python = os.environ.get("KVPRESS_PYTHON")
    if python is None:
        pytest.skip("set KVPRESS_PYTHON to the interpreter of an environment with kvpress")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    bench = Bench(model, TOKENIZER, TEXT, 40, kvpress_python=python)
    system = get_baseline(f"kvpress_{name}")(bench)
    assert abs(system.num_tokens - 40) <= 1
    ratio = 1 - 40 / len(bench.text_ids)
    request = json.dumps([str(tmp_path), PRESSES[name][0], ratio, bench.text_ids, ROWS[0].ids, ROWS[0].length])
    done = subprocess.run([python, "-c", _DIRECT], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _nll(system)[0] == pytest.approx(float(done.stdout.split()[-1]), abs=1e-3)
    assert _nll(system) == pytest.approx(_nll(system))  # what was read behind the text is gone again
    answers = generate_answers(system, ["who ?"], max_new_tokens=4)
    assert len(answers[0]) <= 4
