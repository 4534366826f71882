"""The chat page: one file, and headers that let it load nothing else and talk to nobody else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


@functools.cache
def content() -> bytes:
    """The page."""
    return FILE.read_bytes()


@functools.cache
def headers() -> dict[str, str]:
    """What browsers are told: the page's own script and style alone, by their hashes, and this server alone."""
    text = content().decode()
    sources = {
        name: " ".join(digest(inner) for inner in re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL))
        for name in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def digest(text: str) -> str:
    """The source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
