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
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from torch import nn

STATES = ("keyCache", "valueCache")
INPUT, OUTPUT = "inputIds", "logits"
LEAST_QUANTIZED = 2048  # elements of a weight: below, a scale a row costs more than it saves


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


def quantize(package: "MLModel") -> "MLModel":
    """The same program with the weights of products and of the embedding in int8, symmetric, a scale a row."""
    with _quietly():
        from coremltools.optimize import coreml as optimize

        config = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=LEAST_QUANTIZED
        )
        weights = optimize.get_weights_metadata(package, weight_threshold=LEAST_QUANTIZED)
        kept = {name: None for name, about in weights.items() if not _is_quantized(name, about)}
        return optimize.linear_quantize_weights(package, optimize.OptimizationConfig(config, op_name_configs=kept))


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
