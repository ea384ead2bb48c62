"""`cartridges train CORPUS… --model … --num-tokens … --output-dir …`: from a text to a cartridge with its card."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from ..adapter_folder import CONFIG_FILE, read_config
from ..conversations import load_self_study, read_provenance
from ..corpus import Document, load_corpus
from ..hub.model_card import is_hub_name
from ..self_study import EngineError, SynthesisConfig, estimate_run
from ..self_study.engines import check_engines, make_engines
from ..self_study.estimate import SynthesisEstimate
from ..trainer import SelfStudyConfig, SelfStudyTrainer
from ..trainer.rounds import size_of_rounds
from ..trainer.run_identity import RUN_FILE, check_run
from ..tuner import CartridgeConfig

_DESCRIPTION = """\
Trains a cartridge of a text: the model reads it, asks and answers questions about it, and learns to answer alike
with a small KV cache in place of the text. The same command again carries on where a run was stopped.

  cartridges train handbook.md --model HuggingFaceTB/SmolLM2-135M-Instruct --num-tokens 256 --output-dir handbook
  cartridges train docs/ --config recipe.yaml --num-tokens 2048              # YAML: the same names, `num_tokens: …`
  cartridges train handbook.md --model … --output-dir handbook --estimate    # what it would take; loads no weights
  cartridges train handbook.md --model … --output-dir handbook --budget 5m   # as much as fits into the time
  cartridges train --conversations handbook-set --model … --output-dir …     # written by `cartridges synthesize`
  accelerate launch --num_processes 8 -m peft_cartridges train docs/ --model … --output-dir …
"""
_EPILOG = """\
What to turn first: --num-tokens (a tenth of the text; a twentieth is a bold cartridge, a fifth a safe one) and --budget; how
many conversations, steps and which learning rate follow from them and from the text. `--help-all` lists every setting.
"""
# Settings of `SelfStudyConfig` in the short help; the others are in `--help-all`.
_SHOWN = frozenset(
    [
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "per_device_train_batch_size",
        "loss_type",
        "num_conversations",
        "off_context_share",
        "off_context_dataset",
        "budget",
        "num_eval_conversations",
        "seed_types",
        "teacher_targets",
        "engine",
        "base_url",
        "use_vllm",
        "shard_model",
        "on_policy_fraction",
        "eval_steps",
        "save_steps",
        "push_to_hub",
        "hub_model_id",
        "report_to",
        "use_cpu",
        "initialization",
        "initialization_kwargs",
    ]
)


@dataclass
class ModelArguments:
    """The base model and the cartridge."""

    _argument_group_name = "model and cartridge"

    model: str = field(metadata={"help": "Base model: a name on the Hub, or a folder."})
    num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Length of the cartridge in tokens; by default a tenth of the corpus, at most 8,192. 0: the states of "
            "recurrent layers alone (Mamba)."
        },
    )
    num_frozen_tokens: int = field(
        default=1, metadata={"help": "First tokens that are not trained: an attention sink (paper: 1)."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base model."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16, float16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, e.g. sdpa or flash_attention_2."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bits (bitsandbytes)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class DataArguments:
    """What is learned, and what it is measured on."""

    _argument_group_name = "what is learned, and what it is measured on"

    conversations: str | None = field(
        default=None,
        metadata={"help": "Written conversations: a folder of `cartridges synthesize`, or a name on the Hub."},
    )
    gold_questions: str | None = field(
        default=None,
        metadata={"help": "A JSON lines file of `question` and `answer`, measured and never trained on."},
    )
    description: str = field(
        default="", metadata={"help": "A sentence on the corpus, shown to the model with each chunk."}
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "Paths of the corpus to leave out (patterns)."})
    split: str = field(default="train", metadata={"help": "Split, where the corpus is a data set."})
    text_column: str = field(default="text", metadata={"help": "Column, where the corpus is a data set."})
    max_documents: int | None = field(default=None, metadata={"help": "Stop reading the corpus after so many."})
    estimate: bool = field(default=False, metadata={"help": "Only print sizes; loads no weights."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better `metric_for_best_model`."}
    )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Every option by one name, with dashes; YAML has the same with underscores."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "_" not in name]
        if not names:
            return super()._format_action_invocation(action)
        value = "" if action.nargs in (0, "?") else f" {action.metavar or names[0].lstrip('-').upper()}"
        return ", ".join(names) + value


def make_parser(*, show_all: bool = False) -> TrlParser:
    """One set of options for the command line and for YAML (`--config`)."""
    parser = TrlParser(
        cast(Any, [ModelArguments, DataArguments, SelfStudyConfig]),
        prog="cartridges train",
        usage="cartridges train [CORPUS …] --model MODEL --output-dir FOLDER [--num-tokens N] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument(
        "corpus", nargs="*", default=[], help="files, folders, globs, or data sets (hf://datasets/OWNER/NAME[:CONFIG])"
    )
    parser.add_argument("--config", metavar="FILE", help="options in YAML; those on the command line go before them")
    parser.add_argument("--help-all", action="help", help="show every setting of the trainer, and exit")
    # Trainer shows no progress where its logger is as quiet as this command makes it.
    parser.set_defaults(disable_tqdm=False)
    own = {f.name for kind in (ModelArguments, DataArguments) for f in dataclasses.fields(kind)}
    for action in parser._actions:
        if not show_all and action.dest not in own | _SHOWN | {"corpus", "config", "help", "help_all"}:
            action.help = argparse.SUPPRESS
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed options as `model`, `data` and `trainer`, with `corpus`."""
    parser = make_parser(show_all="--help-all" in argv)
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words:
        _check_recipe((words[words.index("--config") + 1 :] or [""])[0], {action.dest for action in parser._actions})
    model, data, trainer, rest = parser.parse_args_and_config(words)
    return argparse.Namespace(model=model, data=data, trainer=trainer, corpus=rest.corpus)


