"""The steps of a curation: what decides the result of each, its stages, and its figures."""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launchers.counted import counted
from launchers.folder.atomic import write_json, write_text
from launchers.folder.run_folder import read_json
from qwen_moe.curation import dedup, synthesise, weights
from qwen_moe.curation.annotating import Annotating, Decontamination, Domains, Scores
from qwen_moe.curation.documents import KEPT, Lines, Shard, file_name, read_file, tallied
from qwen_moe.curation.execute import Stage
from qwen_moe.curation.filters import build_filters
from qwen_moe.curation.names import STEPS
from qwen_moe.curation.page import PAGE, kept_by_domain
from qwen_moe.curation.reading import BAD, SHOWN, Inputs, find_places
from qwen_moe.curation.recipe import CurateConfig, InputSection
from qwen_moe.curation.step import Context, Step, named
from qwen_moe.curation.words import word_tokenizer
from qwen_moe.errors import UserError

PLAN, BLEND, TOKENIZER, BEGUN = "plan.json", "blend.yaml", "tokenizer", "begun.json"
TOKENIZER_SAMPLE = 200_000_000  # characters, sampled evenly over the documents


class Synthesise(Step):
    name, what = "synthesise", "have a model write texts from templates, and keep those that are rewarded"

    def settings(self, at: Context) -> dict[str, Any]:
        from qwen_moe.posttraining.steps import of_model

        section = at.config.synthesise
        assert section is not None
        return named(self.name, section.model_dump(mode="json")) | {"the model (content)": of_model(section.checkpoint)}

    def stages(self, at: Context) -> Iterator[Stage]:
        from qwen_moe.posttraining.process import run_command

        section, folder = at.config.synthesise, at.folder(self.name)
        assert section is not None
        synthesise.write_queries(section, folder)
        run_command(synthesise.arguments(section, folder), {}, at.lock.pass_fds)
        synthesise.select(section, folder)
        yield from ()

    def facts(self, at: Context) -> dict[str, Any]:
        folder = at.folder(self.name)
        return {
            "kept": sum(1 for _ in read_file(folder / synthesise.TEXTS)),
            "rejected": sum(1 for _ in read_file(folder / synthesise.REJECTED)),
        }


class Read(Step):
    name, what = "read", "read the inputs"

    def settings(self, at: Context) -> dict[str, Any]:
        found: dict[str, Any] = {"tasks": at.config.tasks, "on_bad_line": at.config.on_bad_line}
        for one in at.config.input:
            found |= named(f"input {one.path}", one.model_dump(exclude={"path"}))
            own = [f"{place.name}|{place.status}" for place in at.places if place.of == one]
            found[f"input {one.path} (content)"] = hashlib.sha256("\n".join(own).encode()).hexdigest()
        if not at.places and self.name in at.state.steps:  # inputs that were read and are gone
            before = at.state.steps[self.name]["inputs"]
            found |= {name: value for name, value in before.items() if name.endswith("(content)")}
        return found

    def stages(self, at: Context) -> Iterator[Stage]:
        places, folder = list(at.places), at.folder(self.name)
        if at.config.synthesise is not None:
            path = at.folder("synthesise") / synthesise.TEXTS
            places += find_places([InputSection(path=str(path), domain=at.config.synthesise.domain)], at.config.tasks)
        read = Inputs(places, folder, check_domains=at.config.domains is None)  # that step may give them others
        yield Stage("read", [read, Lines(folder)], at.config.tasks, folder)
        bad = self._bad(at)
        if bad["count"] and at.config.on_bad_line == "error":
            shutil.rmtree(folder)  # the next attempt reads everything again
            raise UserError(
                f"{_unreadable(bad)} cannot be read: {_first(bad)}. Correct them, or leave them out with "
                "on_bad_line: skip"
            )

    def _bad(self, at: Context) -> dict[str, Any]:
        found = [read_json(path) or {} for path in sorted((at.folder(self.name) / BAD).glob("*.json"))]
        return {
            "count": sum(one["count"] for one in found),
            "empty": sum(one["empty"] for one in found),
            "first": [text for *_, text in sorted(tuple(row) for one in found for row in one["first"])][:SHOWN],
        }

    def facts(self, at: Context) -> dict[str, Any]:
        bad = self._bad(at)
        if bad["count"]:
            print(f"left out {_unreadable(bad)} that cannot be read: {_first(bad)}", file=sys.stderr)
        if not any(one.get("documents") for one in tallied(at.folder(self.name)).values()):
            raise UserError("no input has a document with text: give other inputs")
        return super().facts(at) | {"bad": bad}


