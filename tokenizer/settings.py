"""The tokenizer's section of the config: an existing tokenizer, or the size of the one that the run trains itself."""

import re

import pydantic

from settings import Problem, Section


class TokenizerSection(Section):
    """`path` names a tokenizer.json, a folder that holds one, or "hub:OWNER/NAME"; without it the run trains one of
    `vocab_size` entries on its own documents."""

    path: str | None = None
    vocab_size: int = pydantic.Field(4_096, ge=1_024, le=50_257)

    def problems(self) -> list[Problem]:
        if self.path is None:
            return []
        if self.path.startswith("hub:"):  # its presence is not checked here: validation needs no network
            if re.fullmatch(r"hub:[\w.-]+/[\w.-]+", self.path):
                return []
            return [Problem("path", self.path, "write a tokenizer of the Hub as hub:OWNER/NAME")]
        from tokenizer.bpe import Tokenizer, TokenizerError  # lazily: most configs name no tokenizer

        try:
            Tokenizer.load(self.path)
        except TokenizerError as error:
            return [Problem("path", self.path, f"name a tokenizer: {error}")]
        return []
