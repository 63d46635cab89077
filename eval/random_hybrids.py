"""Hybrids with random weights whose texts show whether states are right."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def let_states_speak(hybrid: Any) -> None:
    """Random weights for what is DSLA's own, in place: states that say much, and differently at each token."""
    for name, x in hybrid.named_parameters():
        if ".dsla." not in name:
            continue
        if "state_bias" in name:
            x.fill_(2.0)
        elif "state_gain" in name:
            x.fill_(0.5)
        elif "norm_weight" in name:
            x.uniform_(0.5, 2.0)
        elif "gate_bias" in name:
            x.add_(torch.randn_like(x) * 0.3)
        else:
            x.normal_(0, 0.5)