def _unreadable(bad: dict[str, Any]) -> str:
    return counted(bad["count"], "line, row or file", "lines, rows or files")


class Filters(Step):
    name, what = "filters", "apply the filters"

    def settings(self, at: Context) -> dict[str, Any]:
        return {"filters": [one.model_dump() for one in at.config.filters], "words": at.config.words}

    def stages(self, at: Context) -> Iterator[Stage]:
        folder, there = at.folder(self.name), kept_by_domain(at.state.facts("read"))
        for one in at.config.filters:
            if absent := [name for name in one.only if name not in there]:
                raise UserError(
                    f"filter {one.kind}: only names {', '.join(absent)}, and no document of that domain was read (there are "
                    f"{', '.join(sorted(there))}): correct the name, or leave it out. The step domains comes after filters"
                )
        filters = build_filters(at.config.filters, at.config.words, folder)
        yield Stage("filters", [Shard(at.before(self.name)), *filters, Lines(folder)], at.config.tasks, folder)


class Deduplication(Step):
    name, what = "deduplication", "drop duplicates"

    def settings(self, at: Context) -> dict[str, Any]:
        section = at.config.deduplication
        assert section is not None
        words = {"words": at.config.words} if section.minhash is not None else {}
        return named(self.name, section.model_dump(mode="json")) | words

    def stages(self, at: Context) -> Iterator[Stage]:
        section = at.config.deduplication
        assert section is not None
        folder = at.folder(self.name)
        yield from dedup.deduplicate(section, at.config.words, at.before(self.name), folder, at.config.tasks)


