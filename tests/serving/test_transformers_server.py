"""`cartridges serve --engine transformers`: the same names and the same API, on transformers' own server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("transformers' server is not installed (transformers[serving])", allow_module_level=True)

import httpx
import openai

from peft_cartridges import Gate
from tests.serving.models import SHAPES, answers, save_base, save_cartridge
from tests.serving.server import Server
from tests.tiny_models import tiny_model, tiny_tokenizer

STEPS = 6
MESSAGES = [{"role": "user", "content": "what is the sea ?"}]
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    save_base(folder / "base")
    for name, length in {"a": 37, "b": 64}.items():
        save_cartridge(folder / name, tiny_model("llama", **SHAPES["llama"]), length, seed=length)
    save_cartridge(folder / "gated", tiny_model("llama", **SHAPES["llama"]), 50, seed=50)
    Gate.make("what is the sea ? the sea , the sea .", TOKENIZER).save_pretrained(folder / "gated")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    cartridges = [f"--cartridge={name}={folder / name}" for name in ("a", "b", "gated")]
    server = Server(
        [
            str(folder / "base"),
            "--engine",
            "transformers",
            *cartridges,
            "--served-model-name",
            "base",
            "--device",
            "cpu",
        ],
        folder / "server.log",
    )
    yield server
    server.kill()


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def expected(folder: Path, model: str, messages: Any = MESSAGES) -> str:
    ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    path = None if model == "base" else folder / model
    tokens, _ = answers(tiny_model("llama", **SHAPES["llama"]), path, ids, STEPS)
    end = tokens.index(TOKENIZER.eos_token_id) if TOKENIZER.eos_token_id in tokens else STEPS
    return TOKENIZER.decode(tokens[:end], skip_special_tokens=True)


def ask(server: Server, model: str, **options: object) -> str:
    answer = client(server).chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=STEPS,
        temperature=0,
        **options,  # type: ignore[call-overload]
    )
    return answer.choices[0].message.content


def test_answers_are_those_of_each_name_also_at_once(folder: Path, server: Server) -> None:
    names = ["base", "a", "b"] * 4
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda name: ask(server, name), names))
    assert found == [expected(folder, name) for name in names]
    assert len({*found}) == 3
    stream = client(server).chat.completions.create(
        model="a",
        messages=MESSAGES,
        max_tokens=STEPS,
        temperature=0,
        stream=True,  # type: ignore[call-overload]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected(folder, "a")
    assert {model.id for model in client(server).models.list()} == {"base", "a", "b", "gated"}
    assert ask(server, "a+b") not in found


def test_what_the_gate_rejects_is_answered_by_the_base(folder: Path, server: Server) -> None:
    general = [{"role": "user", "content": "write a haiku now"}]
    found = {}
    for name, messages, extra in (
        ("accepted", MESSAGES, {}), ("rejected", general, {}), ("off", general, {"x-cartridge-gate": "off"}),
    ):  # fmt: skip
        body = {"model": "gated", "messages": messages, "max_tokens": STEPS, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=extra, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-cartridge-gate") == (None if name == "off" else name)
        found[name] = answer.json()["choices"][0]["message"]["content"]
    assert found["accepted"] == expected(folder, "gated")
    assert found["rejected"] == expected(folder, "base", general) != found["off"] == expected(folder, "gated", general)
    listed = httpx.get(f"{server.url}/v1/cartridges").json()["data"]
    gates = {one["id"]: one["gate"] for one in listed}
    assert gates == {"a": None, "b": None, "gated": {"accepted": 1, "rejected": 1}}


def test_bad_input(server: Server) -> None:
    for model, options, status in [
        ("other", {}, 404),
        ("hf-internal-testing/tiny-random-gpt2", {}, 404),  # transformers' server would fetch it
        ("../../etc/passwd", {}, 404),
        ("b", {"messages": [{"role": "user", "content": "sea " * 500}]}, 400),
        ("b", {"extra_body": {"generation_config": "{}"}}, 422),
        ("b", {"n": 2}, 422),
        ("b", {"logprobs": True}, 422),
    ]:
        with pytest.raises(openai.APIStatusError) as caught:
            client(server).chat.completions.create(**{"model": model, "messages": MESSAGES, "max_tokens": 2, **options})  # type: ignore[call-overload]
        assert caught.value.status_code == status, model
    for path in ("/load_model", "/reset"):
        assert httpx.post(server.url + path, json={"model": "b"}).status_code == 404
    assert ask(server, "b")
