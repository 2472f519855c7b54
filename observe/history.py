"""What a run folder tells: metrics.jsonl and config.yaml as plain data for whoever shows it (report, terminal).

Nothing here knows how it will look. All of it works on an unfinished run: what is not there yet is None.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import yaml

from observe.metrics import MetricsLog
from storage import folder

Record = dict[str, Any]
MOST_AT_THE_END = 20  # logged steps, of the last tenth, whose mean is a phase's training loss: single steps are noisy


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase as far as it went. Losses are in nats a token; `tokens` and `steps` count this phase alone."""

    name: str
    context: int | None
    first_tokens: int
    last_tokens: int
    steps: int
    train_loss: float | None
    validation: Record | None  # the last one of the phase
    ended: bool

    @property
    def tokens(self) -> int:
        """Tokens trained on in this phase."""
        return self.last_tokens - self.first_tokens

    @property
    def val_loss(self) -> float | None:
        """The last validation loss of the phase."""
        return self.validation.get("val_loss") if self.validation else None

    @property
    def perplexity(self) -> float | None:
        """exp(validation loss in nats)."""
        return perplexity(self.val_loss)


@dataclasses.dataclass(frozen=True)
class Probe:
    """One probe around one phase: its record before and after (`correct, total, accuracy, low, high`)."""

    phase: str
    name: str
    before: Record | None
    after: Record | None

    @property
    def change(self) -> str:
        """Either "up" or "down" if the 95% intervals are apart, "unclear" if they meet; "" if one is missing."""
        if not self.before or not self.after:
            return ""
        if self.after["low"] > self.before["high"]:
            return "up"
        if self.after["high"] < self.before["low"]:
            return "down"
        return "unclear"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder; `problems` is what `storage.folder.verify` found, empty when it is whole."""

    name: str
    bytes: int
    problems: list[str]


class History:
    """The run in `run_folder`, read once.

    Raises:
        FileNotFoundError: there is no such folder, or it is no run's.
        ValueError: metrics.jsonl is damaged before its last line.
    """

    def __init__(self, run_folder: str | Path):
        self.folder = Path(run_folder)
        if not any((self.folder / name).exists() for name in ("metrics.jsonl", "config.yaml")):
            raise FileNotFoundError(
                f"{self.folder} is no run: neither metrics.jsonl nor config.yaml is in it; name a folder like runs/NAME"
            )
        self.name = self.folder.resolve().name
        self.records = MetricsLog.read(self.folder / "metrics.jsonl")
        config = self.folder / "config.yaml"
        self.config_text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""

    def of(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record.get("kind") == kind]

    def events(self, name: str) -> list[Record]:
        """The events called `name`, in order."""
        return [record for record in self.of("event") if record.get("event") == name]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config; empty when it is missing or unreadable, which its text will show."""
        try:
            found = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def planned_phases(self) -> dict[str, dict[str, Any]]:
        """The phases of the config by name, in order."""
        listed = self.config.get("phases")
        if not isinstance(listed, list):
            return {}
        return {str(phase["name"]): phase for phase in listed if isinstance(phase, dict) and "name" in phase}

    @property
    def last(self) -> Record:
        """The latest record that has a step; empty before the first."""
        return next((record for record in reversed(self.records) if record.get("step") is not None), {})

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run so far."""
        return next((record["seconds"] for record in reversed(self.records) if record.get("seconds") is not None), None)

    @property
    def finished(self) -> bool:
        """Whether every phase that was planned, or at least the last one seen, came to its end."""
        ended = {phase.name for phase in self.phases if phase.ended}
        if self.planned_phases:
            return set(self.planned_phases) <= ended
        return bool(self.phases) and self.phases[-1].ended

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The phases that began, in order."""
        begun = (r for r in self.records if r.get("kind") != "event" or r.get("event") == "phase_start")
        found: list[Phase] = []
        for name in dict.fromkeys(str(record["phase"]) for record in begun if record.get("phase") is not None):
            found.append(self._phase(name, found[-1].last_tokens if found else 0))
        return found

    def _phase(self, name: str, first_tokens: int) -> Phase:
        mine = [record for record in self.records if str(record.get("phase")) == name]
        train = [record for record in mine if record.get("kind") == "train"]
        validations = [record for record in mine if record.get("kind") == "validation"]
        steps = [record["step"] for record in mine if record.get("step") is not None]
        tokens = [record["tokens"] for record in mine if record.get("tokens") is not None]
        tail = train[-min(MOST_AT_THE_END, max(1, len(train) // 10)) :]
        losses = [record["loss"] for record in tail if record.get("loss") is not None]
        starts = [record for record in mine if record.get("event") == "phase_start"]
        planned = self.planned_phases.get(name, {})
        context = next((record["context"] for record in starts if "context" in record), planned.get("context"))
        first_step = starts[0]["step"] if starts else max(0, min(steps, default=1) - 1)
        return Phase(
            name=name,
            context=context,
            first_tokens=first_tokens,
            last_tokens=max([first_tokens, *tokens]),
            steps=max(steps, default=first_step) - first_step,
            train_loss=sum(losses) / len(losses) if losses else None,
            validation=validations[-1] if validations else None,
            ended=any(record.get("event") == "phase_end" or record.get("phase_end") for record in mine),
        )

    @functools.cached_property
    def probes(self) -> list[Probe]:
        """Each probe of each phase, in the order of the phases."""
        taken = {(str(r["phase"]), r["probe"], r["when"]): r for r in self.of("probe")}
        pairs = dict.fromkeys((phase, probe) for phase, probe, _ in taken)
        order = {phase.name: place for place, phase in enumerate(self.phases)}
        return [
            Probe(phase, probe, taken.get((phase, probe, "start")), taken.get((phase, probe, "end")))
            for phase, probe in sorted(pairs, key=lambda pair: order[pair[0]])
        ]

    @property
    def floor_sources(self) -> list[str]:
        """The sources that a bigram model was measured on."""
        return list(dict.fromkeys(str(record.get("source", "")) for record in self.events("bigram_floor")))

    def floor(self, phase: str, source: str) -> float | None:
        """The loss of a bigram model on `source`, in nats a token, measured in `phase` or for the whole run."""
        mine = [r for r in self.events("bigram_floor")
                if str(r.get("source", "")) == source and r.get("phase") in (None, phase)]  # fmt: skip
        return mine[-1].get("loss") if mine else None

    @property
    def environments(self) -> list[dict[str, Any]]:
        """What the run ran on, from every event that tells; one entry for each different one."""
        found: list[dict[str, Any]] = []
        for record in self.of("event"):
            values = record.get("environment")
            if isinstance(values, dict) and values not in found:
                found.append(values)
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints on disk, each read whole and verified."""
        root = self.folder / "checkpoints"
        entries = sorted(root.iterdir()) if root.is_dir() else []
        found = []
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
                problems = [problem.removeprefix(f"{entry}/") for problem in folder.verify(entry)]
                found.append(Checkpoint(entry.name, size, problems))
        return found


def perplexity(loss: float | None) -> float | None:
    """exp(loss in nats); infinity where that is too large for a float."""
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf
