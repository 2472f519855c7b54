"""A model as a Core ML program: a .mlpackage for iOS 18, macOS 15 and later.

    stateful, as swift-transformers loads it: inputIds [1, q] int32, any q up to the context; states keyCache and
    valueCache; logits [1, q, V] fp16. Position and masks are the program's own.
    stateless: inputIds [1, q] int32 -> logits [1, q, V] fp16, the whole text every time.

Products are in fp16, norms in fp32 (a square overflows fp16 above 256), positions in int32. Weights are fp16, or int8
with a scale a row; rotary tables, learned positions and norms stay as they are. coremltools is imported when used.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import MissingPackage, Options
from export.check import BLOCK, check
from export.traced import STATES
from export.trained import Trained

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from torch import nn

    from export.program import Program

INPUT, OUTPUT = "inputIds", "logits"
LEAST_QUANTIZED = 2048  # elements of a weight: below, a scale a row costs more than it saves
GROUP = 16  # rows that share a palette
PACKAGE = "model.mlpackage"
OPTIONS = {"io": ("swift", "stateless"), "quantize": ("none", "int8", "int4", "palette4"), "hub": None}
NOT_VERIFIED = (
    "that Core ML's compiler accepts the package",
    "the numbers that a GPU and a Neural Engine compute",
    "which operations run where, how fast, and in how much memory",
    "the token ids of Swift's own tokenizer",
)


def problems(trained: Trained, options: Options) -> list[str]:
    """What is impossible about it: nothing, where coremltools is there.

    Raises:
        MissingPackage: it is not.
    """
    try:
        metadata.version("coremltools")
    except metadata.PackageNotFoundError as error:
        raise MissingPackage("the package coremltools is not installed: pip install -r requirements.txt") from error
    if options.quantize == "palette4" and find_spec("sklearn") is None:
        raise MissingPackage("--quantize palette4 needs the package scikit-learn: pip install scikit-learn")
    return []


def room(trained: Trained, options: Options) -> int:
    """Bytes on the disk: the weights in fp16, once more while they are quantised, tables and logits beside them."""
    weights = 2 * trained.config.parameters()["total"]
    return int((1 if options.quantize in (None, "none") else 2) * 1.1 * weights) + 50_000_000


def write(trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """model.mlpackage, golden prompts, and what checks it on a Mac, into `folder`; returns the report.

    Raises:
        ExportFault: the package does not compute what the checkpoint does.
    """
    from export import bundle

    stateless, quantized = options.io == "stateless", options.quantize or "none"
    package = convert(trained.model, stateless=stateless, never=trained.never)
    if quantized != "none":
        package = quantize(package, quantized)
    described(package, trained, options)
    package.save(str(folder / PACKAGE))
    del package
    bundle.write_golden(trained, bundle.golden(trained), folder, stateful=not stateless)
    here = Path(__file__).parent / "on_a_mac"
    shutil.copy(here / "check_on_mac.py", folder)
    (folder / ".github" / "workflows").mkdir(parents=True)
    shutil.copy(here / "check-on-mac.yml", folder / ".github" / "workflows")
    weights = next((folder / PACKAGE).rglob("weight.bin")).stat().st_size
    return {
        "contract": contract(trained, stateless),
        "quantize": quantized,
        "weight_bytes": weights,
        "parity": check(folder / PACKAGE, trained, None if quantized == "none" else quantized),
        "coremltools": metadata.version("coremltools"),
        "not_verified": list(NOT_VERIFIED),
    }


def contract(trained: Trained, stateless: bool) -> dict[str, Any]:
    """What a client has to feed, and gets."""
    from export.traced import CacheLayout

    config = trained.config
    shape = list(CacheLayout.of(config).shape)
    states = {} if stateless else {name: {"dtype": "float16", "shape": shape} for name in STATES}
    return {
        "io": "stateless" if stateless else "swift",
        "inputs": {INPUT: {"dtype": "int32", "shape": [1, [1, config.context]]}},
        "states": states,
        "outputs": {OUTPUT: {"dtype": "float16", "shape": [1, "T", config.vocab_size]}},
        "least": "iOS 18, macOS 15",
        "logits_of_512_tokens_bytes": 512 * 2 * config.vocab_size,
        "past_the_context": "tokens stand at the last position and are not remembered",
    }


def swift_problems(program: "Program") -> list[str]:
    """What swift-transformers' LanguageModel would not take, or would feed in another way than the package needs: read
    in its source (Sources/Models/LanguageModel.swift, June 2026). None where its states path loads it."""
    found = [f"input {name} is never fed" for name in program.inputs if name != INPUT]
    taken = program.inputs.get(INPUT)
    if taken is None or taken.dtype != "int32" or len(taken.shape) != 2:
        found.append(f"{INPUT} is {taken}, int32[1, T] is fed")
    bounds = program.ranges[INPUT].bounds if INPUT in program.ranges else ()
    if len(bounds) != 2 or bounds[1][1] is None or bounds[1][1] - bounds[1][0] <= 1:
        found.append(f"{INPUT} has no range of lengths, so the app ends with a fatal error")
    found += [f"there is no state {name}" for name in STATES if name not in program.states]
    found += [f"state {name} is one too many" for name in program.states if name not in STATES]
    logits = program.types().get(OUTPUT)
    if OUTPUT not in program.outputs or logits is None or len(logits.shape) != 3:
        found.append(f"{OUTPUT} is {logits}, [1, T, V] is read")
    return found


def described(package: "MLModel", trained: Trained, options: Options) -> None:
    """Write into the package what it is, and where clients find its tokenizer."""
    package.short_description = f"{trained.name}: {trained.config.parameters()['total']:,} parameters"
    about = {"context": str(trained.config.context), "quantize": options.quantize or "none"}
    if options.hub:
        about["co.huggingface.exporters.name"] = options.hub
    for key, value in about.items():
        package.user_defined_metadata[key] = value


def tell(report: dict[str, Any], out: Path) -> None:
    """Print what was made, how near it is, and what nobody has looked at."""
    parity = report["parity"]
    print(f"{out}: {report['weight_bytes'] / 1e6:,.2f} MB of weights, {parity['operations']} kinds of operations")
    for name, title in (("graph", "graph in fp32"), ("fp16", "in fp16, sums in fp32"),
                        ("fp16_accumulate", "in fp16, sums too"), ("against_checkpoint", "against the checkpoint")):
        of = parity[name]
        print(f"{title:24} max abs {of['max_abs']:.2e} of a range of {of['range']:.1f}, mean KL {of['mean_kl']:.1e}, "
              f"top-1 {of['top1']:.3f}")  # fmt: skip
    for problem in parity["rounding_out_of_bounds"]:
        print(f"rounding to fp16 changes more than usual: {problem}")
    print(f"Not checked here: {'; '.join(report['not_verified'])}. Run {out}/check_on_mac.py on any Mac, or push the "
          "folder to a public repository: its workflow runs there.")  # fmt: skip


def convert(model: "nn.Module", *, stateless: bool = False, never: Sequence[int] = ()) -> "MLModel":
    """The program of `model`, on any machine; only a Mac can run it through Core ML.

    Args:
        model: as `load_model` gives it, in fp32 on the CPU; `for_decoding` has classes that do not convert.
        stateless: without states.
        never: tokens that are never drawn: their logits are lowered by 30,000.
    """
    import numpy as np
    import torch

    from export.traced import Decoder, Stateless

    form = Stateless(model, never) if stateless else Decoder(model, never, torch.float16)
    example = torch.zeros(1, 2, dtype=torch.int32)
    with _quietly(), torch.no_grad():
        import coremltools as ct

        traced = torch.jit.trace(form.eval(), example, check_trace=False)
        length = ct.RangeDim(1, model.config.context, default=1)
        shape = None if stateless else form.layout.shape
        return ct.convert(
            traced,
            inputs=[ct.TensorType(name=INPUT, shape=(1, length), dtype=np.int32)],
            outputs=[ct.TensorType(name=OUTPUT, dtype=np.float16)],
            states=[] if stateless else [ct.StateType(ct.TensorType(shape=shape, dtype=np.float16), name=name)
                                         for name in STATES],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=_may_be_fp16),
            pass_pipeline=_pipeline(ct),
            skip_model_load=True,
        )  # fmt: skip


def quantize(package: "MLModel", kind: str) -> "MLModel":
    """The same program with the weights of products and of the embedding in fewer bits: `kind` is one of

    int8: symmetric, a scale a row.
    int4: symmetric, a scale for 32 weights of a row, or a row whose width 32 does not divide. For GPUs; Neural Engines
        compute it wrong (apple/coreai-models #279), and have palettes instead.
    palette4: each weight one of 16 numbers, found by k-means for 16 rows at a time, or for a matrix whose rows 16 does
        not divide. Needs scikit-learn.
    """
    with _quietly():
        from coremltools.optimize import coreml as optimize

        def config(shape: tuple[int, ...]) -> object:
            least = {"weight_threshold": LEAST_QUANTIZED}
            if kind == "palette4":
                whole = shape[0] % GROUP > 0
                grain = {"granularity": "per_tensor"} if whole else {
                    "granularity": "per_grouped_channel", "group_size": GROUP}  # fmt: skip
                return optimize.OpPalettizerConfig(mode="kmeans", nbits=4, **grain, **least)
            in_blocks = kind == "int4" and shape[-1] % BLOCK == 0
            grain = {"granularity": "per_block", "block_size": BLOCK} if in_blocks else {"granularity": "per_channel"}
            return optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=kind, **grain, **least)

        weights = optimize.get_weights_metadata(package, weight_threshold=LEAST_QUANTIZED)
        each = {name: config(about.val.shape) if _is_quantized(name, about) else None
                for name, about in weights.items()}  # fmt: skip
        shrink = optimize.palettize_weights if kind == "palette4" else optimize.linear_quantize_weights
        return shrink(package, optimize.OptimizationConfig(op_name_configs=each))


def _is_quantized(name: str, about: object) -> bool:
    """Of a constant: matrices of products, and the embedding; not the tables that positions are looked up in."""
    kinds = {child.op_type for child in about.child_ops}
    return "linear" in kinds or (kinds == {"gather"} and "model_embedding_" in name)


def _may_be_fp16(operation: object) -> bool:
    """All but the norms: the mean of squares overflows fp16, and what it is divided by decides every number after."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    modules = operation.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME) or [""]
    return not any(module.endswith("norm") for module in modules)


def _pipeline(ct: object) -> object:
    """coremltools' own passes, and one of ours before them."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if "slms::whole_updates" not in PASS_REGISTRY.passes:

        @register_pass(namespace="slms")
        class whole_updates(AbstractGraphPass):
            """`buffer[:] = value` arrives as slice_update over everything: it is the value itself."""

            def apply(self, prog: object) -> None:
                for function in prog.functions.values():
                    for update in function.find_ops(op_type="slice_update"):
                        if update.update.shape == update.x.shape:
                            function.replace_uses_of_var_after_op(
                                anchor_op=update, old_var=update.outputs[0], new_var=update.update
                            )
                            function.remove_ops([update])

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.insert_pass(0, "slms::whole_updates")
    return pipeline


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """coremltools warns of untested versions, of libraries that only a Mac has, and draws progress bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
