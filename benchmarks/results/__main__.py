"""The evidence: every figure of docs/results.md, one resumable command.

    python -m benchmarks.results --budget small --data DATA
    python -m benchmarks.results --budget full --data DATA --encoder ENCODER --kvpress-python kvpress-env/bin/python
    python -m benchmarks.results --minutes 8 --only baselines        # as much as fits, then the page from what is there
    python -m benchmarks.results --list

Each cell is a JSON line in `--output`; cells that are there with the same settings are left out, so the same command
carries on after a stop, and `--fresh` makes those that are asked for anew. The page is written from the lines at the end of each run, also after
Ctrl-C: `docs/results.md`, or with the small budget, whose self-studies are too short to say how good a cartridge gets,
`outputs/results/results.md`. Documents: the two of `examples/data`, and those of QASPER, QuALITY and LooGLE, from the Hub or from `--data
FOLDER` (`qasper.jsonl`, `quality.jsonl`, `loogle.jsonl`, `general.jsonl`, `longhealth.json`; rows as in
`peft_cartridges.evaluation.tasks`). Lines hold numbers only, no text.

On a GPU, with a model that answers rather than one that only likelihoods can tell apart (`make results-gpu DATA=DATA`; not
run yet):

    python -m benchmarks.results --budget full --device cuda --tasks longhealth quality --data DATA --documents 6 \\
        --conversations 4096 --steps 400 --model Qwen/Qwen3-4B --window 40960
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from peft_cartridges.atomic_files import write_text
from peft_cartridges.evaluation import Document

from .page import write_page
from .plan import BUDGETS, DOCUMENTS, ROOT, Budget, Cell, load_documents, plan, settings_of, work_folder
from .records import read_records


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget",
        choices=list(BUDGETS),
        default="small",
        help="small takes some 50 minutes of one processor, full six hours of two (default: small)",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further cell after so many minutes")
    parser.add_argument("--only", nargs="*", default=[], metavar="GROUP", help="only these groups of cells")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="BASELINE", help="baselines to leave out, e.g. summary"
    )
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument(
        "--fresh", action="store_true", help="make what is kept anew; with `--only`, those groups' cells"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page from the lines that are there")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="*", default=["qasper", "quality"])
    parser.add_argument("--data", type=Path, help="folder with the tasks' rows, instead of the Hub")
    parser.add_argument("--documents", type=int, help="of each task, the shortest ones")
    parser.add_argument("--long-documents", type=int, help="of LooGLE")
    parser.add_argument("--window", type=int, default=8192, help="of the model; longer texts of the tasks are left out")
    for field in fields(Budget):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, help=f"instead of the budget's {_of_budgets(field.name)}"
        )
    parser.add_argument(
        "--encoder", help="SentenceTransformer of the dense retriever (default: the model's own averaged states)"
    )
    parser.add_argument("--kvpress-python", help="interpreter of an environment with kvpress")
    parser.add_argument("--output", type=Path, help="the JSON lines (default: results/ beside the page)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/results", help="conversations and cartridges")
    parser.add_argument(
        "--page",
        type=Path,
        help="(default: docs/results.md, of other models docs/results-MODEL.md; with the small budget in --work)",
    )
    args = parser.parse_args(argv)
    if args.fresh and args.page_only:
        parser.error("--fresh and --page-only: the page is written from the lines that --fresh would leave out")
    name = Path(args.model).name.lower()
    folder = args.work if args.budget == "small" else ROOT / "docs"
    args.output = args.output or folder / "results" / f"{name}-{args.budget}.jsonl"
    own = name == Path(parser.get_default("model")).name.lower()
    args.page = args.page or folder / ("results.md" if own else f"results-{name}.md")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    budget = BUDGETS[args.budget].changed(**{field.name: getattr(args, field.name) for field in fields(Budget)})
    counts = tuple(
        standard if given is None else given
        for given, standard in zip((args.documents, args.long_documents), DOCUMENTS[args.budget], strict=True)
    )
    documents, long, general = load_documents(args.tasks, args.data, args.window, counts)
    cells = plan([name for name in documents if name not in long], long, args.budget)
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return
    settings = settings_of(budget, args.model, args.dtype)
    if args.fresh:
        _forget(args, [cell.name for cell in cells if cell.group in (args.only or [cell.group])], settings)
    if not args.page_only:
        _carry_out(args, argv, budget, cells, documents, general, settings)
    records = list(read_records(args.output, settings).values())
    print(f"Written: {write_page(records, args.page, cells=[cell.name for cell in cells], budget=args.budget)}")


def _carry_out(
    args: argparse.Namespace,
    argv: list[str] | None,
    budget: Budget,
    cells: Sequence[Cell],
    documents: Mapping[str, Document],
    general: list[dict[str, str]],
    settings: dict[str, Any],
) -> None:
    """Each cell that is not there yet."""
    from .run import Run

    args.output.parent.mkdir(parents=True, exist_ok=True)
    run, start = Run(args, budget, documents, general), time.perf_counter()
    # Where things lie on this machine is no part of what was run.
    given = [Path(word).name if Path(word).is_absolute() else word for word in (sys.argv[1:] if argv is None else argv)]
    about = {"command": shlex.join(["python", "-m", "benchmarks.results", *given]), "commit": run.commit}
    try:
        for cell in cells:
            if cell.name in read_records(args.output, settings) or cell.group not in (args.only or [cell.group]):
                continue
            if (time.perf_counter() - start) / 60 > args.minutes:
                print(f"{cell.name}: left for another time (--minutes)")
                continue
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            record = run.carry_out(cell)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, **about}) + "\n")
            print(f"{cell.name}: {record['seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished cells are kept in {args.output}; the same command carries on")


def _forget(args: argparse.Namespace, cells: Sequence[str], settings: dict[str, Any]) -> None:
    """Removes the lines of these cells, and what was kept for these settings: conversations and cartridges serve several
    cells, so all of them are made anew. Whatever else lies in `--output` and `--work` stays."""
    if args.output.exists():
        lines = args.output.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(args.output, "".join(line for line in lines if not _is_of(line, cells, settings)))
    shutil.rmtree(work_folder(args.work, settings), ignore_errors=True)


def _is_of(line: str, cells: Collection[str], settings: dict[str, Any]) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # cut short by a kill
        return True
    return record["name"] in cells and record.get("settings") == settings


def _of_budgets(name: str) -> str:
    return ", ".join(f"{asdict(budget)[name]} ({key})" for key, budget in BUDGETS.items())


if __name__ == "__main__":
    main()
