"""From a valid config to a finished run: processes, data, trainer."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from checkpoints import CheckpointError, checkpoint, hub, locate, newest, read_shape, tokenizer_of
from data import scores
from data.prepare import Prepared, prepare
from data.sources import SourceError
from data.token_shards import TokenShards
from settings import ConfigError, Problem, as_plain
from storage import folder
from tokenizer import TokenizerError
from tokenizer.settings import TokenizerSection
from training.examine import recall_fault
from training.outcome import OutcomeFile, lock
from training.parallel import LaunchError, Strategy
from training.requests import Requests
from training.resume import RunMismatch, check_same_model
from training.settings import RunConfig
from training.stability import Diverged
from training.trainer import Outcome, Trainer, save_resolved_config

__all__ = ["CANNOT_START", "Diverged", "start"]
CLAIM_SECONDS = 90
MOST_PASSES = 40  # over one source; beyond some 16, more of them teach nothing (Muennighoff et al. 2023)
CANNOT_START = (ConfigError, LaunchError, RunMismatch, CheckpointError, SourceError, TokenizerError)


def start(config: RunConfig, requests: Requests | None = None, outcome: OutcomeFile | None = None) -> Outcome:
    """Train the run that `config` describes, from where its folder says it is.

    Args:
        requests: who has listened to signals so far, and goes on doing so; else somebody does while this runs.
        outcome: is told how to learn the run's step; its caller writes it.

    Raises:
        LaunchError: the processes are not those that the config expects.
        machine.rendezvous.Missing: some of them have not come.
        RunMismatch: the folder holds a run of another model, tokenizer or seed.
        ConfigError: what only the prepared data could show.
        CheckpointError, SourceError, TokenizerError: `init_from`, a source or the tokenizer cannot be used.
    """
    with contextlib.ExitStack() as held:
        requests = requests or held.enter_context(contextlib.closing(Requests()))
        held.enter_context(requests.limited(config.run.max_minutes, config.run.deadline))
        strategy = Strategy(config.parallel, stop=lambda: requests.stop)
        held.callback(strategy.close)
        for notice in strategy.notices if strategy.is_main else ():
            print(notice, file=sys.stderr)
        prepared = _prepare(config, strategy, requests, held)
        if outcome is not None:
            outcome.hold()
        _check_against_tokenizer(config, prepared)
        taught = _scores(config, prepared, strategy)
        trainer = Trainer(config, strategy, prepared, requests, taught)
        if outcome is not None:
            outcome.step, outcome.why = lambda: trainer.state.step, trainer.why_stopped
        for line in _lessons(config, taught):
            trainer.watch.say(line)
        for warning in _too_many_passes(config, prepared):
            trainer.watch.say(warning)
        if strategy.is_main:
            save_resolved_config(config)
        for path, problems in trainer.skipped.items():
            trainer.watch.say(f"skipped {path}: {'; '.join(problems)}")
        if trainer.skipped and not trainer.state.step:
            trainer.watch.say("WARNING: no checkpoint of this run can be used: it starts again from the beginning")
        if trainer.changes:
            trainer.watch.say("the config has changed since:\n  " + "\n  ".join(trainer.changes))
        return trainer.run()


def _prepare(config: RunConfig, strategy: Strategy, requests: Requests, held: contextlib.ExitStack) -> Prepared:
    """Shards and tokenizer: made by the main process, then found, or made, by the first of every other machine, for its
    disk may be another. The others believe the main process: reading the corpus once a GPU would teach nothing more."""
    prepared = None
    for my_turn in (strategy.is_main, strategy.is_first_of_machine and not strategy.is_main):
        failure = None
        if my_turn:
            try:
                with requests.interruptible():  # what is prepared so far stays
                    if strategy.is_main:
                        held.enter_context(_claim(config.run.path))
                    log = print if strategy.is_main else lambda _text: None
                    tokenizer = _tokenizer_section(config)
                    if strategy.is_main:
                        _check_first_weights(config)
                    prepared = prepare(config.data, tokenizer, log)
            except (*CANNOT_START, OSError, KeyboardInterrupt) as error:
                failure = error
        failed, stopped = strategy.sum(failure is not None, my_turn and requests.stop, patiently=True)
        if stopped:
            raise KeyboardInterrupt
        if failed:
            if failure and not strategy.is_main:
                print(f"process {strategy.rank}: {failure}", file=sys.stderr)
            raise failure or LaunchError("the process that prepares the data could not")
    of_main = strategy.from_main(prepared)
    prepared = prepared or of_main
    used = {name for phase in config.phases for name in phase.data}
    return dataclasses.replace(prepared, sources={name: prepared.sources[name] for name in used})


def _scores(config: RunConfig, prepared: Prepared, strategy: Strategy) -> dict[str, dict[str, Path]]:
    """By phase that distills, the folders of its teacher's scores by source.

    Raises:
        ConfigError: a phase has none, or those of several teachers, or they are damaged, on any machine.
    """
    problems: list[Problem] = []
    found: dict[str, dict[str, Path]] = {}
    for number, phase in enumerate(config.phases):
        if phase.distill is None:
            continue
        of_phase: dict[str, Path] = {}
        for name in phase.data:
            folders = scores.beside(prepared.sources[name], phase.distill.teacher)
            if len(folders) > 1:
                problems.append(_several(f"phases.{number}.distill.teacher", phase.distill.teacher, name, folders))
            of_phase.update({name: folders[0]} if folders else {})
        if not of_phase:
            teacher = phase.distill.teacher or "TEACHER"
            commands = " or ".join(f"`python -m distill.score {prepared.sources[name]} --teacher {teacher}`"
                                   for name in phase.data)  # fmt: skip
            remedy = f"no source of the phase has a teacher's scores: run {commands} first, or use null"
            problems.append(Problem(f"phases.{number}.distill", as_plain(phase.distill), remedy))
        if strategy.is_first_of_machine:
            faults = [fault for path in of_phase.values() for fault in folder.verify(path)[:1]]
            problems += [Problem(f"phases.{number}.distill", as_plain(phase.distill), f"{fault}: remove its folder and "
                                 "run distill.score again") for fault in faults]  # fmt: skip
        found[phase.name] = of_phase
    (failed,) = strategy.sum(bool(problems))
    if problems:
        raise ConfigError(problems)
    if failed:
        raise LaunchError("another process does not find the teacher's scores that phases.*.distill asks for")
    return found


def _several(key: str, value: str | None, source: str, folders: list[Path]) -> Problem:
    told = ", ".join(f"{scores.teacher_of(about)} ({path.name}, k {about['k']}, {about['dtype_of_weights']})"
                     for path in folders for about in [scores.describe(path)])  # fmt: skip
    return Problem(key, value, f"{source} has several scores: name one teacher of {told}; of one teacher's, move away "
                               "what is not wanted")  # fmt: skip


def _lessons(config: RunConfig, taught: dict[str, dict[str, Path]]) -> Iterator[str]:
    """One line for each phase that distills: what is learned from whom."""
    for phase in config.phases:
        for name in phase.data if phase.distill else ():
            path = taught[phase.name].get(name)
            how = f"from the probabilities in {path}" if path else "by cross-entropy alone: it has no scores"
            yield f"phase {phase.name} learns {name} {how}"


def _too_many_passes(config: RunConfig, prepared: Prepared) -> Iterator[str]:
    """One line for each source that is smaller than what the run reads of it, by so much that it learns it by heart."""
    for name in prepared.sources:
        there = prepared.describe(name)["splits"]["train"]["tokens"]
        read = sum(phase.tokens * phase.data.get(name, 0) / sum(phase.data.values()) for phase in config.phases)
        if read > MOST_PASSES * there:
            yield (f"WARNING: {name} has {there:,} tokens, and the run reads {read:,.0f} of them, {read / there:,.0f} "
                   "times over: it will know them by heart. Give it more text, or train on fewer tokens")  # fmt: skip


def _tokenizer_section(config: RunConfig) -> TokenizerSection:
    """A run goes on with the tokenizer it has, and one from other weights begins with theirs: trained anew, it would be
    another one as soon as a source is added. Weights of the Hub are downloaded here, by one process a machine; the
    others then find them. Only the holder of the claim may ask."""
    section, init_from = config.tokenizer, config.run.init_from
    if section.path is not None and not (init_from is not None and hub.is_name(init_from)):
        return section
    weights = newest(config.run.path / "checkpoints")[0]
    if weights is None and init_from is not None:
        weights = locate(init_from)
    elif weights is not None and checkpoint.read_run_config(weights).get("tokenizer") != as_plain(section):
        weights = None  # another one is asked for: training/resume.py has to say what becomes of that
    if weights is None or section.path is not None:
        return section
    return section.model_copy(update={"path": str(tokenizer_of(weights))})


def _check_first_weights(config: RunConfig) -> None:
    """Raises RunMismatch if the weights that a new run would begin with do not fit its shape: before its data is
    prepared, which may take hours."""
    init_from = config.run.init_from
    if init_from is None or newest(config.run.path / "checkpoints")[0] is not None:
        return
    source = locate(init_from, only_cached=True)
    there = read_shape(source)
    check_same_model(source, there, config.model.config(there.vocab_size, config.longest_context))


def _claim(folder: Path) -> contextlib.AbstractContextManager:
    """Keep other processes from training the run in `folder`, until the result is closed.

    A run that was just interrupted may still be saving: it is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim = lock(folder)
    try:
        return claim.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{folder} is being trained by another process: waiting {CLAIM_SECONDS} s for it to end", flush=True)
    try:
        return claim.acquire(timeout=CLAIM_SECONDS)
    except filelock.Timeout:
        raise LaunchError(
            f"{folder} is being trained by another process: wait for it, stop it, or choose another run.name"
        ) from None


