"""Hybrids as quantisers leave them: weights of the layers' linear projections in 8 or 4 bits, in compressed-tensors' format."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

GROUP = 32  # input channels that share a scale, in 4 bits
SYMMETRIC = {"type": "int", "symmetric": True, "dynamic": False}
SCHEMES = {
    "int8": {
        "weights": {**SYMMETRIC, "num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        "format": "int-quantized",
    },
    "int4": {
        "weights": {**SYMMETRIC, "num_bits": 4, "strategy": "group", "group_size": GROUP},
        "input_activations": None,
        "format": "pack-quantized",
    },
}


def write_quantised(source, scheme, folder):
    """The hybrid in folder `source` in one of SCHEMES, and the same with the weights that this stands for in full precision: folders
    `folder / "small"` and `folder / "whole"`."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    small, whole = {}, {}
    for name, x in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            small[name] = whole[name] = x
            continue
        grouped = x[:, None] if scheme == "int8" else x.unflatten(1, (-1, GROUP))
        most = 127 if scheme == "int8" else 7
        scale = (grouped.abs().amax(-1) / most).bfloat16()
        numbers = (grouped / scale.float()[..., None]).round().clamp(-most, most)
        whole[name] = (numbers * scale.float()[..., None]).view_as(x)
        numbers, stem = numbers.view_as(x).to(torch.int8), name.removesuffix("weight")
        small[f"{stem}weight_scale"] = scale
        if scheme == "int8":
            small[name] = numbers
        else:
            small |= {f"{stem}weight_packed": pack_to_int32(numbers, 4), f"{stem}weight_shape": torch.tensor(x.shape)}
    for kind, weights in (("small", small), ("whole", whole)):
        shutil.copytree(source, folder / kind)
        save_file(weights, folder / kind / "model.safetensors", {"format": "pt"})
    path = folder / "small" / "config.json"
    group = {"targets": ["Linear"], **SCHEMES[scheme]}
    stored = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": {"group_0": group}}
    stored |= {"format": SCHEMES[scheme]["format"], "ignore": ["lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
