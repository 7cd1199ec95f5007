"""Which candidate of a `best` route answers the next request."""

from __future__ import annotations

from server.tasks.definitions import Best, Task


class FirstCandidate:
    """Serves the first candidate: what a route does before anything is known of the others."""

    def pick(self, task: Task, route: Best) -> str:
        """The candidate's name."""
        return route.candidates[0]
