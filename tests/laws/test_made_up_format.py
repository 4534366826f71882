"""A format that nobody has heard of is one new file, added as `How to add a format` says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgerazor import formats, kernels, packed
from edgerazor.allocate import make_plan
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import native
from edgerazor.models import QuantTarget
from edgerazor.packed import MatrixSource, PackedModel
from edgerazor.recipe import Calibrate

#: name -> the file, as somebody would write it who has read the instructions
FILES = {
    "int6": '''
"""Six-bit integers, -32 to 31."""

from edgerazor.formats.core.absmax import Absmax
from edgerazor.formats.core.least_error import ScaleGrid, geometric

FORMAT = Absmax(bits=6, grid=ScaleGrid(geometric(0.8, 1.2, 30), rms_factor=0.3, absmax=True))
''',
    "powers": '''
"""Powers of two and zero: levels -4, -2, -1, 0, 1, 2, 4, and -8 for a given scale."""

import torch
from torch import Tensor

from edgerazor.formats.core.base import Format
from edgerazor.formats.core.least_error import ScaleGrid, geometric


class Powers(Format):
    """Codes -4 to 3; the level of a code q is sign(q) * 2^(|q|-1)."""

    name = "powers"
    nominal_bits = 3.0
    code_bits = 3
    min_rule_code, max_code = -3, 3
    min_code = -4
    rounding = None
    grid = ScaleGrid(geometric(0.3, 1.0, 12), rms_factor=2.0, absmax=True)

    def scale_rule(self, groups: Tensor) -> Tensor:
        return groups.abs().amax(dim=-1) / 4

    def round_to_code_(self, ratios: Tensor, min_code: int) -> Tensor:
        sizes = ratios.abs()
        codes = torch.bucketize(sizes, torch.tensor([0.5, 1.5, 3.0, 6.0])).to(ratios.dtype)
        return ratios.sign_().mul_(codes).clamp_(min_code, self.max_code)

    def level_(self, codes: Tensor) -> Tensor:
        return torch.where(codes == 0, codes, codes.sign() * (codes.abs() - 1).exp2())


FORMAT = Powers()
''',
}


@pytest.fixture(params=list(FILES))
def made_up(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The format's file is there, and gone afterwards."""
    name = request.param
    (tmp_path / f"{name}.py").write_text(FILES[name])
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    formats.get.cache_clear()
    yield name
    sys.modules.pop(f"edgerazor.formats.{name}", None)
    if hasattr(formats, name):
        delattr(formats, name)
    formats.get.cache_clear()


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def specs(name: str) -> dict[str, MatrixSpec]:
    """Alone, and beside int4 in rows and in blocks of a matrix [20, 70] in groups of 32."""
    return {
        "alone": MatrixSpec((name,), 32),
        "rows": MatrixSpec(("int4", name), 32, (torch.arange(20) % 2).to(torch.uint8)),
        "blocks": MatrixSpec(("int4", name), 32, block_formats=(torch.arange(60).view(20, 3) % 2).to(torch.uint8)),
    }


def test_it_is_known_encoded_and_trained(made_up: str) -> None:
    assert made_up in formats.names()
    number_format, w = formats.get(made_up), weights(20, 70)
    assert number_format.name == made_up
    for spec in specs(made_up).values():
        encoded = formats.encode_matrix(w, spec)
        decoded = formats.decode_matrix(encoded, spec)
        assert torch.equal(decoded, formats.quantize_dequantize(w, spec))
        again, _ = formats.unpack_matrix(formats.pack_matrix(encoded, spec), spec.formats, 32, (20, 70))
        assert torch.equal(again.codes, encoded.codes)
        assert torch.equal(again.scales, encoded.scales)
        assert float((decoded - w).square().mean() / w.square().mean()) < 0.05
        master = w.clone().requires_grad_()
        formats.fake_quantize_matrix(master, spec).sum().backward()
        assert torch.equal(master.grad, torch.ones_like(w))
        compensated, scales = formats.gptq_quantize(w, spec, torch.eye(70))
        assert torch.equal(compensated, w)
        assert torch.equal(scales, formats.search_scales(w, spec, torch.full((70,), 1.01)))


def test_it_is_planned_packed_and_read(made_up: str, tmp_path: Path) -> None:
    folder, small = tmp_path / "model", tmp_path / "small"
    folder.mkdir(), small.mkdir()
    targets = [QuantTarget("a", "linear", 0, 20, 70), QuantTarget("b", "linear", 0, 32, 64)]
    bits = formats.get(made_up).nominal_bits
    between = {"bits": (bits + 1.58) / 2, "formats": ("ternary", made_up), "plan": "interleave", "group_size": 32}
    plan = make_plan(targets, Calibrate.model_validate(between, strict=False))
    assert {matrix.formats for matrix in plan.matrices} == {("ternary", made_up)}
    assert plan.nominal_bits() == pytest.approx(between["bits"], abs=0.1)
    sources, encoded = [], {}
    for matrix in plan.matrices:
        encoded[matrix.name] = formats.encode_matrix(weights(*matrix.shape), matrix.spec())
        sources.append(
            MatrixSource(matrix.name, "linear", matrix.spec(), matrix.shape, lambda name=matrix.name: encoded[name])  # type: ignore[misc]
        )
    packed.write(folder, sources, {}, tied={}, settings={}, provenance={})
    predicted = packed.predict(
        ((matrix.name, matrix.kind, matrix.spec(), matrix.shape) for matrix in plan.matrices),
        {},
        tied={},
        settings={},
        provenance={},
    )
    assert predicted.bytes == (folder / "model.safetensors").stat().st_size
    packed.rewrite(PackedModel.open(folder), small, compress=True)
    for path in (folder, small):
        model = PackedModel.open(path)
        model.verify()
        for name, expected in encoded.items():
            assert torch.equal(model.matrix(name).encoded.codes, expected.codes)
            assert torch.equal(model.matrix(name).encoded.scales, expected.scales)


@pytest.mark.skipif(not native.isas(), reason="no library: there was no C++ compiler")
def test_kernels_compute_with_it_or_say_that_they_cannot(made_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit planes of integers are read as they are; of other levels the reference takes care, and `native` says so."""
    monkeypatch.setenv("EDGERAZOR_ISA", native.isas()[-1])
    spec, w, x = MatrixSpec((made_up,), 32), weights(20, 64), weights(3, 64)
    encoded = formats.encode_matrix(w, spec)
    expected = kernels.reference.linear(x, encoded, spec, None, 8, 32)
    torch.testing.assert_close(kernels.linear(x, encoded, spec, None, 8, 32), expected, rtol=1e-4, atol=1e-4)
    assert spec.native_problem() == ("" if made_up == "int6" else "the format powers")
    if made_up == "int6":
        matrix = native.Matrix(formats.pack_matrix(encoded, spec), spec, (20, 64))
        assert [part.bits for part in matrix.parts] == [6]
    else:
        with pytest.raises(ValueError, match=r"^native kernels cannot read codes of powers$"):
            native.Matrix(formats.pack_matrix(encoded, spec), spec, (20, 64))
