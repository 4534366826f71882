"""Training: the trainer, its objective and phases, and what is saved and reported of it."""

from edgerazor.training.budget import Budget, make_budget, report_passes
from edgerazor.training.captured_states import CapturedStates, Captures, capture, captures
from edgerazor.training.checkpoint import Progress
from edgerazor.training.estimate import estimate_training
from edgerazor.training.evaluation import held_out_losses
from edgerazor.training.objective import make_terms
from edgerazor.training.phase_schedule import ScheduledPhase, make_phases
from edgerazor.training.results import DistillDryRun, DistillResult, PhaseEstimate, PhaseResult, result_tables
from edgerazor.training.store import TrainingStore, save_student
from edgerazor.training.student import Student, make_student
from edgerazor.training.teachers import Teacher, TeacherEnsemble, load_further_teachers, report_teachers
from edgerazor.training.trainer import Trainer

__all__ = [
    "Budget",
    "CapturedStates",
    "Captures",
    "DistillDryRun",
    "DistillResult",
    "PhaseEstimate",
    "PhaseResult",
    "Progress",
    "ScheduledPhase",
    "Student",
    "Teacher",
    "TeacherEnsemble",
    "Trainer",
    "TrainingStore",
    "capture",
    "captures",
    "estimate_training",
    "held_out_losses",
    "load_further_teachers",
    "make_budget",
    "make_phases",
    "make_student",
    "make_terms",
    "report_passes",
    "report_teachers",
    "result_tables",
    "save_student",
]
