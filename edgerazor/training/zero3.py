"""The student spread over processes by DeepSpeed's ZeRO-3, where that is installed and the launcher asks for it.

Each process holds a part of every weight, its gradient and its moments. DeepSpeed gathers the weights of a module while
it computes; the head's stay gathered, since the losses compute logits from them a chunk of positions at a time. A
teacher is whole on every process. Checkpoints are those of one process: the main process writes whole tensors, which
are gathered one at a time, so any number of processes, with DeepSpeed, FSDP2 or neither, goes on with them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from edgerazor import devices
from edgerazor.errors import usage_error
from edgerazor.recipe import Distill

#: What `accelerate launch` puts into the environment.
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOADED = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
#: Tensors of AdamW's state.
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_wanted() -> bool:
    """Whether a launcher started several processes and asked for DeepSpeed.

    Raises:
        UserError: for other stages than 3, and for weights or moments that leave the device.
    """
    if devices.process_count() == 1 or os.environ.get(devices.USE_DEEPSPEED, "false").lower() != "true":
        return False
    if os.environ.get(STAGE, "2") != "3" or any(os.environ.get(name, "none") != "none" for name in OFFLOADED):
        raise usage_error(
            "Of DeepSpeed, ZeRO-3 without offloading is supported.",
            "Set `zero_stage: 3` and both offload devices to none, as recipes/launch/zero3.yaml does.",
        )
    return True


def is_part(parameter: Tensor) -> bool:
    """Whether a parameter is spread over processes by DeepSpeed."""
    return hasattr(parameter, "ds_id")


class Engine:
    """What trains a student that is spread over processes.

    Args:
        model: the same one on every process; its parameters are spread, in place.
        head: a part of it that stays gathered.
        optimizer: AdamW over its trainable parameters, whose learning rate counts from then on, too.
        settings: the `distill` section.
    """

    def __init__(self, model: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, settings: Distill) -> None:
        import deepspeed  # type: ignore[import-not-found]  # an extra of its users

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings(
            "ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning
        )  # its own
        if not deepspeed.comm.is_initialized():
            deepspeed.comm.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
        configuration = {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": settings.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)
        self._head: list[Any] = [parameter for parameter in head.parameters() if is_part(parameter)]
        for parameter in self._head:
            parameter.ds_persist = parameter.is_external_param = True
        self.engine.optimizer.persistent_parameters.extend(self._head)
        self.hold_head()

    def hold_head(self) -> None:
        """Gather the head's weights, if they are not."""
        away = [parameter for parameter in self._head if not _is_here(parameter)]
        if away:
            away[0].all_gather(away)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add up the gradient of a micro-batch; gradients are averaged over the processes.

        Args:
            loss: scalar.
            last: of the step.
        """
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts it

    def step(self, problem: str) -> str:
        """Clip the gradient and let the optimizer take its step, unless there is a problem; returns why it did not."""
        if problem:
            self.engine.optimizer.averaged_gradients = {}
            self.engine.optimizer.zero_grad(set_to_none=True)
            self.engine.micro_steps += 1
            return problem
        self.engine.step()
        return "" if self.engine.was_step_applied() else "its gradient is not finite"


def _is_here(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Gather some parameters for the time of a block."""
    away = [parameter for parameter in parameters if is_part(parameter) and not _is_here(parameter)]
    if not away:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

    context: AbstractContextManager[Any] = GatheredParameters(away)
    return context


def whole(parameter: Tensor) -> Tensor:
    """A copy of the whole of a parameter; all processes have to ask for it."""
    with gathered([parameter]):
        return parameter.detach().clone()


def moments(parameter: Tensor) -> dict[str, Tensor]:
    """The whole moments of a parameter, by name; all processes have to ask for them."""
    from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore[import-not-found]

    return {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS} if parameter.requires_grad else {}


def overwrite(parameter: Tensor, weight: Tensor, state: dict[str, Tensor], step: int) -> None:
    """Set a parameter and its moments, on all processes alike.

    Args:
        parameter: spread over the processes.
        weight: whole.
        state: its moments, whole; none before its first gradient.
        step: steps that AdamW has taken.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with torch.no_grad():
        parameter.ds_tensor.copy_(_part_of(weight, parameter))  # type: ignore[attr-defined]
        if _is_here(parameter):
            parameter.copy_(weight)
    if not parameter.requires_grad:
        return
    safe_set_local_fp32_param(parameter, _part_of(weight, parameter))
    zero: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
    if not state:
        return
    for part in zero.fp32_partitioned_groups_flat:  # AdamW makes its state in the first step
        held = zero.optimizer.state[part]
        held["step"] = torch.tensor(float(step))
        for name in MOMENTS:
            held.setdefault(name, torch.zeros_like(part))
    for name, value in state.items():
        safe_set_local_optimizer_state(parameter, _part_of(value, parameter), name)


def _part_of(whole: Tensor, parameter: Any) -> Tensor:
    """What this process holds of a tensor; the last part is filled up with zeros."""
    size = parameter.ds_tensor.ds_numel
    missing = size * devices.process_count() - whole.numel()
    return torch.nn.functional.pad(whole.flatten(), (0, missing)).split(size)[devices.process_index()]
