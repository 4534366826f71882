"""How much memory a training takes, known before a weight is loaded.

Weights, gradients and moments follow from shapes. Activations are counted: the student runs once on tensors that have
shapes and no data (PyTorch's fake tensors), and what autograd saves for the backward pass is added up, whatever family
the model is of. The rest is what the losses hold of the vocabulary's logits, and the program itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edgerazor import devices, formats, kernels, models, modules
from edgerazor.formats import MatrixSpec
from edgerazor.losses.core.logit_losses import CHUNK_ELEMENTS
from edgerazor.models import PreTrainedModel
from edgerazor.modules import InitialWeight
from edgerazor.recipe import Distill
from edgerazor.training.objective import CACHED_LOGITS

#: Chunks of logits that the losses hold at a time: of the student, of the teacher, their gradient, and one in work.
CHUNKS = 4
#: On a CPU, memory of activations over their bytes, since glibc keeps freed blocks between those in use (measured:
#: recipes/results/training.md). With `MALLOC_MMAP_THRESHOLD_=1048576` it is about 1, and a step takes a fifth longer.
HEAP = {torch.float32: 1.36, torch.bfloat16: 1.55}
#: The same of chunks of logits, which are float32, where activations are computed again; where they are kept, `HEAP` of
#: these, which are more, has it in it.
HEAP_LOGITS = HEAP[torch.float32]
#: On a CPU, bytes for each weight that loading and saving leave between blocks in use; measured likewise. Beside a
#: streamed teacher there is neither, since each large block is mapped by itself then (`models.map_large_blocks`).
FRAGMENTS = 2


@dataclass(frozen=True)
class TrainedShape:
    """What a training's memory depends on.

    Attributes:
        model: its configuration and shapes; weights may be missing.
        specs: module path -> formats, for each matrix.
        computing: how the student computes.
        dtype: of products.
        length: tokens of a sequence.
        weights: trained or not, all that the student holds in float32.
        trained: those that have a gradient and moments.
        teacher_bytes: of the weights of all teachers, as they are in memory.
    """

    model: PreTrainedModel
    specs: Mapping[str, MatrixSpec]
    computing: modules.Settings
    dtype: torch.dtype
    length: int
    weights: int
    trained: int
    teacher_bytes: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training holds at its fullest, by what they are for.

    Attributes:
        program: of the process before anything of a model is there, and fragments; nothing on an accelerator.
        weights: float32 master weights.
        moments: AdamW's two; of Adafactor means of rows and columns.
        gradients: of all trained weights; with Adafactor of one at a time.
        teacher: weights of the teachers.
        activations: that autograd keeps of the student between forward and backward pass, and what the C library adds.
        logits: chunks of logits, the teachers' cached ones, the decoded head and its gradient.
        rounded: all rounded weights, which a step keeps.
        decoded: all matrices decoded at once, in an evaluation.
        accumulates: whether gradients of earlier micro-batches are there while activations are.
    """

    program: int
    weights: int
    moments: int
    gradients: int
    teacher: int
    activations: int
    logits: int
    rounded: int
    decoded: int
    accumulates: bool

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step or an evaluation.

        As a backward pass goes on, it frees activations and makes gradients.
        """
        always = self.program + self.weights + self.moments + self.teacher
        forward = self.activations + self.logits
        step = forward + self.gradients if self.accumulates else max(forward, self.gradients)
        return always + max(step + self.rounded, self.decoded + self.logits)


def step_memory(shape: TrainedShape, settings: Distill, device: torch.device) -> StepMemory:
    """What a training of this shape holds.

    Args:
        shape: of the training.
        settings: the `distill` section: batch, accumulation, checkpointing.
        device: that trains.
    """
    counted, on_cpu = saved_bytes(shape, settings.gradient_checkpointing), device.type == "cpu"
    text = shape.model.config.get_text_config()
    tokens, vocabulary, width = settings.batch_size * shape.length, text.vocab_size, text.hidden_size
    chunk = 4 * min(CHUNK_ELEMENTS, tokens * vocabulary)
    cached = 4 * tokens * vocabulary * settings.accumulation
    head = vocabulary * width * (shape.dtype.itemsize + 4)
    in_place, sizes = settings.optimizer == "adafactor", [weight.shape for weight in shape.model.parameters()]
    largest = max(size.numel() for size in sizes)
    factored = sum(size.numel() * (size[0] + size[-1]) // (size[0] * size[-1]) for size in sizes if len(size) > 1)
    keeps = settings.cache_rounding
    in_heap = on_cpu and settings.teacher_source != "streamed"
    of_logits = HEAP_LOGITS if in_heap and settings.gradient_checkpointing else 1.0
    return StepMemory(
        program=(devices.resident_memory() + FRAGMENTS * shape.weights * in_heap) if on_cpu else 0,
        weights=4 * shape.weights,
        moments=4 * factored if in_place else 8 * shape.trained,
        gradients=4 * largest if in_place and settings.accumulation == 1 else 4 * shape.trained,
        teacher=shape.teacher_bytes,
        activations=round(counted * settings.batch_size * (HEAP.get(shape.dtype, 1.0) if in_heap else 1.0)),
        logits=round((CHUNKS * chunk + (cached if cached <= 4 * CACHED_LOGITS else 0) + head) * of_logits),
        rounded=shape.dtype.itemsize * shape.weights if keeps else 0,
        decoded=4 * (shape.weights if keeps else largest),
        accumulates=settings.accumulation > 1,
    )


def saved_bytes(shape: TrainedShape, checkpointed: bool) -> float:
    """Bytes that autograd saves of one sequence, parameters not counted.

    With checkpointing, the inputs of all layers, and everything of the one that is computed again.
    """
    whole = _counted(shape, checkpointed=False)
    if not checkpointed:
        return whole
    layers = models.structure(shape.model).layer_count
    return _counted(shape, checkpointed=True) + whole / layers


def _counted(shape: TrainedShape, checkpointed: bool) -> float:
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # kept, so that none takes another's number
        return tensor

    with _fake_student(shape, checkpointed) as student:
        own = {tensor.untyped_storage()._cdata for tensor in (*student.parameters(), *student.buffers())}
        ids = torch.zeros(1, shape.length, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=shape.dtype == torch.bfloat16):
            student.get_decoder()(input_ids=ids, use_cache=False)
        return float(sum(storage.nbytes() for number, storage in storages.items() if number not in own))


@contextmanager
def _fake_student(shape: TrainedShape, checkpointed: bool) -> Iterator[PreTrainedModel]:
    """The student in training mode, of shapes alone."""
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.shapes_only():
        student = type(shape.model)(shape.model.config)
        matrices = {target.name: target for target in models.structure(student).targets}

        def initial(name: str) -> InitialWeight:
            rows, columns = matrices[name].rows, matrices[name].columns
            groups = formats.group_count(columns, shape.specs[name].group_size)
            return InitialWeight(torch.empty(rows, columns), torch.empty(rows, groups, dtype=torch.float16))

        modules.prepare_for_training(
            student, models.structure(student), shape.specs, shape.computing, initial_weight=initial
        )
        for module in student.modules():
            if isinstance(module, modules.FakeQuantWeight):
                module.decoded_cache = module.weight.detach()
        if checkpointed:
            models.checkpoint_activations(student)
        student.config.use_cache = False
        yield student.train()
