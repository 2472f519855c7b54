"""Going on from a checkpoint: is this still the same run, what has changed, and is there more to do than before?

What would make another run of it is refused, with the word for `run.allow` that lets it pass, where one can. All other
changes are fine, and listed. A run that has finished goes on when its config names further phases, or more tokens for
the last one.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints import RunState, checkpoint, never_drawn, tokenizer_of
from data import scores, shards
from data.prepare import Prepared
from models.config import ModelConfig
from settings import as_plain, differences
from training.settings import PhaseSection, RunConfig

if TYPE_CHECKING:
    from tokenizer import Tokenizer

SAMPLE_ORDER = ("name", "context", "data", "batch_tokens")  # settings of a phase that decide what sample k of it is
SCHEDULE = ("tokens", "learning_rate")  # settings of a phase that decide the learning rate at sample k
LESSON = ("distill",)  # settings of a phase that decide what is learned of a sample

Scores = Mapping[str, Mapping[str, Path]]  # by phase and source, folders of a teacher's scores


class RunMismatch(RuntimeError):
    """The run's folder holds another run than the config describes; the message names what differs."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference between a checkpoint and what it is to go on with; `allow` is the word that lets it pass."""

    key: str
    there: Any
    here: Any
    allow: str | None

    def __str__(self) -> str:
        way = f"run.allow=[{self.allow}] goes on with it" if self.allow else "nothing can: the weights would not fit"
        return f"{self.key}: {self.there!r} there, {self.here!r} in the config ({way})"


class _Data(NamedTuple):
    """What is there now."""

    prepared: Prepared
    digests: dict[str, str]


def digests(prepared: Prepared, taught: Scores) -> dict[str, str]:
    """By source, what tells its shards from any other's; by phase and source, what tells its scores."""
    of_scores = {_of_scores(phase, source): scores.digest(path)
                 for phase, folders in taught.items() for source, path in folders.items()}  # fmt: skip
    return {name: shards.digest(path) for name, path in prepared.sources.items()} | of_scores


def _of_scores(phase: str, source: str) -> str:
    """Under which scores are known beside shards, whose names have no spaces."""
    return f"scores of {source} in phase {phase}"


def take_up(
    path: Path, config: RunConfig, model_config: ModelConfig, prepared: Prepared, taught: Scores
) -> tuple[RunState, list[str]]:
    """The state from which the run of the checkpoint at `path` goes on, and what has changed since, for people.

    Raises:
        RunMismatch: something has changed that would make it another run, and the config does not allow it.
    """
    state, saved = checkpoint.read_state(path), checkpoint.read_run_config(path)
    now = as_plain(config)
    extended = _more_of_the_last_phase(state, saved, now)
    state = extended or state
    here = _Data(prepared, digests(prepared, taught))
    changes = [
        Change(key, there, here, allow)
        for allow, before, after in _what_matters(path, state, saved, now, model_config, here)
        if not (extended and allow == "schedule")
        for key, there, here in differences(before, after)
    ]
    if refused := [change for change in changes if change.allow not in config.run.allow]:
        raise RunMismatch(
            f"{path} holds another run than the config describes; choose another run.name, set back, or allow:\n  "
            + "\n  ".join(map(str, refused))
        )
    listed = [
        f"{key}: {there!r} before, {here!r} now" + (" (that phase is over)" if _is_over(key, state) else "")
        for key, there, here in differences(saved, now)
    ]
    listed += [f"{change.key}: {change.there!r} before, {change.here!r} now" for change in changes
               if change.allow in ("tokenizer", "data")]  # fmt: skip
    begun = len(state.phases_done) + (state.cursor > 0)
    to_come = _data(now["phases"][begun:], state, here.digests)
    listed += [f"{key}: others than before, in a phase to come" for key, _, _ in differences(*to_come)]
    return state, listed


def check_same_model(path: Path, there: ModelConfig, here: ModelConfig) -> None:
    """Raises RunMismatch unless weights of the model in the folder at `path` fit the model `here`."""
    if changes := differences({"model": there.identity()}, {"model": here.identity()}):
        raise RunMismatch(
            f"{path} holds another model than the config describes; set to what is there:\n  "
            + "\n  ".join(f"{key}: {one!r} there, {other!r} in the config" for key, one, other in changes)
        )


