"""What number formats, losses and plans compute on fixed inputs: what stands for the code in a row's fingerprint.

A stored row is worth what the code computes, not how it is written. Source text in the fingerprint would make every row
stale with every renaming, so results stand there: codes, scales, packed bytes and gradients of a small matrix in each
format, value and gradients of each loss on small outputs, and the plan of a tiny model. Codes and bytes count exactly.
Floating point results are rounded to `DIGITS` digits, so that another machine's order of additions does not show.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import formats, losses, models, pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.formats import MatrixSpec
from edgerazor.workdir import WorkDir, digest_json
from recipes.benchmarks.folders import WORLD

DIGITS = 4
LAYERS, HIDDEN, VOCABULARY, LENGTH = 4, 6, 37, 9
#: What calibrate might have measured of a model's layers.
MEASURED = {"cosine": [0.9, 0.2, 0.8, 0.3], "l2": [1.0, 2.0, 5.0, 4.0], "variance": [4.0, 3.0, 2.0, 1.0]}


def normal(seed: int, *shape: int) -> Tensor:
    """Fixed normal numbers, float64 of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(*tensors: Tensor) -> str:
    """Digest of codes, fp16 scales or bytes."""
    return digest_json([[list(tensor.shape), tensor.flatten().tolist()] for tensor in tensors])


def roughly(*tensors: Tensor) -> list[str]:
    """Sum, size and a weighted sum of floating point tensors, to `DIGITS` digits."""
    sums = []
    for tensor in (tensor.detach().double().flatten() for tensor in tensors):
        sums += [tensor.sum(), tensor.norm(), tensor @ torch.arange(1.0, len(tensor) + 1, dtype=torch.float64).sin()]
    return [f"{float(value):.{DIGITS - 1}e}" for value in sums]


@functools.cache
def of_formats() -> str:
    """Digest of weights in every format by every rule of scales, of what trains them, and of activations."""
    weights = (normal(0, 24, 72) * (1 + normal(1, 24, 1).exp())).float()
    inputs = normal(2, 200, 72)
    hessian = inputs.T @ inputs / 200
    facts: dict[str, Any] = {}
    for name in formats.names():
        for published in (False, True):
            spec = MatrixSpec((name,), 32, published=published)
            encoded = formats.encode_matrix(weights, spec)
            scales = formats.initial_scales(weights, spec).requires_grad_()
            trained = weights.clone().requires_grad_()
            (formats.fake_quantize_matrix(trained, spec) * inputs[:24].float()).sum().backward()
            learned = formats.learned_weight(weights, scales.detach(), spec)
            target = formats.ste_target(weights.clone().requires_grad_(), scales, spec)
            (step,) = torch.autograd.grad((target * inputs[:24].float()).sum(), scales)
            facts[f"{name} {published}"] = [
                exactly(*encoded, *formats.pack_matrix(encoded, spec).values()),
                roughly(formats.decode_matrix(encoded, spec), trained.grad, learned, step),
            ]
        spec = MatrixSpec((name,), 32)
        compensated, scales = formats.gptq_quantize(weights, spec, hessian)
        clipped = formats.search_scales(weights, spec, hessian.diagonal().float())
        facts[f"{name} init"] = roughly(compensated, scales, clipped)
    x = inputs.float()
    rounded = [formats.fake_quantize_activations(x, 8, 32), formats.fake_quantize_kv(x, 8)]
    rounded += [formats.fake_quantize_probabilities(x.softmax(-1), 8)]
    rounded += [
        formats.fake_quantize_static(x, 8, torch.tensor(formats.calibrated_scale(formats.magnitude_counts(x), 8)))
    ]
    facts["activations"] = roughly(*rounded)
    return digest_json(facts)


def outputs(seed: int) -> losses.Outputs:
    """What a small model might say of two texts, float64; all tensors want gradients."""
    draw = iter(range(100 * seed, 100 * seed + 99))

    def tensor(*shape: int) -> Tensor:
        return (2 * normal(next(draw), *shape)).requires_grad_()

    attention = {
        layer: losses.Attention(tensor(2, 4, LENGTH, 5), tensor(2, 2, LENGTH, 5), tensor(2, 2, LENGTH, 3), scale=0.3)
        for layer in range(1, LAYERS + 1)
    }
    hidden = {layer: tensor(2, LENGTH, HIDDEN) for layer in range(LAYERS + 1)}
    return losses.Outputs(tensor(2, LENGTH, VOCABULARY), hidden, attention=attention)


@functools.cache
def of_loss(name: str) -> str:
    """Digest of the value and the gradients of a loss with its default options."""
    loss, student, teacher = losses.make(name), outputs(1), outputs(2)
    loss.choose_layers(LAYERS, MEASURED)
    labels = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY
    labels[0, 3] = losses.MASKED
    samples, tokens = losses.step_counts(labels)
    sums = loss.teacher_statistics(teacher, labels)
    totals = losses.StepTotals(samples, tokens, {key: float(value) / samples for key, value in sums.items()})
    value = losses.objective([(1.0, loss)], student, teacher, labels, totals)
    value.backward()
    parts = [student.states, *student.hidden.values()]
    parts += [part for of in student.attention.values() for part in (of.query, of.key, of.value) if part is not None]
    return digest_json(roughly(value, *(part.grad for part in parts if part.grad is not None)))


@functools.cache
def of_plans() -> str:
    """Digest of the plans by sensitivity of a tiny random model, at both granularities, by every estimate."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    facts = []
    with tempfile.TemporaryDirectory() as place, models.quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(WORLD / "teacher")
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained(place)
        tokenizer.save_pretrained(place)
        text = {"train": [{"file": str(WORLD / "heldout.txt")}], "sequence_length": 64}
        for number, (granularity, bits) in enumerate((("row", 1.88), ("tensor", 2.5))):
            settings = {"bits": bits, "granularity": granularity, "sequences": 4, "sensitivity_tokens": 256}
            recipe = recipes.build({"model": place, "data": text, "calibrate": {**settings, "group_size": 32}})
            made: Any = pipeline.run("calibrate", recipe, WorkDir(Path(place) / str(number)), Console(quiet=True))
            facts.append([made.estimate, f"{made.predicted_kl:.2e}", f"{made.nominal_bits:.3f}", made.formats])
    return digest_json(facts)
