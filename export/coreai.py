"""A model as a Core AI asset (.aimodel, iOS 27 and macOS 27), in the bundle that Apple's CoreAILanguageModel takes.

    metadata.json        version 0.2: tokenizer, vocabulary, context, which states are key/value caches
    tokenizer/           as at the folder's top
    NAME.aimodel         main: input_ids [1, q], position_ids [1, P] int32, P the tokens there are with these; states
                         keyCache and valueCache [L, 1, K, S, D], S as long as the caller likes -> logits [1, q, V]

Apple's runtime for Linux executes the asset before the folder is there. The contract is that of apple/coreai-models at
86b363d. coreai-torch is a beta and no part of requirements.txt: imported when used.
"""

import asyncio
import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import ExportFault, MissingPackage, Options
from export.bundle import golden_ids
from export.check import chunk_lengths, logits_of, split
from export.parity import Bounds
from export.traced import STATES
from export.trained import Trained

if TYPE_CHECKING:
    import numpy as np
    from coreai.authoring import AIProgram
    from torch import nn

OPTIONS = {"dtype": ("float32", "float16")}
# Beyond, an iOS 27 beta gave corrupt text (apple/coreai-models #124, open in November 2026); --context goes further
DEFAULT_CONTEXT = 1024
SHORTEST_CACHE = 32  # entries; the caller's caches grow from there
HALF = Bounds(mean_kl=1e-3, top1_clear=0.99)  # the runtime's sums are in fp16 too
NOT_VERIFIED = (
    "what an iPhone's or a Mac's GPU computes, and how fast",
    "that Core AI specialises the asset on a device",
    "the token ids of Swift's own tokenizer",
)


def problems(trained: Trained, options: Options) -> list[str]:
    """What is impossible about it: a context too short for the caches.

    Raises:
        MissingPackage: coreai-torch is not there.
    """
    if find_spec("coreai_torch") is None:
        raise MissingPackage("the package coreai-torch is not installed: pip install coreai-torch (Linux or macOS, "
                             "Python 3.11 or later; a beta, 63 MB)")  # fmt: skip
    context = trained.config.context
    if context <= SHORTEST_CACHE:
        return [f"--to coreai: a context of {context} is too short: its caches begin with {SHORTEST_CACHE} entries"]
    return []


def room(trained: Trained, options: Options) -> int:
    """Bytes on the disk: the weights, and once more while the asset is written."""
    return int(2.2 * (4 if options.dtype == "float32" else 2) * trained.config.parameters()["total"]) + 50_000_000


def write(trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """The asset and the bundle around it into `folder`; returns the report.

    Raises:
        ExportFault: Apple's runtime computes something else than the checkpoint.
    """
    import torch

    dtype = torch.float32 if options.dtype == "float32" else torch.float16
    name = trained.name
    model = _in(trained.model, dtype)
    asset = folder / f"{name}.aimodel"
    convert(model, trained.never).save_asset(asset)
    (folder / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, folder / "tokenizer")
    about = _metadata(trained, name)
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return {
        "contract": {
            "inputs": {"input_ids": "int32 [1, q]", "position_ids": "int32 [1, P], P tokens with these"},
            "states": {state: [trained.config.n_layers, 1, trained.config.n_kv_heads, "S", trained.config.d_head]
                       for state in STATES},
            "outputs": {"logits": [1, "q", trained.config.vocab_size]},
            "least": "iOS 27, macOS 27",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "parity": check(asset, trained, model),
        "coreai_torch": metadata.version("coreai-torch"),
        "not_verified": list(NOT_VERIFIED),
    }  # fmt: skip


def convert(model: "nn.Module", never: Sequence[int] = ()) -> "AIProgram":
    """The program of `model`, whose floating-point type it computes in, norms in fp32."""
    import torch

    from export.traced import CacheLayout, IndexedDecoder

    layout, dtype = CacheLayout.of(model.config), model.embedding.weight.dtype
    context, dim = layout.context, torch.export.Dim
    cache = torch.zeros(len(layout.windows), 1, layout.heads, SHORTEST_CACHE, layout.width, dtype=dtype)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int32),
              "position_ids": torch.arange(10, dtype=torch.int32)[None],
              "key_cache": cache, "value_cache": cache.clone()}  # fmt: skip
    long = dim("cache_length", min=SHORTEST_CACHE, max=context)
    shapes = {"input_ids": {1: dim("new", max=context - 2)}, "position_ids": {1: dim("all", min=2, max=context - 1)},
              "key_cache": {3: long}, "value_cache": {3: long}}  # fmt: skip
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        import coreai_torch

        form = IndexedDecoder(model, never).eval().requires_grad_(False)
        program = torch.export.export(form, (), kwargs=inputs, dynamic_shapes=shapes)
        program = program.run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        converter.add_exported_program(program, input_names=["input_ids", "position_ids"], state_names=list(STATES),
                                       output_names=["logits"], entrypoint_name="main")  # fmt: skip
        return converter.to_coreai()


