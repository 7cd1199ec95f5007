"""The model card of a trained adapter: what its recipe says about it, and the figures of its training."""

from __future__ import annotations

from typing import Any

from adapters import pruning
from adapters.weights import LoraWeights
from server.jobs.recipe import Recipe


def model_card(recipe: Recipe, weights: LoraWeights) -> str:
    """The card as Markdown."""
    training: dict[str, Any] = weights.metadata["training"]
    base = weights.metadata.get("base")
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        "tags: [lora]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        recipe.card.get("about", f"A LoRA adapter for {base}.").strip(),
        "",
        *([f"- **Task**: `POST /generate?task={recipe.name}`; the template is in `task.json`."] if recipe.task else []),
        f"- **Data**: {recipe.card.get('data', f'{recipe.data},').strip()} {training['samples']:,} examples.",
        _training_line(recipe, weights),
        *_figures(recipe, weights),
    ]
    if "limits" in recipe.card:
        lines.append(f"- **Limits**: {recipe.card['limits'].strip()}")
    return "\n".join(lines) + "\n"


def _training_line(recipe: Recipe, weights: LoraWeights) -> str:
    config, training = recipe.config, weights.metadata["training"]
    scheme = (weights.metadata.get("quantization") or {}).get("scheme")
    base = "unquantized weights" if scheme in (None, "none") else f"{scheme} weights"
    dtype = weights.metadata.get("compute_dtype", config.compute_dtype)
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    lora = f"rank {config.lora_rank}, alpha {config.lora_alpha:g}{' (rsLoRA)' * config.use_rslora}, {targets}"
    if training["from"] is not None:
        lora = f"continued from {training['from']} with its ranks and modules"
    return (
        f"- **Training**: `loramux train` on the served {base}; {lora}, AdamW with learning rate "
        f"{config.learning_rate:g}, warm-up and cosine decay, {training['steps']} steps of {config.batch_size}, "
        f"loss on the answer and the end token only, {dtype}, seed {config.seed}."
    )


def _figures(recipe: Recipe, weights: LoraWeights) -> list[str]:
    training, auto, lines = weights.metadata["training"], weights.metadata.get("auto_lora"), []
    if auto is not None:
        ranks = sorted(auto["ranks"].values())  # as trained, before pruning
        lines.append(
            f"- **Ranks**: {ranks[0]} to {ranks[-1]} by module, with as many parameters as rank "
            f"{recipe.config.lora_rank} everywhere; {len(auto['dropped'])} modules have none."
        )
    if recipe.prune_to is not None:
        loss = training.get("pruned", {}).get("loss")
        after = f", validation loss {loss:.4f} per token" if loss is not None else ""
        error = weights.metadata["pruning"]["error"]
        lines.append(f"- **Pruned** to rank {recipe.prune_to} after training; relative error {error:.3g}{after}.")
    if training["evaluations"]:
        best = min(training["evaluations"], key=lambda e: e["loss"])
        before = " before pruning" if recipe.prune_to is not None else ""
        lines.append(
            f"- **Validation**{before}: loss {best['loss']:.4f} per token, {100 * best['accuracy']:.1f} % of the "
            f"answer tokens predicted correctly (teacher forcing), at step {best['step']}."
        )
    count = pruning.parameters(weights)
    size = f"{2 * count / 1e6:.1f} MB" if 2 * count >= 1e5 else f"{2 * count / 1e3:.1f} kB"
    return [*lines, f"- **Size**: {count:,} parameters, {size} in bf16."]
