"""Where preference pairs come from: SOURCES lists the readers, each a generator of pairs and bad rows.

A reader is given what was asked for (a Request), yields PreferencePair or BadRow for every row it meets, and says in
`identity` what its rows depend on, for the fingerprint. Rows are streamed; nothing is held but the row at hand. A new
source is its functions and one row; settings read the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from laddpo.errors import choose
from laddpo.preference.candidates import Grader, candidate_pairs
from laddpo.preference.embedded import arithmetic
from laddpo.preference.examples import COLUMNS, chosen_sides, read_example
from laddpo.preference.generated import (
    arithmetic_corpus,
    arithmetic_identity,
    arithmetic_pairs,
    arithmetic_split,
    corpus_identity,
)
from laddpo.preference.judged import Rater, judged_pairs
from laddpo.preference.onpolicy import sampled_pairs
from laddpo.preference.reading.bad_rows import BadRow, RowError, made_of
from laddpo.preference.reading.files import ReadLog, content_sha256, file_kind, read_rows
from laddpo.preference.reading.locate import has_split
from laddpo.preference.reading.pairs import (
    OF_ROW,
    Example,
    PreferencePair,
    Prompt,
    RowIds,
    UnpairedRow,
    example_of,
    pair_of,
)
from laddpo.preference.reading.ranked import PairMaker, PairRule
from laddpo.preference.reading.rows import SHAPES, WITHOUT_PROMPT, RowRules, mapped_text
from laddpo.preference.reading.unread import OF_SCORES, OPTIONAL, accounted, is_mapped, refuse_unread_columns
from laddpo.preference.requested import local_files, raw_rows, with_guesses
from laddpo.preference.unpaired import (
    are_unpaired,
    desirable,
    have_labels_for_sft,
    read_unpaired,
    refuse_threshold,
    split_pairs,
)


@dataclass(frozen=True)
class Request:
    """What is asked of a source; each uses the part that concerns it.

    Rows of files and of the hub: `dataset_name` (path, name in `preference_dir`, or hub id), `dataset_split`,
    `dataset_config`, `test_split`, `revision`, `columns` (our names to the data's), `format` (one of SHAPES, unpaired
    or json), `label_threshold` (which ratings are desirable), `pair_rule` (scores, ranks or several answers), limits.
    Generated rows: `num_pairs`, `difficulty`, `habit`, `seed`, and the share that validation gets; for a corpus
    `num_examples` and `mistake_share`. Graded candidates: `candidates_name` (files of them, if the rows have none),
    `pairs_per_question`, `grader`; sampled answers also `balance_lengths`, and a judge's `rater` and `pair_by`.
    """

    dataset_name: str | None = None
    dataset_split: str | None = None
    dataset_config: str | None = None
    test_split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    format: str = "auto"
    label_threshold: float | None = None
    preference_dir: Path | None = None
    max_line_bytes: int = 16 * 2**20
    follow_symlinks: bool = False
    allow_empty_prompt: bool = False
    allow_nul: bool = False
    num_pairs: int = 2048
    difficulty: arithmetic.Difficulty = field(default_factory=arithmetic.Difficulty)
    habit: str = "drop_carry"
    seed: int = 0
    validation_fraction: float = 0.0
    candidates_name: str | None = None
    pairs_per_question: int = 4
    grader: Grader | None = None
    balance_lengths: bool = True
    rater: Rater | None = None
    pair_by: str = "best_worst"
    pair_rule: PairRule = field(default_factory=PairRule)
    num_examples: int = 20_000
    mistake_share: float = 0.0

    @property
    def has_test_split(self) -> bool:
        """Whether `test_split` is another split than the one that is read, and the data have it or may have it."""
        if (
            not self.test_split
            or not self.dataset_name
            or self.test_split in (self.dataset_split or "train").split("+")
        ):
            return False
        where = (self.dataset_name, self.preference_dir, self.follow_symlinks, self.test_split, self.dataset_config)
        return has_split(*where)


@dataclass(frozen=True)
class Source:
    """`read` streams the rows, `identity` lists what they depend on, `split_of` places a prompt where the source itself
    has splits of its own (None: the split is by prompt), `is_graded` says whether pairs carry a gold answer.
    `read_examples` streams SFT examples where rows may hold more than pairs; `corpus` is a source of such examples.
    `read_unpaired` streams unpaired rows where `is_unpaired` finds that a request asks for some.
    `reads` names the settings of data, or groups of them, that not every source reads. `needs_dataset`: there is no
    default for data.dataset_name. `needs_grader`: its pairs are answers told right from wrong."""

    read: Callable[[Request, ReadLog], Iterator[PreferencePair | UnpairedRow | Example | BadRow]]
    identity: Callable[[Request], dict]
    split_of: Callable[[Prompt], str] | None = None
    is_graded: bool = False
    read_examples: Callable[[Request, ReadLog], Iterator[Example | BadRow]] | None = None
    corpus: Source | None = None
    read_unpaired: Callable[[Request, ReadLog], Iterator[UnpairedRow | BadRow]] | None = None
    is_unpaired: Callable[[Request], bool] = lambda request: False
    reads: tuple[str, ...] = ()
    needs_dataset: bool = False
    needs_grader: bool = False


def open_source(name: str) -> Source:
    """The source of preference pairs of that name."""
    return choose(SOURCES, name, "data.source", "laddpo/preference/sources.py")


def open_corpus(name: str) -> Source:
    """The source of SFT examples of that name: its corpus, else what its rows hold."""
    source = open_source(name)
    return source.corpus or examples_of(source)


def open_unpaired(name: str) -> Source:
    """The source of unpaired rows of that name. Of pairs both sides are taken, each with its label."""
    source = open_source(name)

    def read(request: Request, log: ReadLog) -> Iterator[UnpairedRow | BadRow]:
        if source.read_unpaired and source.is_unpaired(request):
            return source.read_unpaired(request, log)
        return split_pairs(source.read(request, log), log)

    return replace(source, read=read)


def read_pairs(
    request: Request,
    log: ReadLog,
    shape: str | None = None,
    rows: Iterable[tuple[str, dict] | BadRow] | None = None,
) -> Iterator[PreferencePair | BadRow]:
    """Pairs of local files or of the hub, or of `rows`, in the shape of `shape` or else of `request.format`."""
    if shape is None and rows is None:
        request = with_guesses(request, log, is_pair=True)
    rules = RowRules(request.columns, request.allow_empty_prompt, request.allow_nul)
    shape = shape or shape_name(request.format)
    readable = [*PAIR_COLUMNS, "candidates", "candidate", *OPTIONAL]
    if shape in WITHOUT_PROMPT:
        readable = [name for name in readable if name not in ("prompt", "input")]
    refuse_unread_columns(rules.columns, readable, f"data.format={shape}")
    kind: bool | None = None
    maker = PairMaker(rules, request.pair_rule, log)

    def pairs(place: str, fields: dict) -> Iterator[PreferencePair | BadRow]:
        nonlocal kind
        if request.format == "explicit":
            kind = same_kind(kind, fields, rules)
        answer = mapped_text(fields, "answer", rules, log.warn)
        for made in maker.pairs(fields):
            try:
                texts = SHAPES[shape](made.fields, rules, log.warn)
                yield pair_of(RowIds(), *texts, place, answer, made.weight, made.margin)
            except RowError as error:  # the row's other pairs may be good
                yield error.at(place)

    used = (*PAIR_COLUMNS, "candidates", *(name for name in OPTIONAL if rules.columns.get(name)))
    names = [*(name for name in readable if name in used), *OF_ROW]
    if rows is None:
        rows = raw_rows(request, log, names)
    else:
        rows = accounted(rows, names, request.columns, "the pairs", log.warn)
    yield from made_of(rows, pairs)
    maker.finish()


def read_examples(request: Request, log: ReadLog, shape: str | None = None) -> Iterator[Example | BadRow]:
    """SFT examples of local files or of the hub: a response, a conversation, the chosen side of a pair, or a desirable
    completion."""
    if shape is None and have_labels_for_sft(request):
        columns, response = dict(request.columns), request.columns.get("response")
        if is_mapped("response", response) and not is_mapped("completion", columns.get("completion")):
            columns["completion"] = response
        return desirable(read_unpaired(replace(request, columns=columns), log), log)
    if shape is None:
        refuse_threshold(request)
        request = with_guesses(request, log, is_pair=False)
    rules = RowRules(request.columns, request.allow_empty_prompt, request.allow_nul)
    to_pair = SHAPES[shape or shape_name(request.format)]
    readable = [*COLUMNS, *(name for name in OPTIONAL if name not in OF_SCORES)]
    refuse_unread_columns(rules.columns, readable, "sft on rows")
    rows = raw_rows(request, log, [*(n for n in readable if n not in OPTIONAL or rules.columns.get(n)), *OF_ROW])
    return made_of(
        rows,
        lambda place, fields: [example_of(RowIds(), *read_example(fields, rules, log.warn, to_pair), place)],
    )


def graded_pairs(request: Request, log: ReadLog) -> Iterator[PreferencePair | BadRow]:
    """Correct over incorrect candidates: columns prompt (the question), answer, candidates."""
    rules = RowRules(request.columns, request.allow_empty_prompt, request.allow_nul)
    names = ("prompt", "answer", "candidates")
    refuse_unread_columns(rules.columns, (*names, "candidate"), "data.source=graded_candidates")
    rows, separate = raw_rows(request, log, names), ()
    if request.candidates_name:
        separate = raw_rows(replace(request, dataset_name=request.candidates_name), log, ("prompt", "candidate"))
    return candidate_pairs(rows, separate, rules, request.grader, request.pairs_per_question, request.seed, log)


def graded_identity(request: Request) -> dict:
    """What graded pairs depend on: also the grader, and the seed that picks among many pairs."""
    fields = {
        **rows_identity(request),
        "grader": request.grader.name if request.grader else None,
        "pairs_per_question": request.pairs_per_question,
        "seed": request.seed,
    }
    if request.candidates_name:
        fields["candidates"] = rows_identity(replace(request, dataset_name=request.candidates_name))
    return fields


def onpolicy_pairs(request: Request, log: ReadLog) -> Iterator[PreferencePair | BadRow]:
    """Right over wrong answers of the model itself, or better over worse ones. `dataset_name`: the file of samples."""
    rows = read_rows([Path(request.dataset_name or "")], request.max_line_bytes, log)
    balance = request.balance_lengths
    if request.rater is not None:
        asked = (request.pair_by, request.pairs_per_question, request.seed)
        return judged_pairs(rows, request.rater, *asked, log, balance)
    return sampled_pairs(rows, request.grader, request.pairs_per_question, request.seed, log, balance)


def onpolicy_identity(request: Request) -> dict:
    """What they depend on: the samples, the grader or the judge, and how pairs are chosen among them."""
    judged = {"judge": request.rater.fields(), "pair_by": request.pair_by} if request.rater else {}
    return {
        **judged,
        "samples": content_sha256(Path(request.dataset_name or "")),
        "grader": request.grader.name if request.grader else None,
        "pairs_per_question": request.pairs_per_question,
        "balance_lengths": request.balance_lengths,
        "seed": request.seed,
    }


def same_kind(kind: bool | None, fields: dict, rules: RowRules) -> bool:
    """Text rows and message rows in one file are refused at the first change, unless data.format=auto."""
    is_text = isinstance(fields.get(rules.column("chosen")), str)
    if kind is not None and kind != is_text:
        problem = "is a row of text among rows of messages" if is_text else "is a row of messages among rows of text"
        raise RowError("DATA-59", "", problem, "Keep one kind per file, or set data.format=auto.")
    return is_text


def shape_name(format: str) -> str:
    """The shape of rows that a data.format asks for."""
    known = {**{name: name for name in SHAPES}, "json": "auto"}
    return choose(known, format, "data.format", "laddpo/preference/reading/rows.py")


def rows_identity(request: Request) -> dict:
    """What pairs of files or of the hub depend on: the bytes of the files, not their names or order."""
    files = local_files(request, ReadLog())
    for path in files if request.format != "json" else ():
        file_kind(path)  # a wrong ending is refused, whatever was prepared of the same bytes
    fields = {
        "columns": {
            name: c
            for name, c in sorted(request.columns.items())
            if c and name != "response" and (name, c) not in USUAL
        },
        "format": request.format,
        "allow_empty_prompt": request.allow_empty_prompt,
        "allow_nul": request.allow_nul,
    }
    rule, plain = asdict(request.pair_rule), asdict(PairRule())
    fields |= {name: value for name, value in rule.items() if value != plain[name]}
    test = replace(request, dataset_split=request.test_split) if request.has_test_split else None
    if files:
        if test:
            fields["test_files"] = sorted(content_sha256(path) for path in local_files(test, ReadLog()))
        return {**fields, "files": sorted(content_sha256(path) for path in files)}
    if test:
        fields["test_split"] = request.test_split
    hub = {"dataset": request.dataset_name, "split": request.dataset_split or "train", "revision": request.revision}
    if request.dataset_config is not None:
        hub["config"] = request.dataset_config
    return {**fields, "hub": hub}


def rows_in_shape(shape: str | None = None, **defaults) -> Source:
    """A source of files or of the hub: rows in that shape, with `defaults` for what the request leaves open (columns
    where it names none)."""

    def completed(request: Request) -> Request:
        columns = request.columns if any(request.columns.values()) else defaults.get("columns", {})
        return replace(
            request,
            dataset_name=request.dataset_name or defaults.get("dataset_name"),
            dataset_split=request.dataset_split or defaults.get("dataset_split"),
            format=defaults.get("format", request.format),
            columns=columns,
        )

    def identity(request: Request) -> dict:
        threshold = None if shape else request.label_threshold
        more = {} if threshold is None else {"label_threshold": threshold}
        return {"shape": shape, **rows_identity(completed(request)), **more}

    return Source(
        read=lambda request, log: read_pairs(completed(request), log, shape),
        identity=identity,
        read_examples=lambda request, log: read_examples(completed(request), log, shape),
        read_unpaired=lambda request, log: read_unpaired(completed(request), log),
        is_unpaired=lambda request: shape is None and are_unpaired(completed(request)),
        reads=(*PAIRS_READ, *(() if "format" in defaults else ("format",)), *(() if shape else UNPAIRED_READ)),
        needs_dataset="dataset_name" not in defaults,
    )


def examples_of(source: Source) -> Source:
    """The SFT examples of a source of pairs: what its rows hold, else the chosen sides."""
    if source.read_examples is None:
        return replace(source, read=lambda request, log: chosen_sides(source.read(request, log)))
    return replace(
        source,
        read=source.read_examples,
        identity=lambda request: {**source.identity(request), "response": request.columns.get("response")},
    )


JUDGING = ("grader", "judge", "pair_by", "balance_lengths")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
USUAL = (("completion", "completion"), ("label", "label"))  # not in the keys, which are older than these settings
OF_ROWS = (
    *("dataset_name", "dataset_split", "dataset_config", "revision", "columns", "max_line_bytes", "follow_symlinks"),
    *("allow_empty_prompt", "allow_nul"),
)
ROWS_READ = (*OF_ROWS, "test_split", "test_fraction")
UNPAIRED_READ = ("columns.completion", "columns.label", "label_threshold")
PAIRS_READ = (
    *(*ROWS_READ, *(f"columns.{name}" for name in ("chosen", "rejected", "system", "input", *OF_SCORES))),
    *("columns.candidates", "columns.candidate", "pairs_from", "min_gap", "margin_per_gap"),
)
SOURCES: dict[str, Source] = {
    "arithmetic": Source(
        arithmetic_pairs,
        arithmetic_identity,
        split_of=arithmetic_split,
        is_graded=True,
        corpus=Source(arithmetic_corpus, corpus_identity),
        reads=("num_pairs",),
    ),
    "jsonl": rows_in_shape(),
    "hh_rlhf": rows_in_shape("hh_rlhf", dataset_name="Anthropic/hh-rlhf"),
    "ultrafeedback": rows_in_shape(
        "conversation", dataset_name="HuggingFaceH4/ultrafeedback_binarized", dataset_split="train_prefs"
    ),
    "orca_dpo_pairs": rows_in_shape(
        dataset_name="Intel/orca_dpo_pairs", columns={"prompt": "question", "system": "system"}
    ),
    "laddpo_public": rows_in_shape(format="json"),
    "graded_candidates": Source(
        graded_pairs,
        graded_identity,
        is_graded=True,
        reads=(
            *ROWS_READ,
            "columns.candidates",
            "columns.candidate",
            "format",
            "candidates_name",
            "pairs_per_question",
        ),
        needs_dataset=True,
        needs_grader=True,
    ),
    "onpolicy": Source(
        onpolicy_pairs,
        onpolicy_identity,
        is_graded=True,
        reads=(*OF_ROWS, "test_fraction", "pairs_per_question", "questions", "sampling", *JUDGING),
        needs_grader=True,
    ),
}
