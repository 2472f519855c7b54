"""The `data` section of a config: where documents come from, and how they become token shards."""

import re
from pathlib import Path
from typing import Literal

import pydantic

from data import embedded, sources
from data.preparation.filters import FilterSection
from settings import Problem, Section, in_the_way, kind_of

_PART = re.compile(r"[1-9]\d{0,3}/[1-9]\d{0,3}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SourceSection(Section):
    """One named source of documents, prepared as one folder of shards."""

    # embedded:CORPUS, {jsonl,parquet,text}:PATH_OR_GLOB, hub:OWNER/NAME[/CONFIG] or hub:FOLDER
    from_: str = pydantic.Field(alias="from")
    valid_from: str | None = None  # validation documents of its own; without it they are held out (valid_fraction)
    field: str = pydantic.Field("text", min_length=1)  # column of jsonl, parquet and hub rows
    conversations: bool = False  # the rows are conversations (data/conversations.py), of which the answers are trained
    documents: int | None = pydantic.Field(None, ge=1)  # read at most this many
    # "2/3": only the documents whose hash falls into the second third, so that sources share a corpus without overlap
    part: str | None = None

    def problems(self) -> list[Problem]:
        found = []
        if remedy := sources.fault(self.from_):
            found.append(Problem("from", self.from_, remedy))
        if self.part is not None and not _PART.fullmatch(self.part):
            found.append(Problem("part", self.part, "write it as WHICH/OF, for example 2/3"))
        elif self.part_numbers[0] >= self.part_numbers[1]:
            of = self.part_numbers[1]
            found.append(Problem("part", self.part, f"there are only {of} parts: use 1/{of} to {of}/{of}"))
        if self.conversations:
            found += self._problems_of_conversations()
        elif self.is_embedded and self.from_.partition(":")[2] in embedded.FACTS:
            found.append(Problem("conversations", False, f"set it to true: {self.from_} is questions and answers"))
        if self.is_embedded and self.documents is None and self.from_.partition(":")[2] not in embedded.FACTS:
            found.append(Problem("documents", None, f"say how many documents to make: {self.from_} never ends"))
        if self.valid_from is not None:
            if self.valid_from.startswith("embedded:"):
                remedy = "leave it out: an embedded source in `from` brings validation documents of its own"
            elif self.valid_from == self.from_ and not self.from_.startswith("hub:"):
                remedy = "name other documents than `from`, or leave it out to hold some back by document hash"
            else:
                remedy = sources.fault(self.valid_from)
            if remedy:
                found.append(Problem("valid_from", self.valid_from, remedy))
        return found

    def _problems_of_conversations(self) -> list[Problem]:
        found = []
        for key, source in (("from", self.from_), ("valid_from", self.valid_from)):
            kind, _, corpus = (source or "").partition(":")
            if kind == "text" or (kind == "embedded" and corpus not in embedded.CONVERSATIONS):
                made = ", ".join(f"embedded:{name}" for name in embedded.CONVERSATIONS)
                remedy = f"name jsonl:, parquet: or hub:, whose rows can be conversations, or one of {made}"
                found.append(Problem(key, source, remedy))
        if self.field != "text":
            remedy = "leave it out: of conversations, the columns are known (messages, prompt and completion, ...)"
            found.append(Problem("field", self.field, remedy))
        return found

    @property
    def column(self) -> str | None:
        """The column that holds the text; None for conversations."""
        return None if self.conversations else self.field

    @property
    def part_numbers(self) -> tuple[int, int]:
        """(which, of how many), from 0."""
        which, of = (int(number) for number in (self.part or "1/1").split("/"))
        return which - 1, of

    @property
    def is_embedded(self) -> bool:
        return self.from_.startswith("embedded:")


class EvaluationSet(Section):
    """Questions that a model will be examined with."""

    from_: str = pydantic.Field(alias="from")  # {jsonl,parquet,text}:PATH_OR_GLOB or hub:...
    field: str = pydantic.Field("text", min_length=1)  # column that holds the question
    split: Literal["test", "valid", "train"] = "test"  # of a hub source: the one that the examination asks

    def problems(self) -> list[Problem]:
        remedy = sources.fault(self.from_)
        if self.from_.startswith("embedded:"):
            remedy = "leave it out: an embedded corpus keeps its validation documents out of training by itself"
        return [Problem("from", self.from_, remedy)] if remedy else []


class DataSection(Section):
    """All sources of a run and what is done to their documents."""

    shards: str = pydantic.Field("shards", min_length=1)  # folder of the prepared token shards, shared by all runs
    seed: int = 1234  # of the embedded generator
    # held out by document hash; where no document falls there, the end of the source's last one
    valid_fraction: float = pydantic.Field(0.02, ge=0, le=0.5)
    min_characters: int = pydantic.Field(1, ge=1)  # shorter documents are dropped
    filters: FilterSection = FilterSection()  # and those that are not of these languages or this quality
    # and those whose 5-word shingles have at least this Jaccard similarity with an earlier one's; null: exact ones only
    near_duplicates: float | None = pydantic.Field(None, ge=0.7, le=1)
    evaluation_sets: dict[str, EvaluationSet] = {}  # and those that hold a question of these
    most_malformed: float = pydantic.Field(0.05, ge=0, le=1)  # share of malformed rows that ends the preparation
    workers: int | None = pydantic.Field(None, ge=1, le=1024)  # processes that prepare; null: one a core
    sources: dict[str, SourceSection] = pydantic.Field(default_factory=dict)

    def problems(self) -> list[Problem]:
        found = []
        if not self.sources:
            found.append(Problem("sources", {}, "name at least one source, for example stories: {from: ..., ...}"))
        for name in [*self.sources, *self.evaluation_sets]:
            if not _NAME.fullmatch(name):
                remedy = "a source's name becomes a folder's: use up to 64 letters, digits, - and _"
                where = "sources" if name in self.sources else "evaluation_sets"
                found.append(Problem(f"{where}.{name}", name, remedy))
        if (blocking := in_the_way(Path(self.shards))) is not None:
            remedy = f"{blocking} is {kind_of(blocking)}: name a folder, which is made when needed"
            found.append(Problem("shards", self.shards, remedy))
        return found