def _check_recipe(path: str, options: set[str]) -> None:
    """Raises:
    ValueError: the YAML file cannot be read, or has an option that there is not.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {path!r}.")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is no YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config: {path} is no YAML with `option: value` lines.")
    for name in recipe:
        if name not in options | {"env"}:
            near = difflib.get_close_matches(str(name), options, 1)
            hint = f": is {near[0]} meant?" if near else ". `--help-all` lists them."
            raise ValueError(f"--config: {path}: there is no option {name}{hint}")


def run(args: argparse.Namespace) -> None:
    model, data, trainer_args = args.model, args.data, args.trainer
    _check(args)
    documents = _read_corpus(args)
    questions = _read_questions(data.gold_questions)
    tokenizer = _load_tokenizer(model)
    _prepare(args, documents, tokenizer)
    if data.estimate:
        return
    folder = trainer_args.output_dir
    try:
        _check_servers(args, tokenizer)
        trainer = _make_trainer(args, documents, questions, tokenizer)
        last = None if trainer_args.max_steps == 0 else _last_checkpoint(folder, model.num_tokens)
        if trainer_args.max_steps != 0 and (last is not None or Path(folder, CONFIG_FILE).exists()):
            check_run(trainer)
        if last is not None and trainer.is_world_process_zero():
            _say(f"Carrying on at {last}")
        trainer.train(resume_from_checkpoint=last)
        if last is not None and last.endswith(f"-{trainer.state.global_step}") and trainer.is_world_process_zero():
            _say("The run was finished: more --steps carry it on, and another --output-dir begins anew.")
        if questions or trainer.eval_dataset:
            trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_model()  # with its card, and, with --push-to-hub, on the Hub
    except EngineError as error:
        raise OSError(str(error)) from error
    except KeyboardInterrupt as stop:
        message = f"conversations and checkpoints are kept in {folder}; the same command carries on"
        raise KeyboardInterrupt(message) from stop
    if trainer.is_world_process_zero():
        _say(f"\nThe cartridge is in {folder}: `cartridges info {folder}`, or load_cartridge({folder!r}) in Python.")


def _check(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: an option is missing or does not go with another; before anything is read.
    """
    if not args.corpus and not args.data.conversations:
        raise ValueError("CORPUS is missing: name texts to write conversations about, or give --conversations.")
    if not args.trainer.output_dir or args.trainer.output_dir == "trainer_output":
        raise ValueError("--output-dir is missing: where should the cartridge go?")
    if not Path(args.model.model).exists() and not is_hub_name(args.model.model):
        raise ValueError(f"--model: {args.model.model!r} is neither a folder nor a name on the Hub (`user/name`).")
    if args.model.load_in_4bit and args.model.load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit do not go together: choose one.")
    if args.data.conversations and args.trainer.num_eval_conversations:
        raise ValueError(
            "--num-eval-conversations does not go with --conversations, beside which nothing is written: leave one out, or "
            "measure with --gold-questions."
        )
    if args.trainer.max_steps == 0 and Path(args.trainer.output_dir, RUN_FILE).exists():
        raise ValueError(
            f"--steps 0 would put an untrained cartridge in the place of the one in {args.trainer.output_dir}: give "
            "another --output-dir."
        )
    if args.model.num_tokens is not None and args.model.num_tokens < 0:
        raise ValueError(f"--num-tokens must be at least 0, got {args.model.num_tokens}.")


