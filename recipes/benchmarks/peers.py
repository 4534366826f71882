"""Published post-training methods, run from their own packages, as plain Hugging Face folders to measure.

    build/peers/bin/python recipes/benchmarks/peers.py gptq MODEL --bits 2 --calibration rows.json --out FOLDER

Runs in an environment of its own (`make peers`), because the packages want other versions than ours, and knows nothing
of edgerazor. FOLDER receives the model with every linear layer of the decoder as the package decodes it, in float32;
embedding and norms are the original's. `peer.json` beside it says what the package's own storage of these layers
takes and how long it took. Linear layers are symmetric where the package offers the choice, all in one group size.

* ``gptq``       GPTQModel: GPTQ (arXiv 2210.17323), its defaults otherwise.
* ``auto-round`` Intel's AutoRound: SignRound (arXiv 2309.05516), 200 iterations as by default.
* ``hqq``        HQQ: half-quadratic quantization, needs no calibration; asymmetric by construction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Rows = list[list[int]]
#: Decoded weights float32 [out, in] by module path, and bytes of the package's storage.
Decoded = tuple[dict[str, Tensor], int]
#: What each package's documentation recommends.
OWN_GROUP_SIZE = {"gptq": 128, "auto-round": 128, "hqq": 64}
PACKAGES = {"gptq": "gptqmodel", "auto-round": "auto-round", "hqq": "hqq"}
AUTO_ROUND_ITERATIONS = 200


def gptq(model: Path, bits: int, group_size: int, rows: Rows) -> Decoded:
    """GPTQ's columns in order, each rounding error spread over the columns to come."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it would start one and then ask for two
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        quantizer = GPTQModel.load(str(model), QuantizeConfig(bits=bits, group_size=group_size, device="cpu"))
        quantizer.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
        quantizer.save(folder)
        loaded = GPTQModel.load(folder, device="cpu", backend="torch", dtype=torch.float16).model
        weights = {
            name: module.dequantize_weight().T.float()
            for name, module in loaded.named_modules()
            if hasattr(module, "dequantize_weight")
        }
        stored = 0
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names = [key for key in tensors.keys() if key.rpartition(".")[0] in weights]  # noqa: SIM118
                stored += sum(nbytes(tensors.get_tensor(name)) for name in names)
    return weights, stored


def auto_round(model: Path, bits: int, group_size: int, rows: Rows) -> Decoded:
    """Rounding decisions and clipping trained by signed gradients, block by block."""
    from auto_round import AutoRound

    quantizer = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
        scheme={"bits": bits, "group_size": group_size, "sym": True, "data_type": "int", "act_bits": 16},
        dataset=[torch.tensor([row]) for row in rows],
        iters=AUTO_ROUND_ITERATIONS,
        seqlen=len(rows[0]),
        nsamples=len(rows),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = quantizer.quantize()
    weights, stored = {}, 0
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear) and isinstance(getattr(module, "scale", None), Tensor):
            # the package leaves scale * integer in 16 bits; the integers are those that it would pack
            weight, scale = module.weight.detach().float(), module.scale.detach().float()
            wide = scale.reshape(len(weight), -1).repeat_interleave(group_size, 1)[:, : weight.shape[1]]  # [out, in]
            codes = (weight / wide).round().nan_to_num()
            if codes.amin() < -(2 ** (bits - 1)) or codes.amax() > 2 ** (bits - 1) - 1:
                sys.exit(f"{name} holds numbers that {bits} bits cannot be.")
            weights[name] = codes * wide
            stored += weight.numel() * bits // 8 + scale.numel() * 2 + scale.numel() * bits // 8  # its packing
    return weights, stored


def hqq(model: Path, bits: int, group_size: int, rows: Rows) -> Decoded:
    """Zero points found by half-quadratic splitting of an l_p norm of the weights' error; no text is used."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    weights, stored = {}, 0
    for name, module in original.named_modules():
        if isinstance(module, nn.Linear) and module is not original.get_output_embeddings():
            layer = HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
            weights[name] = layer.dequantize().detach().float()
            stored += nbytes(layer.W_q) + 2 * (layer.meta["scale"].numel() + layer.meta["zero"].numel())  # float16
    return weights, stored


PEERS: dict[str, Callable[[Path, int, int, Rows], Decoded]] = {"gptq": gptq, "auto-round": auto_round, "hqq": hqq}


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write(model: Path, weights: dict[str, Tensor], folder: Path) -> None:
    """The original model with decoded weights in its linear layers, float32.

    Raises:
        SystemExit: the package left a linear layer of the decoder as it was.
    """
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    head = plain.get_output_embeddings()
    linears = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if missing := sorted(linears.keys() - weights.keys()):
        sys.exit(f"The package did not quantize {missing[0]} and {len(missing) - 1} more.")
    with torch.no_grad():
        for name, module in linears.items():
            module.weight.copy_(weights[name])
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("model", type=Path, help="a local 16-bit model folder")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, help="default: what the package recommends")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON: rows of token ids of equal length")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = json.loads(options.calibration.read_text(encoding="utf-8"))
    group_size = options.group_size or OWN_GROUP_SIZE[options.peer]
    began = time.monotonic()
    weights, stored = PEERS[options.peer](options.model, options.bits, group_size, rows)
    seconds = time.monotonic() - began
    write(options.model, weights, options.out)
    report: dict[str, Any] = {
        "linear_bytes": stored,
        "linear_weights": sum(weight.numel() for weight in weights.values()),
        "group_size": group_size,
        "seconds": round(seconds, 3),
        "package": f"{PACKAGES[options.peer]} {metadata.version(PACKAGES[options.peer])}",
    }
    (options.out / "peer.json").write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
