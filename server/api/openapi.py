"""The OpenAPI document, and `/docs`: a static page made from it, without scripts or other hosts."""

from __future__ import annotations

import asyncio
import json
import threading
from decimal import Decimal
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse

from server.api.schemas import PATTERNS

router = APIRouter(include_in_schema=False)

_METHODS = ("get", "put", "post", "delete")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>loramux API</title>
<meta name="viewport" content="width=device-width"><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
:root{{color-scheme:light dark}}
code,pre{{font:14px/1.4 ui-monospace,monospace}} h2{{margin-top:2rem;border-bottom:1px solid}} summary{{cursor:pointer}}
table{{border-collapse:collapse}} td{{padding:.1rem .8rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}}
td:first-child{{min-width:6rem}} h2,h3,pre{{overflow-wrap:anywhere}} pre{{white-space:pre-wrap}}</style>
<main><h1>loramux {version}</h1><p>For programs: <a href="openapi.json">openapi.json</a>.</p>
{routes}<h2>Bodies</h2>{schemas}</main></html>"""
_BOUNDS = (
    ("minimum", "≥"),
    ("exclusiveMinimum", ">"),
    ("maximum", "≤"),
    ("minLength", "length ≥"),
    ("maxLength", "length ≤"),
    ("minItems", "length ≥"),
    ("maxItems", "length ≤"),
    ("maxProperties", "length ≤"),
)


def install(app: FastAPI) -> None:
    """Replace FastAPI's document by a corrected one, which is made once, on first use."""
    lock = threading.Lock()

    def document() -> dict[str, Any]:
        with lock:
            if app.openapi_schema is None:
                made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
                app.openapi_schema = _corrected(made)
            return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    """Remove FastAPI's own 422 responses, whose shape is not ours, and move inline bodies to the schemas."""
    schemas = document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            unprocessable = operation["responses"].get("422", {})
            if "HTTPValidationError" in str(unprocessable.get("content")):
                del operation["responses"]["422"]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if name := content["schema"].get("title"):
                    schemas[name], content["schema"] = content["schema"], {"$ref": f"#/components/schemas/{name}"}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """The document. Making it takes a quarter of a second, so it runs on a thread."""
    return await asyncio.to_thread(lambda: JSONResponse(request.app.openapi()))


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """All routes and bodies as a page."""
    return await asyncio.to_thread(_page, request.app)


def _page(app: FastAPI) -> HTMLResponse:
    document = app.openapi()
    routes = "".join(
        _route(path, method, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in _METHODS
    )
    schemas = "".join(_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items()))
    return HTMLResponse(_PAGE.format(version=escape(document["info"]["version"]), routes=routes, schemas=schemas))


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    responses = "".join(
        f"<tr><td><code>{status}</code><td>{escape(response.get('description', ''))}<td>{_body_links(response)}"
        for status, response in sorted(operation["responses"].items())
    )
    parameters = "".join(
        _field_row(form.format(p["name"]), p["schema"], description=p.get("description"))
        for place, form in (("query", "?{}="), ("header", "{}:"))
        for p in operation.get("parameters", [])
        if p["in"] == place
    )
    body = _body_links(operation.get("requestBody", {}))
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', operation.get('summary', '')))}</p>"
        + (f"<table>{parameters}</table>" if parameters else "")
        + (f"<p>Body: {body}</p>" if body else "")
        + f"<details><summary>Responses</summary><table>{responses}</table></details>"
    )


def _body_links(part: dict[str, Any]) -> str:
    links = []
    for media_type, content in part.get("content", {}).items():
        schema = content.get("schema", {})
        names = [option.get("$ref", "").rsplit("/", 1)[-1] for option in schema.get("anyOf", [schema])]
        links += [f'<a href="#{n}">{n}</a>' if n else f"<code>{escape(media_type)}</code>" for n in names]
    return ", ".join(links)


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        _field_row(field, kind, ", required" if field in required else "")
        for field, kind in schema.get("properties", {}).items()
    )
    examples = "".join(f"<pre>{escape(json.dumps(example))}</pre>" for example in schema.get("examples", []))
    text = escape(schema.get("description", ""))
    return f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{text}</p>{examples}<table>{rows}</table>'


def _field_row(name: str, schema: dict[str, Any], suffix: str = "", description: str | None = None) -> str:
    options = [schema, *schema.get("anyOf", [])]
    text = description or next((option["description"] for option in options if "description" in option), "")
    return f"<tr><td><code>{escape(name)}</code><td>{escape(_type(schema) + suffix)}<td>{escape(text)}"


def _type(schema: dict[str, Any]) -> str:
    """A field's type and bounds, such as `integer ≥ 1 or null`."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in _BOUNDS if key in schema]
    if schema.get("type") == "array":
        return " ".join(["list", *bounds, "of", _type(schema.get("items", {}))])
    pattern = schema.get("pattern")
    words = [PATTERNS.get(pattern, pattern)] if pattern else []
    return ", ".join([" ".join([str(schema.get("type", "any")), *bounds]), *words])


def _number(bound: float) -> str:
    """A bound without an exponent; integers are floats in the document."""
    return f"{int(Decimal(str(bound))) if bound == int(bound) else bound}"
