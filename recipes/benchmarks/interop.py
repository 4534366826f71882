"""Whether llama.cpp says of our exported GGUF files what we say of the packed models.

    make interop                                 all models, then the table in recipes/results/interop.md
    python -m recipes.benchmarks.interop --models world --formats ternary,int4
    python -m recipes.benchmarks.interop --resume       go on where a run was stopped: rows that it made are kept

Each model is packed (where rounding alone would destroy it, distilled before) and exported three times. Both sides then
get the same token ids of held-out text, and perplexity is computed here, from the logits of both:

* *16 bits*: the file with every matrix in float16, in llama.cpp, against transformers computing in float32 with the
  dequantized weights of the packed model. Perplexities differ by at most 0.1 %, the mean KL of the distributions is at
  most 1e-4, and the greedy text of 64 tokens is the same.
* *32 bits*: the file with every matrix in float32, in llama.cpp with keys and values in float32. The file is exact, and
  so is the computation but for the order of sums: the mean KL is at most 1e-9, and the greedy text is always the same.
  (llama.cpp looks GELU up in a table of float16; so does our side here, for Gemma. Sums that differ in their last bits
  may then be neighbours in the table, so the bound of these models is 1e-7.)
* *quantized*: the file with the codes as they are, in llama.cpp, against our packed model with its own 8-bit
  activations, keys and values. llama.cpp rounds activations to 8 bits in blocks of its own and keeps keys and values
  in 16 bits, so perplexities differ by at most 1 %, and greedy texts may part.
* *mixtures of experts*: where two experts have nearly the same score, float16 sends a token to the other one. So the
  bound of KL of their 16-bit files holds for the 98 % of tokens that are nearest, all may reach 1e-3, and texts may
  part. That of 32-bit files, where the choice is the same, is as of all others. Two mixtures whose tokens go to all
  experts, so that nothing is chosen, show that the choice is the cause: they have the bounds of models without experts.
* *token ids*: llama.cpp cuts the held-out text and some awkward lines into the same ids as the Hugging Face tokenizer.

Exit code 3 when one of these is not so. Float16 (to which llama.cpp also rounds the activations that it multiplies with
weights of 16 bits, and keys and values) decides otherwise where two tokens are as good as each other: where the greedy
text of 16 bits parts at two tokens whose logits differ by less than 0.01 in ours, the table says *tie*, and that is no
failure. The random models of each family have no text to be good at; they show that the architecture is understood:
their weights are wide enough that every part of the model matters, which KL sees.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import GELUTanh
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import data, exporters, formats, models, pipeline, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import QUALITY, UserError, usage_error
from edgerazor.exporters import ExportResult
from edgerazor.formats import OF_INPUTS
from edgerazor.packed import PackedModel
from edgerazor.recipe import Recipe
from edgerazor.workdir import WorkDir, machine, write_json
from recipes.benchmarks.folders import BENCHMARKS, BUILD, RESULTS, WORLD
from recipes.benchmarks.methods import Values, real_teachers, world
from recipes.benchmarks.results import commit, markdown, number, publish

EXACT, ROUNDED = 0.001, 0.01  # how far perplexities may differ
EXACT_KL, FULL_KL, TIE = 1e-4, 1e-9, 0.01  # in nats
MIXTURE_KL = 1e-3  # of all tokens, where rounding sends some to other experts; EXACT_KL is that of the `NEAREST` then
NEAREST = 0.98  # share of a mixture's tokens
TABLE_KL = 1e-7  # instead of FULL_KL, where a table of float16 makes steps of the last bits of sums
ROW, ROWS = 256, 8
#: Most numbers in the logits of one side.
LOGITS = 64_000_000
PROMPT, WRITTEN = 16, 64
AWKWARD = (
    "Hello  world\n\n\tand   three spaces \n",
    " a space before, 1234567 and 3.14159, 007",
    "don't I'LL we've O'Neill's (x+y)*z != {a: [b]}; __init__ http://a.b/c?d=e",
    "naïve café, Ærøskøbing; Привет, мир! 你好,世界。 ٣٤٥ 🙂👩‍🚀",
)
STEPS = 100
#: name -> (values of the recipe, whether the embedded teacher is distilled first because rounding would destroy it)
FORMATS: dict[str, tuple[Values, bool]] = {
    "ternary": ({"bits": 1.58}, True),
    "ternary-64": ({"bits": 1.58, "group_size": 64}, True),
    "mixed": ({"bits": 1.88}, True),
    "int2": ({"bits": 2.0, "formats": ["int2", "int4"]}, True),
    "int3": ({"bits": 3.0, "formats": ["int3", "int4"]}, False),
    "int4": ({"bits": 4.0}, False),
    "int5": ({"bits": 5.0, "formats": ["int5", "int8"]}, False),
    "int8": ({"bits": 8.0}, False),
}
#: Formats of the real models, which are only rounded.
REAL_FORMATS = {"realtext-4m": ("ternary", "ternary-64", "mixed", "int3", "int4"), "stories260K": ("int4", "int8")}
SHAPE: Values = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, **ROPE}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 100.0}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
#: Half of each head of 64; the factors of long texts count from the ninth token on.
LONGROPE: Values = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    **{
        "short_factor": [1.0 + 0.1 * pair for pair in range(16)],
        "long_factor": [1.5 + 0.5 * pair for pair in range(16)],
    },
}
GRANITE: Values = {
    **{"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
GEMMA4: Values = {
    **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "sliding_window": 48},
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full") * 3],
    **{"global_head_dim": 128, "hidden_size_per_layer_input": 64, "final_logit_softcapping": 30.0},
}
#: Mamba-2 layers, and one of attention without positions.
GRANITE4: Values = {
    **{**GRANITE, "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]},
    **{"shared_intermediate_size": 512, "num_local_experts": 0},
    **{"mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 64},
}
MIXTURE: Values = {"num_experts": 8, "num_experts_per_tok": 2}
LFM2: Values = {"layer_types": ["conv", "conv", "full_attention", "conv"], "intermediate_size": 768}
DELTA: Values = {
    **{"linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25},
}
#: family -> model type of transformers, and what is special about it beyond `SHAPE`
FAMILIES: dict[str, tuple[str, Values]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 48, "query_pre_attn_scalar": 64}),
    "gemma3": ("gemma3_text", {"sliding_window": 48, "query_pre_attn_scalar": 64, "num_hidden_layers": 6}),
    "gemma4": ("gemma4_text", GEMMA4),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "olmo3": ("olmo3", {"sliding_window": 48, "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}),
    # of models that are called phi3, llama.cpp takes tokens for granted that the vocabulary here does not have
    "phi4": ("phi3", {}),
    "phi4-longrope": ("phi3", {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "hunyuan-alpha": ("hunyuan_v1_dense", {"rope_parameters": ALPHA}),
    "ministral3": ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, **MSCALE}}),
    "lfm2": ("lfm2", LFM2),
    "qwen3.5": ("qwen3_5_text", {**DELTA, "linear_num_value_heads": 4}),
    "qwen3.5-values": ("qwen3_5_text", {**DELTA, "linear_num_value_heads": 8}),
    "granite4": (
        "granitemoehybrid",
        {**GRANITE4, "layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"},
    ),
    "granite4-experts": (
        "granitemoehybrid",
        {**GRANITE4, "layer_types": ["full_attention"] * 4, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"position_embedding_type": "rope"},
    ),
    "granite4-hybrid": ("granitemoehybrid", GRANITE4),
    "granite4-hybrid-experts": ("granitemoehybrid", {**GRANITE4, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {**MIXTURE, "num_key_value_heads": 4}),
    "qwen3-moe": ("qwen3_moe", {**MIXTURE, "moe_intermediate_size": 256, "norm_topk_prob": True, "head_dim": 128}),
    "lfm2-moe": ("lfm2_moe", {**LFM2, **MIXTURE, "moe_intermediate_size": 256, "num_dense_layers": 1}),
    # each token goes to all experts
    "granitemoe-all": ("granitemoe", {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 8}),
    "lfm2-moe-all": (
        "lfm2_moe",
        {**LFM2, **MIXTURE, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "num_dense_layers": 1},
    ),
}
#: Where tokens go to some experts only.
MIXTURES = {name for name, (_, special) in FAMILIES.items() if special.get("num_experts_per_tok", 8) < 8}
#: Ends of the names of matrices that choose experts.
ROUTERS = ("gate.weight", "router.weight")
#: Families that llama.cpp computes only with the embedding as their head, or only with a head of their own.
TIED, UNTIED = ("gemma", "gemma2"), ("olmo2", "olmo3", "olmoe")


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        model: name of the model, in the table and of its folder.
        format: one of `FORMATS`.
        recipe: how it is packed, and on which text both sides are measured.
        distilled: trained before it is packed.
        export: of the codes as they are.
    """

    model: str
    format: str
    recipe: Recipe = field(repr=False)
    distilled: bool = False
    export: str = "gguf"


