"""Memory and speed of a distillation step at the shapes of a real model, beside other ways to compute it.

    python -m recipes.benchmarks.memory                                  ours, and the straightforward formulation
    python -m recipes.benchmarks.memory --peer OTHER_VENV/bin/python     also the published EdgeRazor package (1.3.5)

The published package has our import name, and so needs an environment of its own.

Random weights in the shapes of Qwen3-0.6B; 2 sequences of 1,024 tokens; float32 masters, bfloat16 autocast, teacher in
bfloat16; 1.88 bits, A8-KV8, CE + EAKLD (+ LAFD in a whole step). Each measurement runs in a process of its own.

*Activation memory* is the peak during a step minus what is resident before it, when weights and gradients are
allocated. (The optimizer has no part in it and is left out, on all sides.) On a CPU the peak is the kernel's high-water
mark of the process, on CUDA that of the allocator. Time is that of the second step.

Rows: `loss` from final hidden states to their gradient and that of the head; `step` a whole forward and backward pass;
`checkpointed` the same with gradient checkpointing. `--layers 7` takes fewer layers, for less memory and time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

#: The embedded teacher's folder; the file runs by itself in the environment of the other package.
WORLD = Path(__file__).resolve().parents[1] / "world"

#: Qwen3-0.6B.
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
ROWS, TOKENS = 2, 1024
WORK = ("loss", "step", "checkpointed")
SIDES = ("ours", "plain", "peer")
LOSSES = {"ce": 0.1, "eakld": 2.0, "lafd": 0.1}

Step = Callable[[], None]


# --- measuring ---------------------------------------------------------------------------------


def status(field: str) -> int:
    """A field of the process's status in bytes (VmRSS, VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(step: Step, device: str) -> dict[str, float]:
    """Activation memory in bytes and seconds of the second of two steps."""
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    began = time.monotonic()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")
    return {"bytes": peak - before, "resident": before, "seconds": seconds}


# --- the loss alone ----------------------------------------------------------------------------


def states_and_heads(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Parameter, torch.Tensor, torch.Tensor]:
    """Final hidden states of student and teacher, the student's head (float32) and the teacher's, and labels."""
    torch.manual_seed(0)
    hidden, vocabulary = SHAPE["hidden_size"], SHAPE["vocab_size"]
    student = torch.randn(ROWS, TOKENS, hidden, device=device).bfloat16().requires_grad_()
    teacher = (student.detach().float() + 0.3 * torch.randn(ROWS, TOKENS, hidden, device=device)).bfloat16()
    head = torch.nn.Parameter(torch.randn(vocabulary, hidden, device=device) / hidden**0.5)
    head.grad = torch.zeros_like(head)
    labels = torch.randint(0, int(vocabulary), (ROWS, TOKENS), device=device)
    return student, teacher, head, head.detach().bfloat16(), labels


def our_loss(device: str) -> Step:
    from edgerazor import losses

    student, teacher, head, teacher_head, labels = states_and_heads(device)
    terms = [(LOSSES[name], losses.make(name)) for name in ("ce", "eakld")]

    def step() -> None:
        ours = losses.Outputs(student, head=losses.Head(head.detach().bfloat16(), master=head))
        theirs = losses.Outputs(teacher, head=losses.Head(teacher_head))
        samples, tokens = losses.step_counts(labels)
        sums = terms[1][1].teacher_statistics(theirs, labels)
        totals = losses.StepTotals(samples, tokens, {name: float(value) / samples for name, value in sums.items()})
        losses.total_loss(terms, ours, theirs, labels, totals).backward()

    return step


def plain_loss(device: str) -> Step:
    """The formulas as one would write them down, on whole logits."""
    student, teacher, head, teacher_head, labels = states_and_heads(device)

    def step() -> None:
        logits = student @ head.bfloat16().T
        with torch.no_grad():
            target = teacher @ teacher_head.T
        written_down(logits.float(), target.float(), labels).backward()

    return step


