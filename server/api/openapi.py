"""The OpenAPI document, made exact, and `/docs`: one page of it without a script or another host."""

from __future__ import annotations

import asyncio
import html
import json
import threading
from decimal import Decimal
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse

from server.api.schemas import PATTERNS

router = APIRouter(include_in_schema=False)

_METHODS = ("get", "put", "post", "delete")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>loramux: the routes</title>
<meta name="viewport" content="width=device-width"><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
:root{{color-scheme:light dark}}
code,pre{{font:14px/1.4 ui-monospace,monospace}} h2{{margin-top:2rem;border-bottom:1px solid}} summary{{cursor:pointer}}
table{{border-collapse:collapse}} td{{padding:.1rem .8rem .1rem 0;vertical-align:top;overflow-wrap:anywhere}}
td:first-child{{min-width:6rem}} h2,h3,pre{{overflow-wrap:anywhere}} pre{{white-space:pre-wrap}}</style>
<main><h1>loramux {version}</h1><p>The machine's form of this page is <a href="openapi.json">openapi.json</a>.</p>
{routes}<h2>Bodies</h2>{schemas}</main></html>"""


def install(app: FastAPI) -> None:
    """Replace the document that FastAPI would make. It takes a quarter of a second: on the event loop's thread nobody
    else would be answered meanwhile.
    """
    making = threading.Lock()

    def document() -> dict[str, Any]:
        with making:
            if app.openapi_schema is None:
                made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
                app.openapi_schema = _exact(made)
            return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _exact(document: dict[str, Any]) -> dict[str, Any]:
    """Take out what FastAPI adds by itself, a 422 of another shape, where a malformed body is 400; and give every body
    with a name its place among the schemas.
    """
    schemas = document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            unprocessable = operation["responses"].get("422", {})
            if "HTTPValidationError" in str(unprocessable.get("content")):
                del operation["responses"]["422"]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if name := content["schema"].get("title"):  # said in place: a route that takes one of two bodies
                    schemas[name], content["schema"] = content["schema"], {"$ref": f"#/components/schemas/{name}"}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """The document."""
    return await asyncio.to_thread(lambda: JSONResponse(request.app.openapi()))


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """Every route with its bodies."""
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
    return HTMLResponse(_PAGE.format(version=html.escape(document["info"]["version"]), routes=routes, schemas=schemas))


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{status}</code><td>{html.escape(answer.get('description', ''))}<td>{_bodies(answer)}"
        for status, answer in sorted(operation["responses"].items())
    )
    parameters = "".join(
        f"<tr><td><code>{form.format(html.escape(asked['name']))}</code>"
        + _told(asked["schema"], about=asked.get("description"))
        for place, form in (("query", "?{}="), ("header", "{}:"))
        for asked in operation.get("parameters", [])
        if asked["in"] == place
    )
    asks = _bodies(operation.get("requestBody", {}))
    return (
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation.get('description', operation.get('summary', '')))}</p>"
        + (f"<table>{parameters}</table>" if parameters else "")
        + (f"<p>Body: {asks}</p>" if asks else "")
        + f"<details><summary>Answers</summary><table>{rows}</table></details>"
    )


def _bodies(part: dict[str, Any]) -> str:
    links = []
    for kind, content in part.get("content", {}).items():
        schema = content.get("schema", {})
        names = [option.get("$ref", "").rsplit("/", 1)[-1] for option in schema.get("anyOf", [schema])]
        links += [f'<a href="#{name}">{name}</a>' if name else f"<code>{html.escape(kind)}</code>" for name in names]
    return ", ".join(links)


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code>{_told(kind, ', required' if field in required else '')}"
        for field, kind in schema.get("properties", {}).items()
    )
    text = html.escape(schema.get("description", ""))
    examples = "".join(f"<pre>{html.escape(json.dumps(example))}</pre>" for example in schema.get("examples", []))
    return f'<h3 id="{html.escape(name)}">{html.escape(name)}</h3><p>{text}</p>{examples}<table>{rows}</table>'


def _told(schema: dict[str, Any], more: str = "", about: str | None = None) -> str:
    """The cells about one field or parameter: its type, and what is said of it, be it in the schema."""
    options = [schema, *schema.get("anyOf", [])]
    about = about or next((option["description"] for option in options if "description" in option), "")
    return f"<td>{html.escape(_kind(schema) + more)}<td>{html.escape(about)}"


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    bounds = [f"{sign} {_plain(schema[key])}" for key, sign in _BOUNDS if key in schema]
    if schema.get("type") == "array":
        return " ".join(["list", *bounds, "of", _kind(schema.get("items", {}))])
    words = [PATTERNS.get(pattern, pattern)] if (pattern := schema.get("pattern")) else []
    return ", ".join([" ".join([str(schema.get("type", "any")), *bounds]), *words])


def _plain(bound: float) -> str:
    """A bound as people write it: the document has whole numbers as doubles, of as many digits as tell them apart."""
    return f"{int(Decimal(str(bound))) if bound == int(bound) else bound}"


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
