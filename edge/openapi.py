"""The OpenAPI 3.1 description of `edge.serve`, made of a model and its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketvlm.edge.contract import ModelContract

if TYPE_CHECKING:
    from pocketvlm.edge.serve import Limits

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_TEXT = {"type": "string"}
_ERRORS = {
    "400": "what was sent cannot be used",
    "408": "the body took too long",
    "413": "a body, picture, text or list is larger than what is taken",
    "429": "too many requests are inside; ask again after Retry-After seconds",
    "500": "the model gave no usable answer",
}


def describe(contract: ModelContract, limits: Limits) -> dict[str, Any]:
    """Paths that this model has, with the sizes that are taken."""
    paths: dict[str, Any] = {
        "/health": {"get": _operation("Whether it is up, and what it runs", _object(status=_TEXT, model=_TEXT), {})},
        "/openapi.json": {"get": _operation("This description", {"type": "object"}, {})},
    }
    picture = {
        "required": True,
        "description": f"The encoded picture itself: JPEG, PNG, WebP, ...; at most {limits.body_bytes} bytes and "
        f"{limits.pixels} pixels.",
        "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}},
    }
    embeddings = _object(space_id=_TEXT, dim={"type": "integer"}, embeddings={"type": "array", "items": _NUMBERS})
    if contract.image is not None:
        paths["/embed/image"] = {"post": _operation("Embed one picture", embeddings, _ERRORS, body=picture)}
        verdict = _object(
            label=_TEXT,
            probability={"type": "number"},
            scores={"type": "object", "additionalProperties": {"type": "number"}},
        )
        paths["/classify"] = {"post": _operation("Classify one picture", verdict, _ERRORS, body=picture)}
        if contract.kind != "classifier":
            paths["/classify"]["post"]["parameters"] = [
                _several("label", "One of the labels to choose from; give it once for each.", limits.prompts, True),
                _several("template", "A prompt with {} where the label goes; none means the label.", limits.prompts),
            ]
    if contract.text is not None:
        one = {**_TEXT, "minLength": 1, "maxLength": limits.text_chars}
        texts = {"type": "array", "minItems": 1, "maxItems": limits.texts, "items": one}
        body = {"required": True, "content": {"application/json": {"schema": _object(texts=texts)}}}
        paths["/embed/text"] = {"post": _operation("Embed texts", embeddings, _ERRORS, body=body)}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"pocketvlm: {contract.name}", "version": contract.model_id},
        "paths": paths,
    }


def _operation(
    summary: str, answer: dict[str, Any], errors: dict[str, str], *, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {"description": "the answer", "content": {"application/json": {"schema": answer}}}
    }
    for status, description in errors.items():
        schema = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
        responses[status] = {"description": description, "content": {"application/json": {"schema": schema}}}
    found = {"summary": summary, "responses": responses}
    return found if body is None else {**found, "requestBody": body}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _several(name: str, description: str, most: int, required: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "description": description,
        "required": required,
        "explode": True,
        "schema": {"type": "array", "items": _TEXT, "maxItems": most},
    }
