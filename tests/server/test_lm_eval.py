"""lm-eval's own client of completions against the server: the scores of `edgerazor eval`, to the item."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from edgerazor import runtime, tasks
from edgerazor.console import Console
from edgerazor.tasks.quiet import quiet_lm_eval
from helpers.packed_folders import all_of, write_packed
from helpers.places import SHARED
from helpers.serving import serving

TASK, ITEMS = "arc_easy", 200
#: Of the sum of a choice's tokens: `Model.score` attends to a shared prefix and to what follows it apart, a server to
#: both at once, as a session does; of two sums that differ in their last digits, activations may be rounded apart.
LOGPROB_TOLERANCE = 0.25


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "eval").is_dir(), reason="there are no items of tasks beside the repository")
@pytest.mark.skipif(not importlib.util.find_spec("tenacity"), reason="lm-eval's extra `api` is not installed")
def test_completions_score_as_eval_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from edgerazor.tasks.lm_eval_models import EngineLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_packed(tmp_path / "packed", SHARED / "models" / "realtext-4m", all_of("int4"))
    model = runtime.load(tmp_path / "packed", threads=1)
    (loaded,) = tasks.load(tasks.TaskRequest((TASK,), str(SHARED / "eval"), ITEMS))

    def samples(scored: Any) -> list[Any]:
        described = {"tasks": {TASK: loaded.task}, "groups": {}, "group_map": {}}
        report = evaluate(scored, described, limit=ITEMS, bootstrap_iters=0, log_samples=True)
        return sorted(report["samples"][TASK], key=lambda sample: sample["doc_id"])

    with quiet_lm_eval():
        ours = samples(EngineLM(model, model.tokenizer, 32, Console(quiet=True), "the packed model"))
        with serving(model) as served:
            client = LocalCompletionsAPI(
                model="tiny",
                base_url=f"{served.url}/v1/completions",
                tokenizer=str(model.folder),
                tokenizer_backend="huggingface",
                batch_size=8,
                max_length=model.max_positions,
                max_retries=1,
            )
            theirs = samples(client)
    assert len(ours) == len(theirs) == ITEMS
    scores = [[(sample["acc"], sample["acc_norm"]) for sample in scored] for scored in (ours, theirs)]
    assert scores[0] == scores[1]
    for one, other in zip(ours, theirs, strict=True):
        for ours_pair, theirs_pair in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert theirs_pair[0] == pytest.approx(ours_pair[0], abs=LOGPROB_TOLERANCE)
