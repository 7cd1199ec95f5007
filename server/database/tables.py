"""The tables of the database, as SQLAlchemy Core metadata.

Times are seconds since the epoch. Digests of adapter versions are 64 hex characters. A change here needs an Alembic
revision in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Id = BigInteger().with_variant(Integer, "sqlite")
"""An auto-incremented key: SQLite increments INTEGER alone."""

# -- catalog of adapters

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("history", JSON, nullable=False, doc="digests that the name had, newest first; the first is current"),
    Column("source", String(16), nullable=False, doc="who published it: api, watch or library"),
    Column("since", Float, nullable=False, doc="when the name got its current version"),
    Column("pinned", Boolean, nullable=False),
    Column("replaced", String(64), doc="digest that the watched folder replaced, restored when the folder is removed"),
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("nbytes", BigInteger, nullable=False),
    Column("modules", JSON, nullable=False, doc="module path -> [rank, outputs, inputs]"),
    Column("metadata", JSON, nullable=False, doc="what was read last: task, card, honoured keys, notes"),
    Column("metadata_by_name", JSON, nullable=False, doc="name -> metadata that was published under this name"),
    Column("created_at", Float, nullable=False),
)

imported_folders = Table(
    "imported_folders",
    metadata,
    Column("folder", Text, primary_key=True, doc="origin and folder, such as watch/sentiment"),
    Column("digest", String(64), nullable=False),
    Column("signature", JSON, nullable=False, doc="name, size, times and inode of each file"),
)

# -- tasks

tasks = Table(
    "tasks",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("body", JSON, nullable=False, doc="the definition as PUT /tasks/{task} takes it"),
    Column("by_name", Boolean, nullable=False, doc="whether its route is the adapter of the task's name by default"),
)

deleted_tasks = Table(
    "deleted_tasks",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("marks", JSON, nullable=False, doc="contents of adapter folders that no longer bring this task"),
)

task_owners = Table(
    "task_owners",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("adapter", String(64), nullable=False, doc="whose task.json defines the task where several bring it"),
)

# -- quality

mixes = Table(
    "mixes",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("task", String(64), nullable=False),
    Column("mix", Text, nullable=False, doc="canonical JSON of versions and weights"),
    Column("base", Text, nullable=False),
    Column("client_defined", Boolean, nullable=False, doc="whether a client chose this mix in a request"),
    UniqueConstraint("task", "mix", "base"),
)

answers = Table(
    "answers",
    metadata,
    Column("id", LargeBinary(16), primary_key=True, doc="digest of the answer's id"),
    Column("mix_id", ForeignKey("mixes.id", ondelete="CASCADE"), nullable=False),
    Column("tenant", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("text", LargeBinary, nullable=False, doc="digest of the answer's text"),
    Column("score", Float, doc="feedback, 0 to 1; null without feedback"),
    Index(None, "at"),
)

example_scores = Table(
    "example_scores",
    metadata,
    Column("mix_id", ForeignKey("mixes.id", ondelete="CASCADE"), primary_key=True),
    Column("metric", String(32), primary_key=True),
    Column("example", LargeBinary(16), primary_key=True, doc="digest of the example"),
    Column("context", LargeBinary(16), nullable=False, doc="digest of what the task puts around the example"),
    Column("value", Float, nullable=False),
    Column("at", Float, nullable=False),
    Index(None, "at"),
)

score_hours = Table(
    "score_hours",
    metadata,
    Column("mix_id", ForeignKey("mixes.id", ondelete="CASCADE"), primary_key=True),
    Column("metric", String(32), primary_key=True),
    Column("source", String(16), primary_key=True, doc="feedback or evaluation"),
    Column("hour", Integer, primary_key=True, doc="hours since the epoch"),
    Column("count", Integer, nullable=False),
    Column("total", Float, nullable=False),
    Column("squares", Float, nullable=False),
)

traffic_hours = Table(
    "traffic_hours",
    metadata,
    Column("mix_id", ForeignKey("mixes.id", ondelete="CASCADE"), primary_key=True),
    Column("hour", Integer, primary_key=True, doc="hours since the epoch"),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("ttft", LargeBinary, nullable=False, doc="latency histogram"),
    Column("tpot", LargeBinary, nullable=False, doc="latency histogram"),
    Column("e2e", LargeBinary, nullable=False, doc="latency histogram"),
)

best_candidates = Table(
    "best_candidates",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("rule", Text, nullable=False, doc="the route that the candidate was found by"),
    Column("mix", Text, nullable=False),
    Column("base", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("reason", Text, nullable=False),
)

# -- jobs and files

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sequence", Id, nullable=False, unique=True, doc="the order in which jobs were created"),
    Column("kind", String(32), nullable=False),
    Column("name", String(128), nullable=False),
    Column("status", String(32), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("state", JSON, nullable=False, doc="the other fields of the job"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", Float, nullable=False),
    Column("level", String(16), nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "job_id"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sequence", Id, nullable=False, unique=True, doc="the order in which files were added"),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Integer, nullable=False),
)
