"""What the card of a packed model takes over from its teacher: name, licence, languages.

They come from the metadata at the top of the teacher's README.md, or from those of a GGUF file. Strangers wrote both,
so each field is taken over only where it is what such a field can be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgerazor import models, untrusted
from edgerazor.errors import UserError
from edgerazor.workdir import CARD

#: Texts of licences, which many licences want to stay with what is made of a model.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
#: Most bytes of a card, of a licence's text, and entries of a list.
MOST_BYTES, MOST_ENTRIES = 1 << 22, 200

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")
_LINK = re.compile(r"(https?://[\x21-\x7e]{1,300}|[A-Za-z0-9_][A-Za-z0-9_. -]{0,100})")
_NAME = re.compile(r"[\w .,+()/-]{1,100}")


@dataclass(frozen=True)
class TeacherCard:
    """What is known of a teacher beside its weights.

    Attributes:
        name: of the folder, the file or the hub's model.
        hub_id: of the hub; empty for a local folder or file.
        revision: the hub's commit; empty likewise.
        origin: what a folder was made of, in words ("dequantized from Q4_K_M"); empty for most.
        licence: fields of a card's metadata: `license`, `license_name`, `license_link`; empty where nobody says.
        languages: its codes of languages.
    """

    name: str
    hub_id: str
    revision: str
    origin: str
    licence: Mapping[str, str | list[str]]
    languages: tuple[str, ...]


def read_teacher_card(source: str, folder: Path) -> TeacherCard:
    """What is known of a teacher.

    Args:
        source: as the recipe names it: a folder, a GGUF file or an id of the hub.
        folder: where its files lie.
    """
    described = models.describe_source(source, folder)
    name, revision = described["name"], described.get("revision", "")
    on_hub = bool(revision) and name != revision  # a folder of the hub's cache is named after its commit
    fields = _metadata(folder / CARD)
    if not fields and models.is_gguf(source):
        fields = _gguf_metadata(Path(source))
    return TeacherCard(
        name=name,
        hub_id=name if on_hub else "",
        revision=revision if on_hub else "",
        origin=described.get("origin", ""),
        licence=_licence(fields),
        languages=_languages(fields.get("language")),
    )


def licence_texts(folder: Path) -> list[Path]:
    """The texts of licences beside a teacher: plain files of a size that such texts have."""
    files = sorted({file for pattern in LICENCE_FILES for file in folder.glob(pattern)})
    return [file for file in files if file.is_file() and file.stat().st_size <= MOST_BYTES]


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata at the top of a card; nothing where it has none, or is damaged."""
    try:
        front = _FRONT.match(untrusted.read_bytes(card, MOST_BYTES).decode())
        values = untrusted.parse_yaml(front[1]) if front else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _gguf_metadata(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its licence and languages, in the words of a card."""
    try:
        from edgerazor.untrusted.gguf_file import GgufFile

        metadata = GgufFile(path).metadata
    except (ImportError, UserError):
        return {}
    names = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
    fields = {ours: metadata.get(f"general.{theirs}") for theirs, ours in names.items()}
    return {**fields, "language": metadata.get("general.languages")}


def _licence(fields: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The fields of a licence that are what they can be."""
    licences = fields.get("license")
    stated = licences[:MOST_ENTRIES] if isinstance(licences, list) else [licences]
    names = [str(name) for name in stated if isinstance(name, str) and _LICENCE.fullmatch(name)]
    if not names:
        return {}
    taken: dict[str, str | list[str]] = {}
    taken["license"] = names if isinstance(licences, list) else names[0]
    for field, pattern in (("license_name", _NAME), ("license_link", _LINK)):
        value = fields.get(field)
        if isinstance(value, str) and pattern.fullmatch(value):
            taken[field] = value
    return taken


def _languages(value: Any) -> tuple[str, ...]:
    languages = value if isinstance(value, list) else [value]
    languages = [language for language in languages if isinstance(language, str) and _LANGUAGE.fullmatch(language)]
    return tuple(languages[:MOST_ENTRIES])
