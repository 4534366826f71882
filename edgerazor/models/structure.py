"""The structure of a decoder: the matrices that can be quantized, that is, linear layers, embedding and head.

In a model that sees, the decoder is what transformers calls so (`get_decoder`), and whatever else has weights is a
tower: it stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from edgerazor.errors import UserError
from edgerazor.families import experts_per_token
from edgerazor.models.experts import ExpertList, expert_lists

Kind = Literal["linear", "embedding", "head"]

#: Largest share of the matrix weights that may stay in 16 bits; models with more of them are refused.
UNTOUCHED_LIMIT = 0.02
#: Ends of the paths of what makes inputs of single decoder layers (Gemma 4): their embedding, and a linear layer.
TABLE, PROJECTION = "embed_tokens_per_layer", "per_layer_model_projection"


@dataclass(frozen=True)
class QuantTarget:
    """A matrix that gets a low-bit format.

    Attributes:
        name: path of its module.
        kind: what the matrix is.
        layer: its decoder layer, from 0; None outside the decoder layers.
        rows: output features, or tokens of the vocabulary.
        columns: input features, or hidden size.
        experts: path of the list of experts that it is part of; empty outside experts.
        token_share: of the tokens, on average, that pass through it: of a layer with 64 experts, 8 of which are chosen
            for a token, an eighth.
    """

    name: str
    kind: Kind
    layer: int | None
    rows: int
    columns: int
    experts: str = ""
    token_share: float = 1.0

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Structure:
    """Where the matrices of a decoder are.

    Attributes:
        layers_path: path of the list of decoder layers.
        layer_count: number of decoder layers.
        linears: the linear layers inside the decoder layers, in order.
        embedding: the input embedding.
        head: the output head, or None when it is tied to the embedding.
        head_path: path of the head module, tied or not.
        experts: the lists of experts, in order; none in a dense model.
        tables: embeddings beside the first one, whose rows are inputs of single decoder layers (Gemma 4).
        sixteen: paths of linear layers outside the decoder layers that stay in 16 bits.
        towers: paths of the modules that make features of pictures and project them into the decoder; none where the
            model reads text only.
    """

    layers_path: str
    layer_count: int
    linears: tuple[QuantTarget, ...]
    embedding: QuantTarget
    head: QuantTarget | None
    head_path: str
    experts: tuple[ExpertList, ...] = ()
    towers: tuple[str, ...] = ()
    tables: tuple[QuantTarget, ...] = ()
    sixteen: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[QuantTarget, ...]:
        """Every matrix, the embedding first."""
        return (self.embedding, *self.tables, *self.linears, *((self.head,) if self.head else ()))


def structure(model: PreTrainedModel) -> Structure:
    """Describe a causal decoder.

    Raises:
        UserError: the model is not a decoder of linear layers; the message names what stands in the way.
    """
    family = type(model).__name__
    decoder_path = _decoder_path(model)
    layers_path, layers = _decoder_layers(model, decoder_path, family)
    experts = expert_lists(model)
    routers = {path for listed in experts for path in listed.routers}
    _refuse_experts(layers, family)
    head_path = find_head(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    linears = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                path = f"{layers_path}.{index}.{name}"
                listed = next((listed for listed in experts if path.startswith(f"{listed.path}.")), None)
                if path not in routers:
                    shape = module.out_features, module.in_features
                    linears.append(QuantTarget(path, "linear", index, *shape, *_place(model, listed)))
    if not linears:
        raise UserError(
            f"{family} has no nn.Linear inside its decoder layers, so there is nothing to quantize.",
            "Models of Llama, Qwen, Mistral, SmolLM, Gemma, Phi and OLMo families are built of nn.Linear.",
        )
    rows, columns = embedding.weight.shape
    tied = head.weight is embedding.weight
    described = Structure(
        layers_path=layers_path,
        layer_count=len(layers),
        linears=tuple(linears),
        embedding=QuantTarget(paths[id(embedding)], "embedding", None, rows, columns),
        head=None if tied else QuantTarget(head_path, "head", None, head.out_features, head.in_features),
        head_path=head_path,
        experts=tuple(experts),
        towers=_towers(model, decoder_path, head_path),
        tables=tuple(_tables(model)),
        sixteen=tuple(name for name, module in model.named_modules() if name.endswith(PROJECTION)),
    )
    _refuse_untouched(model, described)
    embedding_scale(embedding)
    return described


def find_head(model: PreTrainedModel) -> str:
    """Path of the output head. That is all that must be known of a model to compute its next-token distributions.

    Raises:
        UserError: the model has no head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no token embedding and linear output head, so it is not a causal language "
            "model."
        )
    return next(name for name, module in model.named_modules() if module is head)


