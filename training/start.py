"""From a valid config to a finished run: processes, data, trainer."""

import dataclasses
import sys

from checkpoints import CheckpointError, locate, newest, tokenizer_of
from data.prepare import Prepared, prepare
from data.sources import SourceError
from settings import ConfigError, Problem
from tokenizer import TokenizerError
from training.parallel import LaunchError, Strategy
from training.settings import RunConfig
from training.trainer import Outcome, RunMismatch, Trainer, save_resolved_config

CANNOT_START = (ConfigError, LaunchError, RunMismatch, CheckpointError, SourceError, TokenizerError)


def start(config: RunConfig) -> Outcome:
    """Train the run that `config` describes, from where its folder says it is.

    Raises:
        LaunchError: the processes are not those that the config expects.
        RunMismatch: the folder holds a run of another model, tokenizer or seed.
        ConfigError: what only the prepared data could show.
        CheckpointError, SourceError, TokenizerError: `init_from`, a source or the tokenizer cannot be used.
    """
    strategy = Strategy(config.parallel)
    try:
        if strategy.is_main:
            for notice in strategy.notices:
                print(notice, file=sys.stderr)
            save_resolved_config(config)
        prepared = _prepare(config, strategy)
        _check_against_tokenizer(config, prepared)
        trainer = Trainer(config, strategy, prepared)
        if strategy.is_main:
            for path, problems in trainer.skipped.items():
                trainer.watch.say(f"skipped {path}: {'; '.join(problems)}")
            if trainer.changes:
                trainer.watch.say("the config has changed since:\n  " + "\n  ".join(trainer.changes))
        return trainer.run()
    finally:
        strategy.close()


def _prepare(config: RunConfig, strategy: Strategy) -> Prepared:
    """Shards and tokenizer, made by the main process and found by the others."""
    section = config.tokenizer
    if section.path is None and config.run.init_from is not None:  # the tokenizer of the weights, resumed or not
        weights = newest(config.run.path / "checkpoints")[0] or locate(config.run.init_from)
        section = section.model_copy(update={"path": str(tokenizer_of(weights))})
    failure = None
    if strategy.is_main:
        try:
            prepared = prepare(config.data, section)
        except CANNOT_START as error:
            failure = error
    (failed,) = strategy.sum(float(failure is not None))  # where the others wait
    if failed:
        raise failure or LaunchError("the main process could not prepare the data")
    if not strategy.is_main:
        prepared = prepare(config.data, section, log=lambda _text: None)
    used = {name for phase in config.phases for name in phase.data}
    return dataclasses.replace(prepared, sources={name: prepared.sources[name] for name in used})


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
    if problems:
        raise ConfigError(problems)
