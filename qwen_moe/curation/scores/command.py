"""`qwen-moe data score`: scores and domains of documents, and classifiers that learn them. Torch is imported only when it is
used."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.counted import counted, tallied
from qwen_moe.config.fields import LARGEST_SIZE
from qwen_moe.data.command import verbs_of_data
from qwen_moe.errors import UserError
from qwen_moe.generation.command import add_running
from qwen_moe.options import LARGEST_SEED, number, whole

if TYPE_CHECKING:
    from qwen_moe.curation.scores.settings import DomainSettings, ScoreSettings
    from qwen_moe.curation.scores.store import Store

_WITH_OUTPUT = ("scorer", "output")


def register(subparsers: Any) -> None:
    """Add the verb to those of `data`; ``args.func(args)`` returns the exit code."""
    parser = verbs_of_data(subparsers).add_parser(
        "score", help="score documents with a model, a classifier or a function, and give them domains"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text, JSONL, Parquet, directories of them, or python-stdlib",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the documents with their scores; the same command goes on after a stop",
    )
    parser.add_argument(
        "--scorer",
        metavar="SCORER",
        help="an instruct model (Hugging Face directory, checkpoint or run), classifier:DIR, or MODULE:FUNCTION of "
        "(text, metadata)",
    )
    parser.add_argument(
        "--domains", type=Path, metavar="YAML", help="assign domains, too: by rules, a classifier or a model"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="1/4",
        help="score only every fourth file, beginning with the first",
    )
    parser.add_argument(
        "--on-failure",
        choices=("error", "skip"),
        default="error",
        help="what to do with a document whose score fails; default: %(default)s",
    )
    _add_model(parser)
    _add_files(parser)
    _add_training(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    # Prompts are short: documents are shortened to fit.
    parser.set_defaults(context_extension="none", chunk_size=None, attention="dense", kept_share=None, compile=False)
    parser.set_defaults(func=_run)


def _shard(text: str) -> tuple[int, int]:
    first, _, of = text.partition("/")
    if not (first.isascii() and of.isascii() and first.isdecimal() and of.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected N/M, such as 1/4")
    if not 1 <= int(first) <= int(of):
        raise argparse.ArgumentTypeError(
            f"{text!r}: of {counted(int(of), 'shard')} the first is 1 and the last {int(of)}"
        )
    return int(first), int(of)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a model that scores")
    group.add_argument(
        "--dimensions", nargs="+", default=[], metavar="NAME", help="default: educational quality coherence"
    )
    group.add_argument(
        "--prompts", type=Path, metavar="YAML", help="dimensions of your own: NAME: text, or NAME: {en: text, de: text}"
    )
    group.add_argument(
        "--language", default="en", help="of the prompt, for documents without metadata.language; default: %(default)s"
    )
    group.add_argument(
        "--document-tokens", type=whole(1, LARGEST_SIZE), default=2048, metavar="N",
        help="of longer documents the middle is not read; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--batch-documents", type=whole(1, 1_000_000), default=256, metavar="N",
        help="documents that are scored before they are written; default: %(default)s",
    )  # fmt: skip
    add_running(group)


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading files, as in `data prepare`")
    group.add_argument("--text-key", default="text", help="the key of the text in JSONL, or its column in Parquet")
    group.add_argument(
        "--on-bad-utf8", choices=("error", "skip", "replace"), default="error",
        help="what to do with text that is not Unicode; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--on-bad-line", choices=("error", "skip"), default="error",
        help="what to do with a line or row without text under the key; default: %(default)s",
    )  # fmt: skip


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training a classifier")
    group.add_argument(
        "--train-classifier", type=Path, metavar="DIR", help="learn the scores of --input instead of scoring it"
    )
    group.add_argument(
        "--target", metavar="KEY", help="learn classes: a key of metadata, such as domain; default: metadata.scores"
    )
    group.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="default: %(default)s")
    group.add_argument(
        "--epochs", type=whole(1, 1000), default=12, help="over the documents, at most; default: %(default)s"
    )
    group.add_argument(
        "--hidden", type=whole(0, 4096), default=32, help="units of the hidden layer, 0 for none; default: %(default)s"
    )
    group.add_argument(
        "--buckets", type=whole(16, 1 << 26), default=1 << 18, help="of hashed words; default: %(default)s"
    )
    group.add_argument(
        "--learning-rate", type=number(above=0, most=10), default=0.03, help="at the first step; default: %(default)s"
    )
    group.add_argument(
        "--most-documents", type=whole(1, 100_000_000), default=200_000, help="that are learned; default: %(default)s"
    )


def _run(args: argparse.Namespace) -> int:
    from qwen_moe.curation.scores.annotate import model_of, needs_model
    from qwen_moe.generation.launch import in_session

    domains = None if args.domains is None else _domain_settings(args)
    if args.train_classifier is not None:
        return _train(args, domains)
    if args.target is not None:
        raise UserError("--target is what a classifier learns: give --train-classifier, or leave it out")
    if args.output is None:
        raise UserError("--output is missing: give the folder for the scored documents")
    if args.scorer is None and domains is None:
        raise UserError("there is nothing to do: give --scorer, --domains, or both; or --train-classifier")
    scores = None if args.scorer is None else _score_settings(args)
    models = [model_of(one) for one in (scores, domains) if one is not None and needs_model(one)]
    if len({str(model) for model in models}) > 1:
        raise UserError(f"--scorer {models[0]} and the model {models[1]} of --domains differ: run a command for each")
    if not models:
        if args.tp * args.ep * args.pp > 1:
            raise UserError("--tp, --ep and --pp split a model, and no model scores here: leave them out")
        from parallel.threads import limit_threads

        limit_threads()
        return _score(args, scores, domains, None)
    if not models[0].is_dir():
        raise UserError(
            f"--scorer {models[0]} does not exist: give a Hugging Face directory, a checkpoint or a run; classifier:DIR; or "
            "MODULE:FUNCTION"
            if scores is not None and needs_model(scores)
            else f"the model {models[0]} of --domains does not exist: give a Hugging Face directory, a checkpoint or a run"
        )
    args.checkpoint = models[0]
    return in_session(args, lambda session: _score(args, scores, domains, session))


def _score_settings(args: argparse.Namespace) -> "ScoreSettings":
    from pydantic import ValidationError

    from qwen_moe.config.load import explain
    from qwen_moe.curation.scores.settings import ScoreSettings
    from qwen_moe.documents import read_text, yaml_mapping

    prompts = {}
    if args.prompts is not None:
        prompts = yaml_mapping(read_text(args.prompts, "--prompts", "a YAML file"), f"--prompts {args.prompts}")
    try:
        return ScoreSettings(
            scorer=args.scorer, dimensions=tuple(args.dimensions), prompts=prompts, language=args.language,
            on_failure=args.on_failure, **_reading(args),
        )  # fmt: skip
    except ValidationError as error:
        raise explain(error, "--scorer", whole=ScoreSettings) from None


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("document_tokens", "batch_documents", "batch_size", "dtype")}


def _domain_settings(args: argparse.Namespace) -> "DomainSettings":
    from pydantic import ValidationError

    from qwen_moe.config.load import explain
    from qwen_moe.curation.scores.settings import DomainSettings
    from qwen_moe.documents import read_text, yaml_mapping

    where = f"--domains {args.domains}"
    values = yaml_mapping(
        read_text(args.domains, "--domains", "a YAML file with rules, a classifier or a model"), where
    )
    try:
        return DomainSettings(**(_reading(args) | values))
    except ValidationError as error:
        raise explain(error, where, whole=DomainSettings) from None
    except TypeError as error:  # a key that is no text
        raise UserError(f"{where}: {error}") from None


def _files(args: argparse.Namespace) -> Any:
    from qwen_moe.data.corpus import Reading

    return Reading(text_key=args.text_key, on_bad_utf8=args.on_bad_utf8, on_bad_line=args.on_bad_line)


def _score(
    args: argparse.Namespace, scores: "ScoreSettings | None", domains: "DomainSettings | None", session: Any
) -> int:
    from qwen_moe.curation.scores.annotate import open_annotator
    from qwen_moe.curation.scores.run import Job, score_corpus

    annotators = [open_annotator(one, session) for one in (scores, domains) if one is not None]
    begin = time.perf_counter()
    job = Job(
        inputs=tuple(args.input),
        output=args.output,
        annotators=annotators,
        reading=_files(args),
        shard=args.shard,
        block=args.batch_documents,
        on_failure=args.on_failure,
        session=session,
    )
    outcome = score_corpus(job)
    if outcome is None:
        return 0
    if outcome.scored:
        seconds = time.perf_counter() - begin
        print(f"{counted(outcome.scored, 'document')}, {outcome.scored / seconds:,.1f} per second", file=sys.stderr)
    _report(args, outcome.store)
    return 0


def _report(args: argparse.Namespace, store: "Store") -> None:
    from launchers.folder.atomic import write_json
    from qwen_moe.curation.scores.picture import draw
    from qwen_moe.curation.scores.store import PICTURE, SUMMARY
    from qwen_moe.curation.scores.summary import collect, described, summary
    from qwen_moe.packages import missing_text

    if left := store.left():
        found: dict[str, Any] = {"output": str(store.folder), "files": store.files, "left": len(left)}
        text = (
            f"{store.folder}: {store.files - len(left)} of {counted(store.files, 'file is', 'files are')} scored; "
            "other shards have the rest"
        )
        print(json.dumps(found) if args.json else text)
        return
    store.check()
    scored = collect(store.rows())
    left_out: dict[str, int] = {}
    for index in range(store.files):
        for reason, count in store.facts(index)["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    if not scored.documents:
        why = ", ".join(tallied(count, reason) for reason, count in left_out.items()) or "no rows"
        raise UserError(
            f"--input {' '.join(args.input)} has no document with text ({why}): give other inputs, and another --output"
        )
    values = summary(scored) | {"left_out": left_out}
    if missing := missing_text("matplotlib"):
        print(f"no picture: {missing}", file=sys.stderr)
    else:
        draw(scored, store.folder / PICTURE)
    write_json(store.folder / SUMMARY, values)
    if args.json:
        print(json.dumps({"output": str(store.folder)} | values))
        return
    print(f"{store.folder}: documents: {values['documents']:,}, files: {store.files:,}")
    print(described(values))
    if left_out:
        print("left out: " + ", ".join(tallied(count, reason) for reason, count in left_out.items()))


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--train-classifier {folder} is there already: give another folder, or remove it")


def _train(args: argparse.Namespace, domains: "DomainSettings | None") -> int:
    if given := [f"--{name}" for name in _WITH_OUTPUT if getattr(args, name) is not None]:
        raise UserError(f"{given[0]} is for scoring: leave it out with --train-classifier, which has its folder")
    if domains is not None and (domains.kind != "rules" or args.target is not None):
        raise UserError(
            "a classifier learns the domains of rules, or those in metadata: give --domains with rules, or --target"
        )
    folder = args.train_classifier
    _check_new(folder)
    from parallel.threads import limit_threads
    from qwen_moe.alone import alone
    from qwen_moe.curation.scores.documents import read
    from qwen_moe.curation.scores.train import Training, described, gather, train, warning
    from qwen_moe.data.corpus import ReadCounts
    from qwen_moe.data.parquet import check_columns
    from qwen_moe.data.sources import find_corpus

    limit_threads()
    training = Training(
        seed=args.seed, buckets=args.buckets, hidden=args.hidden, epochs=args.epochs, learning_rate=args.learning_rate,
        documents=args.most_documents,
    )  # fmt: skip
    corpus = find_corpus(args.input, parquet=True)
    check_columns(corpus.sources, args.text_key, "--text-key")
    print(corpus, file=sys.stderr)
    counts = ReadCounts()
    documents = read(corpus.sources, counts, _files(args))
    kind = "scores" if args.target is None and domains is None else "classes"
    examples = gather(documents, _target(args.target, domains), kind, training, _learned(args.target, domains))
    if counts.left_out.counts:
        print(f"left out: {counts.left_out}", file=sys.stderr)
    classifier, figures = train(examples, training)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder, "give another folder"):
        _check_new(folder)  # another process may have finished its own since
        classifier.save(folder, figures)
    rate = len(examples.features) / max(examples.seconds, 1e-9)
    if args.json:
        print(json.dumps({"output": str(folder), "names": list(examples.names)} | figures))
    else:
        print(f"{folder}: a classifier of {kind} ({', '.join(examples.names)}), {described(figures)}")
        print(f"features of {rate:,.0f} documents per second", file=sys.stderr)
    if told := warning(figures):
        print(told, file=sys.stderr)
    return 0


def _learned(key: str | None, domains: "DomainSettings | None") -> str:
    """What `_target` finds, in messages."""
    if domains is not None:
        return "a domain by the rules"
    return "scores in the metadata" if key is None else f"a class in metadata.{key}"


def _class_of(document: Any, key: str) -> str | None:
    """Raises UserError for what cannot be the name of a domain, which a class becomes."""
    from qwen_moe.curation.scores.settings import check_name

    value = document.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise UserError(f"{document.where}: the class {key} is {value!r:.60}, expected text or a whole number")
    try:
        return check_name(str(value))
    except ValueError as error:
        raise UserError(f"{document.where}: the class {key}: {error}") from None


def _target(key: str | None, domains: "DomainSettings | None") -> Callable[[Any], Any]:
    """What a document teaches; None if nothing."""
    if domains is not None:
        from qwen_moe.curation.scores.rules import Rules

        rules = Rules(domains)
        return lambda document: rules.annotate([document])[0].get("domain")
    if key is not None:
        return lambda document: _class_of(document, key)
    from qwen_moe.curation.scores.annotate import scores_of

    return scores_of
