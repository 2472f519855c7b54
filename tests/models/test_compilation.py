"""Compiled blocks: one compilation serves all layers of a kind, and what it computes is the same.

Only tracing is tested here, with torch's own stand-in for a compiler; kernels take minutes to make on a CPU.
"""

import torch
from torch._dynamo.testing import CompileCounter

from models import ModelConfig, build_model
from models.compilation import compile_blocks
from models.kernels.limits import COMPILATIONS

DEEP = ModelConfig(vocab_size=64, context=64, n_layers=12, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, window=8,
                   global_every=3, dropout=0.2)  # fmt: skip


def compilations(lengths: list[int]) -> int:
    """Of a training step with packed documents at each of these lengths; each must give what is not compiled gives."""
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, compiled = build_model(DEEP, seed=1).train(), build_model(DEEP, seed=1).train()
    compile_blocks(compiled, backend=counter)
    for length in lengths:
        ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
        documents, seeds = (torch.arange(length) // 5).expand(2, -1), torch.tensor([3, 4])
        found, expected = (model.hidden_states(ids, documents, seeds) for model in (compiled, plain))
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    return counter.frame_count


def test_layers_share_what_is_compiled():
    a_length = 2  # for layers with a window and without
    assert compilations([16]) == a_length
    assert compilations([16, 32, 64]) == 3 * a_length
    assert torch._dynamo.config.recompile_limit >= COMPILATIONS


def test_weights_keep_their_names():
    model = build_model(DEEP, seed=1)
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names