def written_down(logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """CE + EAKLD of whole logits [B, T, V]."""
    log_s, log_t = logits[:, :-1].log_softmax(-1), target[:, :-1].log_softmax(-1)
    entropy = -(log_t.exp() * log_t).sum(-1).mean()
    gamma = (1 - entropy / math.log(16)).clamp(0, 1)
    forward = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    reverse = (log_s.exp() * (log_s - log_t)).sum(-1).mean()
    task = torch.nn.functional.nll_loss(log_s.flatten(0, 1), labels[:, 1:].flatten())
    return LOSSES["ce"] * task + LOSSES["eakld"] * (gamma * reverse + (1 - gamma) * forward)


def peer_losses() -> dict[str, Any]:
    """EdgeRazor's published objective in its own words."""
    entropy = {"loss_type": "logits", "loss_function": "compute_kld_confidence", "alpha": LOSSES["eakld"]}
    entropy |= {"temperature": 1.0, "use_entropy": True, "confidence_k": 16}
    features = {"loss_type": "hidden_states", "loss_function": "compute_mse", "alpha": LOSSES["lafd"]}
    features |= {"layer_index": "adaptive", "layer_index_adaptive_topk": 3}
    return {"method": "KD", "loss_task_alpha": LOSSES["ce"], "loss_1": entropy, "loss_2": features}


def peer_loss(device: str) -> Step:
    from edgerazor import EdgeRazor  # type: ignore[attr-defined]  # of the other package

    student, teacher, head, teacher_head, labels = states_and_heads(device)
    objective = {key: value for key, value in peer_losses().items() if key != "loss_2"}
    razor = EdgeRazor(kd_config=objective)

    def step() -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = student @ head.bfloat16().T
        with torch.no_grad():
            target = teacher @ teacher_head.T
        task = ForCausalLMLoss(logits, labels, int(SHAPE["vocab_size"]))  # as the model computes it
        loss, _ = razor.compute_loss({"loss": task, "logits": logits}, {"logits": target}, labels)
        loss.backward()

    return step


# --- a whole step ------------------------------------------------------------------------------


@contextlib.contextmanager
def random_model(layers: int) -> Iterator[Path]:
    """A folder with random weights in bfloat16, and a tokenizer whose text is never looked at."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "num_hidden_layers": layers})).bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(WORLD / "teacher").save_pretrained(folder)
        yield Path(folder)


def our_step(folder: Path, device: str, checkpointed: bool) -> Step:
    from edgerazor import pipeline, recipe, training, workdir
    from edgerazor.console import Console
    from edgerazor.job import JobContext

    text = folder / "text.txt"
    text.write_text((WORLD / "heldout.txt").read_text(encoding="utf-8"), encoding="utf-8")
    settings = {
        "batch_size": ROWS,
        "gradient_checkpointing": checkpointed,
        "precision": "bfloat16",
        "losses": [{"name": name, "weight": weight} for name, weight in LOSSES.items()],
    }
    settings = recipe.build(
        {
            "model": str(folder),
            "device": device,
            "data": {"sequence_length": TOKENS, "train": [{"path": str(text)}]},
            "calibrate": {"bits": 1.88, "plan": "interleave", "rotation": "none", "sequences": 1},
            "distill": settings,
        }
    )
    work, console = workdir.WorkDir(folder / "work"), Console(quiet=True)
    pipeline.run("calibrate", settings, work, console)
    trainer = training.prepare(JobContext(settings, work, console), {}).trainer
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device=device))], lr=0.0)
    batches = next(trainer.batches())

    def step() -> None:
        trainer.step(batches)

    return step


def peer_step(folder: Path, device: str, checkpointed: bool) -> Step:
    from transformers import AutoModelForCausalLM

    from edgerazor import EdgeRazor  # type: ignore[attr-defined]
    from edgerazor.qat.map import _EMBINT4_OVERRIDES as EMBEDDINGS
    from edgerazor.qat.map import create_quant_config  # type: ignore[import-not-found]

    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    # its int4 function does not take the share of int4 rows, which its published setting hands to it all the same
    embeddings = [{**override, "w_mixed_precision_prop": -1.0} for override in EMBEDDINGS]
    quantization = create_quant_config(
        mp_prop=0.125, w_scale_factor=2.0, with_activation_kv=True, is_w_quantized=False, overrides=embeddings
    )
    razor = EdgeRazor(qat_config=quantization, kd_config=peer_losses())
    student = razor.quantize(student).train()
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, int(SHAPE["vocab_size"]), (ROWS, TOKENS), device=device)
    wanted = {"return_dict": True, "output_hidden_states": True}

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            cache = None if checkpointed else razor.create_kv_cache(model_config=student.config)
            ours = student(input_ids=ids, labels=ids, past_key_values=cache, **wanted)
            with torch.no_grad():
                theirs = teacher(input_ids=ids, labels=ids, **wanted)
            loss, _ = razor.compute_loss(ours, theirs, ids)
        loss.backward()

    return step


def plain_step(folder: Path, device: str, checkpointed: bool) -> Step:
    """The same student, but autograd keeps its decoded weights, and the losses are written down on whole logits."""
    from edgerazor import formats, models, modules, recipe
    from edgerazor.allocate import make_plan

    student, _ = models.load(str(folder), None, device, torch.float32)
    teacher, _ = models.load(str(folder), None, device, torch.bfloat16)
    structure = models.structure(student)
    plan = make_plan(structure.targets, recipe.Calibrate(bits=1.88, plan="interleave"))
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    modules.prepare_for_training(student, structure, plan.specs(), modules.Settings(8, 8, plan.group_size))
    student.config.use_cache = False
    student.train()

    def product(module: modules.FakeQuantLinear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = formats.fake_quantize_matrix(module.weight, module.spec)
            return torch.nn.functional.linear(module.activations(x), weight, module.bias)

        return forward

    for module in student.modules():
        if isinstance(module, modules.FakeQuantLinear):
            module.forward = product(module)  # type: ignore[method-assign]
    ids = torch.randint(0, int(SHAPE["vocab_size"]), (ROWS, TOKENS), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            ours = student(input_ids=ids, output_hidden_states=True, use_cache=False)
            with torch.no_grad():
                theirs = teacher(input_ids=ids, output_hidden_states=True, use_cache=False)
        loss = written_down(ours.logits.float(), theirs.logits.float(), ids)
        for mine, wanted in zip(ours.hidden_states[1:4], theirs.hidden_states[1:4], strict=True):
            difference = mine.float() - wanted.float()
            loss = loss + LOSSES["lafd"] / 3 * difference.square().mean()
        loss.backward()

    return step


# --- the command -------------------------------------------------------------------------------


def run(side: str, work: str, device: str, layers: int) -> dict[str, float]:
    """One measurement, in this process."""
    if work == "loss":
        return measure({"ours": our_loss, "plain": plain_loss, "peer": peer_loss}[side](device), device)
    with random_model(layers) as folder:
        make = {"ours": our_step, "plain": plain_step, "peer": peer_step}[side]
        return measure(make(folder, device, work == "checkpointed"), device)


def start(python: str, side: str, work: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [python, __file__, "--one", side, work, "--device", options.device, "--limit", str(options.limit)]
    command += ["--layers", str(options.layers)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        measured: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    except ValueError:
        error = (done.stderr.strip().split("\n") or [""])[-1]
        return {"error": error[-200:] or f"ended with code {done.returncode}"}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", help="Python of an environment with the published edgerazor package")
    parser.add_argument("--work", nargs="*", choices=WORK, default=WORK)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the model of a whole step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=0, help="bytes of address space a measurement may use; 0: any")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        if options.limit:
            resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit), int(options.limit)))
        print(json.dumps(run(*options.one, options.device, options.layers)))
        return
    print("| what | side | activation memory, GB | tokens/s |\n|---|---|---|---|")
    for work in options.work:
        for side in options.sides:
            if side == "peer" and not options.peer:
                continue
            python = options.peer if side == "peer" else sys.executable
            measured = start(python, side, work, options)
            if "error" in measured:
                print(f"| {work} | {side} | {measured['error']} | |", flush=True)
                continue
            rate = ROWS * TOKENS / measured["seconds"]
            print(f"| {work} | {side} | {measured['bytes'] / 1e9:.2f} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
