"""All settings of the server: flags over `LORAMUX_*` variables over `loramux.toml` over defaults.

Unknown variables and keys are errors. None stands for "auto": the part that needs the value chooses it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

import adapters
from server.errors import BadSetting
from server.settings import values as v
from server.settings.values import is_loopback, parse_keys

PREFIX = "LORAMUX_"
DEFAULT_FILE = "loramux.toml"
GROUP_SIZES = (32, 64, 128, 256)

_KUBERNETES_LINK = re.compile(r"(\w+_)?(service_host|service_port(_\w+)?|port_\d+_(tcp|udp|sctp)(_(proto|port|addr))?)")
"""Names, without prefix, of the variables that Kubernetes sets in pods next to a Service named `loramux`."""


class Settings(BaseSettings):
    """All settings, frozen. `load_settings` reads them; `Settings(...)` takes keyword arguments only."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        enable_decoding=False,  # lists are comma-separated, not JSON
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    # Base model
    model: v.Name = Field("smollm2-135m", description="catalogue name, folder, .gguf file or hub id (org/name@rev)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the base model")
    quantization: Literal["int4", "nf4", "none"] = Field(
        "int4", description="quantization of linear layers; none keeps floats (bf16 for quantized GGUF files)"
    )
    group_size: v.AutoInt = Field(
        None, description="weights per scale: 32, 64, 128 or 256; auto is 64, for GGUF files 32"
    )
    double_quant: bool = Field(False, description="quantize scales and zero points too")
    table_bits: Annotated[Literal[8, 16], BeforeValidator(lambda n: int(n) if n in ("8", "16") else n)] = Field(
        8, description="bits per weight of the embedding table and lm_head"
    )
    kernels: Literal["auto", "native", "aten", "reference", "cuda"] = Field("auto", description="compute kernels")
    threads: v.AutoCount = Field(None, description="CPU threads; auto is one for each available processor")
    max_context: v.AutoLength = Field(
        None, description="longest prompt plus answer in tokens; auto is the model's own limit"
    )

    # Storage
    state_dir: v.FilePath = Field(Path("data"), description="directory of all server state; its cache/ may be deleted")
    database_url: str | None = Field(
        None,
        description="SQL database of names, tasks, quality and jobs, such as postgresql://user@host/name; "
        "by default SQLite in the state directory",
    )

    # Adapters
    adapter_dir: v.AutoPath = Field(
        None, description="watched directory of PEFT folders, read only; auto is adapters/ in the state directory"
    )
    library: v.PathOrNone = Field(
        Path(adapters.__path__[0]) / "library", description="adapters registered at startup; none for no such adapters"
    )
    max_rank: v.Count = Field(64, description="highest adapter rank")
    max_mix: v.Count = Field(8, description="most adapters in one mix")
    max_slots: v.Count = Field(
        64, description="most distinct adapters in one batch; on a GPU the default is what adapter_device_memory holds"
    )
    adapter_ram: v.Size = Field(
        2 << 30, description="RAM for loaded adapters; the default is at most half of free memory"
    )
    adapter_device_memory: v.AutoSize = Field(None, description="GPU memory for adapters; auto is part of gpu_memory")
    gpu_memory: v.AutoMemory = Field(
        None, description="total GPU memory to use, as a size or a share; auto is 0.9 of free memory"
    )

    # Engine
    kv_cache: v.AutoSize = Field(
        None,
        description="KV cache memory; auto is a quarter of free memory, at most 2,048 tokens a sequence; "
        "on a GPU what is left of --gpu-memory",
    )
    block_size: Annotated[int, Field(ge=4, le=256)] = Field(16, description="tokens per KV cache block")
    prefix_cache: bool = Field(True, description="reuse the KV cache of equal prompt prefixes")
    max_batch: v.Count = Field(32, description="most sequences in one step")
    max_step_tokens: Annotated[int, Field(ge=16)] = Field(512, description="most new tokens in one step")
    max_queue: v.Count = Field(256, description="most waiting requests")
    max_queue_tokens: v.Count = Field(262_144, description="most waiting tokens")
    deadline: v.Timeout = Field(300.0, description="longest duration of a request; caps its deadline_ms")

    # Limits per key and task
    key_rate: v.AutoRate = Field(
        None, description="requests per second of one key, with bursts of two seconds; auto is no limit"
    )
    key_concurrency: v.AutoCount = Field(None, description="most concurrent requests of one key; auto is no limit")
    task_rate: v.AutoRate = Field(
        None, description="requests per second of one task, with bursts of two seconds; auto is no limit"
    )
    task_concurrency: v.AutoCount = Field(None, description="most concurrent requests of one task; auto is no limit")

    # HTTP
    host: v.Host = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(8000, description="port to listen on; 0 picks a free one")
    api_keys: SecretStr = Field(SecretStr(""), description="inference keys, id:secret, comma-separated")
    api_keys_file: v.FilePath | None = Field(None, description="file of inference keys; read again when it changes")
    admin_keys: SecretStr = Field(SecretStr(""), description="admin keys, id:secret, comma-separated")
    admin_keys_file: v.FilePath | None = Field(None, description="file of admin keys; read again when it changes")
    metrics_key: SecretStr = Field(SecretStr(""), description="key for /metrics only, id:secret")
    metrics_key_file: v.FilePath | None = Field(
        None, description="file of the key for /metrics; read again when it changes"
    )
    metrics_public: bool = Field(False, description="serve /metrics without a key")
    allowed_hosts: v.Hosts = Field(
        (), description="more accepted Host headers, without port, comma-separated; * accepts any"
    )
    insecure: bool = Field(False, description="allow serving without keys on an address that others can reach")
    max_body: v.Size = Field(8 << 20, description="largest JSON body")
    max_upload: v.Size = Field(1 << 30, description="largest upload")
    body_time: v.Timeout = Field(
        30.0, description="longest wait for a request body, plus one second for every 16 KiB received"
    )
    step_limit: v.Timeout = Field(
        30.0, description="longest engine step; a longer one ends the process, so that it is restarted"
    )
    drain: v.Duration = Field(30.0, description="time for running requests to finish after SIGTERM")

    # Adapter sources
    hub_allow: v.Names = Field((), description="hub ids that adapters may be loaded from, org/name or org/*")
    url_allow: v.Names = Field((), description="URL prefixes that adapters may be loaded from")
    fetch_disk: v.Size = Field(4 << 30, description="disk space for all running downloads together")
    fetch_time: v.Duration = Field(300.0, description="longest download of one adapter")

    # Quality records and logs
    quality_retention: v.Duration = Field(90 * 86_400.0, description="how long scores and latencies of tasks are kept")
    log_format: Literal["text", "json"] = Field("text", description="format of log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_prompts: bool = Field(False, description="log prompts and answers")
    access_log: bool = Field(False, description="log every request")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        keys = {
            name: parse_keys(getattr(self, name).get_secret_value(), name)
            for name in ("api_keys", "admin_keys", "metrics_key")
        }
        keyed = keys["api_keys"] or keys["admin_keys"] or self.api_keys_file or self.admin_keys_file
        if not keyed and not self.insecure and not is_loopback(self.host):
            raise BadSetting(
                f"host {self.host!r} can be reached by others and there are no keys: set LORAMUX_API_KEYS, or use "
                "--insecure to serve everybody",
                "host",
            )
        if self.quantization == "nf4" and self.group_size not in (None, 64):
            raise BadSetting("nf4 has groups of 64; leave --group-size out", "group_size")
        if self.group_size not in (None, *GROUP_SIZES):
            known = ", ".join(map(str, GROUP_SIZES))
            raise BadSetting(f"group_size must be one of {known}, not {self.group_size}", "group_size")
        if self.kernels in ("auto", "native") and self.device != "cuda" and self.block_size % 16:
            raise BadSetting(
                f"block_size must be a multiple of 16 for the native kernels, not {self.block_size}; "
                "--kernels reference or aten accept any",
                "block_size",
            )
        return self

    def with_defaults(self, defaults: Mapping[str, Any]) -> Settings:
        """A copy in which `defaults` replace the settings that nobody has set. Raises BadSetting."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return Settings(**{**defaults, **given})
        except ValidationError as error:
            raise _bad_setting(error, {}) from None

    @property
    def cache_dir(self) -> Path:
        """Directory of files that may be deleted."""
        return self.state_dir / "cache"

    @property
    def watched_dir(self) -> Path:
        """Directory that is watched for adapters."""
        return self.adapter_dir if self.adapter_dir is not None else self.state_dir / "adapters"

    @property
    def packing(self) -> dict[str, Any]:
        """Arguments of `load_base`: quantization of the base and where packed weights are cached."""
        return {
            "quantization": self.quantization,
            "group_size": self.group_size,
            "double_quant": self.double_quant,
            "table_bits": self.table_bits,
            "cache_dir": self.cache_dir,
        }


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def load_settings(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Settings:
    """Read the settings. Raises BadSetting.

    Args:
        flags: settings from the command line; None means not set.
        config: TOML file; by default LORAMUX_CONFIG, else loramux.toml in the working directory if it exists.
    """
    named = config or os.environ.get(PREFIX + "CONFIG")
    path = Path(named or DEFAULT_FILE)
    from_file = _read_file(path, required=bool(named))
    from_variables = EnvSettingsSource(Settings)()
    if "://" in str(from_variables.get("port")):  # set by Kubernetes for a Service named `loramux`
        del from_variables["port"]
    _refuse_unknown(path, from_file)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**{**from_file, **from_variables, **given})
    except ValidationError as error:
        only_in_file = from_file.keys() - from_variables.keys() - given.keys()
        raise _bad_setting(error, dict.fromkeys(only_in_file, f"in {path}")) from None


def _read_file(path: Path, required: bool) -> dict[str, Any]:
    try:
        if required and not path.expanduser().is_file():
            raise BadSetting(f"the settings file {path} does not exist", "config")
        return TomlConfigSettingsSource(Settings, toml_file=path)()
    except (OSError, RuntimeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(f"the settings file {path} cannot be read: {error}", "config") from None


def _refuse_unknown(path: Path, from_file: Mapping[str, Any]) -> None:
    """Raises BadSetting for variables and keys that are not settings."""
    fields = list(Settings.model_fields)
    for variable, value in os.environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable == name or not variable.startswith(PREFIX) or name in fields or name == "config":
            continue
        if not _KUBERNETES_LINK.fullmatch(name) and not (name.endswith("_port") and "://" in value):
            raise BadSetting(_unknown(variable, [PREFIX + f.upper() for f in fields]), name)
    for name in from_file:
        if name not in fields:
            raise BadSetting(_unknown(name, fields, f" in {path}"), name)


def _unknown(name: str, known: list[str], where: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`loramux serve --help` lists the settings"
    return f"unknown setting {name}{where}; {hint}"


def _bad_setting(error: ValidationError, places: Mapping[str, str]) -> BadSetting:
    """One error for all problems. `places` says where a setting was set if not by flag or variable."""
    lines, param = [], None
    for problem in error.errors(include_url=False, include_input=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        param = param or name or None
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(name, list(Settings.model_fields)))
        else:
            place = places.get(name) or f"{flag(name)}, {PREFIX}{name.upper()}"
            lines.append(f"{name} ({place}): {message}" if name else message)
    return BadSetting("; ".join(dict.fromkeys(lines)), param)