@dataclass(frozen=True)
class Setting:
    """Where things lie."""

    build: Path
    python: Path
    threads: int
    console: Console


@dataclass(frozen=True)
class Side:
    """What one side computes: logits float32 [tokens of all rows, V], a greedy text, and the logits [WRITTEN, V] that
    it was chosen by, of our side."""

    logits: Tensor
    greedy: list[int]
    steps: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """What was found of a case; perplexities and KL of held-out text, numbers of tokens."""

    case: Case
    types: str
    bits: tuple[float, float]  # real bits of the packed model, and of the quantized file
    same_ids: bool
    exact: tuple[float, float]  # transformers with dequantized weights, llama.cpp with the 16-bit file
    exact_kl: float
    exact_nearest: float  # the same of the `NEAREST` tokens alone
    exact_greedy: int
    tie: bool  # where the greedy texts part, both tokens are as good
    rounded: tuple[float, float]  # our packed model, llama.cpp with the quantized file
    rounded_kl: float
    rounded_greedy: int
    full_kl: float  # of the 32-bit file
    full_greedy: int
    tokens: int

    def failures(self) -> list[str]:
        """What is not as it must be."""
        who = f"{self.case.model}, {self.case.format}"
        failed = [] if self.same_ids else [f"{who}: llama.cpp cuts text into other token ids"]
        for what, pair, bound in (("16-bit", self.exact, EXACT), ("quantized", self.rounded, ROUNDED)):
            if not abs(apart(pair)) <= bound:
                failed.append(f"{who}: perplexity of the {what} file is {percent(apart(pair))} from ours")
        mixture = self.case.model.rpartition("-")[0] in MIXTURES
        near = self.exact_kl <= MIXTURE_KL and self.exact_nearest <= EXACT_KL if mixture else self.exact_kl <= EXACT_KL
        if not near:
            failed.append(f"{who}: the distributions of the 16-bit file are {self.exact_kl:.1e} nats from ours")
        if self.exact_greedy < WRITTEN and not (self.tie or mixture):
            failed.append(f"{who}: the greedy text of the 16-bit file parts after {self.exact_greedy} tokens")
        if not self.full_kl <= (TABLE_KL if self.case.model.startswith("gemma") else FULL_KL):
            failed.append(f"{who}: the distributions of the 32-bit file are {self.full_kl:.1e} nats from ours")
        if self.full_greedy < WRITTEN:
            failed.append(f"{who}: the greedy text of the 32-bit file parts after {self.full_greedy} tokens")
        return failed