def check_same_tokenizer(path: Path, tokenizer: "Tokenizer", config: RunConfig) -> None:
    """Raises RunMismatch if the model in the folder at `path` was trained with another tokenizer, unless the config
    allows it: its weights know what each id means."""
    from tokenizer import Tokenizer

    there = tokenizer_of(path)
    if "tokenizer" in config.run.allow or not (there / "tokenizer.json").exists():
        return
    one, other = Tokenizer.load(there).fingerprint, tokenizer.fingerprint
    if one != other:
        change = Change("tokenizer fingerprint", one, other, "tokenizer")
        raise RunMismatch(f"{path} was trained with another tokenizer; leave tokenizer.path out, or allow:\n  {change}")


def special_tokens(path: Path, tokenizer: "Tokenizer") -> list[int]:
    """The special tokens that the model in the folder at `path` has learned, as ids of `tokenizer`: none that another
    tokenizer would write otherwise."""
    from tokenizer import Tokenizer

    if not (tokenizer_of(path) / "tokenizer.json").exists():
        return []
    there = Tokenizer.load(tokenizer_of(path))
    never = never_drawn(path, there)
    learned = {name: token for name, token in there.special_tokens.items() if token not in never}
    return sorted(token for name, token in tokenizer.special_tokens.items() if learned.get(name) == token)


def _what_matters(
    path: Path, state: RunState, saved: dict[str, Any], now: dict[str, Any], model: ModelConfig, here: _Data
) -> list[tuple[str | None, dict[str, Any], dict[str, Any]]]:
    """(word that allows it, what it was, what it is now) of all that makes a run the run it is."""
    from tokenizer import Tokenizer

    done = len(state.phases_done)
    names = [{"phases": [{"name": phase["name"]} for phase in config["phases"][:done]]} for config in (saved, now)]
    one, other = Tokenizer.load(path / checkpoint.TOKENIZER).fingerprint, here.prepared.tokenizer.fingerprint
    found = [
        (None, {"model": checkpoint.read_model_config(path).identity()}, {"model": model.identity()}),
        ("tokenizer", {"tokenizer fingerprint": one}, {"tokenizer fingerprint": other}),
        ("order", {"run": {"seed": state.seed}}, {"run": {"seed": now["run"]["seed"]}}),
        ("order", *names),
    ]
    if state.cursor:  # in the middle of a phase, `cursor` counts its samples
        before, after = ({f"phases.{done}": (config["phases"][done:] or [{}])[0]} for config in (saved, now))
        found += [
            ("order", _only(before, SAMPLE_ORDER), _only(after, SAMPLE_ORDER)),
            ("schedule", _only(before, SCHEDULE), _only(after, SCHEDULE)),
            ("schedule", _update_rule(saved), _update_rule(now)),
        ]
        found.append(("data", _only(before, LESSON), _only(after, LESSON)))
        found.append(("data", *_data(now["phases"][done : done + 1], state, here.digests)))
    return found


def _data(
    phases: Iterable[dict[str, Any]], state: RunState, here: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the shards and scores of those phases are known by, then and now, as far as both are known."""
    phases = list(phases)
    names = {name for phase in phases for name in phase["data"]}
    lessons = {_of_scores(phase["name"], name) for phase in phases for name in phase["data"]}
    sides = []
    for side in (state.data, here):
        known = {name: side[name] for name in sorted(names) if name in state.data and name in here}
        taught = {name: side.get(name) for name in sorted(lessons) if name in state.data or name in here}
        sides.append({"shards of data.sources": known, **taught})
    return tuple(sides)


def _update_rule(config: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": {key: value for key, value in config["optimizer"].items() if key != "most_skipped"}}


def _only(phases: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {name: {key: phase.get(key) for key in keys} for name, phase in phases.items()}


def _more_of_the_last_phase(state: RunState, saved: dict[str, Any], now: dict[str, Any]) -> RunState | None:
    """The state in the middle of the last phase, if the run was finished and this phase has become longer."""
    last = len(state.phases_done) - 1
    if len(state.phases_done) != len(saved["phases"]) or len(now["phases"]) <= last:
        return None
    before, after = saved["phases"][last], now["phases"][last]
    if after["tokens"] <= before["tokens"] or any(before[key] != after[key] for key in SAMPLE_ORDER):
        return None
    consumed = state.samples_done.get(before["name"])
    phase = PhaseSection.model_validate(after)
    if consumed is None or consumed >= phase.steps * phase.batch_rows:
        return None
    return dataclasses.replace(state, phases_done=state.phases_done[:-1], cursor=consumed, looked_up=state.step)


def _is_over(key: str, state: RunState) -> bool:
    """Whether a config's key belongs to a phase that is done."""
    section, _, rest = key.partition(".")
    return section == "phases" and int(rest.partition(".")[0]) < len(state.phases_done)