def check(asset: Path, trained: Trained, model: "nn.Module") -> dict[str, Any]:
    """How far what Apple's runtime computes here is from the checkpoint, in chunks shorter and longer than a window.

    Raises:
        ExportFault: further than the order of additions, or rounding to fp16, explains.
    """
    import torch

    from export.parity import GRAPH, compare

    lengths = [length for length in chunk_lengths(trained) if length <= trained.config.context - 2]
    while sum(lengths) > trained.config.context - 1:
        lengths.pop()
    ids, drawn = golden_ids(trained, sum(lengths)), trained.drawn
    found = asyncio.run(_run(asset, model, ids, lengths))[:, drawn]
    exact = model.embedding.weight.dtype == torch.float32
    parity = compare(logits_of(model.float(), ids)[:, drawn], found)
    if wrong := parity.problems(GRAPH if exact else HALF):
        raise ExportFault("Apple's runtime computes something else than the checkpoint: " + "; ".join(wrong))
    whole = compare(logits_of(trained.model, ids)[:, drawn], found)
    return {
        "positions": len(ids),
        "chunks": lengths,
        "runtime": dataclasses.asdict(parity),
        "against_checkpoint": dataclasses.asdict(whole),
        "coreai_core": metadata.version("coreai-core"),
    }


async def _run(asset: Path, model: "nn.Module", ids: Sequence[int], lengths: Sequence[int]) -> "np.ndarray":
    """Logits [T, V] in fp32 of what the runtime makes of `ids`, in chunks, with caches that fit them."""
    import numpy as np
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray

    from export.traced import CacheLayout

    layout, kind = CacheLayout.of(model.config), np.dtype(str(model.embedding.weight.dtype).removeprefix("torch."))
    shape = (len(layout.windows), 1, layout.heads, max(SHORTEST_CACHE, len(ids)), layout.width)
    state, logits, done = {name: NDArray(np.zeros(shape, kind)) for name in STATES}, [], 0
    async with AIModelAsset.load(asset).executable() as executable:
        main = executable.load_function("main")
        for part in split(ids, lengths):
            done += len(part)
            inputs = {"input_ids": NDArray(np.array([part], np.int32)),
                      "position_ids": NDArray(np.arange(done, dtype=np.int32)[None])}  # fmt: skip
            logits.append((await main(inputs, state=state))["logits"].numpy()[0].astype(np.float32))
    return np.concatenate(logits)


def _in(model: "nn.Module", dtype: Any) -> "nn.Module":
    """A copy of `model` with its matrices in `dtype`; norms and rotary tables stay fp32."""
    held = copy.deepcopy(model)
    for parameter in held.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    return held


def _metadata(trained: Trained, name: str) -> dict[str, Any]:
    return {
        "metadata_version": "0.2",
        "kind": "llm",
        "name": name,
        "assets": {"main": f"{name}.aimodel"},
        "language": {
            "tokenizer": "tokenizer",
            "vocab_size": trained.config.vocab_size,
            "max_context_length": trained.config.context,
            "embedded_tokenizer": True,
            "function_map": {"main": ["main"]},
            "states": dict.fromkeys(STATES, "kv_cache"),
        },
        "source": {"model_definition": "torch"},
        "compression": None,
    }


def tell(report: dict[str, Any], out: Path) -> None:
    """Print how near it is, and what nobody has looked at."""
    of = report["parity"]["against_checkpoint"]
    print(f"{out}: Apple's runtime here against the checkpoint: max abs {of['max_abs']:.2e} of a range of "
          f"{of['range']:.1f}, mean KL {of['mean_kl']:.1e}, top-1 {of['top1']:.3f}")  # fmt: skip
    print(f"Not checked here: {'; '.join(report['not_verified'])}.")
