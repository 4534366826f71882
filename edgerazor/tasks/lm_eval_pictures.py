"""lm-eval's tasks with pictures (`hf-multimodal`: MMMU, ChartQA), for models already in memory.

Such a task gives a prompt in which `<image>` stands for each picture, and the pictures. As in lm-eval's
`HFMultimodalLM`, each mark becomes the placeholder of the model's processor or, with a chat template, a part of the
turn, and the processor makes tokens and pixels of both. A model of transformers then writes with these; for an engine
the tower looks first, and the engine reads the features (`edgerazor/pictures.py`). Prompts are answered one after the
other, without padding, and none is cut: where one leaves less room than the task allows, its answer is shorter.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from edgerazor import data, devices
from edgerazor.console import Console
from edgerazor.data import PictureTokens
from edgerazor.errors import UserError
from edgerazor.pictures import PictureReader
from edgerazor.tasks.lm_eval_models import BaseLM, EngineLM, TransformersLM, of_all_processes

#: What stands for a picture in lm-eval's prompts.
MARK = "<image>"


class _SeeingLM(BaseLM):
    """What both classes do.

    Args:
        model, batch_size, console, title: as of `TransformersLM`.
        reader: of pictures, for this model; its processor's tokenizer is used.
    """

    MULTIMODAL = True

    def __init__(self, model: Any, reader: PictureReader, batch_size: int, console: Console, title: str) -> None:
        super().__init__(model, data.tokenizer_of(reader.processor), batch_size, console, title)
        self.reader, self.in_chat = reader, False

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, in which each mark is a part of its turn."""
        self.in_chat = True
        history = [{**message, "content": _parts(message["content"])} for message in chat_history]
        return str(super().apply_chat_template(history, add_generation_prompt))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that is written behind each prompt; several processes of a launcher write a part each."""
        with_pictures = [number for number, request in enumerate(requests) if "visual" in request.args[-1]]
        others = [request for number, request in enumerate(requests) if number not in set(with_pictures)]
        part = devices.share_of(with_pictures)
        answers = []
        with self.console.track(f"Tasks of {self.title}", len(part)) as tracker:
            for number in part:
                answers.append(self._answer(requests[number]))
                tracker.advance()
        written = dict(zip(with_pictures, of_all_processes(answers), strict=True))
        texts = iter(super().generate_until(others, disable_tqdm) if others else [])
        return [written[number] if number in written else next(texts) for number in range(len(requests))]

    def _answer(self, request: Any) -> str:
        text, options, given = request.args
        pictures = given["visual"] or []
        where = f"Item {request.doc_id + 1} of {request.task_name}"
        if not self.in_chat:
            text = text.replace(MARK, data.placeholder_in_text(self.reader.processor))
        prompt = self.reader.read_text(where, text, pictures, special=not self.in_chat)
        normalized = normalize_gen_kwargs(options, self.max_gen_toks)
        stop = handle_stop_sequences(
            normalized.pop("until", None), self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        )
        room = self.max_length - len(prompt.ids)
        if room < 1:
            raise UserError(f"{where} takes {len(prompt.ids)} tokens, and the model reads {self.max_length}.")
        count = min(int(normalized.pop("max_gen_toks")), room)
        answer = str(self.tok_decode(self._write(prompt, count, stop, normalized)))
        for string in filter(None, stop):
            answer = answer.split(string)[0]
        return answer

    @abstractmethod
    def _write(self, prompt: PictureTokens, count: int, stop: list[str], options: dict[str, Any]) -> list[int]:
        """At most `count` tokens behind a prompt, up to one that completes a stop string."""


class SeeingTransformersLM(_SeeingLM, TransformersLM):
    """A model of transformers that sees with its own tower."""

    def _write(self, prompt: PictureTokens, count: int, stop: list[str], options: dict[str, Any]) -> list[int]:
        ids = torch.from_numpy(prompt.ids).long()[None].to(self.device)
        given = {name: value.to(self.device) for name, value in prompt.inputs.items()}
        with torch.inference_mode():
            written = self._model_generate(
                ids, ids.shape[1] + count, stop, attention_mask=torch.ones_like(ids), **given, **options
            )
        return list(written[0, ids.shape[1] :].tolist())


class SeeingEngineLM(_SeeingLM, EngineLM):
    """A model of the runtime, which reads the features of pictures; it generates greedily."""

    def _write(self, prompt: PictureTokens, count: int, stop: list[str], options: dict[str, Any]) -> list[int]:
        self.check_greedy(options)
        return self._generate_greedily(self.reader.tokens(prompt), count, stop)


def _parts(content: str) -> list[dict[str, str]]:
    """A turn as the parts of a message: texts, and pictures in the places of their marks."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
