"""The run's config: what is wrong is told whole before anything is allocated, and config.yaml names every key."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from settings import ConfigError, Section, as_plain, read, validate
from training.settings import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "config.yaml"
PHASES = [
    {"name": "stories", "context": 256, "data": {"stories": 1}},
    {"name": "reasoning", "context": 1024, "data": {"problems": 0.8, "stories": 0.2}},
    {"name": "long", "context": 2048, "data": {"recall": 1}},
]
SOURCES = {name: {"from": f"embedded:{name}", "documents": 9} for name in ("stories", "problems", "recall")}
# The default run with the numbers that these tests calculate with.
FIXED = [
    "run={name: never-trained}",  # a run that is there already is checked less
    "model={d_model: 128, n_heads: 4, n_kv_heads: 2}",
    f"data.sources={json.dumps(SOURCES)}",
    f"phases={json.dumps([{**phase, 'tokens': 100_000, 'batch_tokens': 8192} for phase in PHASES])}",
]


def config(*overrides: str) -> RunConfig:
    return validate(RunConfig, read(DEFAULT, [*FIXED, *overrides]))


def problems(*overrides: str) -> dict[str, str]:
    """Remedies by key."""
    with pytest.raises(ConfigError) as error:
        config(*overrides)
    return {problem.key: problem.remedy for problem in error.value.problems}


# --- single problems


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("optimzer.muon_lr=0.1", "optimzer", "no such key"),
        ("optimizer.lr=0.1", "optimizer.lr", "no such key"),
        ("phases.1.contxt=64", "phases.1.contxt", "no such key"),
        ("model.n_layer=2", "model.n_layer", "no such key"),
        ("optimizer.muon_lr=-0.02", "optimizer.muon_lr", "greater than 0"),
        ("optimizer.adamw_lr=0", "optimizer.adamw_lr", "greater than 0"),
        ("optimizer.muon_lr=.nan", "optimizer.muon_lr", "finite"),
        ("optimizer.muon_lr=.inf", "optimizer.muon_lr", "finite"),
        ("optimizer.clip=-1", "optimizer.clip", "greater than 0"),
        ("optimizer.momentum=1", "optimizer.momentum", "less than 1"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas", "from 0 up to, not including, 1"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas", "from 0 up to"),
        ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1", "finite"),
        ("model.rope_base=.inf", "model.rope_base", "finite"),
        ("model.rope_base=0", "model.rope_base", "above 0"),
        ("model.architecture=mamba", "model.architecture", "flow"),
        ("model.n_layers=0", "model.n_layers", "1 or more"),
        ("model.n_layers=2.5", "model.n_layers", "integer"),
        ("model.n_layers=six", "model.n_layers", "integer"),
        ("model.n_layers=", "model.n_layers", "integer"),
        ("model.window=0", "model.window", "1 or more, or null"),
        ("model.window=true", "model.window", "no switch"),
        ("model.n_kv_heads=3", "model.n_kv_heads", "divisor of n_heads (4)"),
        ("model.head_dim=31", "model.head_dim", "even"),
        ("model.gradient_checkpointing=2", "model.gradient_checkpointing", "boolean"),
        ("model.context=1024", "phases.2.context", "at most model.context (1024)"),
        ("run.name=../x", "run.name", "letters, digits"),
        ("run.name=", "run.name", "string"),
        ("run.seed=-1", "run.seed", "greater than or equal to 0"),
        ("run.seed=10000000000000000000", "run.seed", "less than"),
        ("run.folder=README.md/runs", "run.folder", "README.md is a file"),
        ("data.shards=README.md/shards", "data.shards", "README.md is a file"),
        ("run.init_from=runs/none", "run.init_from", "existing run or checkpoint, or hub:OWNER/NAME"),
        ("run.init_from=hub:gpt2", "run.init_from", "as hub:OWNER/NAME"),
        ("run.init_from=hub:a b/c", "run.init_from", "as hub:OWNER/NAME"),
        ("parallel.processes=0", "parallel.processes", "1 or more"),
        ("parallel.processes=two", "parallel.processes", "'auto'"),
        ("parallel.strategy=fsdp", "parallel.strategy", "'ddp'"),
        ("parallel.precision=fp16", "parallel.precision", "'bf16'"),
        ("parallel.cpu_threads=100000", "parallel.cpu_threads", "less than or equal to 1024"),
        ("parallel.timeout_minutes=1.0e+300", "parallel.timeout_minutes", "less than or equal to"),
        ("parallel.timeout_minutes=0", "parallel.timeout_minutes", "greater than 0"),
        ("tokenizer.vocab_size=1000", "tokenizer.vocab_size", "1024"),
        ("tokenizer.path=none.json", "tokenizer.path", "name a tokenizer"),
        ("data.valid_fraction=0.9", "data.valid_fraction", "0.5"),
        ("data.sources.recall.from=jsonl:none.jsonl", "data.sources.recall.from", "existing file"),
        ("data.sources.recall.from=csv:x", "data.sources.recall.from", "KIND:REST"),
        ("data.sources.recall.documents=null", "data.sources.recall.documents", "never ends"),
        ("data.sources.recall={documents: 3}", "data.sources.recall.from", "required"),
        ("phases=[]", "phases", "at least 1 item"),
        ("phases=null", "phases", "list"),
        ("phases.1.name=stories", "phases.0.name", "a name of its own"),
        ("phases.0.tokens=8191", "phases.0.tokens", "at least one batch (8192 tokens)"),
        ("phases.0.tokens=", "phases.0.tokens", "integer"),
        ("phases.0.batch_tokens=8000", "phases.0.batch_tokens", "context (256): 7936 or 8192"),
        ("phases.0.batch_tokens=100", "phases.0.batch_tokens", "context (256): 256"),
        ("phases.0.micro_batch=0", "phases.0.micro_batch", "greater than or equal to 1"),
        ("phases.0.context=1", "phases.0.context", "greater than or equal to 2"),
        ("phases.0.data={}", "phases.0.data", "at least 1"),
        ("phases.0.data={storys: 1}", "phases.0.data.storys", "there are: problems, recall, stories"),
        ("phases.0.data={stories: 0}", "phases.0.data.stories", "above 0"),
        ("phases.0.data={stories: -1}", "phases.0.data.stories", "above 0"),
        ("phases.0.data={stories: 1, recall: .nan}", "phases.0.data.recall", "finite"),
        ("phases.0.data={stories: 1, recall: 0.0009}", "phases.0.data.recall", "at least 0.001002"),
        ("phases.0.probes=[chess]", "phases.0.probes.0", "'recall'"),
        ("phases.0.learning_rate.shape=step", "phases.0.learning_rate.shape", "'wsd'"),
        ("phases.0.distill.alpha=2", "phases.0.distill.alpha", "less than or equal to 1"),
        ("phases.0.learning_rate.peak=-1", "phases.0.learning_rate.peak", "greater than 0"),
        ("phases.0.learning_rate={shape: wsd, warmup: 0.9, decay: 0.2}", "phases.0.learning_rate.decay", "at most 0.1"),
        ("checkpoint.keep=0", "checkpoint.keep", "greater than or equal to 1"),
        ("checkpoint.every_minutes=-1", "checkpoint.every_minutes", "greater than 0"),
        ("evaluation.patience=0", "evaluation.patience", "greater than or equal to 1"),
        ("watch.wandb=maybe", "watch.wandb", "'off'"),
        ("watch.log_every=0", "watch.log_every", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named(override, key, remedy):
    found = problems(override)
    assert key in found and remedy in found[key]
    assert set(found) <= {key, "phases.1.name"}  # a name given twice is wrong in both places


def test_impossible_heads():
    assert problems("model.n_heads=3") == {
        "model.n_heads": "use a divisor of d_model (128)",
        "model.n_kv_heads": "use a divisor of n_heads (3)",
    }


def test_fewer_samples_than_processes():
    found = problems("parallel.processes=9", "parallel.strategy=plain")
    assert found["phases.1.batch_tokens"] == "use at least 9216: one sample a process"
    assert found["parallel.strategy"] == "use ddp or auto for 9 processes"
    assert "phases.0.batch_tokens" not in found


def test_a_source_that_no_phase_uses_is_no_problem():
    assert config("phases.2.data={problems: 1}")


# --- all at once

MANY = {
    "modle": "modle.n_layers=2",
    "model.n_heads": "model.n_heads=5",
    "model.norm_eps": "model.norm_eps=small",
    "model.n_kv_heads": None,  # two do not divide five either
    "optimizer.adamw_lr": "optimizer.adamw_lr=-0.003",
    "data.sources.recall.from": "data.sources.recall.from=parquet:none/*.parquet",
    "phases.0.batch_tokens": "phases.0.batch_tokens=1000",
    "phases.1.data.wiki": "phases.1.data.wiki=0.5",
    "phases.2.learning_rate.final": "phases.2.learning_rate.final=2",
}


def test_many_problems_are_one_report():
    assert set(problems(*filter(None, MANY.values()))) == set(MANY)


@pytest.mark.parametrize("broken", ["phases.0={}", "phases.0.context=x", "phases.0=null", "phases.0.data=null",
                                    "data.seed=x", "evaluation=3", "run={name: 1, nam: 2}"])  # fmt: skip
def test_checks_across_keys_are_made_beside_broken_ones(broken):
    others = ["model.n_heads=3", "phases.1.batch_tokens=1000", "phases.1.data.wiki=1"]
    found = problems(broken, *others)
    assert {"model.n_heads", "phases.1.batch_tokens", "phases.1.data.wiki"} < set(found)
    assert all(key.startswith(broken.split("=")[0]) or key in problems(*others) for key in found), found


def test_sections_that_must_be_there():
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, {"model": {"n_heads": 3}})
    assert {"data", "phases", "model.n_heads"} < {problem.key for problem in error.value.problems}


# --- through the command


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


WITHOUT_TORCH = """
import atexit, runpy, sys
def report():
    heavy = {"torch", "datasets", "transformers", "wandb", "matplotlib"} & set(sys.modules)
    print("heavy:", *heavy, file=sys.stderr)
