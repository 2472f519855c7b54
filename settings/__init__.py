"""Typed configuration: sections that know their own limits, and one report of everything that is wrong.

Every room declares its own section beside the code that it configures (`data/settings.py`, `tokenizer/settings.py`);
`training/settings.py` puts them together as one run. This room is the mechanism they share: reading YAML, applying
`section.key=value` overrides, and collecting every problem (key, value, what would be right) before anything is
allocated.
"""

from settings.paths import in_the_way, kind_of
from settings.reading import load, read
from settings.sections import ConfigError, Problem, Section, as_plain, differences, validate

__all__ = ["ConfigError", "Problem", "Section", "as_plain", "differences", "in_the_way", "kind_of", "load", "read",
           "validate"]  # fmt: skip
