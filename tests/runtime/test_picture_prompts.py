"""The native engine reads pictures: logits, scores and greedy text are those of transformers."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import models, runtime
from edgerazor.kernels import native as native_kernels
from edgerazor.models import PictureFeatures
from edgerazor.runtime.picture_prompts import PicturePrefix
from helpers.packed_folders import SETTINGS, all_of, write_packed
from helpers.seeing_models import SEEING, seeing_model
from helpers.tiny_models import mostly_slow, tiny_tokenizer

needs_native = pytest.mark.skipif(native_kernels.library() is None, reason="the native library is not built")
#: As of models of text: a code of an activation may round to its neighbour.
BOUND = 1e-2
NATIVE = [family for family in SEEING if family != "gemma3"]


def relative(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of logits, relative to their size."""
    return float((computed - expected).norm() / expected.norm())


def picture(family: str, seed: int, rows: int = 4) -> list[int]:
    """Tokens of a picture of random features, as large as those that a tower makes."""
    generator = torch.Generator().manual_seed(seed)
    deep = torch.randn(1, rows, 64, generator=generator) if family == "qwen3_vl" else None
    grid = (1, 4, rows) if family.startswith("qwen") else None
    features = PictureFeatures(torch.randn(rows, 64, generator=generator), deep, grid)
    return models.PICTURES.add(features).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(family: str):
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            seeing_model(family).save_pretrained(place / "teacher")
            tiny_tokenizer().save_pretrained(place / "teacher")
            settings = {**SETTINGS, "activation_bits": 8, "kv_bits": 8}
            write_packed(place / "packed", place / "teacher", all_of("int4"), settings=settings, input_scale=False)
            made[family] = place / "packed"
        return made[family]

    return make


@needs_native
@pytest.mark.parametrize("family", mostly_slow(NATIVE, "smolvlm", "qwen3_vl"))
def test_both_engines_see_the_same(folder, family):
    native = runtime.load(folder(family), threads=1, engine="native")
    other = runtime.load(folder(family), threads=1, engine="transformers")
    prompt = [0, 3, *picture(family, 0), 10, 11, 3, *picture(family, 1, 8), 12, 13]
    expected, computed = other.logits(prompt), native.logits(prompt)
    assert relative(computed, expected) < BOUND
    assert native.logits([prompt, prompt]).shape == (2, len(prompt), 300)
    sessions = [model.session() for model in (native, other)]
    after = [session.feed(prompt) for session in sessions]
    assert relative(*after) < BOUND
    assert relative(after[0], computed[-1]) < BOUND
    written = [session.greedy(12) for session in sessions]
    assert written[0] == written[1]
    more = [14, 3, *picture(family, 2), 15]
    assert relative(*(session.feed(more) for session in sessions)) < BOUND
    choices = [[20, 21], [22]]
    for ours, theirs in zip(*(model.score([(prompt, choices)])[0] for model in (native, other)), strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, rel=BOUND)


#: Families that see -> the family of text that their decoder is.
DECODERS = {"idefics3": "llama", "smolvlm": "llama", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "lfm2_vl": "lfm2"}


@needs_native
@pytest.mark.parametrize("family", mostly_slow(DECODERS, "smolvlm", "qwen3_vl"))
def test_prompts_of_text_alone_give_the_bits_of_a_model_of_text(folder, family, tmp_path):
    """The decoder by itself, packed as its own family: equal logits, before a picture was read and after."""
    seeing = seeing_model(family)
    rope = {"rope_type": "default", "rope_theta": seeing.config.get_text_config().rope_parameters["rope_theta"]}
    fields = {**SEEING[family]["text_config"], "rope_parameters": rope}
    fields.pop("model_type", None)
    if family == "qwen2_5_vl":  # whose default is another than its decoder's
        fields["rms_norm_eps"] = seeing.config.get_text_config().rms_norm_eps
    text = AutoModelForCausalLM.from_config(CONFIG_MAPPING[DECODERS[family]](**fields, tie_word_embeddings=True))
    text.base_model.load_state_dict(seeing.get_decoder().state_dict())
    text.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    settings = {**SETTINGS, "activation_bits": 8, "kv_bits": 8}
    write_packed(tmp_path / "packed", tmp_path / "teacher", all_of("int4"), settings=settings, input_scale=False)
    alone = runtime.load(tmp_path / "packed", threads=1, engine="native")
    model = runtime.load(folder(family), threads=1, engine="native")
    prompt = [0, 5, 9, 20, 7, 11, 3]
    assert torch.equal(model.logits(prompt), alone.logits(prompt))
    session = model.session()
    session.feed([0, 3, *picture(family, 0), 10])
    session.rewind(0)
    assert torch.equal(session.feed(prompt), alone.session().feed(prompt))


@needs_native
@pytest.mark.parametrize("family", mostly_slow(NATIVE, "qwen3_vl"))
def test_a_session_in_pieces_is_one_in_one(folder, family):
    """Text behind a picture, going back, and another picture in the place of the first."""
    model = runtime.load(folder(family), threads=1, engine="native")
    prompt = [0, 3, *picture(family, 0), 10, 11]
    session = model.session()
    session.feed(prompt[:1])
    session.feed(prompt[1:-1])
    assert relative(session.feed(prompt[-1:]), model.logits(prompt, 1)[0]) < BOUND
    session.rewind(2)
    other = [*picture(family, 3), 12]
    assert relative(session.feed(other), model.logits([*prompt[:2], *other], 1)[0]) < BOUND


def test_pictures_that_see_one_another_are_for_transformers(folder):
    model = runtime.load(folder("gemma3"), threads=1)
    assert model.engine == "transformers"
    assert "the tokens of a picture see one another" in model.note
    assert model.logits([0, *picture("gemma3", 0), 5]).isfinite().all()


def test_what_a_sequence_begins_with() -> None:
    """Growing, going back into a picture, and another one in its place: always what a look at the whole finds."""
    draw = random.Random(0)
    for _ in range(200):
        prefix, ids = PicturePrefix(), []
        for _ in range(12):
            start = draw.randint(0, len(ids)) if draw.random() < 0.3 else len(ids)
            tokens = [draw.choice((5, 6, models.FIRST, models.FIRST + 1)) for _ in range(draw.randint(1, 3))]
            changed, known = prefix.follow(ids, start, tokens), prefix.ids
            ids = [*ids[:start], *tokens]
            shown = [place for place, token in enumerate(ids) if token >= models.FIRST]
            assert known == ids[: max(shown, default=-1) + 1]
            assert changed or start >= len(known)


@needs_native
def test_old_tokens_are_not_looked_at_again(folder, monkeypatch) -> None:
    model = runtime.load(folder("qwen3_vl"), threads=1, engine="native")
    made = []
    tables = model.positions.tables
    monkeypatch.setattr(model.positions, "tables", lambda *given: made.append(given) or tables(*given))
    session = model.session()
    session.feed([0, 3, *picture("qwen3_vl", 0), 10])
    for token in range(11, 30):
        session.feed([token])
    session.greedy(20)
    assert len(made) == 1
    assert len(made[0][0]) == 6  # up to the picture's last token
