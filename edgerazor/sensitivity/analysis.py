"""How much a row in a format hurts the teacher's output: estimates in nats of KL per token.

Let `d` be what rounding a row changes in its output for one token, and `g` the gradient of something of the model's
output with respect to it. Four estimates of the damage of one row in one format:

* `hessian`: `E[x²] · (ŵ - w)² / 2`, the error of the layer's own output (GPTQ's and imatrix's quantity), not in nats.
* `fisher`: `E[(g d)²] / 2`, where `g` is the gradient of the log-probability of labels drawn from the teacher. The
  second-order expansion of KL around the teacher with the Fisher matrix for its Hessian; what is left out is that rows
  and tokens act together. `(g d)²` is taken for each token with the actual `d`, not as a product of two means.
* `integrated`: the gradient of the KL itself, where the weights are part of the way `w + a (ŵ - w)` from the teacher to
  a model that has the format everywhere, times the whole way, averaged over `a` (integrated gradients; Sundararajan et
  al., arXiv 1703.01365). The damages of all rows add up to the KL of that model, which holds however large it is; what
  an expansion around the teacher says of a model that rounding destroys means little. But the damage of one row is
  the small difference of large terms of both signs, so with little damage the estimate is the noisier one.
* `direct`: one tensor at a time gets the format, and the KL is measured, shared out to its rows as `fisher` has it. The
  truth that the others are compared with, for small models: it takes a walk for every tensor and format.

What a whole matrix does alone is another question, since its rows act together on a token: `alone` is `E[(Σ g d)²] / 2`
with the sum over its rows, from the same way back as `fisher`. It says how matrices compare, and plans are not made of
it: rows of one matrix in several formats do not act as one.

`auto` makes plans with `fisher`, with `integrated` and with `combined` (the damage of tensors by `integrated`, that of
the rows within them by `fisher`), measures the KL of each (embedding, head and activations as they are), and keeps the
best.
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

from edgerazor import formats, models
from edgerazor.console import Console
from edgerazor.formats import MatrixSpec
from edgerazor.losses import Head
from edgerazor.models import LayerwisePass, Observer, PreTrainedModel, Structure
from edgerazor.modules import attention
from edgerazor.workdir import write_atomically

#: Logits in one piece of work.
LOGITS = 1 << 24
#: Tokens to study a model on where nobody says how many: on a CPU, on a GPU.
MOST_TOKENS, MOST_ON_GPU, FEWEST_TOKENS = 1 << 14, 1 << 16, 1 << 11
#: Between these, tokens times weights on a CPU (2,048 tokens of 600 million weights: four minutes of two cores), and
#: how many times that on a GPU.
AFFORDABLE, FASTER = (1 << 11) * 600_000_000, 16
#: What the names of damages of whole matrices begin with.
ALONE = "alone/"
#: Bits of keys and values whose damage is reported.
CACHES = (8, 4)

Batches = Sequence[tuple[Tensor, Tensor]]
#: Weight of a module's path -> what takes its place.
Change = Callable[[str, Tensor], Tensor]


# --- weights on the way ------------------------------------------------------------------------


class OfOneLayer:
    """What was computed for the linear layers of the decoder layer in work; forgotten when another one begins."""

    def __init__(self, found: Structure) -> None:
        self._layers = {site.name: site.layer for site in found.linears}
        self._layer: int | None = None
        self._kept: dict[str, Tensor] = {}

    def get(self, path: str, compute: Callable[[], Tensor]) -> Tensor:
        """Of a linear layer, computed where it is not there yet."""
        if self._layers[path] != self._layer:
            self._layer, self._kept = self._layers[path], {}
        if path not in self._kept:
            self._kept[path] = compute()
        return self._kept[path]


class Rounded:
    """Changes weights of linear layers to what formats make of them, or part of the way.

    Args:
        found: the matrices.
        specs: module path -> formats; others stay as they are.
        share: of the way.
    """

    def __init__(self, found: Structure, specs: Mapping[str, MatrixSpec], share: float = 1.0) -> None:
        self.specs, self.share = specs, share
        self._errors = OfOneLayer(found)

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The changed weight [rows, columns], in the dtype of the given one."""
        return weight + self.share * self.error(path, weight) if path in self.specs else weight

    def error(self, path: str, weight: Tensor | None = None) -> Tensor:
        """The whole way of a weight [rows, columns], which must be given the first time that its layer is in work."""

        def compute() -> Tensor:
            assert weight is not None
            return formats.quantize_dequantize(weight, self.specs[path]).sub_(weight).to(weight.dtype)

        return self._errors.get(path, compute)


