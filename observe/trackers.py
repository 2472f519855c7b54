"""Experiment trackers behind one small interface: `open_tracker` gives one, `log` takes the records of metrics.jsonl.

Weights & Biases is the one there is: online when a key is present (WANDB_API_KEY, or wandb's own login in netrc),
otherwise offline in the run folder, from where `wandb sync` uploads it later. Nothing that goes wrong in a tracker
stops training: one loud line, and the run goes on without it. What leaves the machine is the resolved config, the
records, and what wandb collects about the hardware; not the console, the source or the git remote.
"""

import netrc
import os
import secrets
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage import folder

MODES = ("auto", "off")
RUN_ID_FILE = "wandb_id"
INIT_SECONDS = 30.0  # a network that does not answer must not cost minutes of a rented card
FINISH_SECONDS = 60.0


class Tracker:
    """Takes records and keeps none: the tracker of a run that has none."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record, as `MetricsLog.append` does."""

    def close(self, failed: bool = False) -> None:
        """Finish, and wait a moment for what is still to be uploaded."""


def open_tracker(
    mode: str, run_folder: Path, config: dict[str, Any], project: str = "slms", say: Callable[[str], None] | None = None
) -> Tracker:
    """The tracker for a run; never fails because of what it tracks with.

    Args:
        mode: "auto" or "off"; "off" imports nothing.
        run_folder: where offline data and the run's id live; a resumed run finds its id there and joins itself.
        config: the resolved config, as plain values.
        say: prints the one line about what became of it; standard error when None.

    Raises:
        ValueError: `mode` is neither.
    """
    if mode not in MODES:
        raise ValueError(f"wandb: {mode!r} is not a mode; write one of {', '.join(MODES)}")
    if mode == "off":
        return Tracker()
    say = say if say is not None else _say
    wanted = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    for attempt in dict.fromkeys((wanted, "offline")):
        try:
            return WandbTracker(attempt, Path(run_folder), config, project, say)
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, training goes on
            _loud(say, f"wandb ({attempt}) did not start", error)
    return Tracker()


def has_key() -> bool:
    """Whether wandb would find a key on this machine; the key itself is not kept."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entry = netrc.netrc(path.expanduser()).authenticators(host)
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue  # no such file, no home, or not readable as one: wandb finds no key in it either
        return bool(entry and entry[2])
    return False


def run_id(run_folder: Path) -> str:
    """The run's id with the tracker: made at the first start, kept in the run folder, the same ever after."""
    path = Path(run_folder) / RUN_ID_FILE
    if path.exists() and (known := path.read_text().strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(4)
    folder.write_file(path, fresh + "\n")
    return fresh


class WandbTracker(Tracker):
    """One wandb run. Steps are its x axis by name rather than wandb's own counter, which refuses to go back when a
    run resumes from an earlier checkpoint: steps done twice then lie on each other."""

    def __init__(self, mode: str, run_folder: Path, config: dict[str, Any], project: str, say: Callable[[str], None]):
        import wandb

        run_folder.mkdir(parents=True, exist_ok=True)
        self._say = say
        self._run = wandb.init(
            project=project,
            name=run_folder.name,
            id=run_id(run_folder),
            resume="allow",
            dir=str(run_folder),
            mode=mode,
            config=config,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        where = self._run.url if mode == "online" else f"upload it later: cd {run_folder} && wandb sync"
        say(f"wandb: {mode} ({where})")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record as one row of named values."""
        self._guard(lambda: self._run.log(rows(record)))

    def close(self, failed: bool = False) -> None:
        """Finish the run, marked as failed if it did."""
        self._guard(lambda: self._run.finish(exit_code=1 if failed else 0))
        self._run = None

    def _guard(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, training goes on
            self._run = None
            _loud(self._say, "wandb failed", error)


def rows(record: dict[str, Any]) -> dict[str, Any]:
    """A record as wandb's flat names: `train/loss`, `validation/stories/val_loss`, `probe/recall/end/accuracy`."""
    place = [str(record.get("kind", "record"))]
    place += [str(record[key]) for key in ("probe", "when", "event") if key in record]
    row = {key: record[key] for key in ("step", "tokens") if key in record}
    skip = {"kind", "step", "tokens", "probe", "when", "event", "sources"}
    row |= {"/".join([*place, key]): value for key, value in record.items() if key not in skip and value is not None}
    for name, values in (record.get("sources") or {}).items():
        row |= {"/".join([*place, name, key]): value for key, value in values.items()}
    return row


def _loud(say: Callable[[str], None], what: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    say(f"WARNING: {what}, training goes on without it: {reason}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
