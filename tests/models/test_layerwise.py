"""One layer at a time computes what the whole model does, forwards and backwards, whole and resumed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgerazor import models
from edgerazor.models import LayerwisePass, Observer
from helpers.tiny_models import FAMILIES, ModelMaker

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

Batches = list[tuple[Tensor, Tensor]]


def some_batches() -> Batches:
    """Batches of different shapes, with padding on the right and positions that do not count."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in ((2, 13), (3, 9), (2, 13), (1, 17)):
        ids = torch.randint(2, 60, (rows, length), generator=draw)
        counts = torch.ones(rows, length, dtype=torch.bool)
        if rows > 1:
            counts[0, length - 4 :] = False
            ids[0, length - 4 :] = 1
            counts[1, :3] = False
        batches.append((ids, counts))
    return batches


def upstream_of(layer_pass: LayerwisePass) -> Any:
    """The gradient of the sum of squares of what enters the head, at the positions that count."""

    def upstream(number: int, states: Tensor) -> Tensor:
        states = states.requires_grad_()
        loss = layer_pass.final(states)[layer_pass.batches[number][1]].square().sum()
        return torch.autograd.grad(loss, states)[0]

    return upstream


class Recorder(Observer):
    """Records everything that the pass shows it."""

    def __init__(self) -> None:
        self.records: dict[str, Tensor] = {}

    def layer(self, index: int, inputs: Tensor, outputs: Tensor, counts: Tensor) -> None:
        self.record(f"inputs {index}", inputs[counts])
        self.record(f"outputs {index}", outputs[counts])

    def linear(self, path: str, x: Tensor, weights: Tensor | None = None) -> None:
        self.record(f"input {path}", x)

    def final(self, x: Tensor) -> None:
        self.record("final", x)

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        assert weight.shape == (g.shape[1], x.shape[1])
        self.record(f"x {path}", x)
        self.record(f"g {path}", g)

    def record(self, name: str, value: Tensor) -> None:
        before = [self.records[name]] if name in self.records else []
        self.records[name] = torch.cat([*before, value.clone()])

    def state(self) -> dict[str, Tensor]:
        return dict(self.records)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.records = dict(state)