# --- the models --------------------------------------------------------------------------------


def case_of(model: str, name: str, folder: Path, values: Values, distilled: bool = False, export: str = "gguf") -> Case:
    changes = {"model": str(folder), "calibrate": {"plan": "interleave", **FORMATS[name][0]}}
    if distilled:
        changes["distill"] = {"steps": STEPS, "evaluate_every": STEPS, "losses": [{"name": "forward_kl"}]}
    else:
        changes["pack"] = {"source": "teacher"}
    return Case(model, name, recipes.build(recipes.merge(values, changes)), distilled, export)


def trained_cases(real_data: Path | None) -> list[Case]:
    """The embedded teacher in every format, and real models where there are some."""
    teacher = world()
    cases = [
        case_of(teacher.name, name, teacher.model, teacher.recipe, distilled)
        for name, (_, distilled) in FORMATS.items()
    ]
    for teacher in real_teachers(real_data) if real_data else ():
        cases += [case_of(teacher.name, name, teacher.model, teacher.recipe) for name in REAL_FORMATS[teacher.name]]
    others = [
        replace(case, export=name)
        for case in cases
        for name, suited in (("gguf-tq2", ("ternary",)), ("gguf-q2", ("ternary", "ternary-64")))
        if case.format in suited
    ]
    return [*(case for case in cases if case.format != "ternary-64"), *others]


