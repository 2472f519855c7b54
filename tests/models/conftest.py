"""What the model tests share: small models of every recipe, and a recorder of tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import models.kernels.attention  # noqa: F401  registers operators
from models import ModelConfig
from tests.small_models import PUBLISHED, build_awake, published, shrunk


class Recorder(TorchDispatchMode):
    """Notes the size of every tensor any operation makes, those inside backward passes and composite kernels too."""

    def __init__(self):
        super().__init__()
        self.elements: list[int] = []

    @property
    def largest(self) -> int:
        """Elements of the largest tensor made."""
        return max(self.elements)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements += [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tree_leaves(result)
                          if isinstance(leaf, torch.Tensor)]  # fmt: skip
        return result


@pytest.fixture(scope="session", params=PUBLISHED)
def recipe(request) -> ModelConfig:
    """A recipe at its real pattern, heads and context, with a small width and vocabulary."""
    return shrunk(published(request.param))


@pytest.fixture(scope="session")
def awake_recipe(recipe):
    """The recipe's model, in evaluation mode, with weights that make every key count. Not to be changed."""
    return build_awake(recipe)


@pytest.fixture
def awake():
    """build_awake itself, for other shapes."""
    return build_awake


@pytest.fixture
def recorder() -> Recorder:
    """A Recorder, to be used as a context manager."""
    return Recorder()


@pytest.fixture
def flop_counter() -> FlopCounterMode:
    """A FlopCounterMode, to be used as a context manager, that knows every product our CPU kernels are made of.

    Attention counts as two products forward and four backward; SDPA has to be kept to its MATH backend.
    """

    def attended(query, key, *_, **__) -> int:
        problems, heads, queries, width = query
        return 4 * problems * heads * queries * key[2] * width

    aten = torch.ops.aten
    ours = {
        aten.addmm_: lambda _self, a, b, **_: 2 * a[0] * a[1] * b[1],  # adds to its result in place
        aten._scaled_dot_product_flash_attention_for_cpu: attended,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _grad, *rest, **_: 2 * attended(*rest),
        # which sees documents of any length: here, rows of one
        torch.ops.slms.documents_apart: lambda query, key, *_, **__: attended(query, key),
        torch.ops.slms.documents_apart_backward: lambda _grad, *rest, **_: 2 * attended(*rest),
    }
    return FlopCounterMode(display=False, custom_mapping=ours)
