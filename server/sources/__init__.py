"""Where bases and adapters come from: folders, the catalogue, the hub, URLs. Turns a name into files on this machine.

Nothing here is reached by an inference request, and nothing reaches for a network that the operator did not name.
"""

from server.sources.adapters import Sources
from server.sources.models import Resolved, resolve_model

__all__ = ["Resolved", "Sources", "resolve_model"]
