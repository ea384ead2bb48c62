"""`cartridges serve` on vLLM: vLLM's own OpenAI-compatible server, whose model names include cartridges.

All of its endpoints, options and metrics are vLLM's. Where it looks a model's name up among LoRA adapters, it finds a
cartridge; where a request enters the engine, the cartridge's placeholders are put in front.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import threading
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from .access import CURRENT, AccessMiddleware, Keys, allowed_names, error_body
from .base_model import BaseModelFacts
from .catalog import JOIN, Catalog, Entry, Limits, Sources, split_revision
from .engine_requests import CartridgeAdapter, behind_cartridge, cache_salt, connector_config, without_placeholders
from .gating import GateMiddleware
from .settings import ServerSettings
from .store import CartridgeStore

logger = init_logger(f"vllm.{__name__}")

_TRY = "try-"  # begins the ids of the server's own requests; those of clients' begin with the endpoint's name


def run(settings: ServerSettings, vllm_arguments: Sequence[str] = ()) -> None:
    """Serves until it is told to stop.

    Args:
        settings: The cartridges, and who may use them.
        vllm_arguments: Of `vllm serve`.

    Raises:
        ValueError: a setting that cannot be, or a cartridge that cannot be served.
    """
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="cartridges serve BASE"))
    args = parser.parse_args(["--model", settings.base, *vllm_arguments])
    validate_parsed_serve_args(args)
    if args.kv_transfer_config is not None:
        raise ValueError("`--kv-transfer-config` is taken by the cartridges: leave it out.")
    if args.headless or (args.api_server_count or 1) > 1:
        raise ValueError(
            "One process answers requests here: leave out `--headless` and `--api-server-count`. For more, start "
            "several servers behind a load balancer."
        )
    # Keys are checked with those of tenants, once.
    api_keys = [*(args.api_key or []), *filter(None, [os.environ.pop("VLLM_API_KEY", None)])]
    args.api_key = None
    keys = Keys.from_settings(api_keys=api_keys, tenants_file=settings.tenants, admin_key=settings.admin_key)
    with tempfile.TemporaryDirectory(prefix="cartridges-") as temporary:
        asyncio.run(_serve(settings, args, keys, CartridgeStore(settings.store or temporary)))


async def _serve(settings: ServerSettings, args: Namespace, keys: Keys, store: CartridgeStore) -> None:
    base = BaseModelFacts(settings.base, revision=args.revision, trust_remote_code=args.trust_remote_code)
    alphabet = base.placeholder_alphabet()
    address, sock = setup_server(args, reuse_port=False)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine_args.kv_transfer_config = connector_config(store, alphabet, settings.host_bytes)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    limits = Limits(
        config.model_config.max_model_len - 2, settings.max_cartridges, settings.max_bytes, settings.load_seconds
    )
    catalog = Catalog(store, base, limits)
    for name, source in settings.cartridges.items():  # before the engine, which takes longer to start
        path, revision = split_revision(source)
        catalog.load(name, path, revision=revision)
    engine = CartridgeEngine.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=args.disable_log_stats
    )
    try:
        engine.catalog, engine.alphabet = catalog, alphabet
        for entry in catalog.entries():
            await engine.try_out(entry)
            logger.info("Cartridge %r: %d tokens from %s", entry.name, entry.stored.num_tokens, entry.source)
        app = await build(engine, args, keys, settings)
        shutdown = await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            log_config=get_uvicorn_log_config(args),
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
        )
        logger.info("Serving %d cartridges on %s", len(catalog.entries()), address)
        await shutdown
    finally:
        engine.shutdown()
        sock.close()


async def build(engine: CartridgeEngine, args: Namespace, keys: Keys, settings: ServerSettings) -> FastAPI:
    """vLLM's application, with cartridges among its models."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    models, renderer = app.state.openai_serving_models, app.state.online_renderer
    models.lora_requests = _Names(engine.catalog, models.lora_requests)
    own_models, own_chat = models.show_available_models, renderer.preprocess_chat

    async def show_available_models() -> Any:
        listed, allowed = await own_models(), allowed_names()
        for entry in engine.catalog.entries():
            if allowed is None or entry.name in allowed:
                listed.data.append(
                    ModelCard(
                        id=entry.name,
                        created=entry.created,
                        root=entry.source if not Path(entry.source).exists() else entry.name,
                        parent=models.base_model_paths[0].name,
                        max_model_len=engine.model_config.max_model_len - entry.stored.num_tokens,
                        permission=[ModelPermission()],
                    )
                )
        return listed

    async def preprocess_chat(request: Any, messages: Any, default_template: Any, **options: Any) -> Any:
        entry = engine.catalog.find(request.model or "", allowed_names())
        template = default_template if entry is None else entry.chat_template or default_template
        return await own_chat(request, messages, template, **options)

    models.show_available_models = show_available_models
    renderer.preprocess_chat = preprocess_chat
    _add_routes(app, engine, settings)
    # Outermost, also around what vLLM put together already (after which `add_middleware` is refused).
    stack: Any = app.middleware_stack or app.build_middleware_stack()
    if settings.gate:
        stack = GateMiddleware(stack, engine.catalog, models.base_model_paths[0].name, engine.count_decision)
    app.middleware_stack = AccessMiddleware(stack, keys)
    return app


