"""Pictures of strangers: bounded in bytes and pixels, of known kinds, one frame; anything else gets one sentence."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from edgerazor.errors import UserError, plain

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PICTURE_BYTES = 64 << 20
#: A few kilobytes can say that they are a picture of gigabytes.
MOST_PIXELS = 64 << 20
#: Decoders that are given strangers' bytes; Pillow has dozens more that nobody needs here.
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read_picture(where: str, data: bytes) -> Image:
    """Decode a picture, in whatever mode it is stored.

    Args:
        where: it comes from, for error messages.
        data: of a file of one of `KINDS`.

    Raises:
        UserError: no such picture, a damaged or too large one, or several in one file.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise UserError(
            "Pictures need the package pillow, which is not installed.",
            "Install it: `pip install 'edgerazor-toolchain[vision]'`, or all of them with [all].",
        ) from error
    if len(data) > MOST_PICTURE_BYTES:
        raise UserError(f"{where} is a picture of {len(data):,} bytes; at most {MOST_PICTURE_BYTES:,} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
            picture = Image.open(io.BytesIO(data), formats=KINDS)
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise UserError(f"{where} is a picture of {width} x {height} pixels; at most {MOST_PIXELS:,} are read.")
        if getattr(picture, "n_frames", 1) > 1:
            raise UserError(f"{where} is animated; expected a picture that stands still.")
        picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{where} is no picture that can be read; expected {', '.join(KINDS)}.") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        reason = plain((str(error).strip().splitlines() or ["it ends too early"])[0].rstrip("."), 200)
        raise UserError(f"{where} is a damaged picture: {reason}.") from None
    return picture


def picture_of_part(where: str, part: dict[str, object], folder: Path) -> Image:
    """The picture of a message's part `{type: image, path: FILE}` or `{type: image, base64: BYTES}`.

    Args:
        where: the message, for error messages.
        part: of its content.
        folder: that a relative path starts from.

    Raises:
        UserError: neither a path nor bytes, an address of the network, no such file, or as `read_picture`.
    """
    path, encoded = part.get("path"), part.get("base64")
    if isinstance(encoded, str):
        if len(encoded) > 2 * MOST_PICTURE_BYTES:
            raise UserError(f"{where} holds a picture of more than {MOST_PICTURE_BYTES:,} bytes.")
        try:
            return read_picture(f"The picture of {where}", base64.b64decode(encoded, validate=True))
        except binascii.Error:
            raise UserError(f"{where} holds a picture whose base64 is not base64.") from None
    if not isinstance(path, str):
        raise UserError(f"{where} holds a picture without path or base64; nothing is fetched from addresses.")
    if "://" in path:
        raise UserError(f"{where} names the picture {plain(path, 100)}; nothing is fetched from addresses.")
    file = folder / path
    try:
        if not file.is_file():
            raise UserError(f"{where} names the picture {plain(path, 100)}, but there is no file {file}.")
        if file.stat().st_size > MOST_PICTURE_BYTES:
            raise UserError(f"{file} is a picture of more than {MOST_PICTURE_BYTES:,} bytes.")
        return read_picture(str(file), file.read_bytes())
    except (OSError, ValueError) as error:  # a name with a zero byte, or too long a one, is a ValueError or OSError
        raise UserError(f"{where} names a picture that cannot be read: {plain(error, 100)}.") from None
