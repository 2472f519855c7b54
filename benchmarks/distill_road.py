"""The whole road from a teacher to a student that reasons: python -m benchmarks.distill_road --json FILE

The default run's model, taught the chat template on problems of its own, is the teacher; a student of 0.3 M parameters
has read stories alone. Every command is the one that a user types: distill.generate, distill.filter, multigpu_train.py
and evaluation.gsm8k. Arms, at equal trained tokens, for each seed: before; plain, as many tokens of stories more; gold,
the corpus's own solutions; traces, the teacher's. All are asked 400 held-out word problems of the embedded corpus.
(Their wording is that of the training problems with other numbers, so decontamination, which would know them for the
same, has no place here; no chain of numbers is on both sides.) Exit code 1: for some seed, traces are not 30 points
above before, or McNemar's p is not below 0.01.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import result

PROBLEMS, HELD_OUT, TAUGHT = 3000, 400, 2000  # for the student, for the exam, for the teacher to learn the template
SAMPLES = 2
SEEDS = (1, 2, 3)
TRAINED_TOKENS = 400_000  # of each arm
GAIN, P = 0.30, 0.01
CONTEXT, BATCH = 256, 2048
STUDENT = {"n_layers": 4, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 192, "window": None,
           "global_every": None, "embedding_scale": 10.7, "copy_init": 2.0}  # fmt: skip
QUIET = ["parallel.cpu_threads=1", "parallel.device=cpu", "watch.wandb=off", "watch.sample_tokens=8",
         "evaluation.every_steps=null", "evaluation.final_tokens=10000", "evaluation.bigram_floor=false"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Road:
    """The folders of one walk along it."""

    folder: Path
    teacher: str  # a run
    tokenizer: Path

    def write_problems(self, name: str, first: int, count: int, split: str) -> str:
        """So many problems with different chains as rows of questions and answers; returns the source."""
        from data import embedded

        rows: dict[Any, dict[str, str]] = {}
        index = first
        while len(rows) < count:
            task = embedded.problem(index, split, 1234)
            rows.setdefault(task.chain, {"question": task.question, "answer": task.solution})
            index += 1
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        return f"jsonl:{path}"

    def train(self, name: str, sources: dict[str, Any], data: dict[str, float], tokens: int, *overrides: str) -> str:
        """One phase of a run of the student's shape; returns the run's folder."""
        config = {
            "run": {"name": name, "folder": str(self.folder / "runs")},
            "model": STUDENT | {"context": 512},
            "tokenizer": {"path": str(self.tokenizer)},
            "data": {"shards": str(self.folder / "shards"), "sources": sources, "workers": 1},
            "optimizer": {"muon_lr": 0.02, "adamw_lr": 0.01},
            "phases": [{"name": name, "context": CONTEXT, "data": data, "tokens": tokens, "batch_tokens": BATCH,
                        "micro_batch": 8, "learning_rate": {"shape": "wsd", "warmup": 0.05, "decay": 0.35}}],
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        run("accelerate.commands.launch", "--num_processes", "1", "multigpu_train.py", "--config", str(path), *QUIET,
            *overrides)  # fmt: skip
        return str(self.folder / "runs" / name)

    def teach_the_template(self, problems: str) -> str:
        """The teacher, after a short phase of questions and answers in its tokenizer's chat template."""
        run("accelerate.commands.launch", "--num_processes", "1", "multigpu_train.py", *QUIET, "run.name=teacher",
            f"run.folder={self.folder / 'runs'}", f"run.init_from={self.teacher}", f"data.shards={self.folder}/shards",
            f'data.sources={{problems: {{from: "{problems}", conversations: true}}}}', "model.context=2048",
            f"phases=[{{name: template, context: 512, data: {{problems: 1}}, tokens: 204800, batch_tokens: {BATCH}, "
            "micro_batch: 4, learning_rate: {shape: cosine, peak: 0.3}}]")  # fmt: skip
        return str(self.folder / "runs" / "teacher")

    def traces(self, teacher: str, problems: str) -> tuple[str, dict[str, Any]]:
        """The teacher's kept solutions as a source, and what the filter counted."""
        config = {
            "job": {"name": "road", "folder": str(self.folder / "traces"), "samples": SAMPLES, "chunk": 100},
            "problems": {"from": problems},
            "sampling": {"max_new_tokens": 128, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            "teacher": {"model": teacher, "device": "cpu", "context": 512},
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(config))
        run("accelerate.commands.launch", "--multi_gpu", "--num_processes", str(os.cpu_count()), "--module",
            "distill.generate", "--config", str(path), ACCELERATE_USE_CPU="true")  # fmt: skip
        (folder,) = (self.folder / "traces").glob("road-*")
        run("distill.filter", str(folder), "--out", "road", "--folder", str(self.folder / "datasets"))
        (made,) = (self.folder / "datasets").glob("road-*/")
        return f"parquet:{made}/data/*.parquet", json.loads((made / "filter.json").read_text())

    def positions(self, name: str, source: dict[str, Any]) -> int:
        """Positions of a phase on one source, of which `TRAINED_TOKENS` are trained."""
        from data.loader import PackedRows
        from data.prepare import Config, prepare
        from data.token_shards import TokenShards
        from settings import validate

        sections = {"shards": str(self.folder / "shards"), "sources": {name: source}, "workers": 1}
        config = validate(Config, {"data": sections, "tokenizer": {"path": str(self.tokenizer)}})
        shards = TokenShards(prepare(config.data, config.tokenizer).sources[name], "train")
        rows = TRAINED_TOKENS * len(PackedRows(shards, CONTEXT)) / shards.trained_tokens
        return max(1, round(rows * CONTEXT / BATCH)) * BATCH

    def examine(self, checkpoint: str, baseline: str, test: str, examples: str) -> dict[str, Any]:
        """What evaluation.gsm8k finds by the strict rule: after, before at its better, and McNemar's p."""
        file = Path(checkpoint) / "exam.json"
        run("evaluation.gsm8k", "--checkpoint", checkpoint, "--baseline", baseline, "--data", test, "--split", "test",
            "--examples", examples, "--max-new-tokens", "128", "--batch", "100", "--json", str(file))  # fmt: skip
        return json.loads(file.read_text())


def main() -> int:
    """Walk the road once with the teacher, then once for each seed with a student; print, write, compare."""
    parser = result.parser(__doc__)
    parser.add_argument("--teacher", default="runs/default", help="a finished default run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    arguments = parser.parse_args()
    from checkpoints import locate, tokenizer_of

    with tempfile.TemporaryDirectory() as folder:
        road = Road(Path(folder), arguments.teacher, tokenizer_of(locate(arguments.teacher)).resolve())
        began = time.monotonic()
        train = road.write_problems("train", 0, PROBLEMS, "train")
        test = road.write_problems("test", 0, HELD_OUT, "valid")
        teacher = road.teach_the_template(road.write_problems("taught", 1_000_000, TAUGHT, "train"))
        traces, counted = road.traces(teacher, train)
        made_traces = time.monotonic() - began
        sources = {"stories": {"from": "embedded:stories", "documents": 5000},
                   "gold": {"from": train, "conversations": True},
                   "traces": {"from": traces, "conversations": True}}  # fmt: skip
        arms = {name: road.positions(name, source) for name, source in sources.items()}  # and their shards, once

        def walk(seed: int) -> list[dict[str, Any]]:
            return _walk(road, seed, sources, arms, train, test)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            rows = [row for found in pool.map(walk, arguments.seeds) for row in found]
    print(result.table(rows))
    claims = {str(row["seed"]): row["gain"] >= GAIN and row["mcnemar_p"] < P for row in rows if row["arm"] == "traces"}
    result.write("distill_road", rows, arguments.json, held=claims, filter=counted, trace_seconds=made_traces,
                 seconds=time.monotonic() - began)  # fmt: skip
    return 0 if claims and all(claims.values()) else 1


def _walk(
    road: Road, seed: int, sources: dict[str, Any], arms: dict[str, int], train: str, test: str
) -> list[dict[str, Any]]:
    """One student: pre-trained on stories, then each arm from there; a row an arm."""
    stories = {"stories": sources["stories"]}
    before = road.train(f"before-{seed}", stories, {"stories": 1.0}, 409_600, f"run.seed={seed}")
    rows = []
    for arm, positions in arms.items():
        name = "plain" if arm == "stories" else arm
        after = road.train(f"{name}-{seed}", {arm: sources[arm]}, {arm: 1.0}, positions, f"run.init_from={before}",
                           f"run.seed={seed}")  # fmt: skip
        found = road.examine(after, before, test, train)
        rows.append({"seed": seed, "arm": name, **_figures(found), "trained_tokens": _trained_tokens(after)})
    return rows


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by the strict rule, its interval, and the comparison with the state before."""
    after = found["greedy"][found["asked"]]["scores"]["strict"]
    pair = found["baseline"]["compared"]["strict"]
    before = found["baseline"]["greedy"][pair["state"]]["scores"]["strict"]
    return {
        "accuracy": after["accuracy"], "low": after["low"], "high": after["high"], "before": before["accuracy"],
        "gain": after["accuracy"] - before["accuracy"], "mcnemar_p": pair["p"],
    }  # fmt: skip


def _trained_tokens(checkpoint: str) -> int:
    from checkpoints import checkpoint as stored
    from checkpoints import locate

    return stored.read_state(locate(checkpoint)).tokens


def run(module: str, *words: str, **environment: str) -> None:
    """`python -m module ...`, or an error with its last words."""
    finished = subprocess.run([sys.executable, "-m", module, *words], cwd=result.ROOT, text=True, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip
    if finished.returncode:
        raise RuntimeError(f"{module} {' '.join(words)} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
