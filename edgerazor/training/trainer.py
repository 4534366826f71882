"""The training of a student: steps, evaluations, phases, and what is saved of them.

An optimizer step is `accumulation` micro-batches on each process. Counts and teacher statistics of the whole step are
known before the student's first backward pass, so that 2B sequences on one process, B on two, and 2 micro-batches of
B give the same gradient. The order of the data is a function of the step, so the step is the position in the data.

The state of a training is its checkpoint. An interrupted training goes on from it and computes the same numbers again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from edgerazor import data, losses, models, modules
from edgerazor.console import Console, Tracker
from edgerazor.data import Batch
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.losses import Outputs, StepTotals
from edgerazor.recipe import Distill
from edgerazor.training import objective, reconstruction, sharding, stability, tracking
from edgerazor.training.budget import Budget, clock, make_budget
from edgerazor.training.captured_states import Captures, captures
from edgerazor.training.checkpoint import Progress
from edgerazor.training.evaluation import held_out_losses, selection_metric
from edgerazor.training.in_place import InPlaceAdafactor
from edgerazor.training.objective import Terms
from edgerazor.training.optimizer import current_rate, learning_rate_factor, make_optimizer, set_learning_rate
from edgerazor.training.pace import Pace
from edgerazor.training.phase_schedule import ScheduledPhase
from edgerazor.training.results import DistillResult, PhaseResult
from edgerazor.training.served_teacher import TeacherGoneError
from edgerazor.training.signals import Signals, watch_signals
from edgerazor.training.store import TrainingStore, is_complete, save_student, student_tensors
from edgerazor.training.student import Student
from edgerazor.training.teachers import TeacherEnsemble, TeacherSource
from edgerazor.workdir import digest_json

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepLeftError(Exception):
    """A step was left before the optimizer changed anything, because the process has been asked to end."""


class StepStatus(NamedTuple):
    """What a step has ended.

    Attributes:
        finished: the training, because the budget is exhausted or the target reached.
        phase_ended: a phase of it.
        interrupted: somebody asked the process to end.
    """

    finished: bool
    phase_ended: bool
    interrupted: bool


@dataclass
class Trainer:
    """One training, from its first evaluation to its result.

    Attributes:
        settings: the `distill` section, with the current phase's own values in their places.
        accelerator: knows the device, the precision and the other processes.
        student: what is trained.
        teachers: what it is compared with; empty where nothing needs a teacher.
        rows: the text to train on.
        held_out: the text to evaluate on.
        phases: of the training, at least one.
        store: where students, checkpoint and metrics go.
        progress: counters.
        tokens_per_row: that a training row takes, on average.
        budget: how long the training lasts.
        optimizer: of the current phase.
        terms: the objective of the current phase.
        compared_layers: layers whose hidden states the last step compared.
        skipped_because: why the last step was not taken; empty where it was.
        clock_start: of the clock when the seconds in `progress` were last updated.
        pace: what people read while it runs.
        signals: whether somebody asked the process to end.
    """

    settings: Distill
    accelerator: Accelerator
    student: Student
    teachers: TeacherSource
    rows: data.TokenRows
    held_out: data.TokenRows
    phases: Sequence[ScheduledPhase]
    store: TrainingStore
    progress: Progress = field(init=False, default_factory=Progress)
    tokens_per_row: float = field(init=False)
    budget: Budget = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    terms: Terms = field(init=False)
    compared_layers: set[int] = field(init=False, default_factory=set)
    skipped_because: str = field(init=False, default="")
    clock_start: float = field(init=False, default=0.0)
    pace: Pace = field(init=False, default_factory=Pace)
    signals: Signals = field(init=False, default_factory=Signals)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.student.model, self.settings)
        self.student.start_engine(self.optimizer, self.settings)
        self.terms = self.phases[0].terms
        self.tokens_per_row = self.rows.tokens_per_row  # once: the mean length of a stream changes as it is read
        self.budget = make_budget(self.settings, self.rows, self.rows_per_step, self.tokens_per_step)

    def allocation(self) -> AbstractContextManager[None]:
        """How the C library gets memory for the steps inside: quickly on a CPU, unless the teacher is streamed."""
        quick = self.accelerator.device.type == "cpu" and self.settings.teacher_source != "streamed"
        return models.freed_blocks_kept() if quick else nullcontext()

    # --- counters and limits -------------------------------------------------------------------

    @property
    def phase(self) -> ScheduledPhase:
        """The current phase; the first one before it has begun."""
        return self.phases[max(self.progress.phase, 1) - 1]

    @property
    def rows_per_step(self) -> int:
        """Sequences of an optimizer step, over all processes."""
        return self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step; their mean where rows are of different lengths."""
        return round(self.rows_per_step * self.tokens_per_row)

    @property
    def student_captures(self) -> Captures:
        """The states that the losses need of the student."""
        return captures(loss for _, loss in self.terms)

    @property
    def teacher_captures(self) -> Captures:
        """The states that the losses need of the first teacher."""
        return captures(loss for _, loss in self.terms if loss.needs_teacher)

    def seconds(self) -> float:
        """Training time so far, resumes included."""
        return self.progress.seconds + clock(self.settings.clock) - self.clock_start

    def budget_share(self) -> float:
        """How much of the budget is used, 0 to 1, all phases together; the largest value of all processes."""
        progress = self.progress
        return self.all_reduce_max(self.budget.share_used(progress.step, self.seconds(), progress.block_seconds))

    def budget_exhausted(self) -> bool:
        """Whether the budget is used up, for all processes alike."""
        if self.budget.steps_exhausted(self.progress.step):
            return True
        if self.budget.seconds is None:
            return False
        return bool(self.all_reduce_max(float(self.budget.time_exhausted(self.seconds()))))

    def interrupted(self) -> bool:
        """Whether a process has been asked to end, for all processes alike."""
        return bool(self.all_reduce_max(float(self.signals.received)))

    def leave_step_if_interrupted(self) -> None:
        """Give a step up that nothing has changed by yet: a large one may last longer than a machine waits.

        Several processes end at the end of the step, since all of them have to.

        Raises:
            StepLeftError: the process has been asked to end.
        """
        if self.signals.received and self.accelerator.num_processes == 1:
            raise StepLeftError

    def all_reduce_max(self, value: float) -> float:
        """The largest of the processes' values, so that all of them decide alike."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max())

    # --- the training --------------------------------------------------------------------------

    def run(self, console: Console) -> None:
        """Everything that is left: the evaluation before the first step, reconstruction, and all steps.

        Raises:
            UserError: the training diverges, or it was interrupted, after which everything is saved.
        """
        with (
            watch_signals() as self.signals,
            self.allocation(),
            sharding.ended_with_others(self.accelerator.num_processes),
            tracking.tracked(self.accelerator),
        ):
            self.evaluate_baseline("initialise", 0)
            self.reconstruct_blocks(console)
            if (blocks := self.settings.reconstruct) is not None:
                self.evaluate_baseline("reconstruct", blocks.steps * self.student.structure.layer_count)
            self.train(console)
        self.accelerator.wait_for_everyone()

    def train(self, console: Console) -> None:
        """All steps that are left.

        Raises:
            UserError: as `run`.
        """
        if self.progress.phase == 0:
            self.begin_phase(1, budget_share=0.0)
        with console.track("distill", self.budget.steps or 0, self.progress.step) as tracker:
            for batches in self.batches():
                loss = self.step_or_save(batches)
                self.count_step(loss)
                self.report_skipped(console)
                status = self.evaluate_and_save()
                self.report(status, tracker, console)
                if status.finished:
                    break
                if status.interrupted:
                    raise _interrupted(f"at step {self.progress.step}; everything is saved.")

    def step_or_save(self, batches: Sequence[Batch]) -> float:
        """One optimizer step, or everything saved where somebody ends the process or the teacher's server is gone.

        Raises:
            UserError: as `step`; what is saved, where one of the two is the reason.
        """
        random_state = torch.get_rng_state()
        try:
            return self.step(batches)
        except StepLeftError:
            torch.set_rng_state(random_state)
            self.save()
            raise _interrupted(f"behind step {self.progress.step}; everything up to it is saved.") from None
        except TeacherGoneError as error:
            self.save()
            raise TeacherGoneError(
                f"{error.message} Everything up to step {self.progress.step} is saved.", error.hint, error.code
            ) from None

    def batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of this process for every step that is left, from the current one on."""
        accelerator, settings = self.accelerator, self.settings
        while not (self.budget.steps_exhausted(self.progress.step) or self.progress.on_target):
            yield [
                self.rows.batch(
                    step=self.progress.step,
                    micro=micro_batch,
                    accumulation=settings.accumulation,
                    rank=accelerator.process_index,
                    world=accelerator.num_processes,
                    batch_size=settings.batch_size,
                )
                for micro_batch in range(settings.accumulation)
            ]

    def count_step(self, loss: float) -> None:
        """Count an optimizer step that had this loss."""
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        if self.skipped_because:
            self.progress.skipped += 1
            self.progress.rate_factor *= stability.LOWER
            return
        self.progress.skipped, self.progress.loss = 0, loss
        self.progress.recent_losses = [*self.progress.recent_losses, loss][-stability.LOOKED_AT :]

    def report_skipped(self, console: Console) -> None:
        """Say that a step was skipped, if it was.

        Raises:
            UserError: too many were, one after the other; what was saved before stays.
        """
        if not self.skipped_because:
            return
        progress = self.progress
        console.warn(
            f"Step {progress.step} was skipped, because {self.skipped_because}; the learning rate is "
            f"{self.settings.learning_rate * progress.rate_factor:.3g} at its peak from now on."
        )
        if progress.skipped >= stability.MOST_SKIPPED:
            raise UserError(
                f"{progress.skipped} steps up to step {progress.step} were skipped one after the other, because "
                f"{self.skipped_because}.",
                "The last checkpoint and the students are kept. Lower --learning-rate, or train with `precision: "
                "float32` in the recipe.",
            )

    def report(self, status: StepStatus, tracker: Tracker, console: Console) -> None:
        """Tell people where the training is, and what a phase that has ended has reached."""
        progress, metric = self.progress, selection_metric(self.teachers)
        self.pace.steps.append((self.seconds(), progress.tokens))
        tracker.note(self.pace.line(progress.loss, metric, self.budget, progress.step))
        tracker.advance()
        if not self.skipped_because:
            shown = {"loss": progress.loss, "tokens": progress.tokens, "learning_rate": current_rate(self.optimizer)}
            self.accelerator.log({**shown, "tokens_per_second": self.pace.tokens_per_second() or 0.0}, progress.step)
        if status.phase_ended:
            ended = progress.phases[-1]
            name = f"phase {ended.phase} of {len(self.phases)} ({ended.what})"
            console.say(f"{name}: {ended.steps} steps, held-out {metric} {ended.held_out:.4f}")

    # --- one step ------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> float:
        """One optimizer step.

        Args:
            batches: its micro-batches on this process: `input_ids [B, T]` and `labels [B, T]`, int64.

        Returns:
            the loss of the step, over all processes; `skipped_because` says whether the step was taken.
        """
        device = self.accelerator.device
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        targets, totals = self.teacher_targets(batches)
        phase_share = self.phase.share_used(self.budget_share(), self.progress.phase_share)
        factor = learning_rate_factor(self.settings, phase_share) * self.progress.rate_factor
        set_learning_rate(self.optimizer, self.settings.learning_rate * factor)
        # whole rounded weights of all layers would be what sharding is to save
        caches = self.settings.cache_rounding and not self.student.sharded
        with modules.rounded_once(self.student.model) if caches else nullcontext():
            loss = self.backward(batches, targets, totals, phase_share)
        step_loss = float(self.accelerator.reduce(loss, "sum"))
        self.skipped_because = self.optimize(step_loss)
        return step_loss

    def teacher_targets(self, batches: Sequence[Batch]) -> tuple[list[Outputs | None], StepTotals]:
        """The teachers' outputs for each micro-batch of a step, and the step's totals.

        Which layers are compared may depend on all micro-batches, and the hidden states of all layers of all of them
        may be more than fits in memory. So the layers are kept that the last step compared, which are nearly always
        the same; where others are compared, the teacher reads the micro-batch again.
        """
        kept_layers = objective.always_compared_layers(self.terms) | self.compared_layers
        needs_teacher = any(loss.needs_teacher for _, loss in self.terms)
        outputs: Iterable[Outputs | None] = [None] * len(batches)
        if needs_teacher:
            outputs = self.teachers.outputs_of(batches, self.teacher_captures)
        targets: list[Outputs | None] = []
        statistics = []
        for batch, target in zip(batches, outputs, strict=True):
            self.leave_step_if_interrupted()
            if target is not None:
                objective.cache_logits(target, batch["labels"], self.terms, len(batches))
            statistics.append(objective.batch_statistics(self.terms, batch["labels"], target))
            if target is not None:
                objective.drop_other_layers(target, kept_layers)
            targets.append(target)
        totals = self.step_totals(statistics)
        self.compared_layers = objective.compared_layers(self.terms, totals)
        compared = [target for target in targets if target is not None]
        for target in compared:
            objective.drop_other_layers(target, self.compared_layers)
        if missing := sorted(self.compared_layers - kept_layers):  # the same ones of all micro-batches
            for target, states in zip(compared, self.teachers.hidden_states(batches, missing), strict=True):
                target.hidden_states |= states
        return targets, totals

    def step_totals(self, statistics: Sequence[dict[str, Tensor]]) -> StepTotals:
        """Counts and statistics of a step, from those of its micro-batches, over all processes."""
        sums: dict[str, Tensor] = {}
        zero = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch_statistics in statistics:
            for name, value in batch_statistics.items():
                sums[name] = sums.get(name, zero) + value.double()
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in sums.items()}
        samples, tokens = int(sums.pop("samples")), int(sums.pop("tokens"))
        return StepTotals(samples, tokens, {name: float(value) / max(samples, 1) for name, value in sums.items()})

    def backward(
        self, batches: Sequence[Batch], targets: Sequence[Outputs | None], totals: StepTotals, phase_share: float
    ) -> Tensor:
        """Add up the gradients of all micro-batches of a step.

        Args:
            batches: micro-batches on the device.
            targets: the teachers' outputs for them.
            totals: counts and statistics of the step.
            phase_share: how much of the phase is done, 0 to 1, on which the weights of losses depend.

        Returns:
            this process's contribution to the loss of the step, a scalar.
        """
        accelerator = self.accelerator
        terms = [(term.weight_at(phase_share), loss) for term, loss in self.terms]
        step_loss = torch.zeros((), device=accelerator.device)
        for index, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            self.leave_step_if_interrupted()
            last = index == len(batches) - 1
            # gradients that are sharded are divided at once, and take the less memory
            with nullcontext() if last or self.student.sharded else accelerator.no_sync(self.student.wrapped):
                outputs = self.student.outputs(batch["input_ids"], self.student_captures)
                loss = losses.total_loss(terms, outputs, target, batch["labels"], totals)
                step_loss += loss.detach()
                if isinstance(self.optimizer, InPlaceAdafactor):
                    self.optimizer.before_backward(active=last)
                    if last and stability.problem(float(step_loss), 0.0, self.progress.recent_losses):
                        break  # before a weight changes
                # Gradients are averaged over processes, but contributions to the loss of the step add up.
                if self.student.engine is not None:
                    self.student.engine.backward(loss * accelerator.num_processes, last)
                else:
                    accelerator.backward(loss * accelerator.num_processes)
        return step_loss

    def optimize(self, loss: float) -> str:
        """Clip the gradient and let the optimizer take its step.

        Args:
            loss: of the step, over all processes.

        Returns:
            why the step was skipped instead; empty where it was taken.
        """
        if self.student.engine is not None:
            return self.student.engine.step(stability.problem(loss, 0.0, self.progress.recent_losses))
        if isinstance(self.optimizer, InPlaceAdafactor):
            norm: Tensor | float = math.nan if self.optimizer.not_finite else 0.0
        elif self.student.sharded:
            norm = sharding.clip_gradients(self.student.model, self.settings.clip)
        else:
            norm = self.accelerator.clip_grad_norm_(self.student.model.parameters(), self.settings.clip)
        problem = stability.problem(loss, float(norm), self.progress.recent_losses)
        if not problem:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return problem

    # --- evaluating and saving -----------------------------------------------------------------

    def evaluate_and_save(self) -> StepStatus:
        """After a step: evaluate the student, end the phase and write a checkpoint, where each is due."""
        settings, step = self.settings, self.progress.step
        finished, interrupted = self.budget_exhausted(), self.interrupted()
        phase_ended = finished or (len(self.phases) > 1 and self.phase.has_ended(self.budget_share()))
        if phase_ended or step % settings.evaluate_every == 0:
            held_out = self.evaluate(settings.train)
            self.progress.on_target = self.reaches_target(held_out)
            finished = finished or self.progress.on_target
            phase_ended = bool(settings.phases) and (phase_ended or finished)
            if phase_ended:
                self.end_phase(held_out, finished)
        if phase_ended or finished or interrupted or step % settings.checkpoint_every == 0:
            self.save()
        return StepStatus(finished, phase_ended, interrupted)

    def evaluate(self, what: str) -> float:
        """Held-out loss of the student as it would be packed; the main process evaluates for all and saves students.

        Of a sharded student all processes evaluate, since none of them has it whole.

        Args:
            what: was done to the student before, for the metrics of a training with phases.

        Returns:
            the held-out loss that decides which student is the best, in nats per token.

        Raises:
            UserError: the loss is not finite.
        """
        is_main = self.accelerator.is_main_process
        if not (is_main or self.student.sharded):
            return self.all_reduce_max(-math.inf)
        progress, settings = self.progress, self.settings
        batches = data.sample_batches(self.held_out, settings.evaluate_sequences, settings.batch_size)
        held_out, digests = held_out_losses(self.student, self.teachers, batches, self.settings.cache_rounding)
        metric = selection_metric(self.teachers)
        value = held_out[metric]
        if not math.isfinite(value):
            raise UserError(f"The held-out loss is not finite at step {progress.step}.", "Lower --learning-rate.")
        tensors = student_tensors(self.student.model, is_main)
        is_best = progress.best is None or value < progress.best
        if is_best:
            progress.best, progress.best_step = value, progress.step
        if is_main:
            self.save_measured(what, tensors, digests, held_out, is_best)
        return self.all_reduce_max(value)

    def save_measured(
        self,
        what: str,
        tensors: dict[str, Tensor],
        digests: dict[str, str],
        held_out: dict[str, float],
        is_best: bool,
    ) -> None:
        """Save the student that was evaluated, and what was measured of it.

        Args:
            what: was done to the student before, for the metrics of a training with phases.
            tensors: of the student.
            digests: module path -> digest of the codes and scales that were evaluated.
            held_out: its held-out losses, in nats per token.
            is_best: whether none before it was better.
        """
        progress, metric = self.progress, selection_metric(self.teachers)
        measured = {"step": progress.step, "measure": f"held-out {metric}", "value": held_out[metric]}
        for folder in ([self.store.best] if is_best else []) + [self.store.last]:
            save_student(folder, tensors, digests, measured)
        row: dict[str, Any] = {"phase": progress.phase, "what": what} if self.settings.phases else {}
        row |= {"step": progress.step, "tokens": progress.tokens, "seconds": round(self.seconds(), 1)}
        self.store.append_metrics({**row, "loss": progress.loss, **held_out})
        self.accelerator.log({f"held_out/{name}": value for name, value in held_out.items()}, progress.step)
        self.pace.measured.append((progress.step, held_out[metric]))
        progress.metrics_lines += 1

    def evaluate_baseline(self, what: str, steps: int) -> None:
        """Before the first step of a training with phases or a target: evaluate, report and save, once.

        Args:
            what: was done to the student before: `initialise` or `reconstruct`.
            steps: that it took.
        """
        progress = self.progress
        needed = self.settings.phases or self.settings.target_kl is not None
        done = any(phase.what == what for phase in progress.phases)
        if not needed or progress.phase or progress.on_target or done:
            return
        held_out = self.evaluate(what)
        self.record_phase(0, what, steps, held_out)
        progress.on_target = self.reaches_target(held_out)
        self.save()

    def reaches_target(self, held_out: float) -> bool:
        """Whether a held-out loss is as low as the target, if there is one."""
        target = self.settings.target_kl
        return target is not None and held_out <= target

    def save(self) -> None:
        """Write the checkpoint, on the main process; the clock goes on from here."""
        is_main = self.accelerator.is_main_process
        if not (is_main or self.student.sharded):
            return
        self.progress.seconds, self.clock_start = self.seconds(), clock(self.settings.clock)
        self.progress.streams = self.rows.state(self.progress.step, self.rows_per_step)
        self.store.save_checkpoint(self.student.model, self.optimizer, self.progress, is_main)

    def resume(self, console: Console) -> None:
        """Go back to the state of the checkpoint, if there is one, and start the clock.

        Raises:
            UserError: the checkpoint or a student is damaged.
        """
        stored = self.store.stored_progress()
        if stored and stored.phase:
            self.enter_phase(stored.phase)
        restored = self.store.restore_checkpoint(self.student.model, self.optimizer)
        if restored:
            self.progress = restored
            if restored.step:
                restored.phase = max(restored.phase, 1)  # checkpoints did not always say that the first had begun
            self.rows.restore(restored.streams)
            if restored.best is not None or is_complete(self.store.best):
                # the best student may have been saved after the checkpoint; it is still the one to beat
                restored.best, restored.best_step = self.store.best_measurement()
            console.say(f"distill goes on from step {restored.step}")
        if self.accelerator.is_main_process:
            self.store.trim_metrics(self.progress.metrics_lines)
        tracking.start(self.accelerator, self.settings, digest_json(self.store.inputs)[:16], self.progress.step)
        self.clock_start = clock(self.settings.clock)

    def result(self, notation: str) -> DistillResult:
        """What the training reached.

        Args:
            notation: of the student's formats, such as `W1.88-A8-KV8`.
        """
        progress = self.progress
        return DistillResult(
            notation=notation,
            steps=progress.step,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 1),
            loss=progress.loss or 0.0,
            best=progress.best or 0.0,
            best_step=progress.best_step,
            measure=f"held-out {selection_metric(self.teachers)}, nats per token",
            tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 1),
            block_errors=[(float(f"{before:.4g}"), float(f"{after:.4g}")) for before, after in progress.block_errors],
            phases=progress.phases,
            stopped="target" if progress.on_target else "budget",
        )

    # --- phases and reconstruction -------------------------------------------------------------

    def begin_phase(self, number: int, budget_share: float) -> None:
        """Go on with a phase, counted from 1, when this share of the whole budget is used."""
        progress = self.progress
        progress.phase, progress.phase_step, progress.phase_share = number, progress.step, budget_share
        if number == 1:
            progress.block_seconds = self.seconds()
        self.enter_phase(number)

    def enter_phase(self, number: int) -> None:
        """Train what a phase trains from now on, with a new optimizer; does nothing in a training without phases."""
        if not self.settings.phases:
            return
        phase = self.phases[number - 1]
        self.settings, self.terms = phase.settings, phase.terms
        if phase.settings.train == "scales":
            modules.freeze_codes(self.student.model)
        else:
            modules.unfreeze_codes(self.student.model)
        self.student.rewrap()
        if isinstance(self.optimizer, InPlaceAdafactor):
            self.optimizer.remove_hooks()
        self.optimizer = make_optimizer(self.student.model, phase.settings)

    def end_phase(self, held_out: float, finished: bool) -> None:
        """Record the current phase and begin the next one that has a part of the budget left, unless all is done."""
        budget_share = self.budget_share()
        steps = self.progress.step - self.progress.phase_step
        self.record_phase(self.progress.phase, self.settings.train, steps, held_out)
        while not finished:
            self.begin_phase(self.progress.phase + 1, budget_share)
            if not self.phase.has_ended(budget_share) or self.progress.phase == len(self.phases):
                return
            # one step has used up the time of this phase, too
            self.record_phase(self.progress.phase, self.settings.train, 0, held_out)

    def record_phase(self, phase: int, what: str, steps: int, held_out: float) -> None:
        """Note what a phase has reached, in the place of what it had reached when it ended before."""
        progress, now = self.progress, self.seconds()
        earlier = [result for result in progress.phases if result.phase < max(phase, 1)]
        seconds = round(now - progress.phase_seconds, 1)
        result = PhaseResult(phase=phase, what=what, steps=steps, seconds=seconds, held_out=held_out)
        progress.phases, progress.phase_seconds = [*earlier, result], now

    def reconstruct_blocks(self, console: Console) -> None:
        """Train the layers that are not reconstructed yet, one by one, if the recipe wants it; save after each.

        Raises:
            UserError: it was interrupted.
        """
        progress, layer_count = self.progress, self.student.structure.layer_count
        layers_done = len(progress.block_errors)
        if self.settings.reconstruct is None or layers_done == layer_count or progress.on_target:
            return
        assert isinstance(self.teachers, TeacherEnsemble)  # `distill` refuses recordings
        block_errors = reconstruction.reconstruct(
            self.student.model,
            self.teachers.first.model,
            self.student.structure,
            self.rows,
            self.settings,
            self.accelerator,
            layers_done,
            self.interrupted,
        )
        with console.track("reconstruct layers", layer_count, layers_done) as tracker:
            for errors in block_errors:
                if errors is None:
                    layer = len(progress.block_errors) + 1
                    raise _interrupted(
                        f"while layer {layer} of {layer_count} was reconstructed; those before it are saved."
                    )
                progress.block_errors.append(errors)
                progress.block_seconds = self.seconds()
                self.save()
                tracker.note(f"relative error {errors[0]:.4f}, then {errors[1]:.4f}")
                tracker.advance()


def _interrupted(where: str) -> UserError:
    return UserError(f"Interrupted {where}", "The same command goes on from there.", INTERRUPTED)
