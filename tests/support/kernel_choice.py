"""The same with PyTorch and with the kernels."""

from dsla_kernels import dispatch


def both(monkeypatch, run):
    """Results of `run` with PyTorch and with the kernels."""
    results = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        results.append(run())
    return results