class CartridgeEngine(AsyncLLM):
    """vLLM's engine, at whose door a `CartridgeAdapter` becomes placeholders in front of the prompt."""

    catalog: Catalog
    alphabet: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._secret = secrets.token_bytes(32)
        self._requests = prometheus_client.Counter(
            "vllm:cartridge_requests", "Requests by cartridge; compositions are counted together.", ["cartridge"]
        )
        self._decisions = prometheus_client.Counter(
            "vllm:cartridge_gate", "Requests that a cartridge's gate accepted or rejected.", ["cartridge", "decision"]
        )

    def generate(  # not `async`: what is refused is refused before a stream has begun
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if (sampling_params.extra_args or {}).get("kv_transfer_params"):
            raise VLLMValidationError("`kv_transfer_params` is not for clients.", parameter="kv_transfer_params")
        tenant = CURRENT.get()
        own_salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
        if not isinstance(lora_request, CartridgeAdapter):
            if isinstance(prompt, dict) and (own_salt is not None or (tenant is not None and tenant.name)):
                salt = cache_salt(self._secret, tenant.name if tenant else "", None, own_salt)
                prompt = {**prompt, "cache_salt": salt}
            return super().generate(prompt, sampling_params, request_id, lora_request=lora_request, **options)
        entry = self.catalog.find(lora_request.lora_name, allowed_names())
        if entry is None:
            raise VLLMNotFoundError(f"The model `{lora_request.lora_name}` does not exist.")
        prompt, sampling_params = behind_cartridge(
            prompt,
            sampling_params,
            entry.stored,
            name=entry.name,
            alphabet=self.alphabet,
            salt=cache_salt(self._secret, tenant.name if tenant else "", entry.stored.digest, own_salt),
            max_model_len=self.model_config.max_model_len,
        )
        if not request_id.startswith(_TRY):
            self._requests.labels(_label(entry)).inc()
        return self._answer(entry, super().generate(prompt, sampling_params, request_id, **options))

    async def _answer(
        self, entry: Entry, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        self.catalog.begin(entry)
        try:
            async for output in outputs:
                yield without_placeholders(output, entry.stored.num_tokens)
        finally:
            await outputs.aclose()
            self.catalog.end(entry)

    def encode(self, *args: Any, lora_request: Any = None, **options: Any) -> Any:
        if isinstance(lora_request, CartridgeAdapter):
            raise VLLMValidationError("Cartridges answer, they do not embed: ask the base model.", parameter="model")
        return super().encode(*args, lora_request=lora_request, **options)

    def count_decision(self, entry: Entry, decision: str) -> None:
        """Of a gate, for `/metrics`."""
        self._decisions.labels(_label(entry), decision).inc()

    async def notify_kv_transfer_request_rejected(self, *args: Any, **options: Any) -> None:
        """Nothing of a client's `kv_transfer_params` reaches the connector."""

    async def try_out(self, entry: Entry) -> None:
        """One token behind a cartridge, as LoRA adapters are loaded before anyone asks for them.

        Raises:
            ValueError: the engine cannot take it.
        """
        adapter = CartridgeAdapter(lora_name=entry.name, lora_int_id=1, lora_path=entry.stored.digest)
        params, reason = SamplingParams(temperature=0, max_tokens=1), "error"
        async for output in self.generate(
            tokens_input([self.alphabet[0]]), params, _TRY + secrets.token_hex(8), lora_request=adapter
        ):
            reason = output.outputs[0].finish_reason or reason
        if reason == "error":
            raise ValueError(f"Cartridge {entry.name!r} does not fit the engine: its log says why.")


def _label(entry: Entry) -> str:
    return "(compositions)" if JOIN in entry.name else entry.name


class _Names(dict[str, Any]):
    """vLLM's table of LoRA adapters, with the cartridges that the client of the current request may name."""

    def __init__(self, catalog: Catalog, adapters: dict[str, Any]) -> None:
        super().__init__(adapters)
        self._catalog = catalog

    def _find(self, name: Any) -> Entry | None:
        try:
            return self._catalog.find(name, allowed_names()) if isinstance(name, str) else None
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="model") from error

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or self._find(name) is not None

    def __missing__(self, name: str) -> CartridgeAdapter:
        entry = self._find(name)
        if entry is None:
            raise KeyError(name)
        return CartridgeAdapter(lora_name=entry.name, lora_int_id=1, lora_path=entry.stored.digest)


# -- endpoints of our own --------------------------------------------------------------------------------------------


class LoadCartridgeRequest(BaseModel):
    cartridge_name: str
    cartridge_path: str
    load_inplace: bool = False


class UnloadCartridgeRequest(BaseModel):
    cartridge_name: str


def _add_routes(app: FastAPI, engine: CartridgeEngine, settings: ServerSettings) -> None:
    catalog = engine.catalog

    @app.get("/v1/cartridges")
    async def cartridges() -> JSONResponse:
        allowed = allowed_names()
        listed = [entry for entry in catalog.entries() if allowed is None or entry.name in allowed]
        return JSONResponse({"object": "list", "data": [entry.describe() for entry in listed]})

    if settings.admin_key is None:
        return

    @app.post("/v1/load_cartridge")
    async def load_cartridge(body: LoadCartridgeRequest, request: Request) -> JSONResponse:
        return await _administer(_load(engine, settings.sources, body))

    @app.post("/v1/unload_cartridge")
    async def unload_cartridge(body: UnloadCartridgeRequest, request: Request) -> JSONResponse:
        return await _administer(_unload(catalog, body.cartridge_name))


async def _load(engine: CartridgeEngine, sources: Sources, body: LoadCartridgeRequest) -> dict[str, Any]:
    path, revision = split_revision(body.cartridge_path)
    sources.check(path)
    options: dict[str, Any] = {"revision": revision, "replace": body.load_inplace}
    abandoned = threading.Event()
    work = asyncio.create_task(
        asyncio.to_thread(engine.catalog.load, body.cartridge_name, path, abandoned=abandoned, **options)
    )
    done, _ = await asyncio.wait({work}, timeout=engine.catalog.limits.seconds)
    if not done:
        abandoned.set()
        work.add_done_callback(lambda late: late.exception())  # asyncio complains of those that nobody looked at
        raise TimeoutError(f"{body.cartridge_path!r} took longer than {engine.catalog.limits.seconds} s to load.")
    entry = work.result()
    try:
        await engine.try_out(entry)
    except ValueError:
        engine.catalog.unload(entry.name)
        raise
    logger.info("Loaded cartridge %r from %s", entry.name, entry.source)
    return entry.describe()


async def _unload(catalog: Catalog, name: str) -> dict[str, Any]:
    catalog.unload(name)
    logger.info("Unloaded cartridge %r", name)
    return {"id": name, "object": "cartridge", "deleted": True}


_STATUS: list[tuple[type[BaseException], int]] = [
    (PermissionError, 403),
    (TimeoutError, 504),
    (FileNotFoundError, 404),
    (KeyError, 404),
    (OSError, 502),  # the Hub
    (ValueError, 400),
]


async def _administer(work: Any) -> JSONResponse:
    tenant = CURRENT.get()
    if tenant is None or not tenant.is_admin:
        work.close()
        return JSONResponse(error_body("This needs the admin's key.", 403, "PermissionDeniedError"), status_code=403)
    try:
        return JSONResponse(await work)
    except (OSError, KeyError, ValueError) as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        message = f"There is no cartridge {error.args[0]!r}." if isinstance(error, KeyError) else str(error)
        return JSONResponse(error_body(message, status), status_code=status)
