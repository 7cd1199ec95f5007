"""From a generation that has ended to the record that quality keeps of it."""

from __future__ import annotations

from server.tasks.inference import Generation, ended
from server.tasks.quality import Quality
from server.tasks.subjects import Answered, Subject


def remember(quality: Quality, generation: Generation, base: str) -> None:
    """Note an answer of a task. Answers without a task, cancelled ones and evaluation traffic are nobody's."""
    task = generation.target.task
    if task is None or generation.status == "cancelled" or not generation.caller.client:
        return
    record = ended(generation)
    quality.answered(
        Answered(
            id=generation.id,
            subject=Subject.of(task.name, generation.versions, base),
            tenant=generation.caller.tenant,
            text=generation.said() if generation.status == "200" else "",
            failed=generation.status != "200",
            prompt_tokens=record.prompt_tokens,
            generated_tokens=record.generated_tokens,
            ttft=record.first_token - record.submitted,
            tpot=record.tpot,
            e2e=record.finished - record.submitted,
            routed=task.route.leads_to(generation.target.choice),
        )
    )
