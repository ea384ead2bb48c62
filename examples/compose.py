"""Trains cartridges apart from each other, joins them, and shows what the joined ones know of every text.

    python examples/compose.py                                   # two texts, two cartridges: about 20 minutes, 2 cores
    python examples/compose.py --fast                            # the same in small, to see that everything works
    python examples/compose.py --corpora lighthouse_handbook --parts 3    # one text, trained in three parts
    python examples/compose.py --parts 2                         # two texts in two parts each: four cartridges
    HF_ENDPOINT=… HF_TOKEN=… python examples/compose.py --push-to USER    # over the Hub: push, then compose by names

The table has the mean negative log-likelihood of gold answers that training never saw: for the questions on each text,
and for pairs of questions, one on each text, asked and answered in one go. A composition should come near to each
cartridge on its own text, and leave each far behind on the other's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from peft_cartridges import (
    CartridgeConfig,
    SelfStudyConfig,
    SelfStudyTrainer,
    cartridge_chat_template,
    compose,
    gold_answer_nll,
    push_cartridge,
)
from peft_cartridges.chat import ChatCodec
from peft_cartridges.hub import load_facts
from smollm2 import HUB_REPO, get_smollm2

DATA = Path(__file__).parent / "data"
Questions = list[dict[str, str]]


@dataclass
class Text:
    """A text to train a cartridge on, a whole corpus or a part of one."""

    name: str
    corpus: str
    text: str


def main() -> None:
    args = parse_args()
    transformers_logging.disable_progress_bar()  # the model is loaded anew for every row
    started = time.perf_counter()
    texts = list(itertools.chain.from_iterable(split(name, args.parts) for name in args.corpora))
    questions = {name: read_questions(name) for name in args.corpora}
    if len(args.corpora) == 2:
        questions["both at once"] = ask_both(*questions.values())
    model_path = get_smollm2(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    for number, text in enumerate(texts, start=1):
        print(f"{number}/{len(texts) + 1}  Cartridge of {text.name}: {len(text.text.split()):,} words")
        train(text, questions[text.corpus], model_path, tokenizer, args)

    print(f"{len(texts) + 1}/{len(texts) + 1}  Joining")
    names = [str(args.output_dir / text.name) for text in texts]
    if args.push_to:
        names = [push_cartridge(name, f"{args.push_to}/{Path(name).name}").repo_id for name in names]
        print(f"     Pushed: {', '.join(names)}")
    adapters = {text.name: args.output_dir / text.name for text in texts}
    for order, parts in compositions(texts, args.corpora).items():
        chosen = [name for name in names if Path(name).name in {part.name for part in parts}]
        chosen.sort(key=lambda name: [part.name for part in parts].index(Path(name).name))
        # All were trained on one model here, which the folders and the Hub call by different names.
        folder = args.output_dir / f"composition-{len(adapters)}"
        adapters[order] = compose(chosen, output_dir=folder, sinks=args.sinks, base_model=HUB_REPO)

    rows = {"no context": measure(None, questions, model_path, tokenizer)}
    tokenizer.chat_template = cartridge_chat_template(tokenizer)  # the one that they were trained with
    rows |= {name: measure(folder, questions, model_path, tokenizer) for name, folder in adapters.items()}
    print_table(rows, adapters)
    if len(args.corpora) == 2:
        show_answers(args.question, adapters, model_path, tokenizer)
    (args.output_dir / "compose.json").write_text(json.dumps(rows, indent=2))
    print(f"{time.perf_counter() - started:.0f} s in all; the cartridges and compose.json are in {args.output_dir}.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a small run, to see that everything works")
    parser.add_argument(
        "--corpora",
        nargs="+",
        default=["lighthouse_handbook", "orchard_cooperative"],
        help="one or two texts in examples/data, without their ending",
    )
    parser.add_argument("--parts", type=int, default=1, help="train each text in so many cartridges (default: 1)")
    parser.add_argument("--num-tokens", type=int, help="length of each cartridge (default: 256 / parts, fast: 64)")
    parser.add_argument("--num-conversations", type=int, help="for each cartridge (default: 256 / parts, fast: 16)")
    parser.add_argument("--max-steps", type=int, help="of training, for each cartridge (default: 40, fast: 4)")
    parser.add_argument("--sinks", choices=("first", "all"), default="first", help="see compose()")
    parser.add_argument("--push-to", metavar="USER", help="push to this user's account on the Hub, and compose from it")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct", help="folder of the model")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/compose"), help="where the cartridges go")
    parser.add_argument(
        "--question",
        default="What is the highest point of Vorrel Rock called, and which river flows through the Brindle Valley?",
        help="the question that is answered aloud",
    )
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.parts < 1 or len(args.corpora) > 2 or args.parts * len(args.corpora) < 2:
        parser.error("there must be at least two cartridges to join: two texts, or `--parts 2` or more")
    args.num_tokens = args.num_tokens or (64 if args.fast else 256 // args.parts)
    args.num_conversations = args.num_conversations or (16 if args.fast else 256 // args.parts)
    args.max_steps = args.max_steps or (4 if args.fast else 40)
    return args


def read_questions(name: str) -> Questions:
    return [json.loads(line) for line in (DATA / f"{name}.questions.jsonl").read_text().splitlines()]


def ask_both(first: Questions, second: Questions) -> Questions:
    """Pairs of questions that no single cartridge can answer."""
    pairs = zip(first[:24], second[:24], strict=True)
    return [{key: f"{one[key]} {other[key]}" for key in ("question", "answer")} for one, other in pairs]


def split(corpus: str, parts: int) -> list[Text]:
    """A corpus in parts of about equal length, cut between its sections."""
    text = (DATA / f"{corpus}.md").read_text()
    if parts == 1:
        return [Text(corpus, corpus, text)]
    heading, *sections = text.split("\n## ")
    cuts = [round(len(sections) * part / parts) for part in range(parts + 1)]
    return [
        Text(f"{corpus}-{part + 1}", corpus, "\n## ".join([heading.strip() + "\n", *sections[start:end]]))
        for part, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


def compositions(texts: list[Text], corpora: list[str]) -> dict[str, list[Text]]:
    """What is joined, by the name that the table gives it: the parts of each text, then all, forward and backward."""
    joined = {}
    if len(corpora) == 2 and len(texts) > 2:
        for corpus in corpora:
            parts = [text for text in texts if text.corpus == corpus]
            joined[f"{corpus}, {len(parts)} parts"] = parts
    joined[f"all {len(texts)}, in order"] = texts
    joined[f"all {len(texts)}, backward"] = texts[::-1]
    return joined


def train(
    text: Text, questions: Questions, model_path: Path, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> None:
    """A cartridge by self-study, in a folder of its own with its card."""
    torch.manual_seed(args.seed)
    corpus = Dataset.from_dict({"text": [text.text]})
    corpus.info.dataset_name = text.name
    trainer = SelfStudyTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16),
        args=SelfStudyConfig(
            output_dir=str(args.output_dir / text.name),
            num_conversations=args.num_conversations,
            recitation_share=0.75,  # a model of 135M parameters asks and answers poorly
            max_steps=args.max_steps,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            finetuned_from=HUB_REPO,  # for the card: the model is loaded from a folder
            language=["en"],
            license="apache-2.0",
            seed=args.seed,
        ),
        train_dataset=corpus,
        processing_class=tokenizer,
        peft_config=CartridgeConfig(num_tokens=args.num_tokens),
        gold_questions=questions,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()


def load(folder: Path | None, model_path: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    return model.eval() if folder is None else PeftModel.from_pretrained(model, folder).eval()


def measure(
    folder: Path | None, questions: dict[str, Questions], model_path: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    model = load(folder, model_path)
    return {name: gold_answer_nll(model, tokenizer, asked) for name, asked in questions.items()}


def print_table(rows: dict[str, dict[str, float]], adapters: dict[str, Path]) -> None:
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows)) + 2
    print(f"\n{'gold-answer NLL on':{width}}{'tokens':>8}" + "".join(f"{name:>22}" for name in columns))
    for name, row in rows.items():
        tokens = load_facts(adapters[name]).num_tokens or 0 if name in adapters else 0
        print(f"{name:{width}}{tokens:>8,}" + "".join(f"{row[column]:>22.3f}" for column in columns))
    print()


def show_answers(
    question: str, adapters: dict[str, Path], model_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    print(question)
    ids = ChatCodec(None, tokenizer).preamble
    ids += ChatCodec(None, tokenizer).encode_turns([{"role": "user", "content": question}], add_generation_prompt=True)
    input_ids = torch.tensor([ids])
    for name, folder in adapters.items():
        output = load(folder, model_path).generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=64, do_sample=False
        )
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        print(f"  {name}: {' '.join(answer.split())}")
    print()


if __name__ == "__main__":
    main()