atexit.register(report)
entry, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(entry, run_name="__main__")
"""


def test_the_command_reports_all_and_touches_nothing(run, tmp_path):
    folders = [f"run.folder={tmp_path}/runs", f"data.shards={tmp_path}/shards"]
    given = filter(None, MANY.values())
    wrong = run(sys.executable, "-c", WITHOUT_TORCH, "multigpu_train.py", *FIXED, *folders, *given)
    assert wrong.returncode == 2
    report = lines(wrong.stderr)
    assert report[0] == f"the config has {len(MANY)} problems:"
    assert {line.split(":")[0] for line in report[1 : len(MANY) + 1]} == set(MANY)
    assert "optimizer.adamw_lr: should be greater than 0 (it is -0.003)" in report
    assert report[-1] == "heavy:" and "Traceback" not in wrong.stderr and wrong.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--config", "none.yaml"], ["model.n_heads"], ["--dry-run", "--json", "x.y=1"],
                                       ["--json"], ["--no-such-option"]])  # fmt: skip
def test_the_exit_code_of_a_wrong_command(run, arguments):
    wrong = run(sys.executable, "-c", WITHOUT_TORCH, "multigpu_train.py", *arguments)
    assert wrong.returncode == 2
    assert lines(wrong.stderr)[-1] == "heavy:" and "Traceback" not in wrong.stderr and wrong.stdout == ""
    assert any(re.split("[.=]", argument)[0] in wrong.stderr for argument in arguments)


def test_one_of_several_processes_speaks(run):
    for rank, speaks in ("0", True), ("1", False):
        wrong = run(sys.executable, "multigpu_train.py", "optimizer.muon_lr=-1", RANK=rank, WORLD_SIZE="2")
        assert wrong.returncode == 2
        assert bool(wrong.stderr) == speaks


@pytest.mark.parametrize("entry", ["multigpu_train.py", "generate.py"])
def test_help_loads_nothing_heavy(run, entry):
    helped = run(sys.executable, "-c", WITHOUT_TORCH, entry, "--help")
    assert helped.returncode == 0
    assert "--c" in helped.stdout and lines(helped.stderr) == ["heavy:"]


# --- config.yaml and the recipes


def keys_of(section: type[Section], raw: Any, node: Any, prefix: str = ""):
    """(dotted key, field, value in the file, its YAML node or None) of every key that the schema has, sections and
    their lists and mappings entered at their first entry."""
    nodes = {key.value: (key, value) for key, value in node.value} if node is not None else {}
    for name, field in section.model_fields.items():
        key = field.alias or name
        value = raw.get(key, ...) if isinstance(raw, dict) else ...
        key_node, value_node = nodes.get(key, (None, None))
        yield f"{prefix}{key}", field, value, key_node
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if is_section(kind)]
        if inner and isinstance(value, list | dict) and value:
            if isinstance(value, list):
                value, value_node, key = value[0], value_node.value[0], f"{key}.0"
            elif not is_section(field.annotation):
                first = next(iter(value))
                value, value_node, key = value[first], value_node.value[0][1], f"{key}.{first}"
            yield from keys_of(inner[0], value, value_node, f"{prefix}{key}.")


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def knobs():
    """(dotted key, field, value, line of config.yaml) of every key of the schema."""
    text = DEFAULT.read_text()
    rows = text.splitlines()
    for key, field, value, node in keys_of(RunConfig, read(DEFAULT), yaml.compose(text)):
        yield key, field, value, "" if node is None else rows[node.start_mark.line]


def test_config_yaml_names_every_key():
    assert {key for key, _, value, _ in knobs() if value is ...} == set()
    assert len(list(knobs())) > 70


def test_config_yaml_comments_every_knob():
    sections = {key for key, field, _, _ in knobs() if is_section(field.annotation)} | {"data.sources.stories"}
    assert {key for key, _, _, line in knobs() if "#" not in line} <= sections


def test_config_yaml_tells_the_defaults():
    """A key may be left out of a config: what it then is stands in config.yaml, as the value or in the comment."""
    for key, field, value, line in knobs():
        if field.is_required() or is_section(field.annotation) or key == "phases.0.learning_rate":
            continue
        default = field.get_default(call_default_factory=True)
        default = list(default) if isinstance(default, tuple) else default
        stated = re.search(r"default: (\S+)\)", line)
        if key == "data.sources":
            assert default == {}
        elif stated:
            assert yaml.safe_load(stated[1]) == default and default != value, key
        else:
            assert default == value, key


@pytest.mark.parametrize("path", sorted([DEFAULT, ROOT / "tests/tiny.yaml", *ROOT.glob("configs/*.yaml")]), ids=str)
def test_recipes_are_valid_but_for_files_that_are_not_here(path):
    raw = read(path)
    for source in raw["data"]["sources"].values():
        for key in ("from", "valid_from"):
            if str(source.get(key)).partition(":")[0] in ("jsonl", "parquet", "text"):
                source[key] = f"jsonl:{__file__}" if key == "from" else f"jsonl:{ROOT / 'config.yaml'}"
    if not str(raw.get("run", {}).get("init_from")).startswith("hub:"):  # another run, that may not be here
        raw.setdefault("run", {})["init_from"] = None
    valid = validate(RunConfig, raw)
    assert validate(RunConfig, copy.deepcopy(as_plain(valid))) == valid


def test_the_saved_config_reads_as_the_same_run(tmp_path):
    valid = config("watch.wandb=off", "run.name='1e5'", "optimizer.clip=null", "model.norm_eps=1e-6", "run.folder=no")
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(as_plain(valid), sort_keys=False))
    assert validate(RunConfig, read(path)) == valid
    assert valid.watch.wandb == "off" and valid.run.name == "1e5" and valid.run.folder == "no"


def test_steps_and_rows_of_a_phase():
    phase = config("phases.0.tokens=20481", "phases.0.batch_tokens=4096").phases[0]
    assert (phase.batch_rows, phase.steps) == (16, 5)
    assert config("phases.0.tokens=8192").phases[0].steps == 1
    model = config().model.config(vocab_size=2048, context=config().longest_context)
    assert (model.vocab_size, model.context) == (2048, 2048)
    assert config("model.vocab_size=3000", "model.context=4096").model.config(2048, 2048).context == 4096


def test_a_misspelt_key_is_told_the_name_it_resembles():
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, read("config.yaml", ["model.n_layer=2", "phases.1.contxt=64", "optimzer.clip=1",
                                                 "data.sources.stories.form=x", "run.colour=red"]))  # fmt: skip
    told = {problem.key: problem.remedy for problem in error.value.problems}
    assert told["model.n_layer"].endswith("did you mean n_layers?")
    assert told["phases.1.contxt"].endswith("did you mean context?")
    assert told["optimzer"].endswith("did you mean optimizer?")
    assert told["data.sources.stories.form"].endswith("did you mean from?")
    assert told["run.colour"].endswith("correct its name or remove it")
