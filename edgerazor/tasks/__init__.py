"""Tasks: those of lm-eval, those of ours, where their items come from, and a model's scores on them.

A *task* is a list of items with a prompt, choices and a metric. lm-eval's registry defines thousands; its files say
how a row of a data set becomes prompt and choices, and we use them as they are, so that a score means what it means
elsewhere. Two things are added: tasks on the small world of the embedded teacher (`world/`), and items read from a
local folder instead of the hub (`local_items.py`), put through the registry's own prompt.

A multiple-choice item is scored by the probability that the model gives to each choice as the continuation of the
prompt; `acc` counts the items whose most probable choice is right, `acc_norm` divides each choice's log-probability
by its length in characters first (Gao et al., the Language Model Evaluation Harness).
"""

from edgerazor.tasks.catalog import ALIASES, WORLD, LoadedTask, TaskRequest, estimate, expand, fingerprint, load
from edgerazor.tasks.lm_eval_run import TaskScore, evaluate, is_generative, non_greedy
from edgerazor.tasks.local_items import read_rows

__all__ = [
    "ALIASES",
    "WORLD",
    "LoadedTask",
    "TaskRequest",
    "TaskScore",
    "estimate",
    "evaluate",
    "expand",
    "fingerprint",
    "is_generative",
    "load",
    "non_greedy",
    "read_rows",
]
