"""Which number types are taken to be fast."""

from __future__ import annotations

import pytest
import torch

from edgerazor import devices


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "fast"),
    [
        (False, False, True, False),
        (False, False, False, False),
        (True, True, True, True),
        (False, True, False, True),  # Zen 4: products of bfloat16 are nearly twice as fast
        (False, True, True, False),  # a Xeon whose AMX the virtual machine hides: they take twice as long
    ],
)
def test_bfloat16_is_fast_where_the_processor_multiplies_it_faster(
    amx: bool, avx512: bool, intel: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(devices, "is_made_by_intel", lambda: intel)
    assert devices.fast_bfloat16(torch.device("cpu")) is fast
    assert devices.inference_dtype(torch.device("cpu")) is (None if fast else torch.float32)
