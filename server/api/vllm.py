"""vLLM's routes for runtime adapters: `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.adapters import publish_source
from server.api.error_responses import errors
from server.api.openai_schemas import BOOKKEEPING, LoadAdapterBody, UnloadAdapterBody, refuse_fields
from server.api.state import ServicesDep
from server.errors import rename_params

router = APIRouter(prefix="/v1", tags=["adapters"])

WRITE_ERRORS = errors(400, 404, 409, 429, 500, 503, 507)


@router.post("/load_lora_adapter", responses=WRITE_ERRORS)
async def load(body: LoadAdapterBody, services: ServicesDep) -> str:
    """Register an adapter from a source; with `load_inplace`, replace the adapter of that name."""
    refuse_fields(body, "", BOOKKEEPING)
    with rename_params(source="lora_path", name="lora_name"):
        await publish_source(services, body.lora_name, body.lora_path, create_only=not body.load_inplace, source="vllm")
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", responses=WRITE_ERRORS)
async def unload(body: UnloadAdapterBody, services: ServicesDep) -> str:
    """Remove an adapter."""
    refuse_fields(body, "", BOOKKEEPING)
    with rename_params(adapters="lora_name", name="lora_name"):
        await services.registry.retire(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