def random_cases(build: Path, real_data: Path | None) -> list[Case]:
    """A small random model of each family, tied and untied, one of them with the vocabulary of Qwen where it is."""
    text = {"data": world().recipe["data"]}
    tokenizer, qwen = WORLD / "teacher", (real_data or Path()) / "tokenizers" / "qwen"
    cases = []
    for family, (kind, special) in FAMILIES.items():
        for tied in (False, True):
            if family in (UNTIED if tied else TIED):
                continue
            name = f"{family}-{'tied' if tied else 'untied'}"
            folder = build / "random" / name
            write_random(folder, kind, {**special, "tie_word_embeddings": tied}, tokenizer)
            cases.append(case_of(name, "int4", folder, text))
    if real_data and qwen.is_dir():
        folder = build / "random" / "qwen3-vocabulary"
        write_random(folder, "qwen3", {"tie_word_embeddings": True}, qwen)
        cases.append(case_of("qwen3-vocabulary", "int4", folder, text))
    return cases


@torch.no_grad()
def write_random(folder: Path, kind: str, special: Values, tokenizer: Path) -> None:
    """A model that is the same every time, if it is not there yet."""
    if (folder / "model.safetensors").exists():
        return
    words = AutoTokenizer.from_pretrained(tokenizer)
    rows = 64 * (len(words) // 64 + 1)  # as many vocabularies, with rows that are no token
    torch.manual_seed(0)
    tables = {"vocab_size_per_layer_input": rows} if kind == "gemma4_text" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, "vocab_size": rows, **tables, **special}))
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
        if name.endswith(ROUTERS):  # spread, so that the last chosen expert of a token weighs little
            parameter.mul_(4)
        if kind == "gemma4_text" and name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.mul_(parameter.shape[0] ** -0.25)  # it divides scores by nothing else
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.add_(torch.randn_like(buffer) * 0.1)
    words.save_pretrained(folder)
    with models.quiet_transformers():
        model.save_pretrained(folder)


# --- both sides --------------------------------------------------------------------------------


def pack(case: Case, setting: Setting) -> WorkDir:
    """The packed model, kept for the next time."""
    work = WorkDir(setting.build / case.model / case.format)
    for stage in ("calibrate", "distill", "pack") if case.distilled else ("pack",):
        pipeline.run(stage, case.recipe, work, setting.console)
    return work