def _check_servers(args: argparse.Namespace, tokenizer: Any) -> None:
    """Of a new run; one that is carried on may have all that it needs of them.

    Raises:
        EngineError: none can be reached.
    """
    trainer = args.trainer
    is_new = not (args.data.conversations or Path(trainer.output_dir).exists())
    writes = trainer.max_steps != 0 or trainer.num_eval_conversations
    if trainer.engine == "openai" and is_new and writes:
        settings = SynthesisConfig.from_args(trainer, engine_model=trainer.engine_model or args.model.model)
        check_engines(make_engines(settings, None, tokenizer))


def _make_trainer(
    args: argparse.Namespace, documents: list[Document], questions: list[dict[str, str]] | None, tokenizer: Any
) -> SelfStudyTrainer:
    model, data, trainer_args = args.model, args.data, args.trainer
    given = trainer_args.model_init_kwargs or {}
    options = {"dtype": model.dtype, "revision": model.model_revision}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    trainer_args.model_init_kwargs = {**options, **(json.loads(given) if isinstance(given, str) else given)}
    quantization = None
    if model.load_in_4bit or model.load_in_8bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=model.load_in_4bit, load_in_8bit=model.load_in_8bit)
    if data.conversations:
        train_dataset = load_self_study(data.conversations)
    else:
        train_dataset = Dataset.from_list([dataclasses.asdict(document) for document in documents])
    stopping = [EarlyStoppingCallback(data.early_stopping_patience)] if data.early_stopping_patience else None
    text = "\n\n".join(document.text for document in documents)
    return SelfStudyTrainer(
        model.model,
        trainer_args,
        train_dataset,
        processing_class=tokenizer,
        peft_config=CartridgeConfig(num_tokens=model.num_tokens, num_frozen_tokens=model.num_frozen_tokens),
        callbacks=cast(Any, stopping),
        gold_questions=questions,
        corpus=text if data.conversations and documents else None,
        quantization_config=quantization,
    )