def _decoder_path(model: PreTrainedModel) -> str:
    """Path of the part that reads text; empty where that is the whole model."""
    if getattr(model.config, "vision_config", None) is None:
        return ""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def _towers(model: PreTrainedModel, decoder_path: str, head_path: str) -> tuple[str, ...]:
    """Paths of the outermost modules with parameters beside decoder and head."""
    if not decoder_path:
        return ()
    inside = (decoder_path, head_path)
    around = {path[: place.start()] for path in inside for place in re.finditer(r"\.", path)} | {""}
    towers = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if parent in around and name not in (*around, *inside) and any(True for _ in module.parameters()):
            towers.append(name)
    return tuple(towers)


def _tables(model: PreTrainedModel) -> Iterator[QuantTarget]:
    """The embeddings of a model whose decoder layers get inputs of their own."""
    for name, module in model.named_modules():
        if name.endswith(TABLE) and isinstance(module, nn.Embedding):
            yield QuantTarget(name, "embedding", None, module.num_embeddings, module.embedding_dim)


def _decoder_layers(model: PreTrainedModel, decoder_path: str, family: str) -> tuple[str, nn.ModuleList]:
    """The longest list of layers of one class: the decoder."""
    config, prefix = (model.config.get_text_config(), f"{decoder_path}.") if decoder_path else (model.config, "")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.startswith(prefix)
        and len(module) == getattr(config, "num_hidden_layers", len(module))
    ]
    lists = [(name, module) for name, module in lists if len({type(layer) for layer in module}) == 1]
    if model.config.is_encoder_decoder or not lists:
        raise UserError(f"{family} is not a decoder-only causal language model.")
    # The outermost list: experts of a layer form lists of their own inside it.
    return min(lists, key=lambda item: item[0].count("."))


def _place(model: PreTrainedModel, listed: ExpertList | None) -> tuple[str, float]:
    """`experts` and `token_share` of a linear layer in a list of experts, or in none."""
    if listed is None:
        return "", 1.0
    chosen = experts_per_token(model.config.get_text_config())
    return listed.path, min(chosen / listed.size, 1.0) if chosen is not None and chosen > 0 else 1.0


def _refuse_experts(layers: nn.ModuleList, family: str) -> None:
    """Refuse stacked experts that `separate_experts` left as they are."""
    for name, parameter in layers.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            raise UserError(
                f"{family} stacks its experts in a way that is not understood ({name} of layer "
                f"{name.partition('.')[0]}: transposed, with biases, or with another gate).",
                "Mixtures like those of Qwen3-MoE, OLMoE, Granite-MoE and LFM2-MoE are supported.",
            )


def _refuse_untouched(model: PreTrainedModel, structure: Structure) -> None:
    """Refuse a model of which more than 2 % of the matrix weights would silently stay 16-bit."""
    quantized = {f"{target.name}.weight" for target in structure.targets} | {f"{structure.head_path}.weight"}
    on_purpose = (*structure.sixteen, *(router for listed in structure.experts for router in listed.routers))
    quantized |= {f"{name}.weight" for name in on_purpose}
    beside = tuple(f"{path}." for path in structure.towers)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith(beside)}
    remaining = {name: size for name, size in matrices.items() if name not in quantized}
    share = sum(remaining.values()) / sum(matrices.values())
    if share > UNTOUCHED_LIMIT:
        largest = sorted(remaining, key=lambda name: -remaining[name])[:3]
        raise UserError(
            f"{share:.0%} of the matrix weights of {type(model).__name__} would stay 16-bit, among them "
            f"{', '.join(largest)}, because they are not nn.Linear, embedding or head.",
            "Such models are not supported.",
        )


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """The factor that some families (Gemma 2 and later) multiply embeddings with inside the embedding module.

    Raises:
        UserError: the embedding is of a class that we do not know.
    """
    if type(embedding) is nn.Embedding:
        return None
    # The number itself, where it is kept: the buffer may be without storage while a model is being loaded.
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if scale is None:
        raise UserError(f"The token embedding is a {type(embedding).__name__}, which is not understood.")
    return float(scale)
