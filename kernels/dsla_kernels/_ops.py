"""Names of the registered operators. A build for the Hugging Face kernel hub puts its own module of this name in this place,
with names that no other build has."""

import torch

ops = torch.ops.dsla_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    return f"dsla_kernels::{op_name}"