def _prepare(args: argparse.Namespace, documents: list[Document], tokenizer: Any) -> None:
    """Chooses the cartridge's length, if nobody has, and says what the run will take, before it begins."""
    model, settings = args.model, SynthesisConfig.from_args(args.trainer)
    lengths: dict[str, int] = {}
    if documents:
        lengths = settings.make_chunker(documents, tokenizer).lengths
    tokens = sum(lengths.values()) if documents else _tokens_behind(args.data.conversations)
    config = AutoConfig.from_pretrained(
        model.model, revision=model.model_revision, trust_remote_code=model.trust_remote_code
    ).get_text_config(decoder=True)
    suggested = ""
    if model.num_tokens is None and not getattr(config, "num_attention_heads", None):
        model.num_tokens = 0
    elif model.num_tokens is None:
        model.num_tokens, smaller, larger = (suggest_num_tokens(tokens, share) for share in (10, 20, 5))
        suggested = f" (--num-tokens; {smaller:,} is bold, {larger:,} is safe)" if tokens else " (--num-tokens)"
    if args.trainer.process_index:
        return
    if documents:
        plural = "" if len(documents) == 1 else "s"
        _say(f"Corpus: {len(documents):,} document{plural}, {tokens:,} tokens")
        if not args.data.conversations:
            if args.trainer.resample_every:
                rows, general, _ = size_of_rounds(args.trainer)
                settings = dataclasses.replace(settings, num_conversations=rows - general)
            estimate = estimate_run(settings, lengths, hidden_size=config.hidden_size)
            _say(f"To write: {_describe_writing(args.trainer, estimate)}")
    if not model.num_tokens:
        _say("Cartridge: states of recurrent layers alone")
        return
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = config.num_hidden_layers * 2 * heads * width
    served = f"{2 * model.num_tokens * each / 1e6:,.2f} MB" + (
        f" in place of the text's {2 * tokens * each / 1e6:,.2f}" if tokens else ""
    )
    _say(
        f"Cartridge: {model.num_tokens:,} tokens{suggested}, at most {4 * model.num_tokens * each / 1e6:,.2f} MB in its "
        f"file (float32) and {served} where it is served (bfloat16)"
    )


def _describe_writing(args: SelfStudyConfig, estimate: SynthesisEstimate) -> str:
    held_out = f"{args.num_eval_conversations:,} held-out conversations (--num-eval-conversations), to measure on"
    if args.max_steps == 0:
        return held_out if args.num_eval_conversations else "nothing (--steps 0 only initializes the cartridge)"
    said = str(estimate)
    if args.resample_every:
        said = f"{size_of_rounds(args)[2]:,} rounds (--resample-every), each of {said}"
    if args.budget is not None and args.num_conversations is None:
        said = f"as many as fit into --budget {args.budget}, which is measured when the run begins, and at most {said}"
    return f"{said}\n{held_out}" if args.num_eval_conversations else said


def suggest_num_tokens(corpus_tokens: int, share: int = 10) -> int:
    """A cartridge's length: 1 / `share` of its corpus, in steps of 16 above 64, and at most the paper's longest; 512
    where the corpus is not known (0)."""
    wanted = corpus_tokens // share if corpus_tokens else 5120 // share
    return max(1, min(wanted if wanted < 64 else wanted // 16 * 16, 8192))


def _tokens_behind(conversations: str) -> int:
    """Length of the corpus that conversations were written about; 0 if they do not tell."""
    coverage = read_provenance(load_self_study(conversations)).get("report", {}).get("coverage", {})
    return sum(found["num_tokens"] for found in coverage.values())


def _read_corpus(args: argparse.Namespace) -> list[Document]:
    data = args.data
    if not args.corpus:
        return []
    return list(
        load_corpus(
            args.corpus,
            split=data.split,
            text_column=data.text_column,
            max_documents=data.max_documents,
            description=data.description,
            exclude=data.exclude,
        )
    )


def _read_questions(path: str | None) -> list[dict[str, str]] | None:
    if path is None:
        return None
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                pair = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"--gold-questions: line {number} of {path} is not JSON ({error}).") from None
            if not isinstance(pair, dict) or not {"question", "answer"} <= pair.keys():
                raise ValueError(f"--gold-questions: line {number} of {path} lacks `question` or `answer`.")
            found.append(pair)
    return found


def _load_tokenizer(model: ModelArguments) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            model.model, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"--model: the tokenizer of {model.model!r} could not be loaded ({reason})") from error


def _last_checkpoint(folder: str, num_tokens: int) -> str | None:
    """Where a stopped run is taken up.

    Raises:
        ValueError: it is a run with a cartridge of another length.
    """
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is not None and read_config(last).num_tokens != num_tokens:
        raise ValueError(
            f"--output-dir: {folder} holds a run with --num-tokens {read_config(last).num_tokens}: give that to carry it "
            "on, or another folder."
        )
    return last


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
