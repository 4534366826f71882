"""From the names a user gives to lm-eval task objects with their items.

Everything that can be wrong is found here, before a model is loaded: unknown names, missing files, rows that do not
fit the task, a data set that cannot be fetched.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgerazor.errors import UserError, plain, usage_error
from edgerazor.tasks import local_items
from edgerazor.tasks.quiet import quiet_lm_eval
from edgerazor.workdir import hash_file, hash_folder

WORLD = ("world_recall", "world_follows", "world_count", "world_agree")
WORLD_FOLDER = Path(__file__).parent / "world"
ALIASES: dict[str, tuple[str, ...]] = {
    "arc": ("arc_easy", "arc_challenge"),
    "openbook_qa": ("openbookqa",),
    "world": WORLD,
}
#: Local files may also be called by these names.
FILE_ALIASES = {"openbookqa": "openbook_qa"}
#: Items in the split that lm-eval scores.
FULL_SIZES = {
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "piqa": 1838,
    "openbookqa": 500,
    **dict.fromkeys(WORLD, 1000),
}
#: The one split of a local file.
SPLIT = "local"
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks a model is scored on, and how.

    Args:
        names: tasks, groups, tags and aliases.
        folder: `TASK.jsonl` files to use instead of the hub's data; None for the hub.
        limit: items per task, None for all.
        num_fewshot: examples before each item, None for the task's own number.
        chat: wrap prompts in the tokenizer's chat template.
        seed: draws the examples.
    """

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    seed: int = 0


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to be scored.

    Args:
        name: in the registry.
        task: lm-eval's object.
        data: the file or data set its items come from.
        items: how many will be scored.
        full_set: whether these are all items of the task; None where its size is not known.
        chance: what guessing scores, the mean of 1/choices; None where there are no choices.
        note: what to know about the prompt.
    """

    name: str
    task: Any
    data: str
    items: int
    full_set: bool | None
    chance: float | None
    note: str


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Names with aliases written out, each once, in order."""
    return tuple(dict.fromkeys(full for name in names for full in ALIASES.get(name, (name,))))


def data_files(request: TaskRequest) -> dict[str, Path]:
    """The local file of each task that has one; nothing is read.

    Raises:
        UserError: a folder was given that is none, or a task of ours has lost its items.
    """
    files = {}
    for name in expand(request.names):
        path = _data_file(name, request.folder)
        if path is not None:
            files[name] = path
    return files


def _data_file(name: str, folder: str | None) -> Path | None:
    if folder is not None:
        if not Path(folder).is_dir():
            raise usage_error(f"--task-data {folder} is not a folder; it must hold TASK.jsonl files.")
        for stem in (name, FILE_ALIASES.get(name, name)):
            if (path := Path(folder) / f"{stem}.jsonl").is_file():
                return path
    if name not in WORLD:
        return None
    path = WORLD_FOLDER / f"{name.removeprefix('world_')}.jsonl"
    if not path.is_file():
        raise UserError(f"The items of {name} are missing: there is no {path}.", "Install edgerazor again.")
    return path


def load(request: TaskRequest) -> list[LoadedTask]:
    """Load the tasks and their items.

    Raises:
        UserError: an unknown name, items that are missing or do not fit, a data set that cannot be fetched, or more
            examples asked for than there are items.
    """
    files = data_files(request)
    with quiet_lm_eval():
        manager = _manager(expand(request.names))
        names = _leaves(manager, expand(request.names), request)
        files |= data_files(TaskRequest(names, request.folder))
        missing = [name for name in names if name not in files]
        if request.folder is not None and missing:
            raise usage_error(
                f"{request.folder} has no {missing[0]}.jsonl, so there are no items for {missing[0]}.",
                "Add the file, or leave --task-data out to fetch the items from the Hugging Face hub.",
            )
        loaded: list[LoadedTask] = []
        for name in names:
            local = {name: _load_local(manager, name, files[name])} if name in files else _load_hub(manager, name)
            loaded += [_prepare(task, full, request, files.get(full), note) for full, (task, note) in local.items()]
    return loaded


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's registry, or the part of it that holds the names: reading its 14,000 files takes seconds.

    A task's folder usually bears the first words of its name (`arc/arc_easy.yaml`).
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    words = [name.split("_") for name in names if name not in WORLD]
    prefixes = {"_".join(parts[:length]) for parts in words for length in range(1, len(parts) + 1)}
    near = [root / prefix for prefix in sorted(prefixes) if (root / prefix).is_dir()]
    manager = lm_eval.tasks.TaskManager(include_path=[*near, WORLD_FOLDER], include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=[WORLD_FOLDER])
    for name in names:
        if name not in manager.task_index:
            raise _unknown_task(name, manager.all_tasks)
    return manager


