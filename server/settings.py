"""Every setting of the server: flags over `LORAMUX_*` variables over `loramux.toml`, unknown ones are errors.

The only reader of environment variables, but for the keys that `loramux bench` sends to others' servers. Owns names,
defaults, units and the checks between settings; knows nothing of what they are used for. `None` where a default says
"auto": the part that needs the value works it out.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

import adapters
from server.errors import BadSetting

PREFIX = "LORAMUX_"
DEFAULT_FILE = "loramux.toml"
GROUPS = (32, 64, 128, 256)
"""What the quantizer can do, which is slow to import."""

_SIZE_UNITS = {"": 1, "B": 1}
_SIZE_UNITS |= {f"{p}iB": 1 << (10 * i) for i, p in enumerate("KMGT", 1)}
_SIZE_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LARGEST = 1 << 63
"""No size is as large, nor can a float of more digits be told from infinity."""
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_size(text: object) -> int:
    """Bytes of "2GiB", "500MB", "4096" or a whole number. Raises ValueError."""
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        unit = {u.lower(): n for u, n in _SIZE_UNITS.items()}.get(m[2].lower()) if m else None
        if m is None or unit is None:
            raise ValueError(f"{text!r} is no size; write it as 2GiB, 512MiB or a number of bytes")
        size = int(min(float(m[1]) * unit, _LARGEST))
    if size < 0:
        raise ValueError("a size can not be negative")
    if size >= _LARGEST:
        raise ValueError("that is more than any machine has")
    return size


def parse_memory(text: object) -> int | float:
    """Bytes as `parse_size` has them, or a share of what is free: a number up to 1 with a point. Raises ValueError."""
    share = text if isinstance(text, float) else None
    if isinstance(text, str) and re.fullmatch(r"\s*[01]?\.\d+\s*", text):
        share = float(text)
    if share is None:
        return parse_size(text)
    if not 0 < share <= 1:
        raise ValueError("a share of memory is over 0 and at most 1; write a size as 20GiB")
    return share


def parse_duration(text: object) -> float:
    """Seconds of "300s", "5m", "250ms", "1h" or a number of seconds. Raises ValueError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text) if isinstance(text, float) or text < _LARGEST else math.inf
    else:
        m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|[smhd]?)\s*", str(text))
        if m is None:
            raise ValueError(f"{text!r} is no duration; write it as 300s, 5m, 250ms or a number of seconds")
        seconds = float(m[1]) * _SECONDS[m[2]]
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError("a duration must be a finite number, not below 0")
    return seconds


def parse_keys(text: str, param: str = "api_keys") -> dict[str, str]:
    """Key id -> secret of `id:secret` entries, separated by commas or line ends. Raises BadSetting.

    The message never holds a secret.
    """
    keys: dict[str, str] = {}
    for number, entry in enumerate((e.strip() for e in re.split(r"[,\n]", text)), 1):
        if not entry:
            continue
        name, colon, secret = entry.partition(":")
        if not colon or not secret or not _KEY_ID.fullmatch(name):
            raise BadSetting(f"{param}: entry {number} is not `id:secret` (id: letters, digits, `.`, `_`, `-`)", param)
        if not (secret.isascii() and secret.isprintable()):
            raise BadSetting(f"{param}: the secret of {name!r} has characters that headers do not carry", param)
        if name in keys:
            raise BadSetting(f"{param}: the id {name!r} is given twice", param)
        keys[name] = secret
    return keys


def _auto(parse: Callable[[Any], Any]) -> BeforeValidator:
    return BeforeValidator(lambda v: None if v is None or v == "auto" else parse(v))


def _comma_list(value: object) -> object:
    return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value


