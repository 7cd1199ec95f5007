"""Settings of the server, and the only access to environment variables."""

from server.settings.environment import (
    fetching_environment,
    keep_few_kernels,
    keep_transfers_in,
    leave_threads_alone,
    training_environment,
)
from server.settings.schema import DEFAULT_FILE, PREFIX, Settings, flag, load_settings
from server.settings.values import given_path, is_loopback, parse_duration, parse_keys, parse_size

__all__ = [
    "DEFAULT_FILE",
    "PREFIX",
    "Settings",
    "fetching_environment",
    "flag",
    "given_path",
    "is_loopback",
    "keep_few_kernels",
    "keep_transfers_in",
    "leave_threads_alone",
    "load_settings",
    "parse_duration",
    "parse_keys",
    "parse_size",
    "training_environment",
]