class Weights(Step):
    name, what = "weights", "weigh the domains"

    def settings(self, at: Context) -> dict[str, Any]:
        from qwen_moe.data.tokenizer import tokenizer_hash

        prepare = at.config.prepare
        found = named(self.name, at.config.weights.model_dump(mode="json"))
        if prepare.tokenizer is not None:
            return found | {"prepare.tokenizer (content)": tokenizer_hash(prepare.tokenizer)}
        return found | {"prepare.vocab_size": prepare.vocab_size}

    def stages(self, at: Context) -> Iterator[Stage]:
        folder, before, section = at.folder(self.name), at.before(self.name), at.config.weights
        if not any(path.stat().st_size for path in before.glob("*.jsonl")):
            facts = {name: at.state.facts(name) for name in at.config.steps}
            empty = next(name for name, one in facts.items() if "tally" in one and not kept_by_domain(one))
            raise UserError(
                f"no document is left to weigh: step {empty} has dropped the last. "
                f"{at.config.run_dir / PAGE} has the reasons; loosen the settings, and repeat the step with --redo"
            )
        counts, tokenizer = folder / dedup.WORK / "counts", self.tokenizer(at)
        if at.config.prepare.train_tokenizer and not (tokenizer / "tokenizer.json").is_file():
            self._train(before, at, tokenizer)
        yield Stage("count", [Shard(before), weights.Count(tokenizer, counts, section.seed)], at.config.tasks, folder)
        shares = weights.plan(counts, section)
        write_json(folder / PLAN, {"seed": section.seed, "domains": {n: asdict(share) for n, share in shares.items()}})
        sample = weights.Sample(shares, section.seed, folder)
        yield Stage("sample", [Shard(before), sample, Lines(folder, by_domain=True)], at.config.tasks, folder)

    @staticmethod
    def tokenizer(at: Context) -> Path:
        return at.config.prepare.tokenizer or at.folder("weights") / TOKENIZER

    def _train(self, before: Path, at: Context, output: Path) -> None:
        from qwen_moe.data.tokenizer import train_tokenizer

        size = sum(path.stat().st_size for path in before.glob("*.jsonl"))
        every = max(1, size // TOKENIZER_SAMPLE)
        ranks = range(at.config.tasks)
        documents = (row for rank in ranks for row in read_file(before / file_name(rank)))
        print(f"training a tokenizer of {at.config.prepare.vocab_size:,} tokens in {output}", file=sys.stderr)
        texts = (row["text"] for number, row in enumerate(documents) if number % every == 0)
        train_tokenizer(texts, at.config.prepare.vocab_size, output)

    def facts(self, at: Context) -> dict[str, Any]:
        return super().facts(at) | {"domains": (read_json(at.folder(self.name) / PLAN) or {})["domains"]}


class Prepare(Step):
    name, what = "prepare", "write the token files of each domain"

    def settings(self, at: Context) -> dict[str, Any]:
        return {"prepare.tokenizer": str(at.config.prepare.tokenizer or "trained")}

    def prefix(self, at: Context, domain: str) -> Path:
        return at.folder(self.name) / domain

    def stages(self, at: Context) -> Iterator[Stage]:
        from qwen_moe.data.prepare import Request, prepare

        folders = {domain: at.folder("weights") / KEPT / domain for domain in self._domains(at)}
        if at.config.decontamination is not None:
            Decontamination().record(at, folders.values())
        for domain, folder in folders.items():
            request = Request(inputs=(str(folder),), tokenizer=Weights.tokenizer(at))
            # The output of another attempt, of other documents, has another step folder.
            prepare(request, self.prefix(at, domain), workers=at.config.workers, overwrite=True)
        self._write_blend(at)
        yield from ()

    def _domains(self, at: Context) -> list[str]:
        shares = at.state.facts("weights")["domains"]
        return [name for name, share in shares.items() if share["tokens_after"]]

    def _write_blend(self, at: Context) -> None:
        shares = at.state.facts("weights")["domains"]
        total = sum(share["tokens_after"] for share in shares.values())
        train = [
            {"prefix": str(self.prefix(at, name)), "weight": round(shares[name]["tokens_after"] / total, 6)}
            for name in self._domains(at)
        ]
        blend = {"data": {"train": train, "tokenizer": str(Weights.tokenizer(at))}}
        head = f"# What {at.source} left, as a blend: a part of a training recipe. Weights are shares of tokens.\n"
        write_text(at.folder(self.name) / BLEND, head + yaml.safe_dump(blend, sort_keys=False))

    def facts(self, at: Context) -> dict[str, Any]:
        found = {}
        for domain in self._domains(at):
            manifest = read_json(self.prefix(at, domain).with_name(f"{domain}.json")) or {}
            found[domain] = {name: manifest.get(name) for name in ("documents", "tokens", "bin_sha256")}
        return {"prefixes": found, "blend": str(at.folder(self.name) / BLEND)}


_CLASSES = (Synthesise, Read, Filters, Scores, Domains, Deduplication, Decontamination, Weights, Prepare)
_BY_NAME: dict[str, type[Step]] = {cls.name: cls for cls in _CLASSES}


def steps_of(config: CurateConfig) -> list[Step]:
    assert tuple(_BY_NAME) == STEPS
    return [_BY_NAME[name]() for name in config.steps]


def check(at: Context) -> None:
    """Raise UserError for mistakes that show before any work: filters, words, settings of other modules, inputs."""
    config = at.config
    mistakes = []

    def attempt(what: Any, *arguments: Any) -> None:
        try:
            what(*arguments)
        except UserError as error:
            mistakes.append(str(error).removeprefix(f"{at.source}: "))

    if config.filters:
        attempt(build_filters, config.filters, config.words, at.folder("filters"))
    if config.deduplication is not None and config.deduplication.minhash is not None:
        attempt(dedup.minhash_config, config.deduplication.minhash)
        attempt(word_tokenizer, config.words)
    for step in steps_of(config):
        if isinstance(step, Annotating):
            attempt(step.check, at)
    if config.synthesise is not None:
        attempt(synthesise.check, config.synthesise)
    if config.prepare.tokenizer is not None:
        from qwen_moe.data.tokenizer import load_tokenizer

        attempt(load_tokenizer, config.prepare.tokenizer)
    else:
        from qwen_moe.data.tokenizer import check_vocabulary_size

        attempt(check_vocabulary_size, config.prepare.vocab_size)
    if mistakes:
        raise UserError(f"{at.source}: " + "; ".join(mistakes))


def _first(bad: dict[str, Any]) -> str:
    more = f"; and {bad['count'] - len(bad['first'])} more" if bad["count"] > len(bad["first"]) else ""
    return "; ".join(bad["first"]) + more
