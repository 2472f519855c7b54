"""What a word is wherever documents are compared by their words: for near-duplicates and for decontamination.

A number is a word, and so is what is left of letters between numbers and other signs. In scripts that put no spaces
between words (Chinese, Japanese, Thai, ...) every letter counts as a word.
"""

import re

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{_UNSPACED}]|[^\W\d{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of `text`, in order, as they are written."""
    return _WORD.findall(text)
