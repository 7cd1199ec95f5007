"""loramux over plain HTTP with `httpx`: generate, classify, stream, many at once, feedback.

pip install httpx
python examples/clients/with_httpx.py http://127.0.0.1:8000 [key]
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx

REVIEWS = ("A stirring, funny film that never lets go.", "Two hours of my life that I want back.")


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post a body. Retry after the time that the server states while it is full or loading."""
    while True:
        answer = await http.post(path, json=body)
        if answer.status_code not in (429, 503):
            answer.raise_for_status()
            content: dict[str, Any] = answer.json()
            return content
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))


async def main(url: str, key: str = "") -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as http:
        # Concurrent requests share a batch on the server, whatever their adapters are.
        bodies = [{"prompt": review} for review in REVIEWS]
        answers = await asyncio.gather(*(ask(http, "/generate?task=sentiment", body) for body in bodies))
        for review, answer in zip(REVIEWS, answers, strict=True):
            print(f"{answer['text']:>9}  {review}  ({answer['adapters'][0]['version']})")

        scored = await ask(http, "/classify?task=sentiment", {"prompt": REVIEWS[1]})
        print(scored["label"], scored["scores"])

        # Feedback counts for the version that answered.
        feedback = {"id": answers[0]["id"], "expected": "positive"}
        (await http.post("/tasks/sentiment/feedback", json=feedback)).raise_for_status()

        print("stream: ", end="")
        body = {"prompt": "The lighthouse keeper", "max_tokens": 30, "stream": True, "adapters": []}
        async with http.stream("POST", "/generate", json=body) as lines:
            async for line in lines.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:  # a failure after the first byte
                        raise RuntimeError(event["error"]["message"])
                    if "usage" not in event:
                        print(event["text"], end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
