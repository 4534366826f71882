"""What a stage is: a verb of a job that reads earlier stages' folders and writes its own.

`pipeline.py` runs stages by what they say of themselves here, and knows none of them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor.job import JobContext
from edgerazor.recipe import Recipe


class Stage(ABC):
    """One stage of a job.

    Attributes:
        name: of its command, of its section of the recipe, and in the working directory.
        result_model: class of its result.
        needs: names of the stages that run before it without asking, unless they are up to date.
        decides_student: what it is asked for decides what the student becomes, so that it may not change behind one.
        on_all_processes: every process that a launcher started takes part; else only the main process does.
        manages_folder: it goes on in its folder, or replaces that itself; else a new one takes the place of the old.
        carried: files of its old folder that a new one begins with, unless everything is done again.
        keeps_progress: what it goes on from stays in its new folder.
    """

    name: ClassVar[str]
    result_model: ClassVar[type[BaseModel]]
    needs: ClassVar[tuple[str, ...]] = ()
    decides_student: ClassVar[bool] = False
    on_all_processes: ClassVar[bool] = False
    manages_folder: ClassVar[bool] = False
    carried: ClassVar[tuple[str, ...]] = ()
    keeps_progress: ClassVar[bool] = False

    # --- what it does ---

    @abstractmethod
    def inputs(self, context: JobContext) -> dict[str, str]:
        """Everything the result depends on, as readable words and fingerprints.

        Raises:
            UserError: something that it reads is missing.
        """

    @abstractmethod
    def describe(self, context: JobContext) -> str:
        """A few words about what it is about to do."""

    @abstractmethod
    def run(self, context: JobContext) -> BaseModel:
        """Do it: read, compute, write the stage's folder but for its manifest.

        Returns:
            the result, of `result_model`.

        Raises:
            UserError: it cannot be done, or was interrupted.
        """

    @abstractmethod
    def dry_run(self, context: JobContext) -> BaseModel:
        """What `run` would do and cost; nothing is written.

        Raises:
            UserError: it cannot be done.
        """

    @abstractmethod
    def show(self, result: Any) -> list[RenderableType]:
        """A result of `result_model`, for people."""

    # --- what is refused ---

    def check_settings(self, context: JobContext) -> None:  # noqa: B027 - most stages refuse nothing
        """Refuse a section of the recipe that cannot be; asked of every stage before any of them runs.

        Raises:
            UserError: the settings contradict themselves or do not fit the model's files.
        """

    def check(self, context: JobContext) -> None:  # noqa: B027 - most stages refuse nothing
        """Refuse a run that cannot work, before anything is written.

        Raises:
            UserError: the recipe does not fit the model, or what the stage reads is not there.
        """

    def check_continuation(self, context: JobContext, inputs: dict[str, str]) -> None:  # noqa: B027 - most stages refuse nothing
        """Refuse to go on from what an interrupted run left, where it was made of other inputs.

        Raises:
            UserError: it was.
        """

    # --- its place in a job ---

    def takes_part(self, recipe: Recipe) -> bool:
        """Whether `run` of a whole recipe includes it."""
        return True

    def stands_alone(self, context: JobContext) -> bool:
        """Whether what it made needs nothing before it, so that it is not made again for the stages behind it."""
        return False

    def stored_inputs(self, context: JobContext) -> dict[str, str] | None:
        """The inputs of what is there, finished or interrupted; None where there is nothing."""
        manifest = context.work.manifest(self.name)
        return manifest.inputs if manifest else None

    def deliver(self, context: JobContext, result: Any) -> Any:
        """What follows a run, or a finished stage that is asked for again; returns the result with it."""
        return result