def text_of(case: Case, tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[list[int]], str]:
    """The first rows of held-out token ids, and the beginning of a text that they are cut from."""
    settings = case.recipe.data
    fraction = 0.0 if settings.held_out else settings.held_out_fraction
    sources = settings.held_out or settings.train
    rows, rest = data.open_rows(sources, tokenizer, data.RowSettings(ROW, held_out_fraction=fraction))
    batches = data.sample_batches(rows if rest is None else rest, count, 1)
    beginning = Path(str(sources[0].file)).read_text(encoding="utf-8")[:4000]
    return [batch["input_ids"][0].tolist() for batch in batches], beginning


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on CPUs, whatever the numbers around it are: from a table of float16 over float16
    (`ggml_vec_gelu_f32` of ggml-cpu/vec.h)."""

    def forward(self, x: Tensor) -> Tensor:
        known = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, known))


def dequantized(folder: Path) -> PreTrainedModel:
    """A packed model as transformers computes it in float32: only its weights are rounded, and GELU."""
    opened = PackedModel.open(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    state = {name: tensor for name, tensor in opened.others().items() if name.rpartition(".")[2] not in OF_INPUTS}
    for name in opened.header.matrices:
        matrix = opened.matrix(name)
        state[f"{name}.weight"] = matrix.spec.rotate_back(formats.decode_matrix(matrix.encoded, matrix.spec))
    state |= {f"{name}.weight": state[f"{other}.weight"] for name, other in opened.header.tied.items()}
    model = models.separate_experts(models.auto_class(config).from_config(config, dtype=torch.float32))
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), GELUTanh):
            module.act_fn = TableGelu()
    return model.eval()


@torch.inference_mode()
def ours(model: PreTrainedModel, rows: list[list[int]], prompt: list[int]) -> Side:
    """What transformers computes."""
    logits = torch.cat([model(torch.tensor([row]), use_cache=False).logits[0].float() for row in rows])
    tokens, cache, steps = torch.tensor([prompt]), None, []
    while len(steps) < WRITTEN:
        output = model(tokens, **models.with_cache(model, cache))
        steps.append(output.logits[0, -1].float())
        cache, tokens = output[models.cache_name(model)], steps[-1].argmax().view(1, 1)
    return Side(logits, [int(step.argmax()) for step in steps], torch.stack(steps))


def theirs(file: Path, request_values: Values, setting: Setting, cache_bits: int = 16) -> tuple[Side, Values]:
    """What llama.cpp computes, and the token ids that it makes of texts.

    Raises:
        UserError: it cannot load or compute the file.
    """
    request, answer = file.with_suffix(".request.json"), file.with_suffix(".answer.npz")
    request.write_text(
        json.dumps({**request_values, "cache_bits": cache_bits, "threads": setting.threads}), encoding="utf-8"
    )
    words = [str(setting.python), str(BENCHMARKS / "llamacpp.py"), str(file), str(request), str(answer)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"llama.cpp does not compute {file}: {' '.join(lines[-1:])}")
    with np.load(answer) as arrays:
        side = Side(torch.from_numpy(arrays["logits"]), arrays["greedy"].tolist())
        said = {"ids": json.loads(str(arrays["ids"])), "bos": json.loads(str(arrays["bos"]))}
    answer.unlink()
    return side, said


def measure(case: Case, setting: Setting) -> Row:
    """Pack, export three times, let both sides compute, compare."""
    work = pack(case, setting)
    folder = work.folder("pack")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    rows, beginning = text_of(case, tokenizer, max(1, min(ROWS, LOGITS // (ROW * vocabulary))))
    texts = [*AWKWARD, f"one text{''.join(tokenizer.all_special_tokens)} and the next", beginning]
    prompt = rows[0][:PROMPT]
    request = {"texts": texts, "rows": rows, "prompt": prompt, "new_tokens": WRITTEN}
    full, wide, narrow = (
        exporters.write_all(folder, [name], work.path / "exports", lossy, Console(quiet=True))[0]
        for name, lossy in (("gguf-f32", False), ("gguf-f16", True), (case.export, False))
    )
    exact = ours(dequantized(folder), rows, prompt)
    rounded = ours(transformers_plugin.load(folder, cache_decoded=True)[0], rows, prompt)
    full_side, _ = theirs(Path(full.file), request, setting, cache_bits=32)
    wide_side, said = theirs(Path(wide.file), request, setting)
    narrow_side, _ = theirs(Path(narrow.file), request, setting)
    mine = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "bos": tokenizer("")["input_ids"],
    }
    return Row(
        case=case,
        types=types_of(narrow),
        bits=(narrow.packed_real_bits, narrow.real_bits),
        same_ids=said == mine,
        exact=(perplexity(exact, rows), perplexity(wide_side, rows)),
        exact_kl=divergence(exact, wide_side),
        exact_nearest=divergence(exact, wide_side, NEAREST),
        exact_greedy=common(exact.greedy, wide_side.greedy),
        tie=is_tie(exact, wide_side),
        rounded=(perplexity(rounded, rows), perplexity(narrow_side, rows)),
        rounded_kl=divergence(rounded, narrow_side),
        rounded_greedy=common(rounded.greedy, narrow_side.greedy),
        full_kl=divergence(exact, full_side),
        full_greedy=common(exact.greedy, full_side.greedy),
        tokens=sum(len(row) - 1 for row in rows),
    )


def stored_file(case: Case, setting: Setting) -> Path:
    """Where the row of a case is kept for a run that goes on."""
    return setting.build / case.model / case.format / f"{case.export}.row.json"


def measured(case: Case, setting: Setting, resume: bool) -> Row:
    """The row of a case, from an earlier run where it was asked to go on."""
    file = stored_file(case, setting)
    if resume and file.exists():
        values = json.loads(file.read_text(encoding="utf-8"))
        return Row(case, **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    row = measure(case, setting)
    write_json(file, {name: value for name, value in asdict(row).items() if name != "case"})
    return row


def perplexity(side: Side, rows: list[list[int]]) -> float:
    """Of all tokens but the first of each row."""
    total, count = 0.0, 0
    for row, logits in zip(rows, side.logits.split([len(row) for row in rows]), strict=True):
        losses = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(row[1:]), reduction="sum")
        total, count = total + float(losses), count + len(row) - 1
    return math.exp(total / count)


def divergence(one: Side, other: Side, share: float = 1.0) -> float:
    """Mean KL of the other side's distributions from one side's, in nats, of the share of tokens that has least."""
    parts = []
    for mine, yours in zip(one.logits.split(ROW), other.logits.split(ROW), strict=True):
        first, second = mine.double().log_softmax(-1), yours.double().log_softmax(-1)
        parts.append((first.exp() * (first - second)).sum(-1))
    values = torch.cat(parts).sort().values
    return float(values[: math.ceil(share * len(values))].mean())


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def is_tie(mine: Side, other: Side) -> bool:
    """Whether two texts part where our logits of both tokens are nearly the same."""
    place = common(mine.greedy, other.greedy)
    if mine.steps is None or place == len(mine.greedy):
        return False
    step = mine.steps[place]
    return bool(step[mine.greedy[place]] - step[other.greedy[place]] < TIE)


def apart(pair: tuple[float, float]) -> float:
    """How far the second number is from the first, relative to it."""
    return pair[1] / pair[0] - 1


def types_of(written: ExportResult) -> str:
    """Types of the linear layers' tensors, those of most weights first."""
    counts = written.types["linear"]
    return ", ".join(sorted(counts, key=lambda name: -counts[name]))


