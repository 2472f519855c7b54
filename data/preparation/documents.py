"""The documents of one source that go into its shards: read in pieces, selected in order, on disk until they are used.

What is done lies in a work folder beside the shards, so that a preparation that was interrupted at any instant goes on
where it was; the folder goes when the shards are written.

    read-00000/        what became of every row of a piece, or of several small ones (read_pieces.py)
    selection.sqlite   which rows are documents, and of which side (select_documents.py)
    tokens-*-00000/    the tokens of a piece (write_tokens.py), with the tokenizer they were made with beside them
    questions.json     of the evaluation sets that no document may hold (contamination.py)
    hub-train/         what was downloaded from the Hub (download.py)
"""

import dataclasses
import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from data import sources
from data.preparation import read_pieces
from data.preparation.contamination import Questions, read_questions
from data.preparation.download import downloaded
from data.preparation.select_documents import Selection, kept
from data.preparation.workers import Workers
from data.settings import DataSection, SourceSection
from storage import folder

WORTH_PROCESSES = 8_000_000  # bytes of text; below, starting them takes longer than they save
Log = Callable[[str], object]
Pieces = list[tuple[sources.Piece, ...]]  # each entry is read in one go


class Documents:
    """The documents of one source that are kept, each with its side, and a tally of the rows that are not.

    Args:
        work: the folder for what is done so far.
    """

    def __init__(
        self, name: str, source: SourceSection, data: DataSection, work: Path, workers: Workers, log: Log = print
    ):
        self.name, self.source, self.data, self.work = name, source, data, work
        self.workers, self._log = workers, log
        self._selection: Selection | None = None
        self._pieces: Pieces | None = None
        self._is_verified = False  # what earlier tries have left

    def make(self) -> None:
        """Read and select all that is not done yet.

        Raises:
            sources.SourceError: the source cannot be read, has too many malformed rows, or leaves no documents on a
                side that needs any.
        """
        if self._selection is not None:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        folder.clear_all_leftovers(self.work)
        rules = self._rules()
        if self._pieces is None:
            self._pieces = self._find_pieces()
        pieces = self._pieces
        selection = self._open_selection(pieces)

        first = selection.done if self._is_verified else 0

        def unread() -> Iterator[tuple]:
            for number in range(first, len(pieces)):
                if number >= selection.done and selection.is_enough():
                    return
                yield (pieces[number], rules, self.table(number))

        if 0 < selection.done < len(pieces):
            self._log(f"{self.name}: going on after {selection.done} of {len(pieces)} pieces")
        done = self.workers.map(_read, unread(), many=self.is_large(pieces))
        for number, problem in enumerate(done, start=first):
            if problem is not None:
                self._log(f"WARNING: {problem}: that piece of {self.name} is read again")
            if number == selection.done:  # else an earlier try has taken it, and the same rows are in it
                selection.take(number, self.table(number))
        selection.hold_out_end(self.table)
        self._is_verified = True
        self._selection = selection
        self._check_not_empty(pieces)
        selection.check_malformed()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(side, normalised text), in order."""
        self.make()
        for number in range(self._selection.done):
            yield from kept(self.table(number), self._selection.answers(number), self._selection.cut(number))

    @property
    def selection(self) -> Selection:
        """The finished selection."""
        self.make()
        return self._selection

    def table(self, number: int) -> Path:
        """What became of the rows of piece `number`."""
        return self.work / f"read-{number:05d}"

    def is_large(self, pieces: Pieces) -> bool:
        """Whether the work is worth several processes."""
        size = sum(piece.size for piece in itertools.chain.from_iterable(pieces))
        return len(pieces) > 1 and size > WORTH_PROCESSES

    def report(self) -> list[str]:
        """One line for each reason: how many rows, and where the first malformed one is."""
        first = self.selection.first_malformed()
        return [f"{count:,} {reason}" + (f", the first at {first[reason]}" if reason in first else "")
                for reason, count in self.selection.dropped().items()]  # fmt: skip

    def forget(self) -> None:
        """Remove what was done so far, but for what was downloaded."""
        for entry in self.work.iterdir():
            if not entry.name.startswith("hub-"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not any(self.work.iterdir()):
            self.work.rmdir()

    def close(self) -> None:
        """Let go of the files."""
        if self._selection is not None:
            self._selection.close()
            self._selection = None

    def _find_pieces(self) -> Pieces:
        """Validation documents of their own first, so that a training document that equals one can be dropped."""
        source = self.source
        own, count = source.valid_from, None
        if source.is_embedded and own is None:
            own, count = source.from_, valid_count(source)
        found = [] if own is None else self._pieces_of(own, "valid", count)
        return found + self._pieces_of(source.from_, "train", source.documents)

    def _pieces_of(self, source: str, split: sources.Split, count: int | None) -> Pieces:
        local = downloaded(source, self.source.column, split, count, self.work, self._log)
        origin = None if local == source else source
        found = sources.pieces(local, split, count, self.data.seed)
        return sources.together([dataclasses.replace(piece, origin=origin) for piece in found])

    def _rules(self) -> read_pieces.Rules:
        questions = None
        if self.data.evaluation_sets:
            questions = self.work / "questions.json"
            sets = {name: read_questions(f"data.evaluation_sets.{name}", exam.from_, exam.field, exam.split)
                    for name, exam in self.data.evaluation_sets.items()}  # fmt: skip
            Questions(sets).save(questions)
        return read_pieces.Rules(self.source.column, self.data.min_characters, self.data.filters,
                                 self.data.near_duplicates is not None, questions)  # fmt: skip

    def _open_selection(self, pieces: Pieces) -> Selection:
        path = self.work / "selection.sqlite"
        try:
            return Selection(path, self.name, pieces, self.source, self.data)
        except sqlite3.DatabaseError as error:  # a machine that lost its power may leave one torn; a full disk does not
            self._log(f"WARNING: {path} cannot be read ({error}): {self.name} is selected anew")
            for file in self.work.glob("selection.sqlite*"):
                file.unlink()
            return Selection(path, self.name, pieces, self.source, self.data)

    def _check_not_empty(self, pieces: Pieces) -> None:
        train, valid = self._selection.counts()
        has_own = any(piece.split == "valid" for piece, *_ in pieces)
        if has_own and not valid:
            raise self._nothing(f"validation documents in {self.source.valid_from or self.source.from_}")
        if not train:
            raise self._nothing(f"training documents in {self.source.from_}", in_validation=0 if has_own else valid)

    def _nothing(self, what: str, in_validation: int = 0) -> sources.BadContentError:
        why = [f"dropped {line}" for line in self.report()]
        if in_validation:
            why.append(f"all {in_validation} are held out for validation: give more, `valid_from`, or valid_fraction=0")
        reasons = "; ".join(why) or "it is empty"
        remedy = "name a file that has some, or the field that holds them, or mend its rows"
        return sources.BadContentError(f"data.sources.{self.name}: there are no {what} ({reasons}): {remedy}")


def valid_count(source: SourceSection) -> int | None:
    """How many validation documents an embedded source brings along; None for a source that is not embedded."""
    return max(100, (source.documents or 0) // 20) if source.is_embedded else None


def _read(pieces: tuple[sources.Piece, ...], rules: read_pieces.Rules, path: Path) -> str | None:
    """In a worker, unless an earlier try has done it; returns what is wrong with what that left, if anything is."""
    problems = folder.verify(path) if path.exists() else []
    if problems:
        folder.remove(path)
    if not path.exists():
        read_pieces.read_piece(pieces, rules, path)
    return problems[0] if problems else None