def by_hooks(model: Any, batches: Batches) -> dict[str, Tensor]:
    """What a `Recorder` would record, from ordinary passes of the whole model."""
    structure = models.structure(model)
    recorder = Recorder()
    model.requires_grad_(True)
    counts = torch.empty(0)

    def hook(path: str) -> Any:
        def forward(_module: Any, args: tuple, output: Tensor) -> None:
            recorder.record(f"input {path}", args[0][counts].detach())
            recorder.record(f"x {path}", args[0].flatten(0, -2).detach())
            output.register_hook(lambda g: recorder.record(f"g {path}", g.flatten(0, -2)))

        return forward

    for target in structure.linears:
        model.get_submodule(target.name).register_forward_hook(hook(target.name))
    for ids, mask in batches:
        counts = mask
        layers = range(structure.layer_count + 1)
        with (
            models.capture_hidden(model, structure, layers) as hidden,
            models.final_states(model, structure.head_path) as last,
        ):
            model(input_ids=ids, use_cache=False)
        recorder.record("final", last[0][counts].detach())
        hidden[0].retain_grad()
        last[0][counts].square().sum().backward()
        assert hidden[0].grad is not None
        recorder.record("input gradients", hidden[0].grad.flatten(0, 1))
        for index in range(structure.layer_count):
            recorder.record(f"inputs {index}", hidden[index][counts].detach())
            recorder.record(f"outputs {index}", hidden[index + 1][counts].detach())
    return recorder.records


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_sees_what_hooks_on_the_whole_model_see(make_model: ModelMaker, tmp_path: Path, family: str) -> None:
    make_model(tmp_path / "model", family)
    whole = models.load(tmp_path / "model")[0].double()
    layered, _ = models.load(tmp_path / "model")
    batches = some_batches()
    recorder = Recorder()
    layer_pass = LayerwisePass(layered, models.structure(layered), batches, tmp_path / "pass", torch.float64)
    layer_pass.forward(recorder)
    layer_pass.backward(upstream_of(layer_pass), recorder)
    for gradient in layer_pass.input_gradients():
        recorder.record("input gradients", gradient.flatten(0, 1))
    expected = by_hooks(whole, batches)
    assert recorder.records.keys() == expected.keys()
    if family == "gemma4":  # what the inputs of single layers have of the embedding is left out
        del expected["input gradients"]
    for name, value in expected.items():
        torch.testing.assert_close(recorder.records[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stored_in_16_bits_passes_like_the_one_loaded_in_32(
    make_model: ModelMaker, tmp_path: Path, family: str
) -> None:
    make_model(tmp_path / "model", family, torch.bfloat16)
    whole, _ = models.load(tmp_path / "model", dtype=torch.float32)
    stored, _ = models.load(tmp_path / "model")
    structure = models.structure(stored)
    before = {name: parameter.data_ptr() for name, parameter in stored.named_parameters()}
    recorder = Recorder()
    layer_pass = LayerwisePass(stored, structure, some_batches(), tmp_path / "pass")
    layer_pass.forward(recorder)
    layer_pass.backward(upstream_of(layer_pass), recorder)
    expected = by_hooks(whole, some_batches())
    for name in recorder.records:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(recorder.records[name], expected[name], rtol=1e-4, atol=1e-5 * scale)
        if not name.startswith(("g ", "x ")):
            assert torch.equal(recorder.records[name], expected[name])
    for target in structure.linears:  # the weights are the stored ones again, in their place in the file
        assert stored.get_parameter(f"{target.name}.weight").data_ptr() == before[f"{target.name}.weight"]
        assert stored.get_parameter(f"{target.name}.weight").dtype == torch.bfloat16


class StoppedError(Exception):
    """Ends a pass in the middle."""


class Stopping(Recorder):
    """Raises at the n-th thing that it is to record."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.remaining = after

    def record(self, name: str, value: Tensor) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            raise StoppedError
        super().record(name, value)


def pass_of(folder: Path, llama: Path, **options: Any) -> LayerwisePass:
    model, _ = models.load(llama)
    return LayerwisePass(model, models.structure(model), options.pop("batches", some_batches()), folder, **options)


def forward_and_backward(layer_pass: LayerwisePass, recorder: Recorder) -> int:
    """A pass forwards and backwards; how often `upstream` was called."""
    calls: list[int] = []
    upstream = upstream_of(layer_pass)

    def counting(number: int, states: Tensor) -> Tensor:
        calls.append(number)
        return upstream(number, states)

    layer_pass.forward(recorder)
    layer_pass.backward(counting, recorder)
    return len(calls)


#: Records forwards for a layer (4 batches of 7 inputs and 2 states), at the end, and backwards for a layer.
LAYER, END, BACK = 4 * (7 + 2), 4, 4 * 7 * 2
RECORDS = 2 * LAYER + END + 2 * BACK


@pytest.mark.parametrize(
    ("after", "skipped"),
    [
        (1, 0),
        (LAYER, 0),
        (LAYER + 1, LAYER),
        (2 * LAYER, LAYER),
        (2 * LAYER + 2, 2 * LAYER),
        (2 * LAYER + END + 1, 2 * LAYER + END),
        (RECORDS - BACK, 2 * LAYER + END),
        (RECORDS - BACK + 1, RECORDS - BACK),
        (RECORDS, RECORDS - BACK),
    ],
)
def test_resumed_equals_uninterrupted(llama: Path, tmp_path: Path, after: int, skipped: int) -> None:
    whole = Recorder()
    assert forward_and_backward(pass_of(tmp_path / "whole", llama), whole) == 4
    with pytest.raises(StoppedError):
        forward_and_backward(pass_of(tmp_path / "pass", llama), Stopping(after))
    resumed = Stopping(0)
    assert forward_and_backward(pass_of(tmp_path / "pass", llama), resumed) == 4 * (after <= 2 * LAYER + END)
    assert -resumed.remaining == RECORDS - skipped
    again = Stopping(0)
    assert forward_and_backward(pass_of(tmp_path / "pass", llama), again) == again.remaining == 0  # all is done
    for recorder in (resumed, again):
        assert recorder.records.keys() == whole.records.keys()
        assert all(torch.equal(recorder.records[name], value) for name, value in whole.records.items())
    assert not list((tmp_path / "pass").glob(".*"))


def test_files_of_another_pass_are_ignored(llama: Path, tmp_path: Path) -> None:
    folder, batches = tmp_path / "pass", some_batches()
    others: list[dict[str, Any]] = [
        {"identity": "other"},
        {"dtype": torch.float64},
        {"batches": [(ids + 1, counts) for ids, counts in batches]},
        {"batches": [(ids, ~counts) for ids, counts in batches]},
        {"batches": batches[:3]},
    ]
    for options in others:
        forward_and_backward(pass_of(folder, llama), Recorder())
        recorder, fresh = Stopping(0), Recorder()
        assert forward_and_backward(pass_of(folder, llama, **options), recorder) > 0
        forward_and_backward(pass_of(tmp_path / "fresh", llama, **options), fresh)
        assert all(torch.equal(recorder.records[name], value) for name, value in fresh.records.items())
    forward_and_backward(pass_of(folder, llama), Recorder())
    (folder / "forward.safetensors").write_bytes(b"damaged")
    recorder = Stopping(0)
    forward_and_backward(pass_of(folder, llama), recorder)
    assert -recorder.remaining == RECORDS


def test_without_a_backward_pass_the_states_of_two_layers_are_on_disk_at_most(llama: Path, tmp_path: Path) -> None:
    most: list[int] = []

    class Counting(Observer):
        def layer(self, *_: Any) -> None:
            most.append(len(list((tmp_path / "pass").glob("*.raw"))))

    layer_pass = pass_of(tmp_path / "pass", llama)
    layer_pass.forward(Counting(), keep_inputs=False)
    assert max(most) == 1  # and the one that is being written
    assert [path.name for path in (tmp_path / "pass").glob("*.raw")] == ["entering-2.raw"]
    layer_pass.clear()
    assert not (tmp_path / "pass").exists()


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="asks Linux what its pages of memory are")
def test_pages_of_a_mapped_weight_are_dropped_and_nothing_is_lost(tmp_path: Path) -> None:
    values = torch.arange(1 << 18, dtype=torch.float32)
    values.numpy().tofile(tmp_path / "weights")

    def mapped() -> Tensor:
        return torch.from_file(str(tmp_path / "weights"), shared=False, size=len(values)).view(512, 512)

    def in_memory(weight: Tensor) -> int:
        """Bytes of it that this process holds."""
        first, pages = weight.data_ptr() // mmap.PAGESIZE, weight.nbytes // mmap.PAGESIZE
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(8 * first)
            return int((np.frombuffer(file.read(8 * pages), np.uint64) >> np.uint64(63)).sum()) * mmap.PAGESIZE

    weight = mapped()
    assert torch.equal(weight.flatten(), values)
    assert in_memory(weight) == weight.nbytes
    models.drop_pages(weight)
    assert in_memory(weight) == 0
    assert torch.equal(weight.flatten(), values)
    written, own = mapped(), values.clone()
    written[100, 100] = 7
    models.drop_pages(written)
    models.drop_pages(own)
    models.drop_pages(weight[3:5, 1:])  # no whole matrix
    assert written[100, 100] == 7
    assert torch.equal(own, values)
