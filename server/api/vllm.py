"""vLLM's routes for runtime adapters: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.adapters import publish_source
from server.api.error_responses import errors
from server.api.openai_schemas import BOOKKEEPING, LoadAdapterBody, UnloadAdapterBody, refuse_fields
from server.api.state import ServicesDep
from server.errors import called

router = APIRouter(prefix="/v1", tags=["adapters"])

WRITE = errors(400, 404, 409, 429, 500, 503, 507)


@router.post("/load_lora_adapter", responses=WRITE)
async def load(body: LoadAdapterBody, parts: ServicesDep) -> str:
    """Register an adapter from a source; with `load_inplace`, over what the name had."""
    refuse_fields(body, "", BOOKKEEPING)
    with called(source="lora_path", name="lora_name"):
        await publish_source(parts, body.lora_name, body.lora_path, create_only=not body.load_inplace, source="vllm")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", responses=WRITE)
async def unload(body: UnloadAdapterBody, parts: ServicesDep) -> str:
    """Retire an adapter."""
    refuse_fields(body, "", BOOKKEEPING)
    with called(adapters="lora_name", name="lora_name"):
        await parts.registry.retire(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
