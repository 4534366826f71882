"""What several test files need: a tokenizer, a text, and tiny random models of every family."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.tiny_job import Run, make_run
from helpers.tiny_models import ModelMaker, sentences, tiny_tokenizer, write_tiny_model

torch.set_num_threads(1)  # tiny models are faster so

#: Tests write and sync thousands of small files, which memory does in no time; where there is enough of it for them.
MEMORY_FOLDER, ENOUGH_BYTES = Path("/dev/shm"), 4 * 10**9
if os.access(MEMORY_FOLDER, os.W_OK) and shutil.disk_usage(MEMORY_FOLDER).free > ENOUGH_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FOLDER))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers that GGUF files become lie with what tests write, and not in the user's cache."""
    monkeypatch.setenv("EDGERAZOR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


#: Files of tests that train or load models, start programs or import much, nearly all of them.
JOBS = {
    *("test_attention", "test_batching", "test_bench", "test_broken_exports", "test_budget_choice"),
    *("test_calibrate", "test_card", "test_compressed_tensors", "test_console", "test_distill"),
    *("test_distilled_data", "test_eval", "test_export_folders", "test_extras", "test_families", "test_fuzz"),
    *("test_generate", "test_gguf", "test_gptq", "test_guard", "test_imports", "test_initialization"),
    *("test_interface", "test_interop", "test_interop_folders", "test_layerwise", "test_learned", "test_lm_eval"),
    *("test_measured", "test_methods", "test_mixed", "test_page", "test_phases", "test_push", "test_real"),
    *("test_recipes", "test_reconstruct", "test_replacement", "test_report", "test_report_page"),
    *("test_rotated_modules", "test_runtime", "test_sampling", "test_sensitivity", "test_serve"),
    *("test_show_packed", "test_static", "test_streaming", "test_tasks", "test_tool_calls"),
    *("test_transformers_plugin", "test_writing"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs commands as a job, which `make test-fast` leaves out."""
    for item in items:
        if "run" in getattr(item, "fixturenames", ()) or item.path.stem in JOBS:
            item.add_marker("job")


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Interrupts what a test starts, too, where the tests run in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line in this process."""
    return make_run(capsys, monkeypatch)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model multiplies exactly as training does: decoded weights, float32 sums."""
    monkeypatch.setenv("EDGERAZOR_ISA", "reference")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCABULARY` entries, trained on `sentences`."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate, train and measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(300), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> ModelMaker:
    """`make_model(folder, config or family, dtype, **overrides)` writes a random model and its tokenizer there."""

    return functools.partial(write_tiny_model, tokenizer)


@pytest.fixture(scope="session")
def llama(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama; read only."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_model(folder, "llama")
    return folder
