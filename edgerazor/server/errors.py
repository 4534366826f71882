"""Errors as OpenAI's clients know them: a status, and JSON that says what is wrong with which field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgerazor.errors import UserError, harmless

#: Most letters of a sentence that is sent back: it may quote what was sent.
LONGEST = 1000
#: The kinds of errors by status; others are `invalid_request_error`, or from 500 on `server_error`.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one sentence, or two.
        param: the field that is wrong, as clients wrote it.
        code: a word for programs, `model_not_found`.
        headers: beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = harmless(self.message, LONGEST)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def from_user_error(error: UserError, param: str | None = None) -> ApiError:
    """What a sentence for people is on the wire: a request that cannot be answered as it is."""
    return ApiError(400, f"{error.message} {error.hint}".strip(), param)


def busy(status: int, message: str, seconds: float, code: str) -> ApiError:
    """A refusal that may be tried again, after so many seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, math.ceil(seconds)))})
