"""Serves two cartridges with vLLM and asks them with the stock `openai` client; prints what docs/serving.md shows.

    .venv-vllm/bin/python examples/serve_two_cartridges.py

The cartridges are the caches of two short texts as they are: this shows serving, not training.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, KVPrefix
from peft_cartridges.adapter_folder import write_cartridge

TEXTS = {
    "lighthouse": "The lighthouse of Korsund was built in 1871. Its keeper is Ingrid Dahl. She lights the lamp at six "
    "in the evening. Her dog is called Bosun. The tower has 142 steps, and its light is green.",
    "bakery": "The bakery of Mill Lane opens at five in the morning. It was founded in 1932 by Paolo Ricci. Its most "
    "famous bread is made of rye and walnuts. On Mondays it is closed.",
}
QUESTIONS = {"lighthouse": "Who is the keeper of the lighthouse?", "bakery": "Who founded the bakery?"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in TEXTS.items():
            make_cartridge(args.model, text, Path(folder) / name)
        command = [
            sys.executable, "-m", "peft_cartridges", "serve", args.model, "--served-model-name", "smollm2",
            *(f"--cartridge={name}={folder}/{name}" for name in TEXTS),
            "--enforce-eager", "--max-model-len", "2048", "--port", str(args.port), "--host", "127.0.0.1",
        ]  # fmt: skip
        print("$", " ".join(["cartridges", *command[3:]]).replace(folder, "cartridges"))
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{args.port}/health", server, Path(folder) / "log")
            ask(openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none"))
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def ask(client: openai.OpenAI) -> None:
    print(">>> [model.id for model in client.models.list()]")
    print([model.id for model in client.models.list()])
    for name, question in QUESTIONS.items():
        for model in ("smollm2", name, "lighthouse+bakery"):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
            )
            print(f">>> ask({model!r}, {question!r})\n{answer.choices[0].message.content}")
    try:
        client.chat.completions.create(model="no-such", messages=[{"role": "user", "content": "?"}])
    except openai.NotFoundError as error:
        print(f">>> ask('no-such', '?')\n{error}")


def make_cartridge(model_name: str, text: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_name)
    prefix = KVPrefix.from_text(model, AutoTokenizer.from_pretrained(model_name), text)
    heads, _, head_dim = prefix.keys[0].shape
    config = CartridgeConfig(
        num_tokens=prefix.num_tokens,
        num_layers=prefix.num_layers,
        num_attention_heads=heads,
        token_dim=heads * head_dim,
        base_model_name_or_path=model_name,
    )
    write_cartridge(folder, config, prefix)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if server.poll() is not None:
                raise RuntimeError(log.read_text()[-3000:]) from error
            time.sleep(1)


if __name__ == "__main__":
    main()
