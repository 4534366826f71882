"""What `pack` and `eval` do with a folder or file that is named directly.

`pack MODEL` rounds a model without training; a folder that is packed already is exported or compressed, and a file or
folder that others quantized is imported. `eval MODEL` measures a model alone, without a working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgerazor.cli.dispatch import assemble, check_gates
from edgerazor.cli.options import RunOptions
from edgerazor.errors import usage_error

#: Fields of `calibrate` that say how a packed model computes, and decide nothing about its weights.
COMPUTING = {"activation_bits", "kv_bits"}
#: Fields that the command line may set only for a model that is measured alone.
ALONE = (("eval", "against"), ("eval", "activation_bits"), ("eval", "kv_bits"), ("calibrate", "group_size"))


def option(name: str) -> str:
    """The option of a field: `--group-size` of `group_size`."""
    return f"--{name.replace('_', '-')}"


# pack ---------------------------------------------------------------------------------------------------------------


def choose_source(values: dict[str, Any], run: RunOptions) -> dict[str, Any]:
    """The values of `pack`, with what is to be packed: the model that was named, or what is in the working directory.

    Raises:
        UserError: options that say how to round, where what is packed was trained.
    """
    packing, model = dict(values.get("pack", {})), values.get("model")
    if values.get("calibrate") and model is None and run.recipe is None:
        raise usage_error(
            "The student's formats were decided before it was trained, so pack takes no "
            f"{option(next(iter(values['calibrate'])))}.",
            "To round without training, name the model: `edgerazor pack MODEL --bits 4`.",
        )
    if "export" in packing:  # what was once allowed for another export is not for this one
        packing.setdefault("allow_lossy", False)
    if model is not None:
        packing["source"] = "teacher"
    elif run.recipe is None and not (packing.keys() & {"export", "compress"} and is_rounded(run)):
        packing["source"] = "auto"
    return {**values, "pack": packing}


def is_rounded(run: RunOptions) -> bool:
    """Whether a job's packed model was made without training, so that it can be made again without a student."""
    from edgerazor.stages import pack
    from edgerazor.workdir import DEFAULT, WorkDir

    return pack.stands_alone(WorkDir(run.work or DEFAULT))


def is_packed_folder(values: dict[str, Any]) -> bool:
    """Whether the model that was named is a packed folder."""
    if "model" not in values:
        return False
    from edgerazor.workdir import find_folder

    if not find_folder(Path(values["model"])).is_dir():
        return False
    from edgerazor.transformers_plugin import is_packed

    return is_packed(Path(values["model"]))


def rewrite_packed(values: dict[str, Any], run: RunOptions) -> None:
    """`pack FOLDER` of a packed folder: export it or compress it; its weights stay."""
    folder, packing = values["model"], values.get("pack", {})
    settings = [*values.get("calibrate", {}), *(["student"] if "student" in packing else [])]
    if "compress" in packing:
        settings += [*(["export"] if "export" in packing else []), *(["dry_run"] if run.dry_run else [])]
        recompress_packed(folder, packing["compress"], settings, run)
    else:
        export_packed(folder, packing.get("export"), packing.get("allow_lossy", False), settings, run)


def recompress_packed(folder: str, compress: bool, settings: list[str], run: RunOptions) -> None:
    """`pack FOLDER --compress` or `--no-compress`; `settings` names what goes with neither."""
    if settings:
        raise usage_error(
            f"{folder} is packed already, and --{'' if compress else 'no-'}compress goes with no "
            f"{option(settings[0])}.",
            "Leave one of them out.",
        )
    from edgerazor.stages import pack

    console = run.open_console()
    result = pack.recompress(Path(folder), compress, console)
    console.result(result, *pack.compress_lines(result))


def export_packed(
    folder: str, names: list[str] | None, allow_lossy: bool, settings: list[str], run: RunOptions
) -> None:
    """`pack FOLDER --export NAME`; `settings` names what would have to pack it again."""
    if settings:
        raise usage_error(
            f"{folder} is packed already, so {option(settings[0])} cannot change it.", "Leave the option out."
        )
    if not names:
        raise usage_error(
            f"{folder} is packed already.",
            f"Export it: `edgerazor pack {folder} --export gguf`. Compress it: `edgerazor pack {folder} --compress`.",
        )
    from edgerazor.stages import pack

    console = run.open_console()
    if run.dry_run:
        sizes = pack.export_dry_run(Path(folder), names, allow_lossy, console)
        console.result(sizes, *(f"{name}: {bits:.2f} real bits" for name, bits in sizes.real_bits.items()))
        return
    result = pack.export_folder(Path(folder), names, allow_lossy, console)
    console.result(result, *pack.export_lines(result.exports))


def is_foreign(values: dict[str, Any]) -> bool:
    """Whether the model that was named is one that others quantized, and is not to be rounded."""
    if "model" not in values or not Path(values["model"]).exists():
        return False
    from edgerazor.importers import find_importer

    importer = find_importer(Path(values["model"]))
    rounding = values.get("calibrate", {}).keys() - COMPUTING
    return importer is not None and (importer.only or not rounding)


def import_foreign(values: dict[str, Any], run: RunOptions) -> None:
    """`pack FILE.gguf`, or a folder that others quantized: their codes become ours."""
    path, section, packing = Path(values["model"]), values.get("calibrate", {}), values.get("pack", {})
    computing = {name: value for name, value in section.items() if name in COMPUTING}
    others = [name for name in section if name not in computing]
    others += [name for name in ("student", "compress") if name in packing]
    if others or run.dry_run:
        raise usage_error(
            f"{path} is quantized already, and its codes are taken as they are, so pack takes no "
            f"{option((others or ['dry_run'])[0])} with it.",
            "Leave it out, or name the original model.",
        )
    exporting = {"export": packing["export"]} if "export" in packing else {}
    exporting["allow_lossy"] = packing.get("allow_lossy", False)
    recipe = assemble({"calibrate": computing, "pack": exporting}, None, None)
    from edgerazor.stages import pack
    from edgerazor.workdir import DEFAULT, WorkDir

    console = run.open_console()
    result = pack.read_foreign(path, recipe, WorkDir(run.work or DEFAULT), console, run.force)
    console.result(result, *pack.foreign_tables(result))


# eval ---------------------------------------------------------------------------------------------------------------


def evaluate_alone(model: str, values: dict[str, Any], run: RunOptions) -> None:
    """`eval MODEL`: measure a model or packed folder without a working directory."""
    from edgerazor.stages import eval as stage

    if run.dry_run:
        raise usage_error("`eval MODEL` has no dry run; leave out the model for that of the working directory.")
    console = run.open_console()
    result = stage.evaluate_model(model, assemble(values, None, run.recipe), console)
    console.result(result, *stage.show(result))
    check_gates(result)


def refuse_settings_of_model_alone(values: dict[str, Any]) -> None:
    """Refuse options of `eval MODEL` where no model was named."""
    for section, name in ALONE:
        if name in values.get(section, {}):
            flag = option(name)
            raise usage_error(f"{flag} is for a model that is measured alone.", f"Name it: `eval MODEL {flag} ...`.")
