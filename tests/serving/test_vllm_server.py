"""`cartridges serve` on a real vLLM, asked by the stock `openai` client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own: make test-vllm)")

import httpx
import openai
from fastapi import FastAPI

from peft_cartridges import Gate
from peft_cartridges.adapter_folder import WEIGHTS_FILE
from peft_cartridges.hub.card_facts import CardFacts, save_facts
from peft_cartridges.serving import vllm_server
from peft_cartridges.serving.base_model import BaseModelFacts
from peft_cartridges.serving.catalog import Catalog, Limits, Sources
from peft_cartridges.serving.settings import ServerSettings
from peft_cartridges.serving.store import CartridgeStore
from tests.serving.models import SHAPES, answers, save_base, save_cartridge
from tests.serving.server import Server
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

STEPS = 8
LENGTHS = {"a": 37, "b": 64, "c": 100}
ADMIN = "a-key-for-the-admin-only"
MESSAGES = [{"role": "user", "content": "what is the sea ?"}]
TOKENIZER = tiny_tokenizer()
OWN_TEMPLATE = TOKENIZER.chat_template  # and with a default system prompt in front, as many models have one:
TOKENIZER.chat_template = (
    "{% if messages[0]['role'] != 'system' %}<system> w33 w44 w55 <end> {% endif %}" + TOKENIZER.chat_template
)


def words(ids: list[int]) -> str:
    """What a server makes of an answer: it ends where the model ends it."""
    end = ids.index(TOKENIZER.eos_token_id) if TOKENIZER.eos_token_id in ids else len(ids)
    return TOKENIZER.decode(ids[:end], skip_special_tokens=True)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        save_base(self.base)
        TOKENIZER.save_pretrained(self.base)
        self.cartridges = {
            name: save_cartridge(folder / name, self.model(), length, seed=length, base=str(self.base))
            for name, length in LENGTHS.items()
        }
        (folder / "allowed").mkdir()
        tenants = {
            "acme": {"api_key": "key-of-acme", "cartridges": ["a", "b"]},
            "globex": {"api_key": "key-of-globex", "cartridges": ["b", "c"]},
            "all": {"api_key": "key-of-all", "cartridges": "*"},
        }
        (folder / "tenants.json").write_text(json.dumps(tenants))
        self.server = self.start()

    def start(self) -> Server:
        cartridges = [f"--cartridge={name}={path}" for name, path in self.cartridges.items()]
        return Server(
            [
                str(self.base), "--served-model-name", "base", *cartridges, "--store", str(self.folder / "store"),
                "--tenants", str(self.folder / "tenants.json"), "--cartridge-root", str(self.folder / "allowed"),
                "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32",
                "--enable-prompt-tokens-details", "--max-cartridges", "6",
                "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
            ],
            self.folder / "server.log",
            CARTRIDGES_ADMIN_KEY=ADMIN,
        )  # fmt: skip

    def model(self) -> Any:
        return tiny_model("llama", **SHAPES["llama"])

    def client(self, tenant: str = "all") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=f"key-of-{tenant}", max_retries=0, timeout=120)

    def ask(self, model: str, tenant: str = "all", **options: Any) -> Any:
        options = {"messages": MESSAGES, "max_tokens": STEPS, "temperature": 0, **options}
        return self.client(tenant).chat.completions.create(model=model, **options)

    def expected(self, model: str, messages: Any = MESSAGES, steps: int = STEPS) -> tuple[list[int], Any]:
        ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return answers(self.model(), self.cartridges.get(model), ids, steps)

    def administer(self, action: str, key: str = ADMIN, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.server.url}/v1/{action}_cartridge", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("server"))
    yield world
    world.server.kill()


def test_every_cartridge_is_a_model(world: World) -> None:
    for tenant, names in {"all": {"a", "b", "c"}, "acme": {"a", "b"}, "globex": {"b", "c"}}.items():
        assert {model.id for model in world.client(tenant).models.list()} == {"base", *names}


@pytest.mark.parametrize("model", ["base", *LENGTHS])
def test_answers_are_those_of_transformers(world: World, model: str) -> None:
    tokens, logprobs = world.expected(model)
    answer = world.ask(model, logprobs=True, top_logprobs=1)
    assert (answer.model, answer.choices[0].message.content) == (model, words(tokens))
    assert answer.usage.prompt_tokens == 13
    found = [one.logprob for one in answer.choices[0].logprobs.content]
    expected = [float(logprobs[step, token]) for step, token in enumerate(tokens)]
    assert found == pytest.approx(expected[: len(found)], abs=2e-4)
    stream = world.ask(model, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == words(tokens)
    completion = world.client().completions.create(model=model, prompt=[10, 11, 12], max_tokens=STEPS, temperature=0)
    assert completion.choices[0].text == words(
        answers(world.model(), world.cartridges.get(model), [10, 11, 12], STEPS)[0]
    )


def test_n_and_tools_and_compositions(world: World) -> None:
    several = world.ask("b", n=3, temperature=1.0, seed=3)
    assert len({choice.message.content for choice in several.choices}) == 3
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    assert world.ask("b", tools=tools).choices[0].message.content == words(world.expected("b")[0])
    joined = [world.ask(model).choices[0].message.content for model in ("a+b", "b+a", "a", "b")]
    assert len(set(joined)) == 4


def status(call: Any) -> int:
    try:
        call()
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def test_bad_input_is_answered_and_the_server_lives_on(world: World) -> None:
    long = [{"role": "user", "content": "sea " * 190}]
    for model in ("other", "a+other", "../../etc/passwd", "/etc/passwd", "a\x00", "a+" * 40 + "a", "+", "a++b"):
        assert status(lambda model=model: world.ask(model)) == 404, model
    for model, options in [
        ("b", {"messages": long}),
        ("b", {"messages": long, "stream": True}),
        ("c+c+c", {}),  # longer than the context
        ("b", {"extra_body": {"kv_transfer_params": {"cartridge": "0" * 64}}}),
        ("base", {"extra_body": {"kv_transfer_params": {"cartridge": "../../etc/passwd"}}}),
        ("b", {"extra_body": {"prompt_logprobs": 1}}),
        ("b", {"extra_body": {"chat_template": "{{ messages }}"}}),
    ]:
        assert status(lambda model=model, options=options: world.ask(model, **options)) == 400, (model, options)
    assert world.ask("b").choices[0].message.content == words(world.expected("b")[0])


def test_tenants_have_their_own_cartridges(world: World) -> None:
    assert status(lambda: world.ask("a", tenant="nobody")) == 401
    for tenant, model in [("acme", "c"), ("globex", "a"), ("acme", "a+c"), ("globex", "a+b")]:
        assert status(lambda tenant=tenant, model=model: world.ask(model, tenant=tenant)) == 404
    assert status(lambda: world.ask("a+b", tenant="acme")) == 200
    for path in ("/v1/models", "/v1/cartridges", "/tokenize", "/load", "/version", "/docs", "/openapi.json"):
        assert httpx.get(world.server.url + path).status_code == 401, path
    for path in ("/health", "/metrics"):
        assert httpx.get(world.server.url + path).status_code == 200, path


@pytest.mark.parametrize("model", ["base", "b"])
def test_tenants_share_no_cached_block(world: World, model: str) -> None:
    """Two tenants with the same prompt, and a salt of their own choice: each finds its own blocks only."""
    messages = [{"role": "user", "content": words(token_ids(100, seed=9).tolist()).replace("w", " w")}]

    def cached(tenant: str, **options: Any) -> int:
        return world.ask(model, tenant=tenant, messages=messages, **options).usage.prompt_tokens_details.cached_tokens

    assert cached("acme") == 0 and cached("acme") >= 64
    assert cached("globex") == 0 and cached("globex") >= 64
    for salt in ("x", "acme", ""):
        options = {"extra_body": {"cache_salt": salt}} if salt else {}
        first = cached("all", **options)
        assert first == 0, salt


def test_load_and_unload(world: World, tmp_path: Path) -> None:
    allowed = world.folder / "allowed"
    late = save_cartridge(allowed / "late", world.model(), 50, seed=50, base=str(world.base))
    assert world.administer("load", "key-of-all", cartridge_name="late", cartridge_path=str(late)).status_code == 403
    assert world.administer("load", "no-key", cartridge_name="late", cartridge_path=str(late)).status_code == 401
    answer = world.administer("load", cartridge_name="late", cartridge_path=str(late))
    assert answer.status_code == 200 and answer.json()["num_tokens"] == 50, answer.text
    world.cartridges["late"] = late
    assert world.ask("late").choices[0].message.content == words(world.expected("late")[0])
    assert status(lambda: world.ask("late", tenant="acme")) == 404
    assert world.administer("load", cartridge_name="late", cartridge_path=str(late)).status_code == 400
    # The same name, with another content: nothing of the old one is answered with.
    save_cartridge(late, world.model(), 51, seed=51, base=str(world.base))
    assert (
        world.administer("load", cartridge_name="late", cartridge_path=str(late), load_inplace=True).status_code == 200
    )
    assert world.ask("late").choices[0].message.content == words(world.expected("late")[0])
    assert world.administer("unload", cartridge_name="late").status_code == 200
    assert world.administer("unload", cartridge_name="late").status_code == 404
    assert status(lambda: world.ask("late")) == 404
    del world.cartridges["late"]


def test_a_cartridge_is_asked_with_the_template_that_it_was_trained_with(world: World) -> None:
    folder = save_cartridge(world.folder / "allowed" / "bare", world.model(), 50, seed=50, base=str(world.base))
    save_facts(CardFacts(recipe={"default_system_prompt": False}), folder)
    assert world.administer("load", cartridge_name="bare", cartridge_path=str(folder)).status_code == 200
    ids = TOKENIZER.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True, chat_template=OWN_TEMPLATE
    )["input_ids"]
    answer = world.ask("bare")
    assert answer.usage.prompt_tokens == len(ids) == 8
    assert answer.choices[0].message.content == words(answers(world.model(), folder, ids, STEPS)[0])
    assert world.administer("unload", cartridge_name="bare").status_code == 200


def test_what_the_gate_rejects_is_answered_by_the_base(world: World) -> None:
    folder = save_cartridge(world.folder / "allowed" / "gated", world.model(), 50, seed=50, base=str(world.base))
    Gate.make("what is the sea ? the sea , the sea .", TOKENIZER).save_pretrained(folder)
    assert world.administer("load", cartridge_name="gated", cartridge_path=str(folder)).status_code == 200
    world.cartridges["gated"] = folder
    general = [{"role": "user", "content": "write a haiku now"}]
    found = {}
    for name, messages, extra in (
        ("accepted", MESSAGES, {}), ("rejected", general, {}), ("off", general, {"x-cartridge-gate": "off"}),
    ):  # fmt: skip
        body = {"model": "gated", "messages": messages, "max_tokens": STEPS, "temperature": 0}
        headers = {"Authorization": "Bearer key-of-all", **extra}
        answer = httpx.post(f"{world.server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-cartridge-gate") == (None if name == "off" else name)
        assert answer.json()["model"] == ("base" if name == "rejected" else "gated")
        found[name] = answer.json()["choices"][0]["message"]["content"]
    assert found["accepted"] == words(world.expected("gated")[0])
    assert found["rejected"] == words(world.expected("base", general)[0])
    assert found["off"] == words(world.expected("gated", general)[0]) != found["rejected"]
    stream = world.ask("gated", messages=general, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == found["rejected"]
    metrics = httpx.get(world.server.url + "/metrics").text
    for decision, count in (("accepted", 1), ("rejected", 2)):
        assert f'vllm:cartridge_gate_total{{cartridge="gated",decision="{decision}"}} {count}.0' in metrics
    assert 'vllm:cartridge_requests_total{cartridge="gated"} 2.0' in metrics
    listed = httpx.get(world.server.url + "/v1/cartridges", headers={"Authorization": "Bearer key-of-all"}).json()
    assert {one["id"]: one["gate"] for one in listed["data"]}["gated"] == {"accepted": 1, "rejected": 2}
    assert world.administer("unload", cartridge_name="gated").status_code == 200
    del world.cartridges["gated"]


def test_what_must_not_be_loaded(world: World) -> None:
    allowed = world.folder / "allowed"

    def refused(path: Path | str, name: str = "bad") -> int:
        answer = world.administer("load", cartridge_name=name, cartridge_path=str(path))
        assert answer.status_code != 200, path
        return answer.status_code

    good = save_cartridge(allowed / "good", world.model(), 20, seed=20, base=str(world.base))
    (allowed / "link").symlink_to(world.folder / "a")
    for path in (world.folder / "a", allowed / ".." / "a", allowed / "link", "/etc", "someone/handbook", allowed):
        assert refused(path) == 403, path
    assert refused(allowed / "missing") == 404
    assert refused(good, "a+b") == refused(good, "../x") == refused(good, "") == refused(good, "x" * 200) == 400
    weights = good / WEIGHTS_FILE
    whole = weights.read_bytes()
    for damaged in (whole[:-8], b"\xff" * 8 + whole[8:], whole[:200], b""):
        weights.write_bytes(damaged)
        assert refused(good) == 400
    weights.unlink()
    (good / "adapter_model.bin").write_bytes(b"pickled")
    assert refused(good) == 400
    other_model = tiny_model("llama", **{**SHAPES["llama"], "num_hidden_layers": 3})
    assert refused(save_cartridge(allowed / "layers", other_model, 20, seed=1)) == 400
    assert refused(save_cartridge(allowed / "long", world.model(), 255, seed=1, base=str(world.base))) == 400
    fill = [save_cartridge(allowed / f"fill{n}", world.model(), 10 + n, seed=n, base=str(world.base)) for n in range(4)]
    codes = [world.administer("load", cartridge_name=path.name, cartridge_path=str(path)).status_code for path in fill]
    assert codes == [200, 200, 200, 400]  # at most six
    for path in fill[:3]:
        assert world.administer("unload", cartridge_name=path.name).status_code == 200
    assert world.ask("a").choices[0].message.content == words(world.expected("a")[0])


def test_a_load_that_takes_too_long_changes_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(base)
    paths = [
        save_cartridge(tmp_path / name, tiny_model("llama", **SHAPES["llama"]), 20 + seed, seed=seed, base=str(base))
        for seed, name in enumerate(("old", "new"))
    ]
    catalog = Catalog(CartridgeStore(tmp_path / "store"), BaseModelFacts(str(base)), Limits(200, seconds=0.05))
    old = catalog.load("handbook", str(paths[0]))
    fetch = catalog._fetch

    def slowly(*arguments: Any) -> Path:
        time.sleep(0.5)
        return fetch(*arguments)

    catalog._fetch = slowly  # type: ignore[method-assign]
    engine: Any = SimpleNamespace(catalog=catalog)
    for name, in_place in (("handbook", True), ("late", False)):
        body = vllm_server.LoadCartridgeRequest(
            cartridge_name=name, cartridge_path=str(paths[1]), load_inplace=in_place
        )
        with pytest.raises(TimeoutError, match=r"took longer than 0\.05 s"):
            asyncio.run(vllm_server._load(engine, Sources((tmp_path,)), body))  # waits for the thread, too
        assert catalog.entries() == [old]
    assert [path.stem for path in catalog.store.folder.iterdir()] == [old.stored.digest]


def test_without_an_admins_key_nobody_loads() -> None:
    def paths(settings: ServerSettings) -> set[str]:
        app = FastAPI()
        vllm_server._add_routes(app, SimpleNamespace(catalog=None), settings)  # type: ignore[arg-type]
        return {path for route in app.routes if "cartridge" in (path := getattr(route, "path", ""))}

    assert paths(ServerSettings("base")) == {"/v1/cartridges"}
    assert paths(ServerSettings("base", admin_key=ADMIN)) == {
        "/v1/cartridges", "/v1/load_cartridge", "/v1/unload_cartridge",
    }  # fmt: skip


def test_metrics(world: World) -> None:
    text = httpx.get(f"{world.server.url}/metrics").text
    for name in ("loads", "load_bytes", "load_seconds", "requests", "host_misses"):
        values = [
            float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:cartridge_{name}_total")
        ]
        assert sum(values) > 0, name


def test_many_clients_at_once_lose_and_mix_nothing(world: World, seconds: float = 60) -> None:
    """32 clients for a minute: every answer is that of its own cartridge to its own question."""
    questions = [[{"role": "user", "content": f"what is w{60 + index} ?"}] for index in range(4)]
    models = ["base", *LENGTHS]
    expected = {
        (model, index): words(world.expected(model, question)[0])
        for model in models
        for index, question in enumerate(questions)
    }
    assert len(set(expected.values())) > 12

    async def one(number: int, client: openai.AsyncOpenAI, end: float) -> int:
        count = 0
        while time.monotonic() < end:
            model, index = models[(number + count) % 4], (number + 3 * count) % 4
            answer = await client.chat.completions.create(
                model=model,
                messages=questions[index],
                max_tokens=STEPS,
                temperature=0,  # type: ignore[arg-type]
            )
            assert (answer.model, answer.choices[0].message.content) == (model, expected[model, index])
            count += 1
        return count

    async def everyone() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{world.server.url}/v1", api_key="key-of-all", max_retries=0, timeout=120
        ) as client:
            end = time.monotonic() + seconds
            return list(await asyncio.gather(*(one(number, client, end) for number in range(32))))

    counts = asyncio.run(everyone())
    assert min(counts) > 0
    print(f"{sum(counts)} answers, each checked")


def test_kill_and_restart(world: World) -> None:
    """After `kill -9` under way, the next one begins with the same store and answers the same."""
    stream = world.ask("c", stream=True, max_tokens=100)
    next(iter(stream))
    world.server.kill()
    assert not world.server.is_alive()
    world.server = world.start()
    for model in LENGTHS:
        assert world.ask(model).choices[0].message.content == words(world.expected(model)[0])
    names = {path.name for path in (world.folder / "store").iterdir()}
    assert len(names) <= len(LENGTHS) + 3 and not any(name.endswith(".part") for name in names)
    assert world.server.stop() == 0
