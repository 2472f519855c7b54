"""Does Core ML compute what the checkpoint does? On a Mac with macOS 15: pip install coremltools numpy, then
python check_on_mac.py. Every golden prompt goes through the package on the CPU, the GPU and wherever Core ML likes
best; the table is that of export_report.json. Exit code 1: something differs by more than rounding explains."""

import json
import sys
from pathlib import Path

import coremltools as ct
import numpy as np

HERE = Path(__file__).resolve().parent
golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
expected = np.load(HERE / "golden.npz")
UNITS = sys.argv[1:] or ["CPU_ONLY", "CPU_AND_GPU", "ALL"]


def log_softmax(x):
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


wrong = 0
print(f"{'units':12} {'prompt':12} {'max abs':>9} {'of range':>9} {'KL':>9}  top-1  greedy text")
for units in UNITS:
    model = ct.models.MLModel(str(HERE / "model.mlpackage"), compute_units=getattr(ct.ComputeUnit, units))
    for prompt in golden["prompts"]:
        state = model.make_state() if golden["stateful"] else None
        ids, written, first = prompt["ids"], [], None
        for step in range(1 + len(prompt["greedy"])):
            new = ids if step == 0 or not golden["stateful"] else ids[-1:]
            feed = {"inputIds": np.array([new], np.int32)}
            logits = (model.predict(feed, state) if state is not None else model.predict(feed))["logits"][0, -1]
            first = logits if first is None else first
            written.append(int(logits.argmax()))
            ids = ids + written[-1:]
        right = expected[prompt["name"]]
        drawn = right > -2e4  # the others are never drawn
        a, b = log_softmax(right[drawn]), log_softmax(first[drawn].astype(np.float32))
        off, kl = np.abs(first[drawn] - right[drawn]).max(), float((np.exp(a) * (a - b)).sum())
        top, same = int(first.argmax()) == int(right.argmax()), written[:-1] == prompt["greedy"]
        part = off / (right[drawn].max() - right[drawn].min())
        wrong += not (kl < 1e-3 and part < 0.02)
        print(f"{units:12} {prompt['name']:12} {off:9.4f} {part:9.5f} {kl:9.1e}  {top!s:5}  {same}")
sys.exit(1 if wrong else 0)
