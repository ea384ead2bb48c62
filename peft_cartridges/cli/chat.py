"""`cartridges chat CARTRIDGE … [--server URL]`."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..gate import Gate

Message = dict[str, str]

_HELP = """\
/cartridge NAME   answer behind another cartridge (a+b joins several)
/none             answer without any
/compare          answer the next question without context, behind the cartridge, and (with --corpus) with the full text
/reset            forget the conversation
/quit             leave (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cartridges", nargs="+", metavar="cartridge",
        help="folders or names on the Hub (user/name@revision), or with --server its names; NAME=… chooses a name",
    )  # fmt: skip
    parser.add_argument("--server", metavar="URL", help="talk to this server instead of loading a model")
    parser.add_argument("--api-key", help="the server's key (default: $OPENAI_API_KEY)")
    parser.add_argument("--base-model", help="name or folder of the base model, if not the one that the cartridge says")
    parser.add_argument("--corpus", type=Path, help="file with the full text, for /compare")
    parser.add_argument(
        "--gate", choices=("auto", "off"), default="auto",
        help="auto: what the cartridge's gate rejects is answered without it (a server decides by its own --gate)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")


def run(args: argparse.Namespace) -> None:
    corpus = args.corpus.read_text(encoding="utf-8") if args.corpus else None
    engine: Engine = ServerEngine(args) if args.server else LocalEngine(args)
    Chat(engine, corpus).talk(input, print)


class Engine(Protocol):
    """Where answers come from. `names` are the cartridges that can be asked for."""

    names: list[str]

    def answer(self, messages: list[Message], cartridge: str | None) -> Iterator[str]:
        """The answer, in pieces; each is a token, or several."""

    def size(self, cartridge: str) -> tuple[int, int]:
        """Tokens and bytes of a cartridge."""

    def accepts(self, messages: list[Message], cartridge: str) -> bool:
        """Whether the gate of a cartridge lets the last question through to it."""


class Chat:
    """A conversation, and the commands within it."""

    def __init__(self, engine: Engine, corpus: str | None = None) -> None:
        self.engine, self.corpus = engine, corpus
        self.cartridge: str | None = engine.names[0]
        self.messages: list[Message] = []
        self._compares = False

    def talk(self, read: Callable[[str], str], write: Callable[..., None]) -> None:
        """Reads lines until there are no more."""
        write(f"{self._status()}. /help lists what can be done.")
        while True:
            try:
                line = read("> ").strip()
            except EOFError:
                return
            try:
                if line.startswith("/"):
                    if line == "/quit":
                        return
                    write(self.command(line))
                elif line and self._compares:
                    self._compares = False
                    write(self.compare(line))
                elif line:
                    self._reply(line, write)
            except (ValueError, OSError) as error:
                write(f"error: {error}")

    def command(self, line: str) -> str:
        """Carries a command out, and says what came of it."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/cartridge":
            unknown = [name for name in argument.split("+") if name not in self.engine.names]
            if unknown:
                return f"There is no cartridge {unknown[0]!r}. There are: {', '.join(self.engine.names)}."
            self.cartridge, self.messages = argument, []
            return self._status()
        if command == "/none":
            self.cartridge, self.messages = None, []
            return self._status()
        if command == "/compare":
            if argument:
                return self.compare(argument)
            self._compares = True
            return "The next question is answered in every way."
        if command == "/reset":
            self.messages = []
            return "The conversation begins anew."
        return _HELP if command == "/help" else f"There is no command {command}.\n{_HELP}"

    def compare(self, question: str) -> str:
        """Answers to one question side by side."""
        turn = [{"role": "user", "content": question}]
        ways: list[tuple[str, list[Message], str | None]] = [("no context", turn, None)]
        if self.cartridge is not None:
            ways.append((f"cartridge {self.cartridge}", turn, self.cartridge))
        if self.corpus is not None:
            ways.append(("full text", [{"role": "system", "content": self.corpus}, *turn], None))
        columns = []
        for title, messages, cartridge in ways:
            started = time.perf_counter()
            text = "".join(self.engine.answer(messages, cartridge)).strip()
            columns.append((f"{title} ({time.perf_counter() - started:.1f} s)", text))
        return _side_by_side(columns)

    def _reply(self, question: str, write: Callable[..., None]) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        pieces, started, first = [], time.perf_counter(), None
        rejected = self.cartridge is not None and not self.engine.accepts(asked, self.cartridge)
        for piece in self.engine.answer(asked, None if rejected else self.cartridge):
            first = first or time.perf_counter()
            pieces.append(piece)
            write(piece, end="", flush=True)
        # Only now, so that a question that failed is not a part of the conversation.
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        end = time.perf_counter()
        speed = f"{(len(pieces) - 1) / (end - first):.1f} tokens/s, " if first and len(pieces) > 1 else ""
        status = f"no cartridge: not about {self.cartridge}, says its gate" if rejected else self._status()
        write(f"\n  [{status}; {speed}first after {(first or end) - started:.2f} s]")

    def _status(self) -> str:
        if self.cartridge is None:
            return "no cartridge"
        sizes = [self.engine.size(name) for name in self.cartridge.split("+")]
        tokens, size = (sum(part) for part in zip(*sizes, strict=True))
        return f"cartridge {self.cartridge}: {tokens:,} tokens, {size / 2**20:.1f} MiB of keys and values"


class LocalEngine:
    """A model in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        from ..adapter_folder import read_cartridge
        from ..chat import with_cartridge_chat_template
        from ..gate import load_gate
        from ..hub import check_base_model, load_cartridge, load_facts
        from ..hub.pull import find_cartridge
        from ..hub.push import served_bytes
        from ..serving.catalog import split_revision

        self.names: list[str] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        self._tokenizers: dict[str, Any] = {}
        self._gates: dict[str, Gate | None] = {}
        self._options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
        if args.temperature > 0:
            self._options["temperature"] = args.temperature
        self._model: Any = None
        for argument in args.cartridges:
            name, source = _named(argument)
            path, revision = split_revision(source)
            folder = find_cartridge(path, **({"revision": revision} if revision else {}))
            if self._model is None:
                self._model, _ = load_cartridge(folder, base_model=args.base_model)
                base = args.base_model or self._model.get_base_model().name_or_path
                self._base_tokenizer: Any = AutoTokenizer.from_pretrained(base)
                self._model.load_adapter(str(folder), name)
                self._model.set_adapter(name)
                self._model.delete_adapter("default")
            else:
                check_base_model(self._model, folder)
                self._model.load_adapter(str(folder), name)
            config, prefix = read_cartridge(folder)
            served = served_bytes(prefix, self._model.dtype)
            self._sizes[name] = (config.num_tokens or 0, served)
            behind = load_facts(folder).recipe.get("default_system_prompt") is False
            self._tokenizers[name] = (
                with_cartridge_chat_template(self._base_tokenizer) if behind else self._base_tokenizer
            )
            self._gates[name] = load_gate(folder) if args.gate == "auto" else None
            self.names.append(name)

    def size(self, cartridge: str) -> tuple[int, int]:
        return self._sizes[cartridge]

    def accepts(self, messages: list[Message], cartridge: str) -> bool:
        from ..gate import any_accepts

        return any_accepts([self._gates[name] for name in cartridge.split("+")], messages)

    def answer(self, messages: list[Message], cartridge: str | None) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        names = cartridge.split("+") if cartridge else []
        tokenizer = self._tokenizers[names[0]] if names else self._base_tokenizer
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                if names:
                    self._model.set_adapter(names if len(names) > 1 else names[0])
                with nullcontext() if names else self._model.disable_adapter():
                    self._model.generate(**inputs, **self._options, streamer=streamer)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        yield from filter(None, streamer)
        thread.join()
        if failures:
            raise ValueError(str(failures[0])) from failures[0]


