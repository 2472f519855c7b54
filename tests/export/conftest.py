"""What the export tests share: small models of every recipe."""

import pytest
import torch

from tests.small_models import PUBLISHED, build_awake, narrow, published


@pytest.fixture(scope="session", params=PUBLISHED)
def awake_recipe(request):
    """A recipe at its real depth, pattern, heads and context with a small width, and weights that make every key count.
    Not to be changed; in float64."""
    return build_awake(narrow(published(request.param))).double()


@pytest.fixture(autouse=True)
def without_gradients():
    """As whoever exports a model has it."""
    with torch.no_grad():
        yield
