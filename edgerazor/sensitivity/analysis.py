"""Sensitivity: how much a row in a format hurts the teacher's output, in nats of KL per token.

Let `d` be what rounding a row changes in its output for one token, and `g` the gradient of something of the model's
output with respect to it. Four estimates of the sensitivity of one row to one format, by their names in a recipe:

* `hessian`: `E[x²] · (ŵ - w)² / 2`, the error of the layer's own output (GPTQ's and imatrix's quantity), not in nats.
* `fisher`: `E[(g d)²] / 2`, where `g` is the Fisher gradient: that of the log-probability of labels sampled from the
  teacher. It is the second-order expansion of KL around the teacher with the Fisher matrix for its Hessian; what is
  left out is that rows and tokens act together. `(g d)²` is taken for each token with the actual `d`, not as a product
  of two means.
* `integrated`: integrated gradients (Sundararajan et al., arXiv 1703.01365). The gradient of the KL itself, at weights
  `w + a (ŵ - w)` between the teacher and a model that has the format everywhere, times `ŵ - w`, averaged over `a`. The
  sensitivities of all rows add up to the KL of that model, which holds however large it is; what an expansion around
  the teacher says of a model that rounding destroys means little. But the sensitivity of one row is the small
  difference of large terms of both signs, so where the KL is small this estimate is the noisier one.
* `direct`: ablation. One tensor at a time gets the format, and the KL is measured, shared out to its rows as `fisher`
  has it. The truth that the others are compared with, for small models: it takes a pass for every tensor and format.

What a whole matrix does is another question, since its rows act together on a token. The per-matrix second order
(`alone/` in files) is `E[(Σ g d)²] / 2` with the sum over its rows, from the same backward pass as `fisher`. It says
how matrices compare, and plans are not made of it: rows of one matrix in several formats do not act as one.

In a mixture of experts a token's error reaches the output times the weight that its router gave the expert, so all of
these weigh an expert by how often and how strongly tokens go there: `g` has that weight in it, and `x` is multiplied
with it. Of an expert that no token went to nothing is known, and all its sensitivities are 0.

`auto` makes plans with `fisher`, with `integrated` and with `combined` (the sensitivity of tensors by `integrated`,
that of the rows within them by `fisher`), measures the KL of each (embedding, head and activations as they are), and
keeps the best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgerazor import devices, formats, models
from edgerazor.console import Console, is_main_process
from edgerazor.formats import MatrixSpec
from edgerazor.models import LayerwisePass, PreTrainedModel, Structure, WeightTransform
from edgerazor.modules import quantize_attention
from edgerazor.sensitivity.gradients import (
    PER_MATRIX,
    FisherSensitivity,
    IntegratedGradients,
    split_rows_and_matrices,
)
from edgerazor.sensitivity.output_head import OutputHead
from edgerazor.sensitivity.rounding import RoundedWeights
from edgerazor.workdir import write_atomically

#: Positions that tell of a head what its formats do: one number each, while all of 5,000 positions take a vocabulary of
#: 262,144 tokens (Gemma 3 270M, one core) longer than everything else that is measured.
HEAD_POSITIONS = 1024
#: Bits of the KV caches whose KL is reported.
KV_BITS = (8, 4)

#: Token ids int64 [B, T] and the positions that count, bool [B, T], of each micro-batch.
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass
class SensitivityAnalysis:
    """A teacher, some text, and a folder in which finished parts are stored until all of them are.

    Attributes:
        model: the teacher; its KV cache may be rounded in between.
        structure: where its matrices are.
        logit_shape: what its family does to logits (see `models.logit_shape`).
        batches: token ids and the positions that count, of all processes.
        make_pass: gives a new pass of a name, with transformed weights, for this process's batches.
        folder: for finished parts of this analysis only.
        names: the candidate formats.
        group_size: number of weights of a row that share a scale.
        points: where integrated gradients are taken: the middles of so many equal parts of the line from teacher to
            rounded model.
        seed: of the labels that are sampled.
        identity: of everything that decides the result; stored parts of another identity are ignored.
        console: where the progress is shown.
        published: whether to round with the scales of the formats' published rules.
        rotation: of weights before they are rounded, as the recipe calls it.
    """

    model: PreTrainedModel
    structure: Structure
    logit_shape: tuple[float, float | None]
    batches: Batches
    make_pass: Callable[[str, WeightTransform | None], LayerwisePass]
    folder: Path
    names: tuple[str, ...]
    group_size: int
    points: int
    seed: int
    identity: str
    console: Console
    published: bool = False
    rotation: str | None = None

    def __post_init__(self) -> None:
        self.own = devices.share_of(range(len(self.batches)))
        self.head = OutputHead(self.model, self.structure, self.logit_shape)
        self.teacher_pass = self.make_pass("teacher", None)
        self.teacher_pass.forward(title="sensitivity: the teacher")
        self.head_inputs = self._head_inputs(self.teacher_pass.outputs(), self.teacher_pass)
        self.tokens = sum(int(counts.sum()) for _, counts in self.batches)

    def spec(self, name: str, columns: int) -> MatrixSpec:
        """A matrix of so many columns all in one format."""
        rotation = formats.find_rotation(self.rotation, columns)
        return MatrixSpec((name,), self.group_size, published=self.published, rotation=rotation)

    def stored_or_computed(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that were stored under this name before an interruption, or else are computed and stored now.

        What is computed are sums over batches, so those of several processes are added up.
        """
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == self.identity:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            pass
        tensors = summed(compute())
        if is_main_process():
            write_atomically(path, lambda path: save_file(tensors, path, {"identity": self.identity}))
        devices.wait_for_everyone()
        return tensors

    # --- estimates: module path -> float64 [formats, rows] ([formats, 1] of embedding and head) ---

    def estimate(self, name: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The estimate that a recipe calls by a name: fisher, integrated, hessian or direct.

        Args:
            name: of the estimate.
            moments: second moments of the inputs of linear layers, path -> float32 [in], for hessian.
        """
        if name == "hessian":
            return self.hessian(moments)
        estimates = {"fisher": self.fisher, "integrated": self.integrated_gradients, "direct": self.ablation}
        return estimates[name]()

    def fisher(self) -> dict[str, Tensor]:
        """The estimate `fisher`. The embedding's is of the rows that were looked up; the head's samples no labels."""
        return split_rows_and_matrices(self.stored_or_computed("fisher", self._fisher))[0]

    def per_matrix(self) -> dict[str, Tensor]:
        """The per-matrix second order of all matrices: module path -> float64 [formats]."""
        return split_rows_and_matrices(self.stored_or_computed("fisher", self._fisher))[1]

    def _fisher(self) -> dict[str, Tensor]:
        """Sensitivities of rows and of whole matrices, as `split_rows_and_matrices` takes them."""
        specs = [MatrixSpec((name,), self.group_size, published=self.published) for name in self.names]
        observer = FisherSensitivity(self.structure, specs, self.rotation)

        def upstream(number: int, states: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed + self.own[number])
            return self._through_final_norm(
                self.teacher_pass, number, states, lambda x: self.head.fisher_gradient(x, generator)
            )

        self.teacher_pass.backward(upstream, observer, title="sensitivity: fisher", identity=str(self.seed))
        rows = self._of_all(observer.rows, len(self.names))
        rows |= {
            table.name: self._embedding(table.name) for table in (self.structure.embedding, *self.structure.tables)
        }
        of_head = self._head()
        name = self.structure.head.name if self.structure.head else self.structure.embedding.name
        rows[name] = rows[name] + of_head if name in rows else of_head
        matrices = {path: value / self.tokens for path, value in observer.matrices.items()}
        matrices |= {path: value.sum(1) for path, value in rows.items() if path not in matrices and not value.any()}
        matrices |= {path: value[:, 0].clone() for path, value in rows.items() if path not in matrices}
        return rows | {PER_MATRIX + path: value for path, value in matrices.items()}

    def _through_final_norm(
        self, layer_pass: LayerwisePass, number: int, states: Tensor, head_gradient: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Gradient with respect to the outputs of the last layer, [B, T, H], from one with respect to head inputs."""
        counts = layer_pass.batches[number][1].to(states.device)
        with torch.enable_grad():
            outputs = states.detach().requires_grad_()
            final = layer_pass.final(outputs)
            flat = final.flatten(0, 1)
            upstream = torch.zeros_like(flat)
            upstream[counts.flatten()] = head_gradient(flat.detach()[counts.flatten()])
            return torch.autograd.grad(flat, outputs, upstream)[0]

    def _embedding(self, table: str) -> Tensor:
        """`E[(g · (ê - e))²] / 2` over looked up rows of an embedding, as inputs of the first layer, or behind these as
        inputs of single layers (Gemma 4); float64 [formats, 1].

        What Gemma 4 makes of hidden states for single layers is left out.
        """
        blocks = self.teacher_pass.blocks
        first = table == self.structure.embedding.name
        part = blocks.hidden if first else blocks.beside
        total = torch.zeros(len(self.names), 1, dtype=torch.float64)
        for number, gradient in enumerate(self.teacher_pass.input_gradients()):
            origin = self.teacher_pass.inputs(number, torch.zeros_like, table)
            for index, name in enumerate(self.names):
                # Both parts are affine in the rows, since some families multiply them.
                error = self.teacher_pass.inputs(number, functools.partial(self._row_errors, name), table) - origin
                products = part(gradient).float() * part(error).float()
                total[index] += float(products.sum(-1).double().square().sum()) / 2
        return total / self.tokens

    def _row_errors(self, name: str, rows: Tensor) -> Tensor:
        """What a format changes in looked up rows [B, T, H]."""
        flat = rows.flatten(0, 1).float()
        return (formats.rounded_weight(flat, self.spec(name, flat.shape[1])) - flat).view_as(rows)

    def _head(self) -> Tensor:
        """Second-order KL of the head alone, float64 [formats, 1]; of long text, from every so many positions."""
        specs = [self.spec(name, self.head.weight.shape[1]) for name in self.names]
        stride = math.ceil(self.tokens / HEAD_POSITIONS)
        total = torch.zeros(len(specs), dtype=torch.float64)
        for x in self.head_inputs:
            read = x[::stride]
            total += self.head.second_order(read, specs) * (len(x) / max(1, len(read)))
        return total[:, None] / self.tokens

    @torch.no_grad()
    def _head_inputs(self, outputs: Iterable[Tensor], layer_pass: LayerwisePass) -> list[Tensor]:
        """Inputs of the head, [n, H] of the positions that count, from the last layer's outputs, for each batch."""
        pairs = zip(layer_pass.batches, outputs, strict=True)
        return [layer_pass.final(states)[counts.to(states.device)] for (_, counts), states in pairs]

    def integrated_gradients(self) -> dict[str, Tensor]:
        """The estimate `integrated`; of linear layers only, and negative sensitivities count as none."""
        by_format = [self._integrated_gradients(name) for name in self.names]
        return {path: torch.stack([rows[path] for rows in by_format]).clamp(min=0) for path in by_format[0]}

    def _integrated_gradients(self, name: str) -> dict[str, Tensor]:
        """Integrated gradients of one format: module path -> float64 [rows]."""
        by_point = [
            self.stored_or_computed(f"{name}-{share:.3f}", functools.partial(self._gradients_at, name, share))
            for share in self.shares()
        ]
        return {path: torch.stack([rows[path] for rows in by_point]).mean(0) for path in by_point[0]}

    def shares(self) -> list[float]:
        """The points between teacher (0) and rounded model (1) where gradients are taken."""
        return [(number + 0.5) / self.points for number in range(self.points)]

    def _gradients_at(self, name: str, share: float) -> dict[str, Tensor]:
        """KL gradient times `ŵ - w` at one point, for one format: module path -> float64 [rows]."""
        specs = {target.name: self.spec(name, target.columns) for target in self.structure.linears}
        rounded = RoundedWeights(self.structure, specs, share)
        layer_pass = self.make_pass(f"{name}-{share:.3f}", rounded)
        title = f"sensitivity: {name} at {share:.0%}"
        layer_pass.forward(title=title)
        observer = IntegratedGradients(rounded)

        def upstream(number: int, states: Tensor) -> Tensor:
            teacher = self.head_inputs[number]
            return self._through_final_norm(layer_pass, number, states, lambda x: self.head.kl_gradient(x, teacher))

        layer_pass.backward(upstream, observer, title=title)
        layer_pass.clear()
        return self._of_all(observer.rows)

    def _of_all(self, sums: Mapping[str, Tensor], *shape: int) -> dict[str, Tensor]:
        """Means over tokens of sums [*shape, rows] of linear layers: zeros for an expert that no token went to."""
        missing = {
            target.name: torch.zeros(*shape, target.rows, dtype=torch.float64)
            for target in self.structure.linears
            if target.name not in sums
        }
        return missing | {path: value / self.tokens for path, value in sums.items()}

    def hessian(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The estimate `hessian`, from the second moments of inputs, path -> float32 [in]; not in nats."""
        sensitivities = {}
        for target in self.structure.linears:
            weight = self.model.get_submodule(target.name).weight.detach().float()
            specs = [self.spec(name, target.columns) for name in self.names]
            weight = specs[0].rotate(weight)  # the basis that moments are of
            errors = [formats.quantize_dequantize(weight, spec).sub_(weight).square_() for spec in specs]
            sensitivities[target.name] = torch.stack([(error @ moments[target.name]).double() / 2 for error in errors])
        return sensitivities

    def ablation(self) -> dict[str, Tensor]:
        """The estimate `direct`; of linear layers only."""
        fisher = self.fisher()
        measured = self.stored_or_computed("direct", self._ablation)
        return combined(fisher, {path: value[:, None] for path, value in measured.items()})

    def _ablation(self) -> dict[str, Tensor]:
        """Module path -> float64 [formats]: the KL where that tensor alone has the format."""
        measured = {}
        with self.console.track("sensitivity: one tensor at a time", len(self.structure.linears)) as tracker:
            for target in self.structure.linears:
                specs = [self.spec(name, target.columns) for name in self.names]
                values = [self.measure({target.name: spec}, target.layer or 0) for spec in specs]
                measured[target.name] = torch.tensor(values, dtype=torch.float64).clamp(min=0)
                tracker.advance()
        return measured

    # --- measuring ---

    @torch.no_grad()
    def measure(self, specs: Mapping[str, MatrixSpec], first: int = 0) -> float:
        """KL per token to the teacher, in nats, of a model in which some linear layers are rounded.

        Args:
            specs: module path -> formats, of the rounded ones.
            first: a decoder layer before which none is rounded; the pass begins there.
        """
        layer_pass = self.make_pass("measure", RoundedWeights(self.structure, specs))
        outputs = layer_pass.forward_from(first, self.teacher_pass.layer_inputs(first))
        pairs = zip(self._head_inputs(outputs, layer_pass), self.head_inputs, strict=True)
        own = sum(self.head.divergence(ours, theirs) for ours, theirs in pairs)
        return sum(devices.all_values(own)) / self.tokens

    def measure_kv_caches(self) -> dict[str, float] | None:
        """KL per token, in nats, of rounded keys and values alone, `int8` and `int4`; None where the model's attention
        cannot be exchanged for a quantized one."""
        if not models.has_attention_interface(self.model):
            return None
        implementation, divergences = self.model.config.get_text_config()._attn_implementation, {}
        for bits in KV_BITS:
            quantize_attention(self.model, bits)
            divergences[f"int{bits}"] = self.measure({})
            models.set_attention(self.model, implementation)
        return divergences


def summed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all processes' tensors, by name."""
    if devices.process_count() == 1:
        return tensors
    parts = devices.all_values({name: tensor.cpu() for name, tensor in tensors.items()})
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in tensors}


def combined(fisher: Mapping[str, Tensor], integrated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sensitivity of each tensor by `integrated`, shared out to its rows as `fisher` has it."""
    shares = {path: fisher[path] / fisher[path].sum(1, keepdim=True).clamp(min=1e-30) for path in integrated}
    return {path: shares[path] * rows.sum(1, keepdim=True) for path, rows in integrated.items()}
