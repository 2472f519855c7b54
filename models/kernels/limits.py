"""How much at once: what kernels keep together in memory, and how many compilations of a function are allowed.

Does not import torch by itself, for plans are made from it.
"""

# Logits that exist together in the loss, elements: what stays near a CPU's cores; what keeps a GPU busy
LOGITS_AT_ONCE = {"cpu": 6 * 2**20, "cuda": 2**26}
COMPILATIONS = 64  # of one function: shapes, windows, and with or without gradients


def allow_many() -> None:
    """Raise dynamo's limit of 8, beyond which it gives up, and flex attention makes dense scores."""
    import torch._dynamo

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), COMPILATIONS))
