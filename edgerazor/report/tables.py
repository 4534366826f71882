"""Results of the stages as tables and lines, for people."""

from __future__ import annotations

from rich.console import RenderableType

from edgerazor import packed
from edgerazor.benchmark.bench_result import BenchResult, Engine
from edgerazor.calibration.calibrate_result import CalibrateResult
from edgerazor.console import megabytes, percent, table
from edgerazor.evaluation.eval_result import EvalResult, Measured
from edgerazor.exporters import ExportResult
from edgerazor.packaging.pack_result import CompressResult, ForeignResult, PackResult

#: Classes of tensors in words.
CLASSES = {
    "linear": "decoder linear layers",
    "embedding": "embeddings",
    "head": "head",
    "tower": "towers",
    "other": "norms and others",
    None: "all tensors",
}

# --- calibrate ---------------------------------------------------------------------------------


def calibrate_tables(result: CalibrateResult) -> list[RenderableType]:
    """The plan, for people."""
    rows = [[name, f"{count:,}"] for name, count in result.formats.items()]
    least = min(range(len(result.layer_similarity)), key=lambda i: result.layer_similarity[i])
    caption = f"{result.tokens:,} calibration tokens; layer {least + 1} changes its input most"
    if result.measured_kl is not None:
        predicted = "" if result.predicted_kl is None else f" ({result.predicted_kl:.3g} predicted)"
        caption += (
            f"; planned by {result.estimate}: KL {result.measured_kl:.3g}{predicted} before training, of the rounded "
            "linear layers; draw it with `edgerazor show plan`"
        )
    if (towers := result.towers) is not None:
        worst = max(towers.moved, key=lambda path: towers.moved[path])
        caption += (
            f"; towers in {towers.format} move the features of {towers.pictures} pictures by {towers.together:.2g} of "
            f"their square ({worst} alone by {towers.moved[worst]:.2g})"
        )
    return [
        table(
            f"Plan {result.notation}: {result.nominal_bits:.3g} nominal bits, {result.real_bits:.3g} real ones in a "
            f"packed model of {megabytes(result.bytes)}",
            ["format of decoder linear layers", "weights"],
            rows,
            caption=caption,
        )
    ]


# --- pack --------------------------------------------------------------------------------------


def pack_tables(result: PackResult) -> list[RenderableType]:
    """The size table, for people."""
    smaller = result.teacher_bytes / result.bytes
    caption = (
        f"{result.folder}: {smaller:.1f} times smaller than the {megabytes(result.teacher_bytes)} teacher, "
        "verified bit for bit"
    )
    shown = [size_table(f"Packed {result.notation}", result.classes, result, caption)]
    return [*shown, *export_lines(result.exports)]


def export_lines(results: list[ExportResult]) -> list[RenderableType]:
    """A line for each export, and its notes."""
    lines: list[RenderableType] = []
    for export in results:
        effect = f"changes weights of {len(export.lossy)} tensors" if export.lossy else "every weight bit for bit"
        lines.append(
            f"{export.export}: {export.file}, {megabytes(export.bytes)}, {export.real_bits:.2f} real bits, {effect}"
        )
        lines += [f"  {note}" for note in export.notes]
    return lines


def size_table(
    title: str, classes: list[packed.ClassSize], whole: PackResult | packed.SizeTable, caption: str = ""
) -> RenderableType:
    """Weights, bits and bytes by class of tensors and altogether."""
    rows = [
        [
            CLASSES[size.kind],
            f"{size.weights:,}",
            f"{size.nominal_bits:.2f}",
            f"{size.real_bits:.2f}",
            megabytes(size.bytes),
        ]
        for size in classes
    ]
    rows.append(["whole file", f"{whole.parameters:,}", "", f"{whole.real_bits:.2f}", megabytes(whole.bytes)])
    return table(title, ["tensors", "weights", "nominal bits", "real bits", "size"], rows, caption)


def foreign_tables(result: ForeignResult) -> list[RenderableType]:
    """The size table, for people."""
    weights = [f"{name} {count:,}" for name, count in result.formats.items()]
    effect = f"scales of {len(result.lossy)} matrices rounded" if result.lossy else "every weight as it was"
    caption = f"{result.folder}, made of {result.source}: {', '.join(weights)} weights; {effect}"
    shown = [size_table("Packed", result.sizes.classes, result.sizes, caption), *result.notes]
    return [*shown, *export_lines(result.exports)]


def compress_lines(result: CompressResult) -> list[str]:
    """A packed folder that was compressed or restored, for people."""
    how = "compressed" if result.compressed else "not compressed"
    if not result.changed:
        return [f"{result.folder} is {how} already: {megabytes(result.bytes)}, {result.real_bits:.2f} real bits"]
    sizes = f"{megabytes(result.bytes_before)} became {megabytes(result.bytes)}, {result.real_bits:.2f} real bits"
    return [f"{result.folder} is {how}: {sizes}, verified bit for bit"]