class ServerEngine:
    """A server with OpenAI's API: `cartridges serve`, or any other, whose models are then the names."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ..serving.http import get_json

        key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        url = args.server.rstrip("/").removesuffix("/v1")
        models = get_json(f"{url}/v1/models", key)["data"]
        known = {model["id"] for model in models}
        self.names = [name for name, _ in map(_named, args.cartridges)]
        if unknown := [name for name in self.names if not set(name.split("+")) <= known]:
            raise ValueError(f"{url} has no model {unknown[0]!r}. It has: {', '.join(sorted(known))}.")
        try:
            listed = get_json(f"{url}/v1/cartridges", key)["data"]
        except OSError:  # a server that says nothing about sizes
            listed = []
        self._sizes = {one["id"]: (one["num_tokens"], one["bytes"]) for one in listed}
        self._base = next((model["id"] for model in models if not model.get("parent")), models[0]["id"])
        self._url, self._key = f"{url}/v1", key
        self._options = {"max_tokens": args.max_new_tokens, "temperature": args.temperature}

    def size(self, cartridge: str) -> tuple[int, int]:
        return self._sizes.get(cartridge, (0, 0))

    def accepts(self, messages: list[Message], cartridge: str) -> bool:
        return True  # the server has the gate

    def answer(self, messages: list[Message], cartridge: str | None) -> Iterator[str]:
        from ..serving.http import stream_chat

        body = {"model": cartridge or self._base, "messages": messages, **self._options}
        yield from stream_chat(self._url, self._key, body)


def _named(argument: str) -> tuple[str, str]:
    name, sign, source = argument.partition("=")
    if sign:
        return name, source
    return Path(argument.partition("@")[0]).name if Path(argument).exists() else argument, argument


def _side_by_side(columns: list[tuple[str, str]]) -> str:
    """Columns as wide as the terminal lets them be; below each other where that would be too narrow."""
    width = (shutil.get_terminal_size().columns - 3 * (len(columns) - 1)) // len(columns)
    if width < 24:
        return "\n\n".join(f"--- {title}\n{text}" for title, text in columns)
    wrapped = [
        [
            title[:width],
            "-" * width,
            *(line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]),
        ]
        for title, text in columns
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(f"{cell:{width}}" for cell in row).rstrip() for row in rows)
