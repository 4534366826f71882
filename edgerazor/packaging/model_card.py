"""The card of a packed model: `README.md`, as the Hugging Face hub reads it.

Metadata for the hub, sizes, results, how to run it, what was not measured and how it was made. Nothing in it differs
between equal runs: no time, host or path. It is no part of what `pack` made (`workdir.REPORTS`), so that other words or
new results make no stage stale.

Two sections lie between marks (HTML comments, which nobody sees) and are written anew when their numbers change: the
sizes by `pack FOLDER --compress`, the results by `eval`. What people write around them stays.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from edgerazor import families, packed, registry, untrusted
from edgerazor.packaging.markdown import block, code, escaped, table
from edgerazor.packaging.teacher_card import MOST_BYTES, TeacherCard
from edgerazor.packed import PackedModel
from edgerazor.workdir import CARD, write_text

Section = Literal["size", "results"]

#: Classes of tensors in words.
CLASSES = {
    **{"linear": "decoder linear layers", "embedding": "embeddings", "head": "head"},
    **{"tower": "towers", "other": "norms and others"},
}
#: What stands for results before there are any.
NOT_MEASURED = (
    "Nothing of it has been measured yet: `edgerazor eval --tasks arc,hellaswag` in its working directory writes what "
    "is left of its teacher here."
)


@dataclass(frozen=True)
class Making:
    """How a packed model was made.

    Attributes:
        source: `student` (trained), `teacher` (rounded without training) or `import` (somebody else's codes).
        commands: that make it again.
        recipe: the YAML that they read; empty where they need none.
        teacher_bytes: of the teacher's weight files; None where there was none.
        notes: what else there is to say, in sentences.
    """

    source: str
    commands: tuple[str, ...]
    recipe: str = ""
    teacher_bytes: int | None = None
    notes: tuple[str, ...] = ()


def write_card(folder: Path, teacher: TeacherCard, making: Making) -> None:
    """Write the card of a packed folder that is complete but for it.

    Args:
        folder: weights and configuration are there already.
        teacher: what is known of the model that it was made of.
        making: how.
    """
    write_text(folder / CARD, render(folder, teacher, making))


def render(folder: Path, teacher: TeacherCard, making: Making) -> str:
    """The text of a card; arguments as `write_card`."""
    model = PackedModel.open(folder)
    config = untrusted.load_json(folder / "config.json")
    model_type = str(config.get("model_type", ""))
    parts = [
        f"---\n{metadata(model, teacher, model_type, has_chat_template(folder))}---",
        f"# {escaped(teacher.name, 100)}, {packed.size_table(model).nominal_bits:.3g} bits",
        introduction(model, teacher, making),
        "## Size",
        marked("size", sizes(model, making.teacher_bytes)),
        "## Results",
        marked("results", NOT_MEASURED),
        "## How to run it",
        how_to_run(model, model_type, has_chat_template(folder)),
        "## Limits",
        limits(teacher),
        "## How it was made",
        how_it_was_made(model, making),
    ]
    return "\n\n".join(parts) + "\n"


# --- sections that are written anew ------------------------------------------------------------


def marked(section: Section, text: str) -> str:
    """A section between its marks."""
    return f"<!-- edgerazor: {section} -->\n{text}\n<!-- edgerazor: end of {section} -->"


def update_section(folder: Path, section: Section, text: str) -> bool:
    """Write a section of a card anew; the caller is the only writer of the folder.

    Returns:
        false where there is no card, or somebody has taken the marks out of it; it stays as it is.
    """
    path = folder / CARD
    try:
        card = untrusted.read_bytes(path, MOST_BYTES).decode()
    except (OSError, ValueError):
        return False
    begin, end = f"<!-- edgerazor: {section} -->", f"<!-- edgerazor: end of {section} -->"
    before, found_begin, rest = card.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        return False
    changed = f"{before}{marked(section, text)}{after}"
    if changed != card:
        write_text(path, changed)
    return True


def update_sizes(folder: Path) -> None:
    """Write the sizes of a packed folder whose weight files are others now into its card, if it has one."""
    try:
        card = untrusted.read_bytes(folder / CARD, MOST_BYTES).decode()
    except (OSError, ValueError):
        return
    known = re.search(r"the ([0-9,]{1,30}) bytes of its teacher", card)
    update_section(folder, "size", sizes(PackedModel.open(folder), int(known[1].replace(",", "")) if known else None))


def sizes(model: PackedModel, teacher_bytes: int | None) -> str:
    """Label bits beside real ones, bytes, and each class of tensors."""
    whole = packed.size_table(model)
    compressed = " The weight files are compressed (zstd)." if model.header.compression else ""
    beside = ""
    if teacher_bytes:
        beside = f", {teacher_bytes / whole.bytes:.1f} times smaller than the {teacher_bytes:,} bytes of its teacher"
    sentence = (
        f"**{whole.nominal_bits:.4g} label bits, {whole.real_bits:.4g} real bits** a weight. The label is the average "
        "of the decoder's linear layers by the names of their formats; real bits are 8 times all bytes of the weight "
        "files by all weights, scales, embeddings and norms included. "
        f"{whole.bytes:,} bytes for {whole.parameters:,} weights{beside}.{compressed}"
    )
    rows = [
        [
            CLASSES[size.kind],
            f"{size.weights:,}",
            f"{size.nominal_bits:.2f}",
            f"{size.real_bits:.2f}",
            f"{size.bytes:,}",
        ]
        for size in whole.classes
    ]
    rows.append(["whole files", f"{whole.parameters:,}", "", f"{whole.real_bits:.2f}", f"{whole.bytes:,}"])
    return f"{sentence}\n\n{table(['tensors', 'weights', 'label bits', 'real bits', 'bytes'], rows)}"


# --- the others --------------------------------------------------------------------------------


def metadata(model: PackedModel, teacher: TeacherCard, model_type: str, chat: bool) -> str:
    """The YAML at the top, which the hub reads."""
    bits = packed.size_table(model).nominal_bits
    fields: dict[str, Any] = dict(teacher.licence)
    if teacher.languages:
        fields["language"] = list(teacher.languages)
    if teacher.hub_id:
        fields |= {"base_model": teacher.hub_id, "base_model_relation": "quantized"}
    tags = ["edgerazor", "quantized", f"{bits:.3g}-bit"]
    tags += [model_type] if re.fullmatch(r"[a-z0-9_]{1,40}", model_type) else []
    tags += ["conversational"] if chat else []
    fields |= {"library_name": "edgerazor", "pipeline_tag": "text-generation", "tags": tags}
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def introduction(model: PackedModel, teacher: TeacherCard, making: Making) -> str:
    """What it is, of what, under which licence."""
    verb = {
        "student": "compressed by quantization-aware distillation: trained through the rounding, with the original as "
        "its teacher",
        "teacher": "rounded without training",
        "import": "with the codes of a model that others quantized",
    }[making.source]
    name = (
        f"[{escaped(teacher.hub_id)}](https://huggingface.co/{teacher.hub_id})"
        if teacher.hub_id
        else code(teacher.name)
    )
    revision = f", revision {code(teacher.revision, 60)}" if teacher.revision else ""
    origin = f" ({escaped(teacher.origin)})" if teacher.origin else ""
    sentences = [f"{name}{origin}{revision}, {verb}, in the packed format of edgerazor."]
    if not teacher.hub_id:
        sentences.append(
            "It was made of local files, so the metadata name no `base_model`: add that line before you publish it."
        )
    if not teacher.licence:
        sentences.append(
            "The original's files name no licence, so none stands here: its licence still holds, look it up and add it."
        )
    return " ".join(sentences)


def has_chat_template(folder: Path) -> bool:
    """Whether the model's tokenizer comes with a chat template."""
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(untrusted.load_json(folder / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError):
        return False


def how_to_run(model: PackedModel, model_type: str, chat: bool) -> str:
    """A command or some lines of Python for each engine, and the exports."""
    prompt = '--chat "Why is the sky blue?"' if chat else '"Once upon a time"'
    family = families.find(model_type)
    native = (
        f"Natively on a CPU ({code(model_type)} has native code in edgerazor), where its settings allow it; else "
        "transformers computes it, and that is said."
        if family is not None and family.native is not None
        else f"There is no native code for {code(model_type)} in edgerazor, so transformers computes it, more slowly."
    )
    rotated = bool(model.header.rotations)
    commands = "\n".join(f"edgerazor pack FOLDER --export {name}" for name in export_names(rotated))
    return "\n\n".join(
        [
            "FOLDER is this folder, downloaded; `pip install edgerazor-toolchain` installs the program "
            "(`edgerazor-toolchain[serve]` with the server).",
            native,
            block(f"edgerazor generate --model FOLDER {prompt}\nedgerazor serve --model FOLDER"),
            block(
                'import edgerazor\n\nmodel = edgerazor.load("FOLDER")\nprint(model.generate("Once upon a time").text)',
                "python",
            ),
            "In transformers, on a CPU or a GPU; edgerazor has to be imported once, and no remote code is run:",
            block(
                "import edgerazor\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
                "python",
            ),
            "For other engines, each weight exactly as here, or refused with the names of the tensors that do not fit"
            + (" (its matrices are rotated, which other formats cannot say)" if rotated else "")
            + ":",
            block(commands),
        ]
    )


def export_names(rotated: bool) -> list[str]:
    """Exports to name in a card, one of each kind: those that can hold rotated matrices, or all.

    None is imported for it that need not be: some need packages that are not installed everywhere.
    """
    names = registry.names("exporters")
    if rotated:
        names = [name for name in names if _holds_rotated(name)]
    return [name.replace("_", "-") for name in names]


def _holds_rotated(plugin: str) -> bool:
    try:
        return bool(registry.find("exporters", plugin, "EXPORTER").rotated)
    except ImportError:  # of a package for other people's formats, which do not know of rotations
        return False


def limits(teacher: TeacherCard) -> str:
    """What nobody should take for measured."""
    return "\n".join(
        [
            "- Only what stands under Results was measured. Other tasks, other languages, long contexts, chat and code "
            "were not, and may have lost more.",
            "- Compression can change what a model refuses, and its biases. Neither was measured.",
            "- Speed and memory depend on the machine: `edgerazor bench` measures them.",
            f"- Whatever holds for {code(teacher.name, 100)} (its data, its limits, its licence) holds here, too.",
        ]
    )


def how_it_was_made(model: PackedModel, making: Making) -> str:
    """Commands, recipe, and what the header says of it."""
    version = escaped(model.header.provenance.get("edgerazor", ""), 40)
    parts = [f"With edgerazor {version}:", block("\n".join(making.commands))]
    if making.recipe:
        parts += ["`recipe.yaml`, local files by their names alone:", block(making.recipe, "yaml")]
    parts += [escaped(note, 600) for note in making.notes]
    settings = model.header.settings
    computing = (
        f"Inputs of linear layers have {settings.get('activation_bits', 16)} bits, keys and values "
        f"{settings.get('kv_bits', 16)}."
    )
    hashes = {
        name: value
        for name, value in model.header.provenance.items()
        if name.endswith("sha256") and isinstance(value, str)
    }
    if hashes:
        computing += " Identity of what it was made of, from the header of its weight file:"
    return "\n\n".join([*parts, computing, *([block(json.dumps(hashes, indent=1), "json")] if hashes else [])])
