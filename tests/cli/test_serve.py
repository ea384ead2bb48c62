"""`cartridges serve`: what it makes of its arguments, before any engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_cartridges.cli import main, serve
from peft_cartridges.serving.settings import ServerSettings

KEY = "0123456789abcdef"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerSettings, list[str]]]:
    """What the server of transformers would have been started with."""
    calls: list[Any] = []
    fake = SimpleNamespace(run=lambda settings, arguments: calls.append((settings, arguments)))
    monkeypatch.setattr("peft_cartridges.serving.transformers_server", fake, raising=False)
    monkeypatch.delenv("CARTRIDGES_ADMIN_KEY", raising=False)
    return calls


def run(*arguments: str) -> int:
    return main(["serve", "base", "--engine", "transformers", *arguments])


def test_what_it_does_not_know_goes_to_the_engine(started: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    status = run(
        "--cartridge", "a=user/a@v2", "--port", "1", "--cartridge=b=./x=y", "--dtype=float32", "--cartridge-root", "r",
        "--cartridge-namespace", "acme", "--max-cartridge-gib", "0.5", "--admin-key-file", str(tmp_path / "key"),
    )  # fmt: skip
    ((settings, arguments),) = started
    assert status == 0 and arguments == ["--port", "1", "--dtype=float32"]
    assert settings.cartridges == {"a": "user/a@v2", "b": "./x=y"} and settings.max_bytes == 1 << 29
    assert settings.sources.roots == (Path("r"),) and settings.sources.namespaces == ("acme",)
    assert settings.admin_key == KEY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cartridge", "a"], "expected NAME=CARTRIDGE"),
        (["--cartridge", "=x"], "expected NAME=CARTRIDGE"),
        (["--cartridge", "a=x", "--cartridge", "a=y"], "names 'a' twice"),
        (["--admin-key-file", "missing"], "missing"),
    ],
)
def test_bad_arguments_are_one_line(
    started: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err and not started


def test_the_admins_key(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in [("", "is empty"), ("short", "shorter than 16")]:
        (tmp_path / "key").write_text(content)
        with pytest.raises(ValueError, match=message):
            serve.run(serve.parse_args(["base", "--engine", "transformers", "--admin-key-file", str(tmp_path / "key")]))
    monkeypatch.setenv("CARTRIDGES_ADMIN_KEY", KEY)
    assert run() == 0 and started[-1][0].admin_key == KEY
    assert run() == 0 and started[-1][0].admin_key is None  # it does not stay where child processes see it


def test_vllm_must_be_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main(["serve", "base", "--engine", "vllm"]) == 1
    assert "vLLM is not installed here" in capsys.readouterr().err
