"""Random choices of a model's training mode, and how to switch them off."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

#: Parts of the names that transformers gives to rates of random choices: attention_dropout, dropout, resid_pdrop,
#: layerdrop, router_jitter_noise.
RANDOM_RATES = ("dropout", "pdrop", "layerdrop", "jitter_noise")


def disable_dropout(model: PreTrainedModel) -> None:
    """Switch off every random choice of a model's training mode, in place.

    The student copies the teacher's output without dropout. Dropped activations would be noise of the size of what is
    to be learned, and random numbers would make a resumed training differ from an uninterrupted one. Configurations
    keep such rates from pre-training: Phi 0.1, GPT-2, OPT and its skipped layers, Mixtral's noise of the router.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_random_rate(name, value):
                setattr(module, name, 0.0)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            if _is_random_rate(name, value):
                setattr(config, name, 0.0)


def _is_random_rate(name: str, value: object) -> bool:
    """Whether an attribute is the rate of a random choice and not 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value != 0 and any(part in name for part in RANDOM_RATES)