# --- the table ---------------------------------------------------------------------------------

WHAT = ("model", "packed", "GGUF", "real bits", "token ids")
EXACTLY = ("16 bits: ours", "llama.cpp", "apart", "KL", "of nearest 98 %", "same text")
ABOUT = ("quantized: ours", "llama.cpp", "apart", "KL", "same text")
FULLY = ("32 bits: KL", "same text")
HEAD = (*WHAT, *EXACTLY, *ABOUT, *FULLY)


def cells(row: Row) -> list[str]:
    """One row of the table."""
    line = [row.case.model, row.case.format, row.types, f"{row.bits[0]:.2f}, {row.bits[1]:.2f}"]
    line.append("same" if row.same_ids else "DIFFER")
    for pair, greedy, *distances in (
        (row.exact, row.exact_greedy, row.exact_kl, row.exact_nearest),
        (row.rounded, row.rounded_greedy, row.rounded_kl),
    ):
        line += [number(pair[0], 5), number(pair[1], 5), percent(apart(pair)), *(f"{kl:.1e}" for kl in distances)]
        line.append(f"{greedy}/{WRITTEN}")
    if row.tie:
        line[HEAD.index("same text")] += ", tie"
    return [*line, f"{row.full_kl:.1e}", f"{row.full_greedy}/{WRITTEN}"]


