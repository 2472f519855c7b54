"""Near-duplicates: documents that share most of their 5-word shingles with an earlier one that stays.

MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3) finds the earlier documents that
may be alike, and the exact Jaccard similarity of the shingles decides. Signatures come from rensa, a MinHash in Rust.
The index lies on disk, in SQLite, for it grows with the corpus; memory does not. Nor does the work on a document, when
all documents begin with the same page: a band has room for so many documents, and those that share most bands with a
new one are compared.
"""

import collections
import sqlite3
from collections.abc import Sequence

import numpy as np

from data.preparation.words import words_of

SHINGLE = 5  # words
BANDS, ROWS = 20, 5  # at a similarity of 0.8 one document in 3,000 is missed, at 0.7 one in 40
SEED = 42
LONGEST = 1_000_000  # characters of a document that are looked at: a book is known by its first chapters
BAND_ROOM, COMPARED = 100, 50  # documents: in one band, and held against a new one


def shingles(texts: Sequence[str]) -> list[np.ndarray]:
    """For each text the sorted hashes, uint64, of its shingles; those of a text with fewer words are one, of all, or of
    the text itself if it has none."""
    from rensa import RMinHash

    tokens = []
    for text in texts:
        words = words_of(text[:LONGEST].lower()) or [text]
        tokens.append([" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))])
    return [np.unique(np.array(hashes, dtype=np.uint64)) for hashes in RMinHash.hash_token_sets(tokens)]


def bands(sets: Sequence[np.ndarray]) -> np.ndarray:
    """[documents, BANDS] uint64 of each set of shingles: two documents that share one of them may be alike."""
    from rensa import RMinHash

    if not sets:
        return np.zeros((0, BANDS), dtype=np.uint64)
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    flat = np.ascontiguousarray(np.concatenate(sets))
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, SEED).to_rows()
    digests = np.array(rows, dtype=np.uint64).reshape(len(sets), BANDS, ROWS)
    mixed = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), digests.shape[:2]).copy()
    for row in range(ROWS):
        mixed ^= digests[:, :, row]
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


class Index:
    """The documents that stay, in the tables `bands` and `kept` of a database."""

    def __init__(self, database: sqlite3.Connection, threshold: float):
        self._database, self._threshold = database, threshold
        database.execute("CREATE TABLE IF NOT EXISTS kept (id INTEGER PRIMARY KEY, shingles BLOB)")
        database.execute("CREATE TABLE IF NOT EXISTS bands (band INTEGER, id INTEGER, PRIMARY KEY (band, id)) "
                         "WITHOUT ROWID")  # fmt: skip

    def add(self, its_bands: np.ndarray, its_shingles: np.ndarray) -> bool:
        """Take a document in, unless it is like one that is there already; returns whether it was taken."""
        keys = its_bands.astype(np.int64).tolist()
        marks = ",".join("?" * len(keys))
        pairs = self._database.execute(f"SELECT band, id FROM bands WHERE band IN ({marks})", keys).fetchall()
        shared = collections.Counter(number for _, number in pairs)
        for number in sorted(shared, key=lambda number: (-shared[number], number))[:COMPARED]:
            (blob,) = self._database.execute("SELECT shingles FROM kept WHERE id = ?", (number,)).fetchone()
            if similarity(np.frombuffer(blob, dtype=np.uint64), its_shingles) >= self._threshold:
                return False
        number = self._database.execute("INSERT INTO kept (shingles) VALUES (?)", (its_shingles.tobytes(),)).lastrowid
        sizes = collections.Counter(band for band, _ in pairs)
        free = ((key, number) for key in set(keys) if sizes[key] < BAND_ROOM)
        self._database.executemany("INSERT INTO bands VALUES (?, ?)", free)
        return True
