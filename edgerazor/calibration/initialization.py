"""Starts that lose less than rounding by the weights alone: made in calibrate, once the plan is known, and read by
distill, which trains from there, and by pack, where the teacher is rounded without training.

*clip* gives each group the scale with the least error, where an error weighs as much as its input is large on average.

*gptq* goes through the decoder layer by layer and rounds each linear layer so that errors make up for each other
(`formats.gptq_quantize`). What a layer's inputs have to do with each other is seen where they are: in a student whose
earlier layers are done, which rounds activations, keys and values as the packed model will. Within a layer the linear
layers are done in the order in which they are used; those that share an input (q, k and v) share what is seen of it.

Embedding and head are clipped in both: a head by the mean squares of the final hidden states, an embedding by its own
weights alone, and a matrix that is both by the sum of the two, their means made alike.

The file holds `P.scales`, float16 [rows, groups], for every matrix P, and `P.weight`, float32, where it is compensated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgerazor import data, formats, job, models, modules
from edgerazor.allocate import Plan
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.models import Blocks, PreTrainedModel, Structure
from edgerazor.modules import FakeQuantLinear, InitialWeight
from edgerazor.recipe import Recipe
from edgerazor.workdir import WorkDir, write_atomically

#: About how many forward passes over the calibration text a start takes.
PASSES = {"least_error": 0, "rtn": 0, "clip": 1, "gptq": 5}

WEIGHT, SCALES = ".weight", ".scales"


@dataclass
class Sequences:
    """Some sequences on their way through the layers.

    Attributes:
        states: what enters the next layer, float32 [B, T, H], on the CPU.
        counts: bool [B, T], the positions that count.
    """

    states: Tensor
    counts: Tensor


class _SeenError(Exception):
    """Ends a forward pass from which nothing more is wanted."""


# --- reading -----------------------------------------------------------------------------------


def stored(recipe: Recipe, work: WorkDir, plan: Plan) -> Callable[[str], InitialWeight] | None:
    """What calibrate made.

    Args:
        recipe: says which start is wanted.
        work: where calibrate wrote it.
        plan: that it is wanted for.

    Returns:
        module path -> where its matrix begins; None where all begin at the scales that the plan says.

    Raises:
        UserError: calibrate has not made this start for this plan, or its file is damaged.
    """
    wanted = recipe.calibrate.init
    if wanted not in job.MADE_INITS:
        return None
    missing = UserError(
        f"{work.path} holds no {wanted} start for these settings.",
        f"Make one: `edgerazor calibrate {recipe.model} --bits {recipe.calibrate.bits:g} --start {wanted}`.",
    )
    if work.manifest("calibrate") is None or not work.start_file.exists() or job.read_plan(work) != plan:
        raise missing
    try:
        file = safe_open(work.start_file, framework="pt").__enter__()
        names = set(file.keys())
        made = (file.metadata() or {}).get("start")
    except (OSError, SafetensorError):
        raise job.damaged(work.start_file) from None
    if made != wanted:
        raise missing
    if not names >= {matrix.name + SCALES for matrix in plan.matrices}:
        raise job.damaged(work.start_file)

    def of(name: str) -> InitialWeight:
        weight = file.get_tensor(name + WEIGHT) if name + WEIGHT in names else None
        return InitialWeight(weight, file.get_tensor(name + SCALES))

    return of


def file_bytes(wanted: str, plan: Plan) -> int:
    """Size of the file that a start makes."""
    scales = sum(2 * each.rows * formats.group_count(each.columns, plan.group_size) for each in plan.matrices)
    weights = sum(4 * each.rows * each.columns for each in plan.matrices if each.kind == "linear")
    return {"clip": scales, "gptq": scales + weights}.get(wanted, 0)


def memory_bytes(recipe: Recipe, teacher: PreTrainedModel, tokens: int) -> int:
    """What making a start needs: float32 weights, and where layers are gone through, what enters one of them."""
    weights = sum(4 * each.numel() for each in teacher.parameters())
    states = 4 * tokens * teacher.config.get_text_config().hidden_size
    return {"clip": weights, "gptq": weights + states}.get(recipe.calibrate.init, 0)


# --- making ------------------------------------------------------------------------------------


@torch.no_grad()
def write(recipe: Recipe, work: WorkDir, plan: Plan, rows: data.TokenRows, console: Console) -> None:
    """Make the start that the recipe asks for, and write it beside the plan.

    Args:
        recipe: of the whole job.
        work: where calibrate's statistics and plan lie already.
        plan: the formats.
        rows: calibration text.
        console: shows the progress.

    Raises:
        UserError: activations that are not finite, or a linear layer that is never used.
    """
    model, _ = job.load_teacher(recipe, job.device_of(recipe), torch.float32)
    found, specs = models.structure(model), plan.specs()
    batches = list(data.sample_batches(rows, recipe.calibrate.sequences, recipe.calibrate.batch_size))
    starts = clipped_ends(model, found, specs, batches)
    if recipe.calibrate.init == "clip":
        starts |= clipped_linears(model, found, specs, load_file(work.statistics_file), console)
    else:
        settings = replace(job.settings_of(plan, found, work), learned_scales=False)
        input_scales = job.input_scales(plan, model, found, work)
        modules.prepare_for_training(
            model, found, specs, settings, input_scales=input_scales, initial_weight=starts.get
        )
        starts |= compensated_linears(Blocks(model, found), batches, console)
    tensors = {name + SCALES: start.scales.cpu() for name, start in starts.items()}
    tensors |= {name + WEIGHT: start.weight.cpu() for name, start in starts.items() if start.weight is not None}
    about = {"start": recipe.calibrate.init}
    write_atomically(work.start_file, lambda path: save_file(tensors, path, metadata=about))


def clipped_ends(
    model: PreTrainedModel, found: Structure, specs: dict[str, MatrixSpec], batches: Sequence[data.Batch]
) -> dict[str, InitialWeight]:
    """The embedding and the head, one matrix or two, of a model that is not rounded yet."""
    moment = final_moment(model, found, batches)
    both = 1 + moment / moment.mean().clamp(min=torch.finfo(moment.dtype).tiny)
    importance = {found.head.name: moment} if found.head else {found.embedding.name: both}
    starts = {}
    for site in (found.embedding, *((found.head,) if found.head else ())):
        weight = model.get_submodule(site.name).weight
        starts[site.name] = InitialWeight(
            None, formats.search_scales(weight, specs[site.name], importance.get(site.name))
        )
    return starts


def final_moment(model: PreTrainedModel, found: Structure, batches: Sequence[data.Batch]) -> Tensor:
    """Mean of the squares of what enters the head, float32 [H]."""
    total, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        counts = (batch["labels"] != data.MASKED).to(model.device)
        with models.final_states(model, found.head_path) as states:
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
        total = total + states[0][counts].square().sum(0, dtype=torch.float64)
        tokens += int(counts.sum())
    return (total / tokens).float()


def clipped_linears(
    model: PreTrainedModel,
    found: Structure,
    specs: dict[str, MatrixSpec],
    statistics: dict[str, Tensor],
    console: Console,
) -> dict[str, InitialWeight]:
    """The linear layers, clipped by the second moments of their inputs in the teacher."""
    starts = {}
    with console.track("clipped start", len(found.linears)) as tracker:
        for site in found.linears:
            weight, moment = model.get_submodule(site.name).weight, statistics[f"input_second_moment/{site.name}"]
            starts[site.name] = InitialWeight(None, formats.search_scales(weight, specs[site.name], moment))
            tracker.advance()
    return starts


def compensated_linears(blocks: Blocks, batches: Iterable[data.Batch], console: Console) -> dict[str, InitialWeight]:
    """The linear layers, compensated one after the other, in place.

    Args:
        blocks: of a student with training modules.
        batches: calibration text.
        console: shows the progress.

    Returns:
        their master weights, the student's own memory, and scales.
    """
    device = blocks.model.device
    names = {module: name for name, module in blocks.model.named_modules()}
    starts = {}
    flow = [
        Sequences(blocks.inputs(batch["input_ids"].to(device)).cpu(), batch["labels"] != data.MASKED)
        for batch in batches
    ]
    with console.track("compensated start", len(blocks.layers)) as tracker:
        for index in range(len(blocks.layers)):
            for modules in in_order_of_use(blocks, index, flow[0]):
                hessian = input_hessian(blocks, index, modules[0], flow)
                for module in modules:
                    starts[names[module]] = compensate(module, hessian, names[module])
            move_on(blocks, index, flow)
            tracker.advance()
    return starts


def in_order_of_use(blocks: Blocks, index: int, sequences: Sequences) -> list[list[FakeQuantLinear]]:
    """The linear layers of a decoder layer, those that share an input together.

    Raises:
        UserError: one is never used.
    """
    inputs: list[Tensor] = []
    groups: list[list[FakeQuantLinear]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, FakeQuantLinear)
        known = next((place for place, x in enumerate(inputs) if x is args[0]), None)
        if known is None:
            inputs.append(args[0])
            groups.append([module])
        else:
            groups[known].append(module)

    layer = blocks.layers[index]
    linears = [module for module in layer.modules() if isinstance(module, FakeQuantLinear)]
    with hooked(linears, note):
        blocks.forward_layer(index, sequences.states.to(blocks.model.device))
    if sum(map(len, groups)) < len(linears):
        raise UserError(
            f"Layer {index} of {type(blocks.model).__name__} has linear layers that it does not use.",
            "Use `--init clip` or `--init least_error`.",
        )
    return groups


def input_hessian(blocks: Blocks, index: int, module: FakeQuantLinear, flow: Sequence[Sequences]) -> Tensor:
    """The mean of `x x^T` over what a linear layer multiplies its weight with, float64 [in, in]."""
    device, current = blocks.model.device, flow[0]
    total = torch.zeros(module.in_features, module.in_features, dtype=torch.float64, device=device)

    def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = module.quantized_input(args[0])[current.counts.to(device)]  # [valid tokens, in]
        total.add_(x.T @ x)
        raise _SeenError

    with hooked([module], add), modules.encoded_once(blocks.layers[index]):
        for current in flow:
            with contextlib.suppress(_SeenError):
                blocks.forward_layer(index, current.states.to(device))
    return total.div_(sum(int(sequences.counts.sum()) for sequences in flow))


def compensate(module: FakeQuantLinear, hessian: Tensor, name: str) -> InitialWeight:
    """Round a linear layer so, in place."""
    try:
        weight, scales = formats.gptq_quantize(module.weight, module.spec, hessian)
    except ValueError as error:
        raise UserError(
            f"{name} cannot be compensated: {error}.",
            "Use `--init clip` or `--init least_error`.",
        ) from None
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.scales = nn.Parameter(scales.float(), requires_grad=False)
    return InitialWeight(weight, scales)


def move_on(blocks: Blocks, index: int, flow: Iterable[Sequences]) -> None:
    """Replace what enters a layer by what leaves it."""
    with modules.encoded_once(blocks.layers[index]):
        for sequences in flow:
            sequences.states = blocks.forward_layer(index, sequences.states.to(blocks.model.device)).cpu()


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Any:
    """Call something before each forward pass of some modules inside."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
