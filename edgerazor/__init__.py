"""edgerazor: compress a Hugging Face causal language model to 1.58-4 bits and measure what it cost.

Importing this package is light: it loads neither torch nor transformers. It makes packed folders loadable with
`transformers.AutoModelForCausalLM.from_pretrained`, at once where transformers is loaded, else when it is imported.
"""

from __future__ import annotations

import os
from typing import Any

from edgerazor.transformers_registration import register_quantizer

__version__ = "0.1.0"


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a packed model to run it: see `edgerazor.runtime.load`."""
    from edgerazor import runtime  # here, since it imports torch

    return runtime.load(folder, **options)


register_quantizer()