def _unknown_task(name: str, known: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(name, [*ALIASES, *WORLD], n=2, cutoff=0.6)
    close += [match for match in difflib.get_close_matches(name, known, n=3, cutoff=0.7) if match not in close]
    hint = f"Did you mean {' or '.join(close[:3])}?" if close else "`lm-eval ls tasks` lists all tasks of lm-eval."
    return usage_error(f"There is no task called {name!r}.", hint)


def _leaves(manager: Any, names: Sequence[str], request: TaskRequest) -> tuple[str, ...]:
    """With local files, groups and tags become their tasks, so that each finds its file; else they stay."""
    if request.folder is None:
        return tuple(names)
    leaves: list[str] = []
    for name in names:
        entry = manager.task_index[name]
        kind = entry.kind.name
        if kind == "TAG":
            leaves += _leaves(manager, sorted(entry.tags), request)
        elif kind == "GROUP":
            members = (entry.cfg or {}).get("task") or []
            if not all(isinstance(member, str) and member in manager.task_index for member in members):
                raise usage_error(f"{name} changes the settings of its tasks, so local items cannot serve it.")
            leaves += _leaves(manager, members, request)
        else:
            leaves.append(name)
    return tuple(dict.fromkeys(leaves))


class _OneSplit(dict):
    """A data set whose splits are all the same items, whatever the task calls them."""

    def __init__(self, items: Any) -> None:
        super().__init__({SPLIT: items})

    def __missing__(self, split: str) -> Any:
        return self[SPLIT]


def _load_local(manager: Any, name: str, path: Path) -> tuple[Any, str]:
    """The registry task over the rows of a file, and a note on its prompt."""
    import datasets

    entry = manager.task_index[name]
    if entry.kind.name != "TASK":
        raise usage_error(f"{name} fetches its items with code of its own, so it cannot take them from {path}.")
    items = local_items.with_pictures(local_items.read(path, name), path)
    if lacking := sorted(_fields({**entry.cfg, **items.overrides}) - set(items.rows[0])):
        raise UserError(
            f"{path} does not fit {name}: it has {', '.join(items.rows[0])} and needs {', '.join(lacking)}.",
            f"Use the fields of {name}'s own data set, or query/choices/gold where those are understood.",
        )
    try:
        rows = _OneSplit(datasets.Dataset.from_list(items.rows))
        settings = {
            "task": name,
            "custom_dataset": lambda **_: rows,
            "training_split": None,
            "validation_split": None,
            "test_split": SPLIT,
            "fewshot_split": SPLIT,
            **items.overrides,
        }
        # Settings can be changed only inside a group, which serves no other purpose here.
        return manager.load([{"group": SPLIT, "task": [settings]}])["tasks"][name], items.note
    except KeyError as error:
        raise UserError(f"{path} does not fit {name}: its items have no field {error}.") from None
    except Exception as error:
        raise UserError(f"{path} does not fit {name}: {_reason(error)}.") from None


def _fields(config: dict[str, Any]) -> set[str]:
    """Fields of an item that a task's templates name; none where its own code prepares the items first.

    lm-eval would take a bare name that is no field for the prompt itself, and ask nonsense without a word.
    """
    from jinja2 import meta
    from lm_eval.utils import env

    fields: set[str] = set()
    if config.get("process_docs"):
        return fields
    if isinstance(shown := config.get("doc_to_image"), list):
        fields |= set(shown)
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = config.get(key)
        if isinstance(template, str):
            fields |= {template} if template.isidentifier() else meta.find_undeclared_variables(env.parse(template))
    return fields


def _load_hub(manager: Any, name: str) -> dict[str, tuple[Any, str]]:
    """A task or the tasks of a group, with items from the hub."""
    try:
        tasks = manager.load([name])["tasks"]
    except ImportError as error:
        raise UserError(f"The task {name} needs a package that is not installed: {_reason(error)}.") from None
    except OSError as error:
        raise UserError(
            f"The items of {name} cannot be fetched from the Hugging Face hub: {_reason(error)}.",
            f"Connect to the network, or put {name}.jsonl into a folder and name it with --task-data.",
        ) from None
    except Exception as error:
        raise UserError(f"The task {name} cannot be loaded: {_reason(error)}.") from None
    return {full: (task, "") for full, task in tasks.items()}


def _prepare(task: Any, name: str, request: TaskRequest, path: Path | None, note: str) -> LoadedTask:
    """Settle the number of examples and count the items."""
    documents = task.eval_docs
    available = len(documents)
    items = min(available, request.limit or available)
    notes = [note, _settle_examples(task, name, available, request, path is not None)]
    if request.chat:
        notes.append("chat template applied")
    known = FULL_SIZES.get(name, available if path is None else None)
    full_set = False if items < available else None if known is None else available == known
    data = str(path) if path is not None else str(task.config.dataset_path or "lm-eval")
    chance = None
    if path is not None:
        for number in range(items):
            _check_item(task, documents[number], f"Item {number + 1} of {path} does not fit {name}")
    if task.OUTPUT_TYPE == "multiple_choice":
        chance = sum(1 / len(task.doc_to_choice(documents[index])) for index in range(items)) / items
    return LoadedTask(name, task, data, items, full_set, chance, "; ".join(filter(None, notes)))


def _check_item(task: Any, document: Any, misfit: str) -> None:
    """Render a local item as lm-eval will, which believes what it finds.

    Raises:
        UserError: it cannot, or the answer is none of the choices; begins with `misfit`.
    """
    try:
        question, answer = task.doc_to_text(document), task.doc_to_target(document)
        task.doc_to_image(document)
        chosen = task.OUTPUT_TYPE == "multiple_choice"
        choices = task.doc_to_choice(document) if chosen else None
    except Exception as error:  # a task's templates and functions fail in ways of their own
        raise UserError(f"{misfit}: {plain(_reason(error), 200)}.") from None
    if not chosen:
        return
    if not (isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices)):
        raise UserError(f"{misfit}: its choices are not a list of texts.")
    right = question if task.multiple_input else answer
    for gold in right if isinstance(right, list) else [right]:
        if gold not in (range(len(choices)) if isinstance(gold, int) else choices):
            raise UserError(f"{misfit}: its answer is none of its {len(choices)} choices.")


