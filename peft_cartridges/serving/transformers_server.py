"""`cartridges serve --engine transformers`: transformers' own server (`transformers serve`), for small set-ups.

One request after the other is generated; what the API has and transformers' server has not (`n`, log-probabilities)
is refused with status 422. Its continuous batching has no place for a prefix of a request's own, and is not used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils.import_utils import is_serve_available

from ..attention import shared_prefix
from .access import AccessMiddleware, Keys, allowed_names
from .base_model import BaseModelFacts
from .catalog import Catalog, Entry, Limits, split_revision
from .gating import GateMiddleware
from .settings import ServerSettings
from .store import CartridgeStore

# Of transformers' server; they load any model of the Hub, and take all models away.
_CLOSED_PATHS = ("/load_model", "/reset")


def run(settings: ServerSettings, arguments: Sequence[str] = ()) -> None:
    """Serves until it is told to stop.

    Args:
        settings: The cartridges, and who may use them. Loading and unloading at run time is for vLLM only.
        arguments: `--host`, `--port`, `--device`, `--dtype`, `--served-model-name`, `--api-key`, `--log-level`.

    Raises:
        ValueError: a setting that cannot be, or a cartridge that cannot be served.
        ImportError: transformers' server is not installed.
    """
    if not is_serve_available():
        raise ImportError("transformers' server is not installed: pip install 'transformers[serving]'.")
    import uvicorn

    parser = argparse.ArgumentParser(prog="cartridges serve BASE --engine transformers", allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--served-model-name")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args(arguments)
    if settings.admin_key is not None:
        raise ValueError("Loading at run time needs `--engine vllm`: leave the admin's key out, or change the engine.")
    keys = Keys.from_settings(api_keys=args.api_key, tenants_file=settings.tenants)
    base = BaseModelFacts(settings.base)
    positions = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    with tempfile.TemporaryDirectory(prefix="cartridges-") as temporary:
        limits = Limits(positions - 2, settings.max_cartridges, settings.max_bytes)
        catalog = Catalog(CartridgeStore(settings.store or temporary), base, limits)
        for name, source in settings.cartridges.items():
            path, revision = split_revision(source)
            catalog.load(name, path, revision=revision)
        name = args.served_model_name or settings.base
        app = build(catalog, name, args.device, args.dtype, keys, gate=settings.gate)
        uvicorn.run(app, host=args.host, port=args.port, log_level=args.log_level)


# What transformers' server would leave out of account, and what lets a client choose code paths of `generate`; with
# the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "generation_config": (None,),
}


def _validate(own: Callable[[dict[str, Any]], None], body: dict[str, Any]) -> None:
    from fastapi import HTTPException

    refused = [name for name, harmless in _REFUSED.items() if body.get(name) not in harmless]
    if refused:
        raise HTTPException(422, f"`--engine transformers` has no {', '.join(refused)}: serve with `--engine vllm`.")
    own(body)


def build(catalog: Catalog, name: str, device: str, dtype: str, keys: Keys, *, gate: bool = True) -> Any:
    """transformers' application, whose models are the base and its cartridges."""
    from fastapi import HTTPException
    from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

    class Manager(model_manager.ModelManager):
        """Loads the base model once, and finds cartridges in the catalog; nothing else is a model."""

        def __init__(self) -> None:
            super().__init__(device=device, dtype=dtype, model_timeout=-1)
            self._model, self._tokenizer = super().load_model_and_processor(
                super().process_model_name(catalog.base.name)
            )

        def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
            if not hasattr(self, "_tokenizer"):
                return super().load_model_and_processor(model_id_and_revision, *args, **options)
            if model_id_and_revision == name:
                return self._model, self._tokenizer
            try:
                entry = catalog.find(model_id_and_revision, allowed_names())
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            if entry is None:
                raise HTTPException(404, f"The model {model_id_and_revision!r} does not exist.")
            tokenizer = self._tokenizer
            if entry.chat_template is not None:
                tokenizer = copy.copy(tokenizer)
                tokenizer.chat_template = entry.chat_template
            return _Behind(self._model, catalog, entry), tokenizer

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
            allowed = allowed_names()
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": ""}]
            return listed + [
                {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "", "parent": name}
                for entry in catalog.entries()
                if allowed is None or entry.name in allowed
            ]

    class State(utils.GenerationState):
        """One thread generates for all names: they are one model."""

        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            return super().get_manager(name, use_cb=False)

    class _Behind:
        """The base model as `generate` sees it behind a cartridge."""

        def __init__(self, model: Any, catalog: Catalog, entry: Entry) -> None:
            self._model, self._catalog, self._entry = model, catalog, entry

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._model, attribute)

        def generate(self, **inputs: Any) -> Any:
            length = inputs["input_ids"].shape[-1]
            room = catalog.limits.num_tokens + 2 - self._entry.stored.num_tokens - length
            if room < 1:
                raise HTTPException(
                    400,
                    f"The prompt has {length} tokens and cartridge {self._entry.name!r} "
                    f"{self._entry.stored.num_tokens}: that leaves no room in the model's context.",
                )
            config = inputs["generation_config"]
            config.max_new_tokens = min(config.max_new_tokens or room, room)
            self._catalog.begin(self._entry)
            try:
                prefix = self._catalog.store.read_prefix(self._entry.stored)
                with shared_prefix(self._model, prefix.to(self._model.device, self._model.dtype)):
                    return self._model.generate(**inputs)
            finally:
                self._catalog.end(self._entry)

    manager, state = Manager(), State()
    handlers: dict[str, Any] = {
        "completion_handler": completion.CompletionHandler(manager, state),
        "response_handler": response.ResponseHandler(manager, state),
    }
    # Parameters that this version of transformers has beside these are for other kinds of models.
    for parameter in inspect.signature(server.build_server).parameters.values():
        if parameter.name.endswith("_handler") and parameter.name not in (*handlers, "chat_handler"):
            handlers[parameter.name] = None
    chat: Any = chat_completion.ChatCompletionHandler(manager, state)
    for handler in (chat, handlers["completion_handler"], handlers["response_handler"]):
        handler._validate_request = functools.partial(_validate, handler._validate_request)
    app = server.build_server(manager, chat, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in _CLOSED_PATHS]

    @app.get("/v1/cartridges")
    async def cartridges() -> dict[str, Any]:
        allowed = allowed_names()
        listed = [entry for entry in catalog.entries() if allowed is None or entry.name in allowed]
        return {"object": "list", "data": [entry.describe() for entry in listed]}

    if gate:
        app.add_middleware(GateMiddleware, catalog=catalog, base_name=name)
    app.add_middleware(AccessMiddleware, keys=keys)  # the outermost: it says who asks
    return app
