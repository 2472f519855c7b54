"""The second stage of preparation: which of the rows that were read become documents, and on which side.

What one row alone cannot tell is decided here, in the order of the source and by one process: duplicates and
near-duplicates of earlier documents, training documents that are in validation, parts and sides. The answers lie in one
SQLite file with the indices they follow from; a piece's answers are committed together, so an interrupted preparation
goes on with the next piece. Memory does not grow with the corpus.

A source of one document, or of so few that none comes to the validation side, has the end of its last one there: when
all pieces have their answers, that document is cut in two.
"""

import collections
import contextlib
import errno
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data import conversations, sources
from data.preparation import clean, near_duplicates, read_pieces
from data.settings import DataSection, SourceSection

TRAIN, VALID, DROPPED, CUT = 0, 1, 2, 3  # of one row; of one that is cut, the end is for validation
SIDES = {TRAIN: "train", VALID: "valid"}
COLUMNS = ["part", "line", "fault", "malformed", "count", "detail", "text", "key"]
CACHE_KIB = 32 * 1024  # of SQLite's pages in memory
EARLIEST = 1000  # rows before too many of them can be malformed


class Selection:
    """The answers for the pieces of one source, made one piece after the other.

    Attributes:
        done: how many pieces have their answers.

    Args:
        path: of the database.
        pieces: of the source, as they are read in one go; validation documents of their own first.

    Raises:
        OSError: the disk is full, or does not let itself be written.
        sqlite3.DatabaseError: what is at `path` is no database.
    """

    def __init__(
        self, path: Path, name: str, pieces: list[tuple[sources.Piece, ...]], source: SourceSection, data: DataSection
    ):
        self.path, self.name, self.pieces, self.source, self.data = path, name, pieces, source, data
        self._own = sum(piece.split == "valid" for piece, *_ in pieces)  # pieces of validation documents of their own
        self._flat = list(itertools.chain.from_iterable(pieces))
        self._firsts = list(itertools.accumulate(map(len, pieces), initial=0))  # of each of `pieces`, in `_flat`
        self._before = 0, 0  # of the last malformed row: its place in `_flat`, the lines of its file before that
        with _as_oserror(path):
            self._open(path)

    def _open(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._database.execute("CREATE TABLE IF NOT EXISTS pieces (number INTEGER PRIMARY KEY, answers BLOB, "
                               "documents INTEGER, rows INTEGER, malformed INTEGER)")  # fmt: skip
        self._database.execute("CREATE TABLE IF NOT EXISTS cut (number INTEGER PRIMARY KEY, place INTEGER, "
                               "held_out INTEGER, length INTEGER)")  # fmt: skip
        self._database.execute("CREATE TABLE IF NOT EXISTS keys (key BLOB PRIMARY KEY, held_out INTEGER) WITHOUT ROWID")
        self._database.execute("CREATE TABLE IF NOT EXISTS dropped (reason TEXT PRIMARY KEY, count INTEGER)")
        self._database.execute("CREATE TABLE IF NOT EXISTS quarantine (id INTEGER PRIMARY KEY, reason TEXT, "
                               "place TEXT, detail TEXT, count INTEGER)")  # fmt: skip
        query = "SELECT count(*), total(documents * (number >= ?)), total(rows), total(malformed) FROM pieces"
        # kept beside the table: to ask it again for every piece takes the longer, the more there are
        self.done, self._documents, self._rows, self._malformed = map(
            int, self._database.execute(query, (self._own,)).fetchone()
        )
        self._index = None
        if self.data.near_duplicates is not None:
            self._index = near_duplicates.Index(self._database, self.data.near_duplicates)

    def is_enough(self) -> bool:
        """Whether all documents that are asked for are read."""
        return self._left("train") == 0 and self.done >= self._own

    def take(self, number: int, table: Path) -> None:
        """Answer for every row in the table of piece `number`.

        Raises:
            sources.BadContentError: too many rows are malformed.
            OSError: the disk is full, or does not let itself be written.
        """
        with _as_oserror(self.path):
            self._take(number, table)
        self.check_malformed(EARLIEST)

    def _take(self, number: int, table: Path) -> None:
        split = self.pieces[number][0].split
        left = self._left(split)
        answers = bytearray()
        dropped: collections.Counter[str] = collections.Counter()
        rows = malformed = documents = 0
        self._database.execute("BEGIN")
        try:
            columns = COLUMNS + (["bands", "shingles"] if self._index else [])
            for batch in read_pieces.read_table(table, columns):
                for row in _rows(batch):
                    if left is not None and documents >= left:
                        answers.append(DROPPED)  # not counted: it was not asked for
                        continue
                    rows += row["count"]
                    if row["malformed"]:
                        malformed += row["count"]
                        self._quarantine(number, row)
                    else:
                        documents += 1
                    reason = row["fault"] or self._reason(row, split)
                    if reason:
                        dropped[reason] += row["count"]
                        answers.append(DROPPED)
                    else:
                        answers.append(self._side(row["text"], split))
            self._database.execute("INSERT INTO pieces VALUES (?, ?, ?, ?, ?)",
                                   (number, bytes(answers), documents, rows, malformed))  # fmt: skip
            self._count_dropped(dropped)
            self._database.execute("COMMIT")
            self.done += 1
            self._documents += documents if number >= self._own else 0
            self._rows += rows
            self._malformed += malformed
        except BaseException:
            if self._database.in_transaction:  # a full disk has ended it already
                self._database.execute("ROLLBACK")
            raise

    def hold_out_end(self, table: Callable[[int], Path]) -> None:
        """When all pieces have their answers: where no document is for validation, or the only one there is, cut the
        last one, so that its end is, `data.valid_fraction` of the source's text. A document that equals that end, or
        is nearly a duplicate of it, is dropped.

        Nothing changes where validation documents are there or unwanted, of conversations, and where documents are too
        short (clean.place_of_cut).

        Args:
            table: of a piece.

        Raises:
            OSError: the disk is full, or does not let itself be written.
        """
        train, valid = self.counts()
        is_needed = train + valid == 1 or not valid
        if self._own or self.source.conversations or not self.data.valid_fraction or self.held_out_end or not is_needed:
            return
        characters, last = 0, None
        for number in range(self.done):
            for place, _, row in _staying(table(number), self.answers(number), ["text"]):
                characters += len(row["text"])
                if clean.place_of_cut(row["text"], 0) is not None:
                    last = number, place, row["text"]
        if last is not None:
            cut = clean.place_of_cut(last[2], int(self.data.valid_fraction * characters))
            with _as_oserror(self.path):
                self._cut(table, *last, cut)

    def _cut(self, table: Callable[[int], Path], last: int, place: int, text: str, cut: int) -> None:
        end = clean.cut_at(text, cut)[1]
        key = clean.key_of(end)
        shingles = near_duplicates.shingles([end])[0] if self._index else None

        def is_like_the_end(row: dict[str, Any]) -> bool:
            if row["key"] == key or shingles is None:
                return row["key"] == key
            return near_duplicates.similarity(row["shingles"], shingles) >= self.data.near_duplicates

        self._database.execute("BEGIN")
        try:
            dropped = 0
            for number in range(self.done):
                answers = bytearray(self.answers(number))
                if number == last:
                    answers[place] = CUT
                columns = ["key", *(["shingles"] if self._index else [])]
                for other, answer, row in _staying(table(number), bytes(answers), columns):
                    if answer == TRAIN and is_like_the_end(row):
                        answers[other] = DROPPED
                        dropped += 1
                self._database.execute("UPDATE pieces SET answers = ? WHERE number = ?", (bytes(answers), number))
            self._count_dropped({"in_validation": dropped} if dropped else {})
            self._database.execute("INSERT INTO cut VALUES (?, ?, ?, ?)", (last, cut, len(end), len(text)))
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    @property
    def held_out_end(self) -> tuple[int, int] | None:
        """Characters that `hold_out_end` holds out, and those of the document; None where it does not."""
        return self._database.execute("SELECT held_out, length FROM cut").fetchone()

    def cut(self, number: int) -> int | None:
        """Where the document of piece `number` whose answer is CUT is cut, in characters; None if it has none."""
        found = self._database.execute("SELECT place FROM cut WHERE number = ?", (number,)).fetchone()
        return found[0] if found else None

    def check_malformed(self, least_rows: int = 1) -> None:
        """Raises sources.BadContentError if more than `data.most_malformed` of at least so many rows are malformed."""
        rows, malformed = self._rows, self._malformed
        if rows >= least_rows and malformed > self.data.most_malformed * rows:
            examples = self._database.execute("SELECT place, detail FROM quarantine ORDER BY id LIMIT 3").fetchall()
            raise sources.BadContentError(
                f"data.sources.{self.name}: {malformed:,} of {rows:,} rows are malformed, more than "
                f"data.most_malformed={self.data.most_malformed:g} allows: mend them, name another field, or allow "
                "more. The first are " + "; ".join(f"{place}: {detail}" for place, detail in examples)
            )

    def answers(self, number: int) -> bytes:
        """TRAIN, VALID, DROPPED or CUT for every row of piece `number`."""
        return self._database.execute("SELECT answers FROM pieces WHERE number = ?", (number,)).fetchone()[0]

    def counts(self) -> tuple[int, int]:
        """Documents that stay, for training and for validation."""
        found = [0, 0]
        for (answers,) in self._database.execute("SELECT answers FROM pieces"):
            found[TRAIN] += answers.count(TRAIN) + answers.count(CUT)
            found[VALID] += answers.count(VALID) + answers.count(CUT)
        return found[TRAIN], found[VALID]

    def dropped(self) -> dict[str, int]:
        """Rows that do not stay, by reason."""
        return dict(self._database.execute("SELECT reason, count FROM dropped ORDER BY reason"))

    def first_malformed(self) -> dict[str, str]:
        """By reason, where the first malformed row is and what is wrong with it."""
        query = "SELECT reason, place, detail FROM quarantine ORDER BY id DESC"
        return {reason: f"{place}: {detail}" for reason, place, detail in self._database.execute(query)}

    def quarantine(self) -> Iterator[str]:
        """One JSON line for each malformed row: reason, place (file:line, hub:NAME:row), detail, its rows."""
        query = "SELECT reason, place, detail, count FROM quarantine ORDER BY id"
        for reason, place, detail, count in self._database.execute(query):
            yield json.dumps({"reason": reason, "place": place, "detail": detail, "rows": count}, ensure_ascii=False)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _count_dropped(self, more: Mapping[str, int]) -> None:
        self._database.executemany(
            "INSERT INTO dropped VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
            more.items(),
        )

    def _left(self, split: sources.Split) -> int | None:
        """How many documents of that side are still asked for; None: all."""
        if split == "valid" or self.source.documents is None:
            return None
        return max(0, self.source.documents - self._documents)

    def _reason(self, row: dict[str, Any], split: sources.Split) -> str | None:
        """Why a document does not stay, because of others; else None, and it is remembered."""
        part, parts = self.source.part_numbers
        key = row["key"]
        if split == "train" and parts > 1 and clean.part_of(conversations.question_of(row["text"]), parts) != part:
            return "other_part"
        held_out = split == "valid"
        if self._own and self.source.conversations and self._asks_what_is_held_out(row["text"], held_out):
            return "in_validation"
        if not self._database.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (key, held_out)).rowcount:
            there = self._database.execute("SELECT held_out FROM keys WHERE key = ?", (key,)).fetchone()[0]
            return "in_validation" if there and not held_out else "duplicate"
        if self._index and not self._index.add(row["bands"], row["shingles"]):
            return "near_duplicate"
        return None

    def _asks_what_is_held_out(self, text: str, held_out: bool) -> bool:
        """Whether a training conversation asks what one of those in validation asks, however it is answered."""
        key = clean.key_of(f"asked: {conversations.question_of(text)}")
        if held_out:
            self._database.execute("INSERT OR IGNORE INTO keys VALUES (?, 1)", (key,))
            return False
        return self._database.execute("SELECT 1 FROM keys WHERE key = ?", (key,)).fetchone() is not None

    def _side(self, text: str, split: sources.Split) -> int:
        if split == "valid":
            return VALID
        by_hash = not self._own and clean.split_of(
            conversations.question_of(text), self.data.valid_fraction
        ) == "valid"
        return VALID if by_hash else TRAIN

    def _quarantine(self, number: int, row: dict[str, Any]) -> None:
        index = self._firsts[number] + row["part"]
        line = self._lines_before(index) + row["line"]
        place = f"{_name(self._flat[index])}:{line}".encode(errors="backslashreplace").decode()
        self._database.execute("INSERT INTO quarantine (reason, place, detail, count) VALUES (?, ?, ?, ?)",
                               (row["fault"], place, row["detail"], row["count"]))  # fmt: skip

    def _lines_before(self, index: int) -> int:
        """How many lines of the same file, or rows of what was downloaded, lie before a piece. Asked in their order,
        it counts none twice."""
        at, lines = self._before
        first = index
        while first > at and _of_one(self._flat[first - 1], self._flat[index]):
            first -= 1
        counted = sum(map(sources.lines_of, self._flat[first:index]))
        self._before = index, counted + (lines if first == at else 0)
        return self._before[1]