def _settle_examples(task: Any, name: str, available: int, request: TaskRequest, local: bool) -> str:
    """Set the number of few-shot examples as lm-eval's command line does, and say where they come from."""
    fixed = task.config.num_fewshot
    if fixed == 0 and request.num_fewshot:
        return "this task takes no examples"
    count = request.num_fewshot if request.num_fewshot is not None and fixed != 0 else fixed or 0
    task.set_config("num_fewshot", count)
    if count == 0:
        return ""
    if not local or task.fewshot_cfg.samples is not None:
        return f"{count} examples"
    if count >= available:
        raise usage_error(f"{name} has {available} items, too few to draw {count} examples beside each.")
    # lm-eval leaves the item itself out when examples come from the split that is scored.
    task.fewshot_cfg.split = SPLIT
    return f"{count} examples, drawn from the same file without the item itself"


def estimate(request: TaskRequest) -> dict[str, tuple[int | None, int | None]]:
    """Number of items, and roughly of tokens, of each task that would go through a model; nothing is fetched.

    Returns:
        name -> (items, tokens), None where they would have to be fetched first.

    Raises:
        UserError: an unknown name, or a local file that cannot be read.
    """
    files = data_files(request)
    result: dict[str, tuple[int | None, int | None]] = {}
    with quiet_lm_eval():
        manager = _manager(expand(request.names))
        for name in _leaves(manager, expand(request.names), request):
            path = files.get(name) or _data_file(name, request.folder)
            if path is None:
                size = FULL_SIZES.get(name)
                result[name] = (min(size, request.limit or size) if size else None, None)
                continue
            rows = local_items.read_rows(path)[: request.limit]
            result[name] = (len(rows), sum(_bytes(row) for row in rows) // BYTES_PER_TOKEN)
    return result


def _bytes(row: dict[str, Any]) -> int:
    """Bytes of all prompts of a row: each choice of several words repeats the rest."""
    choices = row.get("choices") or row.get("endings") or [row.get("sol1"), row.get("sol2")]
    choices = choices.get("text", []) if isinstance(choices, dict) else choices
    texts = [choice for choice in choices if isinstance(choice, str)]
    rest = sum(len(value.encode()) for value in row.values() if isinstance(value, str))
    copies = 1 if all(" " not in text for text in texts) else len(texts)
    return rest * max(copies, 1) + sum(len(text.encode()) for text in texts)


def fingerprint(request: TaskRequest) -> dict[str, str]:
    """SHA-256 of the local files that items may come from."""
    digests = {name: hash_file(path) for name, path in data_files(request).items()}
    if request.folder is not None:  # a group finds its tasks' files only when it is loaded
        digests["folder"] = hash_folder(Path(request.folder), ("*.jsonl",))
    return digests


def _reason(error: BaseException) -> str:
    """The first line of an exception of another library, for the end of a sentence."""
    return (str(error).strip().split("\n")[0].strip() or type(error).__name__).rstrip(".")
