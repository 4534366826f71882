"""Initializations that lose less than rounding to nearest: the scales, and for GPTQ the weights, that training or
packing begins with. Calibrate finds them once the plan is known; distill trains from them, and pack rounds a teacher by
them where there is no training.

*clip* searches for the scale of each group that minimizes the squared error of its weights, each weighted by the second
moment of its input.

*gptq* goes through the decoder layer by layer and quantizes each linear layer with GPTQ (`formats.gptq_quantize`; arXiv
2210.17323). The Hessian `E[x x^T]` of its inputs is measured in the student whose earlier layers are quantized already,
with activations, keys and values rounded as the packed model rounds them. What the layer should give is the teacher's
output of the teacher's own input, so that it makes up for the errors of those before it, too (arXiv 2504.02692), but
where a training of scales follows. Within a decoder layer the linear layers are quantized in the order in which they
are used; those that share an input (q, k and v) share its moments. The experts of a layer are quantized together, each
with the Hessian of its own tokens, whose inputs count as much as its output does; the teacher sends other tokens to
them, so they make up for their own errors.

An expert that calibration never reached has scales of least squared error in both.

Embedding and head have clipped scales in both: the head by the second moments of the final hidden states, the embedding
by its own weights alone, and a tied matrix by the sum of both weightings, scaled to equal means.

The file holds `P.scales`, float16 [rows, groups], for every matrix P, and `P.weight`, float32, where GPTQ changed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgerazor import data, devices, formats, models, modules
from edgerazor.allocate import Plan
from edgerazor.calibrated import SCALES, WEIGHT
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.job import JobContext
from edgerazor.models import Blocks, PreTrainedModel, Structure
from edgerazor.modules import FakeQuantLinear, InitialWeight
from edgerazor.workdir import write_atomically


@dataclass
class Sequences:
    """A micro-batch on its way through the layers.

    Attributes:
        states: what enters the student's next layer, float32 [B, T, H], on the CPU.
        original: what enters the teacher's.
        taught: linear layers of the teacher's latest layer, by their paths -> their inputs [B, T, in].
        counts: bool [B, T], the positions that count.
        input_ids: int64 [B, T].
    """

    states: Tensor
    original: Tensor
    counts: Tensor
    input_ids: Tensor
    taught: dict[str, Tensor] = field(default_factory=dict)


class _InputSeenError(Exception):
    """Ends a forward pass early, once the input of the linear layer has been added to its Hessian."""


def file_bytes(init: str, plan: Plan) -> int:
    """Size of the file that an initialization makes."""
    matrices = plan.matrices
    scales = sum(2 * matrix.rows * formats.group_count(matrix.columns, plan.group_size) for matrix in matrices)
    weights = sum(4 * matrix.rows * matrix.columns for matrix in matrices if matrix.kind == "linear")
    return {"clip": scales, "gptq": scales + weights}.get(init, 0)


def memory_bytes(init: str, model: PreTrainedModel, tokens: int) -> int:
    """Memory that an initialization needs: float32 weights, for GPTQ twice, and what enters a layer of both models.

    Args:
        init: its name.
        model: the teacher.
        tokens: of calibration text.
    """
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    states = 2 * 4 * tokens * model.config.get_text_config().hidden_size
    return {"clip": weights, "gptq": 2 * weights + states}.get(init, 0)


# --- making ------------------------------------------------------------------------------------


@torch.no_grad()
def write(context: JobContext, plan: Plan, rows: data.TokenRows) -> None:
    """Make the initialization that the recipe asks for, and write it beside the plan.

    Args:
        context: of the job; calibrate's statistics and plan lie in its working directory already.
        plan: the formats.
        rows: calibration text.

    Raises:
        UserError: activations that are not finite, or a linear layer that is never used.
    """
    settings, work, console = context.recipe.calibrate, context.work, context.console
    teacher = context.load_teacher(context.device, torch.float32)
    model, structure, specs = teacher.model, teacher.structure, plan.specs()
    batches = list(data.sample_batches(rows, settings.init_sequences(rows.length), settings.batch_size))
    starts = clip_ends(model, structure, specs, batches)
    if settings.init == "clip":
        starts |= clip_linears(model, structure, specs, load_file(work.statistics_file), console)
    else:
        computing = replace(context.student_settings(plan, structure), learned_scales=False)
        input_scales = context.input_scales(plan, teacher)
        modules.prepare_for_training(
            model, structure, specs, computing, input_scales=input_scales, initial_weight=starts.get
        )
        original = None
        if settings.scales == "computed":  # where scales are learned a training follows, see `formats/core/gptq.py`
            loaded = context.load_teacher(context.device, devices.inference_dtype(context.device))
            original = Blocks(loaded.model, loaded.structure)
        starts |= gptq_linears(Blocks(model, structure), original, batches, console)
    tensors = {path + SCALES: start.scales.cpu() for path, start in starts.items()}
    tensors |= {path + WEIGHT: start.weight.cpu() for path, start in starts.items() if start.weight is not None}
    metadata = {"start": settings.init}
    write_atomically(work.start_file, lambda path: save_file(tensors, path, metadata))


def clip_ends(
    model: PreTrainedModel, structure: Structure, specs: dict[str, MatrixSpec], batches: Sequence[data.Batch]
) -> dict[str, InitialWeight]:
    """Search for the scales of embedding and head, one matrix or two, of a model that is not quantized yet."""
    of_head = specs[structure.head.name if structure.head else structure.embedding.name]
    moment = final_moment(model, structure, batches, of_head)
    both = 1 + moment / moment.mean().clamp(min=torch.finfo(moment.dtype).tiny)
    importance = {structure.head.name: moment} if structure.head else {structure.embedding.name: both}
    starts = {}
    for site in (structure.embedding, *structure.tables, *((structure.head,) if structure.head else ())):
        spec = specs[site.name]
        weight = spec.rotate(model.get_submodule(site.name).weight)
        starts[site.name] = InitialWeight(None, formats.search_scales(weight, spec, importance.get(site.name)))
    return starts


def final_moment(
    model: PreTrainedModel, structure: Structure, batches: Sequence[data.Batch], spec: MatrixSpec
) -> Tensor:
    """Mean of the squares of what enters the head, float32 [H], rotated as the spec of its matrix says."""
    total, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        counts = (batch["labels"] != data.MASKED).to(model.device)
        with models.final_states(model, structure.head_path) as states:
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
        total = total + spec.rotate(states[0][counts]).square().sum(0, dtype=torch.float64)
        tokens += int(counts.sum())
    return (total / tokens).float()


def clip_linears(
    model: PreTrainedModel,
    structure: Structure,
    specs: dict[str, MatrixSpec],
    statistics: dict[str, Tensor],
    console: Console,
) -> dict[str, InitialWeight]:
    """Search for the scales of the linear layers, weighted by the second moments of their inputs in the teacher."""
    starts = {}
    with console.track("clipped start", len(structure.linears)) as tracker:
        for site in structure.linears:
            spec, moment = specs[site.name], statistics[f"input_second_moment/{site.name}"]
            weight = spec.rotate(model.get_submodule(site.name).weight)
            importance = moment if bool(moment.any()) else None  # nothing is known of an expert that no token went to
            starts[site.name] = InitialWeight(None, formats.search_scales(weight, spec, importance))
            tracker.advance()
    return starts


def gptq_linears(
    blocks: Blocks, original: Blocks | None, batches: Iterable[data.Batch], console: Console
) -> dict[str, InitialWeight]:
    """Quantize the linear layers with GPTQ one after the other, in place.

    Args:
        blocks: of a student with training modules.
        original: of the teacher, towards whose outputs weights move; None: they stay.
        batches: calibration text.
        console: shows the progress.

    Returns:
        their master weights, the student's own memory, and scales.
    """
    device = blocks.model.device
    names = {module: name for name, module in blocks.model.named_modules()}
    starts = {}
    flow = []
    for batch in batches:
        ids = batch["input_ids"]
        states, teachers = (model.inputs(ids.to(device)).float().cpu() for model in (blocks, original or blocks))
        flow.append(Sequences(states, teachers, batch["labels"] != data.MASKED, ids))
    with console.track("compensated start", len(blocks.layers)) as tracker:
        for index in range(len(blocks.layers)):
            groups = in_order_of_use(blocks, index, flow)
            if original is not None:
                teach(original, index, [names[sharing[0]] for together in groups for sharing in together], flow)
            for together in groups:
                moments = input_moments(blocks, index, [sharing[0] for sharing in together], flow)
                for sharing, of_input in zip(together, moments, strict=True):
                    for module in sharing:
                        starts[names[module]] = gptq_linear(module, of_input, names[module])
            move_on(blocks, index, flow)
            tracker.advance()
    return starts


def in_order_of_use(blocks: Blocks, index: int, flow: Sequence[Sequences]) -> list[list[list[FakeQuantLinear]]]:
    """The linear layers of a decoder layer as they are quantized one after the other.

    Returns:
        those that are quantized together: one input, or what all experts have at the same place; of these, those that
        share an input.

    Raises:
        UserError: one is never used, and it is no expert's.
    """
    inputs: list[Tensor] = []
    groups: list[list[FakeQuantLinear]] = []
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, FakeQuantLinear)
        if module in seen:
            return
        seen.add(module)
        known = next((place for place, x in enumerate(inputs) if x is args[0]), None)
        if known is None:
            inputs.append(args[0])
            groups.append([module])
        else:
            groups[known].append(module)

    layer, path = blocks.layers[index], f"{blocks.structure.layers_path}.{index}"
    linears = {module: name for name, module in layer.named_modules(prefix=path) if isinstance(module, FakeQuantLinear)}
    lists = {target.name: target.experts for target in blocks.structure.linears}
    with hooked(linears, note):
        for sequences in flow:  # the first of them, but where it leaves experts without tokens
            layer_output(blocks, index, sequences.states, sequences)
            if len(seen) == len(linears):
                break
    unused = [module for module in linears if module not in seen]
    if not all(lists[linears[module]] for module in unused):
        raise UserError(
            f"Layer {index} of {type(blocks.model).__name__} has linear layers that it does not use.",
            "Use `--init clip` or `--init least_error`.",
        )
    together: dict[tuple[str, str], list[list[FakeQuantLinear]]] = {}
    for group in [*groups, *([module] for module in unused)]:
        name = linears[group[0]]
        in_experts = lists[name]
        place = in_experts, name.rpartition(".")[2] if in_experts else name
        together.setdefault(place, []).append(group)
    return list(together.values())


@dataclass
class InputMoments:
    """Second moments of what a linear layer multiplies its weight with, float64 [in, in].

    Attributes:
        hessian: the mean of `x x^T` over inputs x, all positions that count; of an expert its own, 0 for the others.
        drift: the mean of `(x_T - x) x^T`, where x_T is the same input in the teacher; None of an expert, which has
            other tokens there.
    """

    hessian: Tensor
    drift: Tensor | None


def input_moments(
    blocks: Blocks, index: int, linears: Sequence[FakeQuantLinear], flow: Sequence[Sequences]
) -> list[InputMoments]:
    """The moments of the inputs of linear layers that are quantized together."""
    device, current = blocks.model.device, flow[0]
    names = {module: name for name, module in blocks.model.named_modules()}
    totals = {
        module: torch.zeros(module.in_features, module.in_features, dtype=torch.float64, device=device)
        for module in linears
    }
    first = names[linears[0]]
    drift = torch.zeros_like(totals[linears[0]]) if first in current.taught else None

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, FakeQuantLinear)
        expert = models.expert_of(blocks.model, names[module])
        counts, x = models.at_tokens(expert, current.counts.to(device)), module.quantized_input(args[0])
        if expert is not None and expert.routed is not None:
            x = x * expert.routed.weights[:, None]

        def counted(x: Tensor) -> Tensor:
            return (x[counts] if x.shape[:-1] == counts.shape else x.flatten(0, -2)).float()  # [valid tokens, in]

        with torch.autocast(device.type, enabled=False):
            x = counted(x)
            totals[module].add_(x.T @ x)
            if drift is not None:
                drift.add_((module.spec.rotate(counted(current.taught[first].to(device))) - x).T @ x)
        if len(linears) == 1:
            raise _InputSeenError

    with hooked(linears, add), modules.encoded_once(blocks.layers[index]):
        for current in flow:
            with contextlib.suppress(_InputSeenError):
                layer_output(blocks, index, current.states, current)
    tokens = sum(int(sequences.counts.sum()) for sequences in flow)
    return [
        InputMoments(totals[module].div_(tokens), None if drift is None else drift.div_(tokens)) for module in linears
    ]


def gptq_linear(module: FakeQuantLinear, moments: InputMoments, name: str) -> InitialWeight:
    """Quantize one linear layer with GPTQ, in place; without any input, with the scales of least squared error.

    Raises:
        UserError: the Hessian cannot be factorized.
    """
    if not bool(moments.hessian.any()):
        scales = formats.search_scales(module.weight, module.spec)
        module.scales = nn.Parameter(scales.float(), requires_grad=False)
        return InitialWeight(None, scales)
    try:
        weight, scales = formats.gptq_quantize(module.weight, module.spec, moments.hessian, moments.drift)
    except ValueError as error:
        raise UserError(
            f"{name} cannot be compensated: {error}.",
            "Use `--init clip` or `--init least_error`.",
        ) from None
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.scales = nn.Parameter(scales.float(), requires_grad=False)
    return InitialWeight(weight, scales)


def teach(original: Blocks, index: int, paths: Iterable[str], flow: Iterable[Sequences]) -> None:
    """Let the teacher compute a decoder layer: keep the inputs of linear layers that are no experts, and move on."""
    names = {original.model.get_submodule(p): p for p in paths if models.expert_of(original.model, p) is None}
    taught: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        taught[names[module]] = args[0].cpu()

    with hooked(names, keep):
        for sequences in flow:
            taught = sequences.taught = {}
            sequences.original = layer_output(original, index, sequences.original, sequences).float().cpu()


def move_on(blocks: Blocks, index: int, flow: Iterable[Sequences]) -> None:
    """Replace the states that enter a decoder layer of the student by those that leave it."""
    with modules.encoded_once(blocks.layers[index]):
        for sequences in flow:
            sequences.states = layer_output(blocks, index, sequences.states, sequences).float().cpu()


def layer_output(blocks: Blocks, index: int, states: Tensor, sequences: Sequences) -> Tensor:
    """What leaves a decoder layer, [B, T, H], with products in bfloat16 where the hardware is fast at it."""
    device = blocks.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=devices.fast_bfloat16(device)):
        return blocks.forward_layer(index, states.to(device), sequences.input_ids)


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Any:
    """Call something before each forward pass of some modules inside."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
