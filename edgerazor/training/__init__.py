"""Training: the trainer, its objective and phases, and what is saved and reported of it."""

from edgerazor.training.budget import Budget, is_limited, make_budget, report_passes
from edgerazor.training.budget_choice import BudgetChoice
from edgerazor.training.captured_states import CapturedStates, Captures, capture, captures
from edgerazor.training.checkpoint import Progress
from edgerazor.training.estimate import (
    PlannedTraining,
    estimate_training,
    memory_bytes,
    student_sizes,
    trained_shape,
)
from edgerazor.training.evaluation import held_out_losses
from edgerazor.training.objective import make_terms
from edgerazor.training.phase_schedule import ScheduledPhase, make_phases
from edgerazor.training.preparation import Preparation, needs_teacher, prepare
from edgerazor.training.recorded_teacher import (
    RecordedTeacher,
    check_losses,
    check_recording,
    check_sequences,
    fitting_inputs,
    recorded_tokens,
    teacher_outlines,
)
from edgerazor.training.results import (
    DistillDryRun,
    DistillResult,
    PhaseEstimate,
    PhaseResult,
    ScaleDryRun,
    result_tables,
)
from edgerazor.training.scale import plan_at_scale
from edgerazor.training.served_teacher import ServedTeacher, Server, TeacherGoneError, check_served_losses
from edgerazor.training.speed import (
    MachineSpeed,
    cost_of,
    forward_seconds,
    init_seconds,
    measure_machine,
    speed_of,
    training_dtype,
    writing_seconds,
)
from edgerazor.training.store import TrainingStore, save_student
from edgerazor.training.streamed_teacher import StreamedTeacher
from edgerazor.training.student import Student, make_student
from edgerazor.training.teacher_sources import PreparedTeacher, check_source, open_teacher, resident_bytes
from edgerazor.training.teachers import (
    Teacher,
    TeacherEnsemble,
    TeacherSource,
    load_further_teachers,
    report_teachers,
)
from edgerazor.training.trainer import Trainer

__all__ = [
    "Budget",
    "BudgetChoice",
    "CapturedStates",
    "Captures",
    "DistillDryRun",
    "DistillResult",
    "MachineSpeed",
    "PhaseEstimate",
    "PhaseResult",
    "PlannedTraining",
    "Preparation",
    "PreparedTeacher",
    "Progress",
    "RecordedTeacher",
    "ScaleDryRun",
    "ScheduledPhase",
    "ServedTeacher",
    "Server",
    "StreamedTeacher",
    "Student",
    "Teacher",
    "TeacherEnsemble",
    "TeacherGoneError",
    "TeacherSource",
    "Trainer",
    "TrainingStore",
    "capture",
    "captures",
    "check_losses",
    "check_recording",
    "check_sequences",
    "check_served_losses",
    "check_source",
    "cost_of",
    "estimate_training",
    "fitting_inputs",
    "forward_seconds",
    "held_out_losses",
    "init_seconds",
    "is_limited",
    "load_further_teachers",
    "make_budget",
    "make_phases",
    "make_student",
    "make_terms",
    "measure_machine",
    "memory_bytes",
    "needs_teacher",
    "open_teacher",
    "plan_at_scale",
    "prepare",
    "recorded_tokens",
    "report_passes",
    "report_teachers",
    "resident_bytes",
    "result_tables",
    "save_student",
    "speed_of",
    "student_sizes",
    "teacher_outlines",
    "trained_shape",
    "training_dtype",
    "writing_seconds",
]