def percent(share: float) -> str:
    return f"{100 * share:+.3f} %"


def tables(rows: list[Row]) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and lines of three tables, because one is too wide: files and 32 bits, 16 bits, quantized."""
    lines = [cells(row) for row in rows]
    what, exactly, fully = len(WHAT), len(WHAT) + len(EXACTLY), len(HEAD) - len(FULLY)
    made = []
    for shown, begin, end in ((what, fully, len(HEAD)), (3, what, exactly), (3, exactly, fully)):
        made.append(([*HEAD[:shown], *HEAD[begin:end]], [line[:shown] + line[begin:end] for line in lines]))
    return made


def show(rows: list[Row], console: Console) -> None:
    """The tables in a terminal."""
    for head, lines in tables(rows):
        console.out.print(rich_table("llama.cpp and ours", head, lines))


def described(rows: list[Row], python: Path) -> str:
    """The facts and the tables."""
    tokens = sorted({row.tokens for row in rows})
    facts = [
        f"{' or '.join(f'{count:,}' for count in tokens)} tokens",
        version(python),
        machine(),
        f"commit {commit()}",
    ]
    return "\n\n".join([f"{'; '.join(facts)}.", *(markdown(head, lines) for head, lines in tables(rows))])


def version(python: Path) -> str:
    """Which llama.cpp it is."""
    words = [str(python), "-c", "import importlib.metadata as m; print(m.version('llama_cpp_python'))"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"llama.cpp of llama-cpp-python {done.stdout.strip()}"


# --- the command line --------------------------------------------------------------------------


def built(python: Path) -> Path:
    """The interpreter beside llama.cpp.

    Raises:
        UserError: there is none.
    """
    if not python.exists():
        raise usage_error(f"There is no {python}.", "Build llama.cpp with `make llamacpp`.")
    return python


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    cases = [*trained_cases(options.real_data), *random_cases(options.build, options.real_data)]
    for name in ("model", "format"):
        wanted = getattr(options, f"{name}s")
        if wanted is not None:
            cases = [case for case in cases if getattr(case, name) in wanted.split(",")]
    if not cases:
        raise usage_error("There is no such model in such a format.")
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated; default: all that are there")
    parser.add_argument("--formats", help=f"comma-separated, of {', '.join(FORMATS)}; default: all")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--build", type=Path, default=BUILD / "interop", help="folder of packed models")
    parser.add_argument("--llamacpp", type=Path, default=BUILD / "llamacpp" / "bin" / "python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run that was stopped")
    parser.add_argument("--results", type=Path, help="where the table goes; default: nowhere, or interop.md for all")
    parser.add_argument("--marks", default="interop", help="name of the marks in that page; default: %(default)s")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    try:
        setting = Setting(options.build, built(options.llamacpp), options.threads, console)
        if options.results and not options.results.is_file():
            raise usage_error(f"There is no page {options.results} to put the table into.")
        rows = []
        for case in chosen(options):
            console.say(f"{case.model}, {case.format}")
            rows.append(measured(case, setting, options.resume))
    except UserError as error:
        console.error(error)
        return error.code
    show(rows, console)
    whole = options.models is None and options.formats is None
    if results := options.results or (RESULTS / "interop.md" if whole else None):
        publish(options.marks, described(rows, setting.python), results)
    failures = [line for row in rows for line in row.failures()]
    for line in failures:
        console.error(UserError(line))
    return QUALITY if failures else 0


if __name__ == "__main__":
    sys.exit(main())