# --- what is gathered on the way back ----------------------------------------------------------


class FisherDamage(Observer):
    """`E[(g d)²] / 2`, summed over tokens: `sums`, path -> float64 [formats, rows]; `alone`, path -> float64 [formats].

    Args:
        found: the matrices.
        specs: a matrix all in one format, for each of the formats.
    """

    def __init__(self, found: Structure, specs: Sequence[MatrixSpec]) -> None:
        self.specs = tuple(specs)
        self.sums: dict[str, Tensor] = {}
        self.alone: dict[str, Tensor] = {}
        self._errors = OfOneLayer(found)

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        def compute() -> Tensor:
            return torch.stack([formats.quantize_dequantize(weight, spec, weight.dtype) for spec in self.specs]).sub_(
                weight
            )

        rows, together = [], []
        for error in self._errors.get(path, compute):
            change = (x @ error.T).mul_(g).float()
            together.append(change.sum(1).square_().sum())
            rows.append(change.square_().sum(0))
        self.sums[path] = self.sums.get(path, 0) + torch.stack(rows).double().cpu() / 2
        self.alone[path] = self.alone.get(path, 0) + torch.stack(together).double().cpu() / 2

    def state(self) -> dict[str, Tensor]:
        return self.sums | {ALONE + path: value for path, value in self.alone.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sums, self.alone = parted(state)

    def identity(self) -> str:
        return str([(spec.formats, spec.group_size, spec.published) for spec in self.specs])


def parted(damages: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SensitivityTable of rows, and those of whole matrices, both by the module's path."""
    rows = {name: value for name, value in damages.items() if not name.startswith(ALONE)}
    return rows, {name.removeprefix(ALONE): value for name, value in damages.items() if name not in rows}


class PathDamage(Observer):
    """`Σ g · (ŵ - w)` per row, of weights that a `Rounded` has changed: path -> float64 [rows], summed over tokens."""

    def __init__(self, rounded: Rounded) -> None:
        self.rounded = rounded
        self.sums: dict[str, Tensor] = {}

    def gradient(self, path: str, weight: Tensor, x: Tensor, g: Tensor) -> None:
        found = (g.T @ x).float().mul_(self.rounded.error(path)).sum(1, dtype=torch.float64)
        self.sums[path] = self.sums.get(path, 0) + found.cpu()

    def state(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)


# --- the head ----------------------------------------------------------------------------------


class Output:
    """The head of a model, and what is computed from its logits, a piece at a time.

    Args:
        model, found: where the head is.
        shape: what the family does to logits, as `models.logit_shape` gives it before any walk through the model.
    """

    def __init__(self, model: PreTrainedModel, found: Structure, shape: tuple[float, float | None]) -> None:
        module = model.get_submodule(found.head_path)
        self.weight, self.bias = module.weight.detach(), module.bias
        self.shape = shape
        self.rows = max(1, LOGITS // self.weight.shape[0])

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """float32 [n, vocabulary] of what enters the head, [n, H]."""
        return self._head(x.dtype, weight).logits(x).float()

    def _head(self, dtype: torch.dtype, weight: Tensor | None = None) -> Head:
        if weight is None and self.weight.dtype != dtype:
            self.weight = self.weight.to(dtype)  # once, and not for every piece
        return Head((self.weight if weight is None else weight).to(dtype), self.bias, *self.shape)

    def drawn(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient, with respect to x [n, H], of the log-probabilities of labels drawn from the model."""

        def change(logits: Tensor, _rows: slice) -> Tensor:
            p = logits.softmax(-1)
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(x.device)
            return p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))

        return self._gradient(x, change)

    def away(self, x: Tensor, teacher: Tensor) -> Tensor:
        """The gradient, with respect to x [n, H], of the sum of KL(teacher || model)."""
        return self._gradient(x, lambda logits, rows: logits.softmax(-1).sub_(self.logits(teacher[rows]).softmax(-1)))

    @torch.no_grad()
    def divergence(self, x: Tensor, teacher: Tensor) -> float:
        """The sum of KL(teacher || model) over positions, in nats; both are what enters the head, [n, H]."""
        return float(sum(self._divergences(x[rows], teacher[rows]).double().sum() for rows in self._pieces(x)))

    def _divergences(self, x: Tensor, teacher: Tensor) -> Tensor:
        log_t = self.logits(teacher).log_softmax(-1)
        p = log_t.exp()
        return p.mul_(log_t.sub_(self.logits(x).log_softmax(-1))).sum(-1)

    @torch.no_grad()
    def damages(self, x: Tensor, specs: Sequence[MatrixSpec]) -> Tensor:
        """Half the variance of the change of logits under the model, summed over x [n, H]: float64 [formats].

        That is KL to second order when the head alone is rounded, here without drawing labels.
        """
        found = torch.zeros(len(specs), dtype=torch.float64)
        for index, spec in enumerate(specs):
            rounded = formats.quantize_dequantize(self.weight, spec, x.dtype)
            for rows in self._pieces(x):
                found[index] += float(self._variances(x[rows], rounded).double().sum()) / 2
        return found

    def _variances(self, x: Tensor, rounded: Tensor) -> Tensor:
        """Of the change of logits that a rounded weight makes, under the model: float32 [n] for x [n, H]."""
        logits = self.logits(x)
        change, p = self.logits(x, rounded).sub_(logits), logits.softmax(-1)
        del logits  # as large as all the others
        mean = (p * change).sum(-1)
        return (change.square_().mul_(p).sum(-1) - mean.square()).clamp(min=0)

    @torch.no_grad()
    def _gradient(self, x: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """With respect to x [n, H], from that with respect to the logits of some of its rows, float32 [rows, V]."""
        gradient, head = torch.empty_like(x), self._head(x.dtype)
        for rows in self._pieces(x):
            logits = self.logits(x[rows])
            gradient[rows] = head.through_(change(logits, rows), logits).to(x.dtype) @ head.weight
        return gradient

    def _pieces(self, x: Tensor) -> list[slice]:
        return [slice(at, at + self.rows) for at in range(0, len(x), self.rows)]


# --- the estimates -----------------------------------------------------------------------------


@dataclass
class SensitivityAnalysis:
    """A teacher, some text, and where what is found is kept until all of it is.

    Attributes:
        model, found: the teacher; its cache may be rounded in between.
        logit_shape: what its family does to logits (see `Output`).
        batches: token ids and the positions that count.
        walk_of: a new walk of that name through weights that are changed.
        folder: of what has been found so far, its own.
        names: the candidate formats.
        group_size: weights of a row that share a scale.
        points: where gradients are taken for `integrated`: the middles of so many equal parts of the way.
        seed: of the labels that are drawn.
        identity: of everything that decides what is found; what is kept of another study is not taken for this one's.
        console: where the progress is shown.
        published: round at the scales of the formats' published rules.
    """

    model: PreTrainedModel
    found: Structure
    logit_shape: tuple[float, float | None]
    batches: Batches
    walk_of: Callable[[str, Change | None], LayerwisePass]
    folder: Path
    names: tuple[str, ...]
    group_size: int
    points: int
    seed: int
    identity: str
    console: Console
    published: bool = False

    def __post_init__(self) -> None:
        self.output = Output(self.model, self.found, self.logit_shape)
        self.teacher = self.walk_of("teacher", None)
        self.teacher.forward(title="sensitivity: the teacher")
        self.entering_head = self._entering_head(self.teacher.leaving(), self.teacher)
        self.tokens = sum(int(counts.sum()) for _, counts in self.batches)

    def spec(self, name: str) -> MatrixSpec:
        return MatrixSpec((name,), self.group_size, published=self.published)

    def kept(self, name: str, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was found under that name before an interruption, or is found now."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == self.identity:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            pass
        found = find()
        write_atomically(path, lambda path: save_file(found, path, {"identity": self.identity}))
        return found

    # --- each estimate: module path -> float64 [formats, rows] ([formats, 1] of embedding and head) ---

    def fisher(self) -> dict[str, Tensor]:
        """See above. The embedding's damage is that of the rows that were looked up; the head's is exact."""
        return parted(self.kept("fisher", self._fisher))[0]

    def alone(self) -> dict[str, Tensor]:
        """See above: module path -> float64 [formats], also of embedding and head."""
        return parted(self.kept("fisher", self._fisher))[1]

    def _fisher(self) -> dict[str, Tensor]:
        """SensitivityTable of rows and of whole matrices, as `parted` takes them."""
        observer = FisherDamage(self.found, [self.spec(name) for name in self.names])

        def upstream(number: int, states: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed + number)
            return self._back(self.teacher, number, states, lambda x: self.output.drawn(x, generator))

        self.teacher.backward(upstream, observer, title="sensitivity: fisher", identity=str(self.seed))
        damages = {path: value / self.tokens for path, value in observer.sums.items()}
        damages[self.found.embedding.name] = self._embedding()
        head = self._head()
        name = self.found.head.name if self.found.head else self.found.embedding.name
        damages[name] = damages[name] + head if name in damages else head
        whole = {path: value / self.tokens for path, value in observer.alone.items()}
        whole |= {path: value[:, 0].clone() for path, value in damages.items() if path not in whole}
        return damages | {ALONE + path: value for path, value in whole.items()}

    def _back(self, walk: LayerwisePass, number: int, states: Tensor, of_final: Callable[[Tensor], Tensor]) -> Tensor:
        """Through the final norm: the gradient with respect to states [B, T, H], from one of what enters the head."""
        counts = self.batches[number][1].to(states.device)
        with torch.enable_grad():
            entering = states.detach().requires_grad_()
            final = walk.final(entering)
            flat = final.flatten(0, 1)
            upstream = torch.zeros_like(flat)
            upstream[counts.flatten()] = of_final(flat.detach()[counts.flatten()])
            return torch.autograd.grad(flat, entering, upstream)[0]

    def _embedding(self) -> Tensor:
        """`E[(g · (ê - e))²] / 2` over looked up rows, as they enter the first layer; float64 [formats, 1]."""
        total = torch.zeros(len(self.names), 1, dtype=torch.float64)
        for number, gradient in enumerate(self.teacher.returned()):
            origin = self.teacher.entering(number, torch.zeros_like)
            for index, name in enumerate(self.names):
                # What enters is affine in the rows: some families multiply them.
                error = self.teacher.entering(number, functools.partial(self._row_errors, name)) - origin
                total[index] += float((gradient * error).float().sum(-1).double().square().sum()) / 2
        return total / self.tokens

    def _row_errors(self, name: str, rows: Tensor) -> Tensor:
        """What a format changes in looked up rows [B, T, H]."""
        flat = rows.flatten(0, 1).float()
        return (formats.quantize_dequantize(flat, self.spec(name)) - flat).view_as(rows)

    def _head(self) -> Tensor:
        """Float64 [formats, 1]."""
        specs = [self.spec(name) for name in self.names]
        return sum(self.output.damages(x, specs) for x in self.entering_head)[:, None] / self.tokens

    @torch.no_grad()
    def _entering_head(self, leaving: Iterable[Tensor], walk: LayerwisePass) -> list[Tensor]:
        """What enters the head, [n, H] of the positions that count, for what leaves the last layer in each batch."""
        pairs = zip(self.batches, leaving, strict=True)
        return [walk.final(states)[counts.to(states.device)] for (_, counts), states in pairs]

    def integrated(self) -> dict[str, Tensor]:
        """See above; of linear layers only, negative damages are taken for none."""
        of_each = [self._integrated(name) for name in self.names]
        return {path: torch.stack([each[path] for each in of_each]).clamp(min=0) for path in of_each[0]}

    def _integrated(self, name: str) -> dict[str, Tensor]:
        """Of one format: module path -> float64 [rows]."""
        found = [self.kept(f"{name}-{a:.3f}", functools.partial(self._on_the_way, name, a)) for a in self.shares()]
        return {path: torch.stack([each[path] for each in found]).mean(0) for path in found[0]}

    def shares(self) -> list[float]:
        """Of the way, where gradients are taken."""
        return [(number + 0.5) / self.points for number in range(self.points)]

    def _on_the_way(self, name: str, share: float) -> dict[str, Tensor]:
        rounded = Rounded(self.found, {site.name: self.spec(name) for site in self.found.linears}, share)
        walk = self.walk_of(f"{name}-{share:.3f}", rounded)
        title = f"sensitivity: {name} at {share:.0%}"
        walk.forward(title=title)
        observer = PathDamage(rounded)

        def upstream(number: int, states: Tensor) -> Tensor:
            return self._back(walk, number, states, lambda x: self.output.away(x, self.entering_head[number]))

        walk.backward(upstream, observer, title=title)
        walk.clear()
        return {path: value / self.tokens for path, value in observer.sums.items()}

    def hessian(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See above, from the second moments of inputs, float32 [in]; not in nats."""
        damages = {}
        for site in self.found.linears:
            weight = self.model.get_submodule(site.name).weight.detach().float()
            errors = [
                formats.quantize_dequantize(weight, self.spec(name)).sub_(weight).square_() for name in self.names
            ]
            damages[site.name] = torch.stack([(error @ moments[site.name]).double() / 2 for error in errors])
        return damages

    def direct(self) -> dict[str, Tensor]:
        """See above."""
        fisher = self.fisher()
        measured = self.kept("direct", self._direct)
        return combined(fisher, {path: value[:, None] for path, value in measured.items()})

    def _direct(self) -> dict[str, Tensor]:
        """Module path -> float64 [formats]: KL where that tensor alone has the format."""
        measured = {}
        with self.console.track("sensitivity: one tensor at a time", len(self.found.linears)) as tracker:
            for site in self.found.linears:
                specs = [{site.name: self.spec(name)} for name in self.names]
                values = [self.measure(each, site.layer or 0) for each in specs]
                measured[site.name] = torch.tensor(values, dtype=torch.float64).clamp(min=0)
                tracker.advance()
        return measured

    # --- measuring ---

    @torch.no_grad()
    def measure(self, specs: Mapping[str, MatrixSpec], first: int = 0) -> float:
        """KL per token, in nats, to the teacher, where these linear layers are rounded, none of them before `first`."""
        walk = self.walk_of("measure", Rounded(self.found, specs))
        leaving = walk.onwards(first, self.teacher.entered(first))
        pairs = zip(self._entering_head(leaving, walk), self.entering_head, strict=True)
        return sum(self.output.divergence(ours, theirs) for ours, theirs in pairs) / self.tokens

    def caches(self) -> dict[str, float] | None:
        """KL per token of keys and values in a few bits alone; None where the model lets nothing be put before them."""
        if not models.exchangeable_attention(self.model):
            return None
        before, found = self.model.config._attn_implementation, {}
        for bits in CACHES:
            attention.quantize_cache(self.model, bits)
            found[f"int{bits}"] = self.measure({})
            models.use_attention(self.model, before)
        return found


def combined(fisher: Mapping[str, Tensor], integrated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The damage of each tensor by `integrated`, shared out to its rows as `fisher` has it."""
    shares = {path: fisher[path] / fisher[path].sum(1, keepdim=True).clamp(min=1e-30) for path in integrated}
    return {path: shares[path] * damage.sum(1, keepdim=True) for path, damage in integrated.items()}


def affordable_tokens(weights: int, device: torch.device) -> int:
    """How many tokens a model of so many weights is studied on where nobody says: minutes on two cores."""
    most, affordable = (MOST_TOKENS, AFFORDABLE) if device.type == "cpu" else (MOST_ON_GPU, FASTER * AFFORDABLE)
    return min(most, max(FEWEST_TOKENS, affordable // weights))


def sequences_of(tokens: int, length: int) -> int:
    """How many sequences have about so many tokens."""
    return max(1, math.ceil(tokens / length))


def walks(estimates: Sequence[str], formats_: int, tensors: int, points: int) -> int:
    """About how many walks forwards these estimates take the time of."""
    each = {"fisher": 3 + formats_, "integrated": 4 * formats_ * points, "direct": formats_ * tensors // 2}
    return 6 + sum(each.get(estimate, 0) for estimate in estimates)