def _check_against_tokenizer(config: RunConfig, prepared: Prepared) -> None:
    problems = []
    vocab_size, entries = config.model.vocab_size, prepared.tokenizer.vocab_size
    if vocab_size is not None and vocab_size < entries:
        remedy = f"use at least the tokenizer's {entries} entries, or null"
        problems.append(Problem("model.vocab_size", vocab_size, remedy))
    context = config.model.context or config.longest_context
    for index, prompt in enumerate(config.watch.sample_prompts):
        length = len(prepared.tokenizer.encode(prompt)) + 1  # the end of text goes before it
        if length >= context:
            remedy = f"shorten it: its {length} tokens leave no room in the model's context of {context}"
            problems.append(Problem(f"watch.sample_prompts.{index}", f"{prompt[:40]}...", remedy))
    for number, phase in enumerate(config.phases):
        if "recall" in phase.probes and (fault := recall_fault(config, prepared, context)):
            remedy = f"leave recall out, or prepare for it: {fault}"
            problems.append(Problem(f"phases.{number}.probes", phase.probes, remedy))
    problems += _without_rows(config, prepared)
    if problems:
        raise ConfigError(problems)


def _without_rows(config: RunConfig, prepared: Prepared) -> Iterator[Problem]:
    """Of which sources a phase would have nothing to train on, however late it comes."""
    for number, phase in enumerate(config.phases):
        for name in phase.data:
            tokens = TokenShards(prepared.sources[name], "train")
            if not len(tokens.lengths):
                dropped = prepared.describe(name)["dropped"]
                told = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "it is empty"
                remedy = f"name other documents: none is left for training after preparation (dropped: {told})"
                yield Problem(f"data.sources.{name}.from", config.data.sources[name].from_, remedy)
            elif tokens.masks is not None and phase.context < (shortest := int(tokens.lengths.min())):
                count = len(tokens.lengths)
                remedy = f"use {shortest} or more: all {count:,} conversations of {name} are longer, and none is cut"
                yield Problem(f"phases.{number}.context", phase.context, remedy)
