"""Prompts that count as read: vLLM's connector for measuring decoding fills the cache with noise, here for the requests that ask for it."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

FILLED = {"kv_transfer_params": {"filled": True}}  # a request's extra arguments
# Of `LLM`; the values in the cache lie around 0 as widely as keys and values do.
SETTINGS = {
    "kv_connector": "FillConnector",
    "kv_connector_module_path": __name__,
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 0.5},
}


class FillConnector(DecodeBenchConnector):
    """Fills for requests with `FILLED`; others are read as they are."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not request.kv_transfer_params:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