# --- eval --------------------------------------------------------------------------------------


def eval_tables(result: EvalResult) -> list[RenderableType]:
    """Scores, text metrics and notes, for people."""
    shown: list[RenderableType] = []
    everyone = {"packed": result, **result.compared}
    if result.tasks:
        shown.append(_task_table(everyone))
    if any(measured.text for measured in everyone.values()):
        shown.append(_text_table(everyone))
    shown += [line for name, measured in everyone.items() for line in _picture_lines(name, measured)]
    if result.kernel:
        shown.append(f"Engine: {result.engine}, kernels: {result.kernel}")
    shown += [f"Note: {note}" for note in result.notes]
    shown += [f"Failed: {failure}" for failure in result.failures]
    return shown


def _task_table(everyone: dict[str, Measured]) -> RenderableType:
    """A row for each task and model, and one for the average."""
    rows = []
    for name, measured in everyone.items():
        label = "" if len(everyone) == 1 else f" ({name})"
        for task, one in measured.tasks.items():
            part = {True: "", False: ", part", None: ""}[one.full_set]
            rows.append(
                [
                    f"{task}{label}",
                    f"{one.metric}, {one.items}{part}",
                    percent(one.teacher_score),
                    percent(one.score),
                    percent(one.stderr),
                    percent(one.chance),
                    percent(one.retention),
                    percent(one.retention_above_chance),
                ]
            )
        if measured.average and len(measured.tasks) > 1:
            mean = measured.average
            above = percent(mean.retention_above_chance)
            rows.append([f"average{label}", "", percent(mean.teacher_score), percent(mean.score), "", "", "", above])
    columns = ["task", "metric, items", "teacher", "score", "± stderr", "chance", "retention", "above chance"]
    return table("Tasks", columns, rows)


def _picture_lines(name: str, measured: Measured) -> list[str]:
    """What was measured of the places of pictures, and without their features."""
    lines, text = [], measured.text
    if text is not None and text.picture_kl is not None:
        lines.append(f"Places of pictures, {name}: KL {text.picture_kl:.4g} over {text.picture_tokens:,} tokens.")
    if measured.blind:
        shares = ", ".join(f"{task} {percent(share)}" for task, share in measured.blind.items())
        lines.append(f"Without features of pictures, {name}: {shares}.")
    return lines


def _text_table(everyone: dict[str, Measured]) -> RenderableType:
    rows = []
    for name, measured in everyone.items():
        if (text := measured.text) is not None:
            numbers = (text.teacher_perplexity, text.perplexity, text.kl)
            shown = ["" if value is None else f"{value:.4g}" for value in numbers]
            rows.append([name, *shown, percent(text.top1_agreement), str(text.tokens)])
    columns = ["held-out text", "teacher's perplexity", "perplexity", "KL, nats/token", "top-1 agreement", "tokens"]
    return table("Text", columns, rows)


# --- bench -------------------------------------------------------------------------------------


def bench_tables(result: BenchResult) -> list[RenderableType]:
    """Sizes and speeds, for people."""
    sizes = [
        [
            engine.name,
            str(engine.threads),
            engine.kernel,
            megabytes(engine.weight_bytes),
            "" if engine.load_seconds is None else f"{engine.load_seconds:.2f}",
            _above_imports(engine),
        ]
        for engine in result.engines
    ]
    speeds = [
        [
            run.engine,
            str(run.threads),
            run.phase,
            str(run.context),
            f"{run.tokens_per_second:,.1f}",
            "" if run.bytes_per_token is None else megabytes(run.bytes_per_token),
            "" if run.bandwidth_share is None else f"{run.bandwidth_share:.1%}",
        ]
        for run in sorted(result.runs, key=lambda run: run.threads)
    ]
    memory = [
        f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s with {_threads(bandwidth.threads)}"
        for bandwidth in result.bandwidths
    ]
    return [
        table("Size", ["engine", "threads", "kernel", "weights", "load seconds", "memory above imports"], sizes),
        table(
            f"Speed, {result.machine}",
            ["engine", "threads", "phase", "context", "tokens/s", "bytes a token", "share of bandwidth"],
            speeds,
            caption=f"memory bandwidth in the same rounds ({result.bandwidth_of}): {', '.join(memory)}",
        ),
        *result.notes,
    ]


def _above_imports(engine: Engine) -> str:
    """Memory that the model and its caches took, where it is known."""
    if engine.peak_memory_bytes is None or engine.start_memory_bytes is None:
        return ""
    return megabytes(engine.peak_memory_bytes - engine.start_memory_bytes)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
