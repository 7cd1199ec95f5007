"""The adapter catalog in the database, and the import of a catalog of the version without one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from adapters.catalog_state import API, LIBRARY, WATCH, CatalogState, ImportedFolder, VersionRecord
from adapters.errors import StoreFailed
from adapters.peft_format import read_folder, save
from adapters.registry import Registry
from adapters.store import AdapterStore
from adapters.weights import LowRank, with_digest
from server.database import Database, database_url
from server.database.catalog import SqlCatalog
from server.database.tables import adapters

LEGACY = Path(__file__).parent / "data" / "legacy_state"
SHAPES = {f"model.layers.0.self_attn.{p}": (6, 4) for p in ("q_proj", "v_proj")}
A, B, C, D = (digit * 64 for digit in "abcd")


def record(digest: str, **metadata: object) -> VersionRecord:
    return VersionRecord(digest, 1 << 40, {"q": (2, 6, 4)}, metadata, 1.5, {"m": metadata})


def test_each_saved_state_is_loaded_again(database: Database) -> None:
    catalog = SqlCatalog(database)
    assert catalog.load() == (CatalogState(), {})
    signature = (("adapter_config.json", 1, 2**62, 2**62 + 1, 2**63),)
    states = [
        (CatalogState().set_version("m", A, LIBRARY, 1.25), [record(A, card="ü\u2028", task={"a": [1, None]})]),
    ]
    states.append((states[-1][0].set_folder("watch/m", ImportedFolder(B, signature)), []))
    states.append((states[-1][0].set_version("m", B, WATCH, 2.0), [record(B), record(A, card="new")]))
    states.append((states[-1][0].set_pinned("m", True).set_version("n", B, API, 3.0), []))
    states.append((states[-1][0].set_version("m", C, API, 4.0).set_version("m", D, API, 5.0), [record(C), record(D)]))
    states.append((states[-1][0].set_folder("watch/m", None).remove_name("m"), []))
    states.append((CatalogState(), []))
    records: dict[str, VersionRecord] = {}
    for state, changed in states:
        records |= {each.digest: each for each in changed}
        records = {digest: each for digest, each in records.items() if digest in state.digests}
        catalog.save(state, changed)
        assert SqlCatalog(database).load() == (state, records)


def test_a_failed_save_changes_nothing_and_can_be_repeated(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = SqlCatalog(database)
    first = CatalogState().set_version("m", A, API, 1.0)
    catalog.save(first, [record(A)])
    second = first.set_version("m", B, API, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr("server.database.catalog._delete", lambda *_: database_error())
        with pytest.raises(StoreFailed):
            catalog.save(second, [record(B)])
    assert SqlCatalog(database).load() == (first, {A: record(A)})
    catalog.save(second, [record(B)])
    assert SqlCatalog(database).load() == (second, {A: record(A), B: record(B)})


def database_error() -> None:
    raise StoreFailed("the database is full; nothing was changed")


def test_a_catalog_of_the_version_without_a_database_is_imported_once(database: Database, tmp_path: Path) -> None:
    root = tmp_path / "state" / "store"
    shutil.copytree(LEGACY / "store", root)
    registry = Registry(AdapterStore(root, SqlCatalog(database, root)), shapes=SHAPES, ram_bytes=1 << 20)
    assert registry.names() == ["formal", "poems"] and registry.rejected() == []
    formal, poems = registry.describe("formal"), registry.describe("poems")
    assert [v["current"] for v in formal["versions"]] == [True, False, False] and not formal["pinned"]
    assert formal["card"] == "card 2" and poems["card"] == "card of poems" and poems["pinned"]
    assert registry.metadata("formal")["task"] == {"prompt": "2 {input}"}
    for version in (version for each in (formal, poems) for version in each["versions"]):
        assert read_folder(root / "versions" / version["digest"], name="x").digest == version["digest"]
    assert registry.imported_folders(WATCH) == ["formal", "gone"]
    assert registry.remove_folder("formal", "watch/formal"), "it restores the version that the folder replaced"
    assert registry.current("formal").digest == formal["versions"][1]["digest"]
    registry.close()
    assert not (root / "names.json").exists()
    (root / "names.json.migrated").rename(root / "names.json")
    registry = Registry(AdapterStore(root, SqlCatalog(database, root)), shapes=SHAPES, ram_bytes=1 << 20)
    assert registry.current("formal").digest == formal["versions"][1]["digest"], "the database has priority"
    registry.close()


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": 99}', '{"format": 1, "names": {"a": {"history": ["../x"]}}}']
)
def test_an_unreadable_names_file_stops_the_start_and_deletes_nothing(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "store"
    shutil.copytree(LEGACY / "store", root)
    (root / "names.json").write_text(damage)
    database = Database(database_url(None, tmp_path))
    with pytest.raises(StoreFailed, match=r"names\.json in the store cannot be read"):
        AdapterStore(root, SqlCatalog(database, root))
    shutil.copy(LEGACY / "store" / "names.json", root)
    store = AdapterStore(root, SqlCatalog(database, root))
    assert not store.missing and set(store.state.names) == {"formal", "poems"}
    store.close()
    database.close()


def test_a_version_with_a_damaged_record_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "store"
    shutil.copytree(LEGACY / "store", root)
    database = Database(database_url(None, tmp_path))
    digest = next((root / "versions").iterdir()).name
    (root / "versions" / digest / "record.json").write_text("{}")
    store = AdapterStore(root, SqlCatalog(database, root))
    assert set(store.missing) == {digest} and f"record of version {digest[:12]} cannot be read" in caplog.text
    store.close()
    database.close()


PUBLISHER = """
import sys
from pathlib import Path
from adapters.peft_format import read_folder
from adapters.registry import Registry
from adapters.store import AdapterStore
from server.database import Database, database_url
from server.database.catalog import SqlCatalog

root, folders = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
shapes = {p: (m.B.shape[0], m.A.shape[1]) for p, m in read_folder(folders[0], name="a").modules.items()}
catalog = SqlCatalog(Database(database_url(None, root)))
registry = Registry(AdapterStore(root / "store", catalog), shapes=shapes, ram_bytes=1 << 20)
for n in range(10**6):
    print("ab"[n % 2], registry.publish_now("ab"[n % 2], folders[n % len(folders)]).version.digest, flush=True)
"""


def write_adapter(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 2.0)
        for path, (out, into) in SHAPES.items()
    }
    save(with_digest("x", modules), folder)
    return folder


def test_a_killed_process_loses_no_acknowledged_publish(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"source-{seed}", seed) for seed in range(5)]
    for run in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(tmp_path), *map(str, folders)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
            text=True,
        ) as process:
            assert process.stdout is not None
            acknowledged = dict(process.stdout.readline().split() for _ in range(15 + 6 * run))
            process.kill()
            lines = process.stdout.read().splitlines()
        acknowledged |= dict(line.split() for line in lines if len(line.split()) == 2 and len(line) == 66)
        assert process.returncode == -signal.SIGKILL
        database = Database(database_url(None, tmp_path))
        store = AdapterStore(tmp_path / "store", SqlCatalog(database))
        assert not store.missing and set(store.records) == store.state.digests
        for name, digest in acknowledged.items():
            history = store.state.names[name].history
            assert digest in history[:2], "at most one publish was not acknowledged"
            assert read_folder(store.path(digest), name=name).digest == digest
        store.close()
        with database.read() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(adapters)) == 2
        database.close()
