"""Products with a few rows are what torch's own product is, whichever kernel makes them; the fastest one is chosen."""

import pytest
import torch
from torch import nn

from models.kernels import row_products
from models.kernels.row_products import FEW, PRODUCTS, RowLinear, choose


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (58, 33), (13, 7), (1, 5), (9, 1), (640, 256)])
@torch.no_grad()
def test_every_product_is_the_same(product, dtype, bias, rows, columns):
    torch.manual_seed(0)
    layer = RowLinear(columns, rows, bias=bias, dtype=dtype)
    layer.product = product
    for shape in ((1, 1), (FEW, 1), (1, FEW), (2, 2), (1, FEW + 1), (3, FEW)):
        x = torch.randn(*shape, columns, dtype=dtype)
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        found = layer(x)
        assert found.dtype == dtype and found.shape == expected.shape
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [((1.0, 0.5, 0.9), 1), ((1.0, 0.5, 0.2), 2), ((0.1, 0.5, 0.2), 0), ((1.0, 0.9, 2.0), 0)],
    ids=["the second", "the third", "torch's own", "torch's own, if another is hardly faster"],
)
def test_each_shape_gets_what_is_fastest_for_it(monkeypatch, seconds, chosen):
    model = nn.Sequential(RowLinear(8, 16), RowLinear(16, 8), RowLinear(8, 16), nn.Linear(8, 8))

    def measured(product, weight):
        return seconds[PRODUCTS.index(product)] if len(weight) == 16 else 1.0  # the other shape: all the same

    monkeypatch.setattr(row_products, "_seconds", measured)
    choose(model)
    assert [layer.product for layer in model[:3]] == [PRODUCTS[chosen], PRODUCTS[0], PRODUCTS[chosen]]


def test_without_other_products_it_is_a_plain_layer():
    plain, layer = nn.Linear(8, 16), RowLinear(8, 16)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1, 8)
    assert torch.equal(layer(x), plain(x))
