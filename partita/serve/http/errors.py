"""Every refusal is OpenAI's error object: {"error": {message, type, param, code}}, and names all problems.

status  type                    code                when
400     invalid_request_error                       a body or a field that cannot be
401     invalid_request_error   invalid_api_key     a key is asked for and is not the one
404     invalid_request_error   model_not_found     another model; an id that does not run
404/405 invalid_request_error                       no such path or method
413     invalid_request_error                       a body longer than the server reads
429     invalid_request_error   overloaded          as many requests wait as may
500     server_error                                our own fault
503     server_error            engine_failed       a rank was lost, or the engine has ended
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

SERVER_FAULT = 500
HEADERS: dict[int, dict[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": "1"},
}


class Said(BaseModel):
    """What is wrong; `param` is the first field at fault, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Refused(BaseModel):
    """The body of every refusal."""

    error: Said


# as the OpenAPI document has them
EVERY: dict[int | str, dict[str, Any]] = {
    status: {"model": Refused, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 404, 413, 429, 500, 503)
}


class ApiError(Exception):
    """A refusal: its status, its words, the field at fault and a code for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object, as a reply and as an event of a stream hold it."""
        kind = "server_error" if self.status >= SERVER_FAULT else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def all_of(problems: Sequence[tuple[str, str]]) -> ApiError:
    """One refusal that names every problem and, where its text does not, its field; `param` is the first
    one's."""
    lines = [x if not field or x.startswith(field) else f"{field}: {x}" for field, x in problems]
    count = f"{len(lines)} problems: " if len(lines) > 1 else ""
    return ApiError(400, count + "; ".join(lines), param=problems[0][0] or None)


def reply(error: ApiError) -> JSONResponse:
    """The refusal as a reply."""
    return JSONResponse(error.body(), error.status, HEADERS.get(error.status))


def install(app: FastAPI) -> None:
    """All that a handler may raise becomes a reply of one form."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return reply(all_of(problems_of(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == HTTPStatus.BAD_REQUEST:  # of a body alone
            what = "the body cannot be read as JSON: too deep, a number too long, or no UTF-8"
        made = reply(ApiError(error.status_code, what))
        made.headers.update(error.headers or {})  # which methods there are
        return made

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return reply(ApiError(SERVER_FAULT, f"our own fault: {type(error).__name__}"))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; what a framework refuses by itself is refused as all else is."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(name, None)
    return made


def problems_of(errors: Sequence[Any]) -> list[tuple[str, str]]:
    """(field, what is wrong) of what pydantic found; nothing of the client's values is repeated."""
    return [_problem(error) for error in errors]


def _problem(error: Any) -> tuple[str, str]:
    where = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return "", f"the body is no JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if error["type"] == "extra_forbidden":
        return ".".join(where), "this server knows no such field"
    if not where and error["type"] in ("model_type", "model_attributes_type", "missing"):
        return "", "the body must be a JSON object, sent as application/json"
    return ".".join(where), error["msg"].removeprefix("Value error, ")