def _whole(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _named(value: object) -> object:
    if value == "":
        raise ValueError("an empty name is none; leave it out for the default")
    return value


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with ~, and whose home that is cannot be told") from None


_Given = TypeVar("_Given", Path, Path | None)


def given_path(path: _Given) -> _Given:
    """A path that is no setting, as a command or a recipe was given it: a shell leaves `~` alone in `--output=~/x`.

    Raises BadSetting.
    """
    try:
        return path if path is None else _at_home(path)
    except ValueError as error:
        raise BadSetting(str(error)) from None


def _hosts(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(r"\*|[^\s/:\[\]]+|\[[0-9A-Fa-f:.]+\]", name):
            raise ValueError(f"{name!r} is no host: no scheme, port or path, and an IPv6 address in brackets")
    return names


def _without_brackets(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
AutoSize = Annotated[int | None, _auto(parse_size)]
AutoMemory = Annotated[int | float | None, _auto(parse_memory)]
AutoInt = Annotated[int | None, _auto(lambda v: v)]
AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, _auto(lambda v: v)]
AutoLength = Annotated[Annotated[int, Field(ge=2)] | None, _auto(lambda v: v)]
Place = Annotated[Path, BeforeValidator(_named), AfterValidator(_at_home)]
AutoPlace = Annotated[Place | None, _auto(lambda v: v)]
Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[Annotated[float, Field(gt=0)] | None, _auto(lambda v: v)]


class Settings(BaseModel):
    """All settings, frozen. Made by `load_settings`; tests may pass keyword arguments to `Settings` directly."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # The base and how it runs
    model: Annotated[str, BeforeValidator(_named)] = Field(
        "smollm2-135m", description="catalogue name, local folder, .gguf file or hub id (org/name@rev)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the base lives")
    quantization: Literal["int4", "nf4", "none"] = Field(
        "int4",
        description="form of the base's linears; none keeps the file's floats, bf16 of a GGUF file's codes",
    )
    group_size: AutoInt = Field(None, description="weights per scale, 32, 64, 128 or 256: auto is 64, from GGUF 32")
    double_quant: bool = Field(False, description="quantize the scales and zeros too")
    table_bits: Annotated[Literal[8, 16], BeforeValidator(_whole)] = Field(
        8, description="bits of embedding tables and lm_head"
    )
    kernels: Literal["auto", "native", "aten", "reference", "cuda"] = Field(
        "auto", description="kernels to run the base with"
    )
    threads: AutoCount = Field(None, description="CPU threads of the kernels: auto is one a processor that it may use")
    max_context: AutoLength = Field(
        None, description="longest prompt and answer, in tokens: auto is the base's own limit"
    )

    # Adapters
    state_dir: Place = Field(Path("data"), description="all that the server writes; its cache/ may be deleted")
    database_url: str | None = Field(
        None,
        description="SQL database of names, tasks, quality and jobs, such as postgresql://user@host/name; "
        "by default SQLite in the state directory",
    )
    adapter_dir: AutoPlace = Field(
        None, description="watched directory of PEFT folders, never written: auto is adapters/ in the state directory"
    )
    library: Annotated[Place | None, _auto(lambda v: None if v == "none" else v)] = Field(
        Path(adapters.__path__[0]) / "library", description="adapters registered at start; none for no such adapters"
    )
    max_rank: Count = Field(64, description="highest rank of an adapter")
    max_mix: Count = Field(8, description="most adapters in one mix")
    max_slots: Count = Field(
        64, description="most distinct adapters in one batch; on a GPU what adapter_device_memory holds, unless given"
    )
    adapter_ram: Size = Field(
        2 << 30, description="RAM for adapters that are loaded; half of what is free if that is less, unless given"
    )
    adapter_device_memory: AutoSize = Field(None, description="GPU memory for adapters: auto is a share of gpu_memory")
    gpu_memory: AutoMemory = Field(
        None, description="GPU memory to use in all, or a share: auto is 0.9 of what is free"
    )

    # The engine
    kv_cache: AutoSize = Field(
        None,
        description="memory for keys and values: auto is a quarter of what is free, at most 2,048 tokens a sequence; "
        "on a GPU what --gpu-memory leaves",
    )
    block_size: Annotated[int, Field(ge=4, le=256)] = Field(16, description="tokens in one block of the KV cache")
    prefix_cache: bool = Field(True, description="reuse keys and values of equal prompt starts")
    max_batch: Count = Field(32, description="most sequences in one step")
    max_step_tokens: Annotated[int, Field(ge=16)] = Field(512, description="most new tokens in one step")
    max_queue: Count = Field(256, description="most requests that wait")
    max_queue_tokens: Count = Field(262_144, description="most tokens that wait")
    deadline: Annotated[Duration, Field(gt=0)] = Field(
        300.0, description="longest time of one request; one whose deadline_ms is longer gets this"
    )

    key_rate: Rate = Field(
        None, description="requests a second that one key may send, two seconds' worth at once: auto is no limit"
    )
    key_concurrency: AutoCount = Field(None, description="most requests of one key in flight: auto is no limit")
    task_rate: Rate = Field(
        None, description="requests a second that one task may be sent, two seconds' worth at once: auto is no limit"
    )
    task_concurrency: AutoCount = Field(None, description="most requests of one task in flight: auto is no limit")

    # HTTP
    host: Annotated[str, AfterValidator(_without_brackets)] = Field(
        "127.0.0.1", description="address to listen on; of a name, its first one"
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(8000, description="port to listen on; 0 picks a free one")
    api_keys: SecretStr = Field(SecretStr(""), description="inference keys, id:secret, comma-separated")
    api_keys_file: Place | None = Field(None, description="file of inference keys, read again when it changes")
    admin_keys: SecretStr = Field(SecretStr(""), description="admin keys, id:secret, comma-separated")
    admin_keys_file: Place | None = Field(None, description="file of admin keys, read again when it changes")
    metrics_key: SecretStr = Field(SecretStr(""), description="a key that opens /metrics only, as id:secret")
    metrics_key_file: Place | None = Field(None, description="file of the key for /metrics, read again when it changes")
    metrics_public: bool = Field(False, description="serve /metrics without a key")
    allowed_hosts: Annotated[Names, AfterValidator(_hosts)] = Field(
        (), description="more values of the Host header to accept, with any port, comma-separated; * is any"
    )
    insecure: bool = Field(False, description="serve without keys on an address that others can reach")
    max_body: Size = Field(8 << 20, description="largest JSON body")
    max_upload: Size = Field(1 << 30, description="largest upload")
    body_time: Annotated[Duration, Field(gt=0)] = Field(
        30.0, description="longest that a client may be waited for within its body, and a second more for every 16 KiB"
    )
    step_limit: Annotated[Duration, Field(gt=0)] = Field(
        30.0, description="a step that takes longer hangs: the process ends, so that something restarts it"
    )
    drain: Duration = Field(30.0, description="time that running requests get to finish at SIGTERM")

    # Sources
    hub_allow: Names = Field((), description="hub ids that adapters may be loaded from, org/name or org/*")
    url_allow: Names = Field((), description="URL prefixes that adapters may be loaded from")
    fetch_disk: Size = Field(4 << 30, description="disk for adapters on their way from hub or URL, all together")
    fetch_time: Duration = Field(300.0, description="longest time that one adapter may be on its way")

    # Quality records
    quality_retention: Duration = Field(90 * 86_400.0, description="how long scores and latencies of tasks are kept")

    # Logs
    log_format: Literal["text", "json"] = Field("text", description="form of log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_prompts: bool = Field(False, description="write prompts and answers into the log")
    access_log: bool = Field(False, description="one log line for every request")

    @model_validator(mode="after")
    def _together(self) -> Self:
        given = {
            name: parse_keys(getattr(self, name).get_secret_value(), name)
            for name in ("api_keys", "admin_keys", "metrics_key")
        }
        keyed = given["api_keys"] or given["admin_keys"] or self.api_keys_file or self.admin_keys_file
        if not keyed and not self.insecure and not is_loopback(self.host):
            raise BadSetting(
                f"host {self.host!r} can be reached by others and there are no keys: set LORAMUX_API_KEYS, or say "
                "--insecure to serve everybody",
                "host",
            )
        if self.quantization == "nf4" and self.group_size not in (None, 64):
            raise BadSetting("nf4 has groups of 64; leave --group-size out", "group_size")
        if self.group_size not in (None, *GROUPS):
            known = ", ".join(map(str, GROUPS))
            raise BadSetting(f"group_size must be one of {known}, not {self.group_size}", "group_size")
        return self

    @model_validator(mode="after")
    def _native(self) -> Self:
        if self.kernels in ("auto", "native") and self.device != "cuda" and self.block_size % 16:
            raise BadSetting(
                f"block_size must be a multiple of 16 for the native kernels, not {self.block_size}; "
                "--kernels reference or aten take any",
                "block_size",
            )
        return self

    def where_not_given(self, others: Mapping[str, Any]) -> Settings:
        """These settings, with those of `others` that nobody has given here. Raises BadSetting."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        try:
            return Settings(**{**others, **given})
        except ValidationError as e:
            raise BadSetting(*_explain(e)) from None

    @property
    def cache_dir(self) -> Path:
        """Where disposable files go."""
        return self.state_dir / "cache"

    @property
    def packing(self) -> dict[str, Any]:
        """How the base becomes what is resident, and where that is kept: arguments of `load_base`."""
        return {
            "quantization": self.quantization,
            "group_size": self.group_size,
            "double_quant": self.double_quant,
            "table_bits": self.table_bits,
            "cache_dir": self.cache_dir,
        }

    @property
    def watched_dir(self) -> Path:
        """The user's adapter directory: `adapter_dir`, or adapters/ in the state directory."""
        return self.adapter_dir if self.adapter_dir is not None else self.state_dir / "adapters"


def is_loopback(host: str) -> bool:
    """Whether `host` is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Lets oneDNN, and torch beside it, keep a step's kernels, and not those of the last 1,024 shapes that they have met: a
gigabyte where rows and ranks change from step to step."""


def training_environment() -> dict[str, str]:
    """What a training process is started with: this one's variables and, where they are not set, FEW_KERNELS."""
    return {**FEW_KERNELS, **os.environ}


def fetching_environment(scratch: Path) -> dict[str, str]:
    """What pip is started with: this one's variables, and `scratch` for what it keeps while it runs."""
    return {**os.environ, "TMPDIR": str(scratch.resolve())}


def keep_transfers_in(cache: Path) -> None:
    """Where the hub's client keeps what it needs between transfers, and its log of them, unless HF_XET_CACHE says
    where. Before it is imported, which looks then."""
    os.environ.setdefault("HF_XET_CACHE", str(cache.resolve() / "xet"))


_FEWER_THREADS = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT")
_BOUND_THREADS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def leave_threads_alone() -> list[str]:
    """Take out, for this process and those that it starts, what gives torch fewer threads than it was told it has, as
    oneDNN leaves their share of a product as it finds it; and what binds threads to processors, as OpenMP begins with
    the one that loads it, and all threads that are no thread of its own inherit that single processor. Before torch is
    loaded, which looks then. Answers them."""
    return [name for name in (*_FEWER_THREADS, *_BOUND_THREADS) if os.environ.pop(name, None) is not None]


def keep_few_kernels() -> None:
    """FEW_KERNELS for a command that computes in this process. oneDNN looks once, at its first product."""
    os.environ.update({name: value for name, value in FEW_KERNELS.items() if name not in os.environ})


def load_settings(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Settings:
    """Settings from flags (None: not given), then `LORAMUX_*`, then a TOML file. Raises BadSetting.

    The file is `config`, else LORAMUX_CONFIG, else loramux.toml in the working directory if it is there. Of a variable
    that is empty only the name is looked at.
    """
    environment = {k[len(PREFIX) :].lower(): v for k, v in os.environ.items() if k.startswith(PREFIX)}
    environment = {name: value for name, value in environment.items() if not _is_service_link(name, value)}
    from_variable = environment.pop("config", "") or None
    named = config or from_variable
    file = Path(named or DEFAULT_FILE)
    from_file = _read_file(file, must_exist=named is not None)
    for name in environment:
        if name not in Settings.model_fields:
            raise BadSetting(_unknown(PREFIX + name.upper(), [PREFIX + f.upper() for f in Settings.model_fields]), name)
    for name in from_file:
        if name not in Settings.model_fields:
            raise BadSetting(_unknown(name, list(Settings.model_fields), f" in {file}"), name)
    environment = {name: value for name, value in environment.items() if value}
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    try:
        return Settings(**{**from_file, **environment, **given})
    except ValidationError as e:
        in_file = from_file.keys() - environment.keys() - given.keys()
        raise BadSetting(*_explain(e, dict.fromkeys(in_file, f"in {file}"))) from None


_SERVICE_LINKS = (
    (r"service_host", r"[0-9a-fA-F.:]+"),
    (r"service_port(_\w+)?", r"\d+"),
    (r"port(_\d+_(tcp|udp|sctp))?", r"(tcp|udp|sctp)://\S+:\d+"),
    (r"port_\d+_(tcp|udp|sctp)_proto", r"tcp|udp|sctp"),
    (r"port_\d+_(tcp|udp|sctp)_port", r"\d+"),
    (r"port_\d+_(tcp|udp|sctp)_addr", r"[0-9a-fA-F.:]+"),
)
"""Names without their prefix, and values, of the variables that Kubernetes gives to the pods beside a Service."""


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes tells where a Service is, one named `loramux` or `loramux-...`: that is no setting."""
    return any(
        re.fullmatch(rf"(\w+_)?{names}", name) and re.fullmatch(values, value) for names, values in _SERVICE_LINKS
    )


def _read_file(path: Path, must_exist: bool) -> dict[str, Any]:
    try:
        path = _at_home(path)
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if must_exist:
            raise BadSetting(f"the settings file {path} does not exist", "config") from None
        return {}
    except (OSError, ValueError) as e:  # not to be read, no UTF-8, no TOML, or in nobody's home
        raise BadSetting(f"the settings file {path} can not be read: {e}", "config") from None


def _unknown(name: str, known: list[str], where: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `loramux serve --help` lists those that are flags"
    return f"unknown setting {name}{where}{hint}"


def _explain(error: ValidationError, places: Mapping[str, str] | None = None) -> tuple[str, str | None]:
    """What is wrong, and with which setting; `places` says of those that no flag or variable has where they are."""
    lines, param = [], None
    for e in error.errors(include_url=False, include_input=False):
        name = str(e["loc"][0]) if e["loc"] else ""
        param = param or name or None
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            lines.append(_unknown(name, list(Settings.model_fields)))
        else:
            place = (places or {}).get(name) or f"{flag(name)}, {PREFIX}{name.upper()}"
            lines.append(f"{name} ({place}): {message}" if name else message)
    return "; ".join(dict.fromkeys(lines)), param
