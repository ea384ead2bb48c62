"""`SelfStudySynthesizer`: a model writes conversations about a corpus, and says how it would answer with it in context."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..chat import ChatCodec, with_cartridge_chat_template
from ..conversations.folder import OFF_CONTEXT, WRITTEN, ConversationFolder, Part, plan_parts
from ..conversations.loading import read_parts, without_bulk, without_rows
from ..conversations.provenance import CorpusDigest, describe, make_identity, origin_of
from ..conversations.report import make_report, without
from ..conversations.rows import make_features, rows_to_table
from ..corpus import Chunk, Chunker, iter_documents
from ..model_identity import model_fingerprint, tokenizer_fingerprint
from .dialogue import SeedPrompts
from .engines import Engine, TransformersEngine, check_engines, make_engines
from .off_context import GivenConversations, num_off_context
from .part_study import PartStudy
from .processes import Processes
from .quality import Candidate, make_filters
from .scoring import EngineScoring, ModelScorer
from .sizes import conversations_of_chunks, num_conversations
from .stages import Stage
from .synthesis_config import SynthesisConfig

# Parts whose first requests are measured against the window before anything runs.
_PARTS_MEASURED = 32


class SelfStudySynthesizer:
    """Makes a conversation set (arXiv 2506.06266): about each chunk of a corpus a model asks questions (A) and answers
    them (B), both with the chunk in context; then the teacher's targets are computed.

    Args:
        model: A transformers causal LM, or a PEFT model (its cartridge is disabled meanwhile). It scores, and writes
            too unless `args.engine` names another engine; `None` where an engine does all.
        processing_class: Tokenizer or processor of the model, with a chat template.
        args: Settings.
        engines: What writes, instead of what `args.engine` names: one or many `Engine`s of one model.
        seed_prompts: Texts, or a callable that is given a chunk and a `random.Random` and gives a text; used instead
            of the built-in seed prompts.
        off_context_dataset: General conversations or prompts of your own, a `datasets.Dataset` or other rows, instead of
            what `args.off_context_dataset` names; see `GivenConversations`.

    Example:

    ```python
    synthesizer = SelfStudySynthesizer(model, tokenizer, SynthesisConfig(num_conversations=512))
    dataset = synthesizer.synthesize(text, output_dir="handbook-self-study")
    ```

    Raises:
        ValueError: nothing that was given can give the targets that `args.teacher_targets` wants.
    """

    def __init__(
        self,
        model: nn.Module | None,
        processing_class: Any,
        args: SynthesisConfig | None = None,
        *,
        engines: Engine | Sequence[Engine] | None = None,
        seed_prompts: SeedPrompts | None = None,
        off_context_dataset: Any = None,
    ) -> None:
        self.args = args if args is not None else SynthesisConfig()
        options: dict[str, Any] = {
            "chat_template_kwargs": self.args.chat_template_kwargs,
            "thoughts": self.args.thoughts,
        }
        bare = ChatCodec(model, processing_class, **options)
        self._bare_preamble = bare.preamble if bare.has_template else []
        if not self.args.default_system_prompt:
            processing_class = with_cartridge_chat_template(processing_class)
        self.codec = ChatCodec(model, processing_class, **options)
        kind = self.args.teacher_targets
        wants_top_k = model is None and (kind == "top_k" or self.args.measures_usefulness)
        if engines is None:
            top_k = self.args.teacher_top_k if wants_top_k else 0
            engines = make_engines(self.args, model, self.codec, top_k=top_k)
        self.engines = [engines] if isinstance(engines, Engine) else list(engines)
        if not self.engines:
            raise ValueError("`engines` is empty: give at least one.")
        if model is None:
            model = next((one.model for one in self.engines if isinstance(one, TransformersEngine)), None)
        if model is None and kind == "hidden_states":
            raise ValueError(
                '`teacher_targets` is "hidden_states", which engines do not give: pass the `model` to score with, or set '
                '`teacher_targets="live"` (computed in the training step) or `"top_k"`.'
            )
        scores = wants_top_k and model is None
        if scores and not all(one.gives_top_k and one.k >= self.args.teacher_top_k for one in self.engines):  # type: ignore[attr-defined]
            raise ValueError(
                f"`teacher_top_k` is {self.args.teacher_top_k}, but an engine gives fewer log-probabilities: lower it, "
                "make the engine with a larger `top_k` (most give at most 20), or pass the `model` to score with."
            )
        self.model = model
        self._engine_scores = scores
        here = [one for one in self.engines if isinstance(one, TransformersEngine) and one.model is model]
        prefixes = here[0].prefixes if here else None
        self._scorer = ModelScorer(model, self.codec, self.args, prefixes, self._bare_preamble) if model else None
        self._one_model = len(here) == len(self.engines) == 1
        self.seed_prompts: SeedPrompts | None = seed_prompts or self.args.seed_prompts or None
        source = self.args.off_context_dataset if off_context_dataset is None else off_context_dataset
        self._given = None if source is None else GivenConversations.load(source, self.args.synthesis_seed)

    # -- what users call ---------------------------------------------------------------------------------------------

    def synthesize(
        self, corpus: Any, output_dir: str | Path | None = None, *, corpus_name: str | None = None
    ) -> Dataset:
        """The conversation set of a corpus.

        Args:
            corpus: A text, several texts, or rows with a `text` column, also a stream of them; see `as_documents` (and
                `load_corpus` for files, folders and data sets by name).
            output_dir: The set's folder. The same call carries on a run that was killed, extends a set (with another
                `num_conversations`), or gives it other targets; several processes and jobs share the work. Without it
                the set lies in a temporary folder until the process ends.
            corpus_name: Stands in the set's description.

        Returns:
            Rows with `messages`, `input_ids` (what the student sees behind its cartridge), `completion_mask` (1 where a
            token is learned), `turns_start` (where what the teacher sees too begins), the teacher's targets
            (`teacher_hidden_states`, flat `[learned tokens * hidden_size]`; or `teacher_top_k_ids` and
            `teacher_top_k_logprobs`, flat `[learned tokens * k]`; or none, if they are `live`), `chunk_id`, `context`
            (the text in the teacher's context; both are null in general conversations, which come last), `seed_type`, `id`, `origin`, and `usefulness` where that is measured.
            `read_report` gives what it was made from and what came of it.

        Raises:
            ValueError: the corpus is empty or has no `text`, a chunk does not fit into the model's window, nothing was
                kept, or `output_dir` holds another set.
            EngineError: no engine can be reached, or none answers any more; what was finished is kept in `output_dir`.
        """
        processes = Processes()
        digest = CorpusDigest(corpus_name or _dataset_name(corpus))
        chunker = self.args.make_chunker(digest.reading(iter_documents(corpus)), self.codec)
        identity = self._identity(digest.identity())
        identity["synthesis"]["num_conversations"] = num_conversations(self.args, chunker.lengths)
        folder = ConversationFolder(processes.same(lambda: output_dir or _temporary_folder()))
        wanted = self._wanted(chunker)
        self._check_engines(folder, wanted)
        if processes.is_main:
            folder.claim(identity)
        processes.wait_for_all()
        identity = folder.claim(identity)
        chunks, plan = self._plan(chunker, wanted, folder.parts(WRITTEN))
        self._write(folder, plan, chunks, identity, shown=processes.is_main)
        stage = self._score(folder, plan, identity, shown=processes.is_main)
        processes.wait_for_all()
        if processes.is_main:
            self._conclude(folder, stage, plan, identity, chunker.lengths)
        processes.wait_for_all()
        return self._open(folder, stage, plan, wanted)

    def preview(self, corpus: Any, number: int = 4) -> tuple[Dataset, float]:
        """A few conversations from all over a corpus, with the run's settings; and the tokens that were generated per
        second meanwhile. The first ones of a run with the same seed are not the same: a preview spreads over more
        chunks.

        Raises:
            ValueError: `number` is below 1, or as `synthesize`.
            EngineError: as `synthesize`.
        """
        if number < 1:
            raise ValueError(f"A preview shows at least 1 conversation, got {number}.")
        check_engines(self.engines)
        digest = CorpusDigest()
        chunker = self.args.make_chunker(digest.reading(iter_documents(corpus)), self.codec)
        identity = self._identity(digest.identity())
        each, rest = divmod(number, min(number, 4))
        wanted = {chunk: each + (chunk < rest) for chunk in range(min(number, 4))}
        chunks, plan = self._plan(chunker, wanted)
        folder = ConversationFolder(_temporary_folder())
        folder.claim(identity)
        start = time.perf_counter()
        self._write(folder, plan, chunks, identity, shown=False)
        stage = self._score(folder, plan, identity, shown=False)
        seconds = time.perf_counter() - start
        report = self._conclude(folder, stage, plan, identity, chunker.lengths)
        return self._open(folder, stage, plan, wanted), report["generated_tokens"] / seconds

    def check(self, corpus: Any, output_dir: str | Path | None = None) -> None:
        """Whether a run can begin: no model is run, nothing is written.

        Args:
            corpus, output_dir: As of `synthesize`.

        Raises:
            ValueError: the corpus is empty or has no `text`, or a chunk does not fit into the model's window.
            EngineError: there is something to write, and no engine can be reached.
        """
        chunker = self.args.make_chunker(iter_documents(corpus), self.codec)
        wanted = self._wanted(chunker)
        self._check_engines(None if output_dir is None else ConversationFolder(output_dir), wanted)
        self._plan(chunker, wanted)

    def address(self, corpus: Any) -> str:
        """What the set of a corpus is addressed by: 64 hexadecimal digits, of all that decides its content (corpus,
        model, chat template, recipe, `synthesis_seed`)."""
        return self.identity(corpus)["address"]

    def identity(self, corpus: Any) -> dict[str, Any]:
        """What the set of a corpus is made from, with its address; see `make_identity`."""
        digest = CorpusDigest()
        for _ in digest.reading(iter_documents(corpus)):
            pass
        return self._identity(digest.identity())

    # -- what there is to do -----------------------------------------------------------------------------------------

    def _identity(self, corpus: dict[str, Any]) -> dict[str, Any]:
        settings = {field.name: getattr(self.args, field.name) for field in fields(SynthesisConfig)}
        if self.seed_prompts is not None:
            own = self.seed_prompts
            named = getattr(own, "__qualname__", type(own).__qualname__) if callable(own) else list(own)
            settings["seed_prompts"] = named
        settings["off_context_dataset"] = None if self._given is None else self._given.identity
        unused = ["off_context_dataset"] if self._given is None else []
        engine = self.engines[0]
        return make_identity(
            base_model=engine.model_name if self.model is None else _name_of(self.model),
            model_fingerprint=engine.fingerprint if self.model is None else model_fingerprint(self.model),
            tokenizer_fingerprint=tokenizer_fingerprint(self.codec),
            corpus=corpus,
            settings=settings,
            content_settings=[name for name in SynthesisConfig.content_settings() if name not in unused],
        )

    def _wanted(self, chunker: Chunker) -> dict[int, int]:
        """How many conversations there are to be about each chunk and, under `OFF_CONTEXT`, about none."""
        args, lengths = self.args, chunker.lengths
        wanted = dict(enumerate(conversations_of_chunks(args, lengths)))
        general = num_off_context(num_conversations(args, lengths), args.off_context_share)
        if self._given is not None:
            general = min(general, len(self._given))
        return {**wanted, OFF_CONTEXT: general} if general else wanted

    def _plan(
        self, chunker: Chunker, wanted: Mapping[int, int], there: Sequence[Part] = ()
    ) -> tuple[dict[int, Chunk], list[Part]]:
        """The chunks, and the parts of the set.

        Raises:
            ValueError: as `_check_window`.
        """
        number = sum(chunk != OFF_CONTEXT for chunk in wanted)
        chunks = dict(enumerate(itertools.islice(chunker.chunks(self.args.synthesis_seed), number)))
        plan = plan_parts(there, wanted)
        self._check_window(chunker, chunks, plan)
        return chunks, plan

    def _check_engines(self, folder: ConversationFolder | None, wanted: Mapping[int, int]) -> None:
        """Before anything is written. Where all that they are to do is there, engines may be gone."""
        stages = [WRITTEN, *([self._stage()] if self._engine_scores else [])]
        plan = plan_parts(folder.parts(WRITTEN), wanted) if folder else []
        if folder is None or not all(folder.has(stage, part) for part in plan for stage in stages):
            check_engines(self.engines)

    def _window(self) -> int | None:
        windows = [engine.max_length for engine in self.engines if engine.max_length is not None]
        return min(windows, default=None)

    def _check_window(self, chunker: Chunker, chunks: dict[int, Chunk], plan: Sequence[Part]) -> None:
        """Raises:
        ValueError: a chunk, or what is first asked about it, does not fit into the model's window.
        """
        window = self._window()
        if window is None:
            return
        args = self.args
        longest = min(args.max_chunk_tokens, max(chunker.lengths.values()))
        answered = len(self.codec.encode_prompt(["?"])) + args.max_question_tokens + args.max_answer_tokens
        needed = longest + args.num_rounds * answered
        for part in plan[:_PARTS_MEASURED] if needed <= window else ():
            study = self._study(part, chunks.get(part.chunk), window=None)
            asked = [len(request.prompt) + request.max_new_tokens for request in study.begin()]
            turns = max([args.num_rounds * answered, *asked, study.longest_recitation()])
            needed = max(needed, len(study.context) + turns)
        if needed > window:
            raise ValueError(
                f"A chunk of {longest} tokens and a conversation about it need up to {needed} tokens, the model's window "
                f"has {window}: lower `max_chunk_tokens` ({args.max_chunk_tokens}), or `max_question_tokens` "
                f"({args.max_question_tokens}), `max_answer_tokens` ({args.max_answer_tokens}) or `num_rounds` "
                f"({args.num_rounds})."
            )

    def _study(self, part: Part, chunk: Chunk | None, **options: Any) -> PartStudy:
        options = {"seed_prompts": self.seed_prompts, "bare_preamble": self._bare_preamble, **options}
        return PartStudy(part, chunk, self.codec, self.args, given=self._given, **options)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write(
        self,
        folder: ConversationFolder,
        plan: Sequence[Part],
        chunks: dict[int, Chunk],
        identity: dict[str, Any],
        *,
        shown: bool,
    ) -> None:
        """Writes the parts that are not there; with one model for all, each is scored as soon as it is written, while
        its chunk's prefix is there."""
        constants = {"origin": origin_of(identity)}
        features = make_features("top_k" if self._engine_scores else "live")
        stage = self._stage()

        def study(part: Part) -> PartStudy:
            options = {"window": self._window(), "constants": constants, "address": identity["address"]}
            return self._study(part, chunks.get(part.chunk), **options)

        def keep(job: PartStudy) -> None:
            folder.write(WRITTEN, job.part, rows_to_table(job.rows(), features), job.report)
            if self._one_model and stage != WRITTEN:
                with folder.claimed(stage, job.part) as mine:  # who has nothing to write any more may be at it
                    if mine:
                        self._score_here(folder, stage, job.part, identity)

        Stage(folder, WRITTEN, plan, "Conversations", shown).run_jobs(self.engines, study, keep)

    # -- scoring -----------------------------------------------------------------------------------------------------

    def _stage(self) -> str:
        """Where the parts with the wanted targets lie."""
        args = self.args
        if args.teacher_targets == "live":
            return "live-scored" if args.measures_usefulness else WRITTEN
        if args.teacher_targets == "top_k":
            mass = "" if args.teacher_top_k_mass == 1 else f"-{args.teacher_top_k_mass:g}"
            by = "-engine" if self._engine_scores else ""
            return f"top_k-{args.teacher_top_k}{mass}{by}"
        return args.teacher_targets

    def _score(self, folder: ConversationFolder, plan: Sequence[Part], identity: dict[str, Any], *, shown: bool) -> str:
        """Scores the parts that are not scored yet; gives the stage where they lie."""
        name = self._stage()
        if name == WRITTEN:
            return name
        stage = Stage(folder, name, plan, "Scoring", shown)
        if not self._engine_scores:
            stage.make_each(lambda part: self._score_here(folder, name, part, identity))
            return name

        def scoring(part: Part) -> EngineScoring:
            return EngineScoring(part, folder.read(WRITTEN, part), self.codec, self.args, self._bare_preamble)

        def keep(job: EngineScoring) -> None:
            folder.write(name, job.part, *job.result())

        stage.run_jobs(self.engines, scoring, keep)
        return name

    def _score_here(self, folder: ConversationFolder, stage: str, part: Part, identity: dict[str, Any]) -> None:
        assert self._scorer is not None
        origin = {"origin": origin_of(identity)}
        folder.write(stage, part, *self._scorer.score(part, folder.read(WRITTEN, part), origin))

    # -- what came of it ---------------------------------------------------------------------------------------------

    def _conclude(
        self,
        folder: ConversationFolder,
        stage: str,
        plan: Sequence[Part],
        identity: dict[str, Any],
        lengths: dict[str, int],
    ) -> dict[str, Any]:
        """Finds what two parts have alike, and writes the manifest; gives the report.

        Raises:
            ValueError: nothing was kept.
        """
        reports = [self._part_report(folder, stage, part) for part in plan]
        left_out = self._compare_parts(folder, stage, plan)
        lost: dict[str, Counter[str]] = {}
        for name, reason in left_out.items():
            lost.setdefault(name.split("-")[1], Counter())[reason] += 1
        for number, part in enumerate(plan):
            if counted := lost.pop(part.about, None):
                reports[number] = without(reports[number], counted)
        report = make_report(reports, lengths)
        there = folder.manifest() or {}
        known = there.get("left_out", {})
        folder.write_manifest({**there, **identity, "report": report, "left_out": {**known, **left_out}})
        if not report["kept"]:
            raise ValueError(
                f"No conversation of {report['made']} was kept ({report['dropped']}): loosen `quality_filters`, "
                "`min_usefulness`, `max_question_tokens` or `max_answer_tokens`, use a stronger model, or, where it is "
                '`unstorable_targets`, set `teacher_targets="top_k"` or `"live"`.'
            )
        return report

    @staticmethod
    def _part_report(folder: ConversationFolder, stage: str, part: Part) -> dict[str, Any]:
        report = folder.read_part_report(WRITTEN, part)
        if stage == WRITTEN:
            return report
        return without(report, folder.read_part_report(stage, part)["dropped"])

    def _compare_parts(self, folder: ConversationFolder, stage: str, plan: Sequence[Part]) -> dict[str, str]:
        """Ids of the rows whose like is in an earlier part, with the filter that says so."""
        filters = make_filters(self.args.quality_filters, max_similarity=self.args.max_similarity)
        comparing = {name: one for name, one in filters.items() if one.compares}
        found: dict[str, str] = {}
        for part in tqdm(plan if comparing else (), desc="Comparing", unit=" parts", delay=2, leave=False):
            rows = folder.read(stage, part).select_columns(["id", "messages", "context", "seed_type"])
            for row in rows:
                candidate = Candidate(row["messages"], row["context"] or "", row["seed_type"])
                reason = next((name for name, one in comparing.items() if one.drops(candidate)), None)
                if reason is not None:
                    found[row["id"]] = reason
        return found

    def _open(self, folder: ConversationFolder, stage: str, plan: Sequence[Part], wanted: Mapping[int, int]) -> Dataset:
        manifest = folder.manifest() or {}
        dataset = read_parts(folder, stage, plan, manifest.get("left_out", {}))
        beyond = [
            f"{manifest['address'][:12]}-{part.about}-{index}"
            for part in plan
            for index in range(max(part.first, wanted[part.chunk]), part.end)
        ]
        dataset = without_rows(dataset, beyond)
        if stage == WRITTEN:
            columns = [name for name in make_features("top_k") if name.startswith("teacher_")]
            dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
        return describe(dataset, without_bulk(manifest))


def _name_of(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _dataset_name(corpus: Any) -> str | None:
    return getattr(getattr(corpus, "info", None), "dataset_name", None)


def _temporary_folder() -> str:
    """A folder that is there until the process ends: the data set is mapped from it."""
    path = tempfile.mkdtemp(prefix="cartridges-self-study-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