def _name(piece: sources.Piece) -> str:
    """Under which its rows are counted."""
    return piece.origin or piece.place


def _of_one(piece: sources.Piece, other: sources.Piece) -> bool:
    return (_name(piece), piece.split) == (_name(other), other.split)


@contextlib.contextmanager
def _as_oserror(path: Path) -> Iterator[None]:
    """What SQLite says of the disk, as whoever else writes would say it."""
    try:
        yield
    except sqlite3.OperationalError as error:
        number = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from error


def kept(table: Path, answers: bytes, cut: int | None) -> Iterator[tuple[str, str]]:
    """(side, text) of the rows of a table that stay; of the row that is cut, both parts.

    Args:
        cut: as `Selection.cut` tells it.
    """
    for _, answer, row in _staying(table, answers, ["text"]):
        if answer == CUT:
            yield from zip(("train", "valid"), clean.cut_at(row["text"], cut), strict=True)
        else:
            yield SIDES[answer], row["text"]


def _staying(table: Path, answers: bytes, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(place, answer, row) of those rows of a table that are not dropped, with some of their columns."""
    answered = enumerate(answers)
    for batch in read_pieces.read_table(table, columns):
        for (place, answer), row in zip(itertools.islice(answered, len(batch)), _rows(batch), strict=True):
            if answer != DROPPED:
                yield place, answer, row


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch; lists of numbers as arrays."""
    plain = {name: batch.column(name).to_pylist() for name in batch.schema.names if name not in ("bands", "shingles")}
    arrays = {}
    for name in ("bands", "shingles"):
        if name in batch.schema.names:
            column = batch.column(name)
            values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
            arrays[name] = [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    for place in range(len(batch)):
        yield {name: column[place] for name, column in {**plain, **arrays}.items()}
