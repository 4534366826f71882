"""The numbers that a student and its packed model compute by, beside the formats of their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Bits of activations and of attention, and which scales are trained.

    Attributes:
        activation_bits: bits of the inputs of quantized linear layers; 16 leaves the inputs as they are.
        kv_bits: bits of keys and values; 16 leaves them as they are.
        group_size: number of consecutive activations of a token that share a scale.
        learned_scales: whether the scales of weights are trained. A packed model ignores it.
        learned_inputs: whether the stored scales of the inputs of linear layers are trained. A packed model ignores it.
        query_bits: bits of queries; 16 leaves them as they are.
        probability_bits: bits of attention probabilities; 16 leaves them as they are.
        adaptive_tokens: `causal` or `ranked` gives unimportant tokens fewer bits (see `attention.py`), `off` does not.
        thresholds: for `causal`, the least importance of an important token, by layer.
        learned_zero_points: whether the stored scales of inputs have zero points, which are trained with them.
    """

    activation_bits: int
    kv_bits: int
    group_size: int
    learned_scales: bool = False
    learned_inputs: bool = False
    query_bits: int = 16
    probability_bits: int = 16
    adaptive_tokens: str = "off"
    thresholds: tuple[float, ...] = ()
    learned_zero_points: bool = False
