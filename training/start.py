"""From a valid config to a finished run: processes, data, trainer."""

import dataclasses
import sys

from checkpoints import CheckpointError, checkpoint, newest, resolve
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
        _check_vocabulary(config, prepared)
        trainer = Trainer(config, strategy, prepared)
        if strategy.is_main:
            for path, problems in trainer.skipped.items():
                trainer.watch.say(f"skipped {path}: {'; '.join(problems)}")
        return trainer.run()
    finally:
        strategy.close()


def _prepare(config: RunConfig, strategy: Strategy) -> Prepared:
    """Shards and tokenizer, made by the main process and found by the others."""
    section = config.tokenizer
    if section.path is None and config.run.init_from is not None and newest(config.run.path / "checkpoints")[0] is None:
        section = section.model_copy(update={"path": str(resolve(config.run.init_from) / checkpoint.TOKENIZER)})
    if strategy.is_main:
        prepared = prepare(config.data, section)
        strategy.barrier()
    else:
        strategy.barrier()
        prepared = prepare(config.data, section, log=lambda _text: None)
    used = {name for phase in config.phases for name in phase.data}
    return dataclasses.replace(prepared, sources={name: prepared.sources[name] for name in used})


def _check_vocabulary(config: RunConfig, prepared: Prepared) -> None:
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < prepared.tokenizer.vocab_size:
        remedy = f"use at least the tokenizer's {prepared.tokenizer.vocab_size} entries, or null"
        raise ConfigError([Problem("model.vocab_size", vocab_size, remedy)])
