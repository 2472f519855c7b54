"""The documents of one source that go into its shards: cleaned, without exact duplicates, each on its side.

What is left out is tallied by reason. This stage alone decides which documents a run sees; sources.py only reads, and
prepare.py only tokenises and writes.
"""

import collections
from collections.abc import Iterator

from data import clean, sources
from data.settings import DataSection, SourceSection

Document = tuple[sources.Split, str]  # side and normalised text


class Documents:
    """The documents of one source that are kept, each with its side, and a tally of the rows that are not.

    Iterating reads the source anew. Validation documents of their own (`valid_from`, or of the embedded corpora) come
    first, so that a training document that equals one of them can be dropped.

    Attributes:
        dropped: rows dropped so far, by reason.
        first: for the malformed ones among these reasons, the first row: "file:line: what is wrong".

    Raises:
        sources.SourceError: when iterating; the source cannot be read, or leaves no documents on a side that needs any.
    """

    def __init__(self, name: str, source: SourceSection, data: DataSection):
        self.name, self.source, self._data = name, source, data
        self._valid_source = source.from_ if source.is_embedded and source.valid_from is None else source.valid_from
        self.dropped: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}

    def __iter__(self) -> Iterator[Document]:
        self.dropped.clear()
        self.first.clear()
        held_out: set[bytes] = set()
        if self._valid_source is not None:
            count = valid_count(self.source) if self._valid_source == self.source.from_ else None
            for text, key in self._clean(self._valid_source, "valid", count):
                if self._is_new(key, held_out):
                    yield "valid", text
            if not held_out:
                raise self._nothing(f"validation documents in {self._valid_source}")
        seen: set[bytes] = set()
        in_training = 0
        part, parts = self.source.part_numbers
        for text, key in self._clean(self.source.from_, "train", self.source.documents):
            if parts > 1 and clean.part_of(text, parts) != part:
                self.dropped["other_part"] += 1
            elif key in held_out:
                self.dropped["in_validation"] += 1
            elif self._is_new(key, seen):
                by_hash = self._valid_source is None
                side = clean.split_of(text, self._data.valid_fraction) if by_hash else "train"
                in_training += side == "train"
                yield side, text
        if not in_training:
            raise self._nothing(f"training documents in {self.source.from_}", in_validation=len(seen))

    def _clean(self, source: str, split: sources.Split, count: int | None) -> Iterator[tuple[str, bytes]]:
        for row in sources.documents(source, self.source.field, split, count, self._data.seed):
            if isinstance(row, sources.BadRow):
                self.dropped[row.reason] += row.count
                self.first.setdefault(row.reason, f"{row.where}: {row.detail}")
                continue
            text = clean.normalise(row)
            if len(text) < self._data.min_characters:
                self.dropped["too_short"] += 1
            else:
                yield text, clean.key_of(text)

    def _is_new(self, key: bytes, seen: set[bytes]) -> bool:
        if key in seen:
            self.dropped["duplicate"] += 1
            return False
        seen.add(key)
        return True

    def _nothing(self, what: str, in_validation: int = 0) -> sources.SourceError:
        why = [f"dropped {line}" for line in self.report()]
        if in_validation:
            why.append(f"all {in_validation} are held out for validation: give more, `valid_from`, or valid_fraction=0")
        reasons = "; ".join(why) or "it is empty"
        return sources.SourceError(f"data.sources.{self.name}: there are no {what} ({reasons})")

    def report(self) -> list[str]:
        """One line for each reason: how many rows, and where the first malformed one is."""
        lines = []
        for reason, count in sorted(self.dropped.items()):
            where = f", the first at {self.first[reason]}" if reason in self.first else ""
            lines.append(f"{count:,} {reason}{where}")
        return lines


def valid_count(source: SourceSection) -> int | None:
    """How many validation documents an embedded source brings along; None for a source that is not embedded."""
    return max(100, source.documents // 20) if source.is_embedded else None
