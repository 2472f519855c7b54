"""Secrets have no place in a config: it is saved with the run, shown in reports and sent to trackers.

They come from the environment (HF_TOKEN, WANDB_API_KEY) or from the tools' own logins. What looks like one in a config
is refused, and no message shows it.
"""

import re
from typing import Any

REMEDY = (
    "a config is no place for secrets: remove it, revoke it if the file was shared, and give it by environment "
    "(HF_TOKEN, WANDB_API_KEY) or log in once (hf auth login, wandb login)"
)
# 40 hex digits alone are a wandb key; in a path they are a commit's.
_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|(?:sk|pk)-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|glpat-[\w-]{16,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
    r"|wandb_v1_\w{16,}|(?<![\w/-])[0-9a-f]{40}(?![\w/-])|://[^/\s:@]+:[^/\s@]+@"
)
_KEY = re.compile(r"(?:^|_)(?:token|api_?key|secret|passwd|password|credentials?)$", re.IGNORECASE)


def looks_secret(key: str, value: Any) -> bool:
    """Whether `value`, found under the dotted `key`, looks like a token, a key or a password."""
    if not isinstance(value, str) or not value:
        return False
    return bool(_VALUE.search(value) or _KEY.search(key.rpartition(".")[2]))


def masked(text: str) -> str:
    """`text` with whatever looks like a secret hidden."""
    return _VALUE.sub("(hidden)", text)


def find(raw: Any, key: str = "") -> list[str]:
    """The dotted keys of a config's nested dicts and lists under which something looks like a secret."""
    if isinstance(raw, dict):
        pairs = [(str(name), value) for name, value in raw.items()]
        found = [f"{key}.(hidden)" if key else "(hidden)" for name, _ in pairs if _VALUE.search(name)]
    elif isinstance(raw, list):
        pairs, found = [(str(place), value) for place, value in enumerate(raw)], []
    else:
        return [key] if looks_secret(key, raw) else []
    return found + [place for name, value in pairs for place in find(value, f"{key}.{name}" if key else name)]
