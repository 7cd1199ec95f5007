"""Where a base comes from: a GGUF file, a Hugging Face folder, or a folder that `loramux quantize` wrote.

Owns the names and shapes that each of them must have, and turns their tensors, one at a time, into the stored layout
under Transformers' module paths. Does not know backends or caches (loader.py).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from server.errors import BadModel
from server.kernels.packed_format import stored_parts
from server.kernels.weight import STORED, Weight
from server.model import config as model_config
from server.model import gguf_config, gguf_vocabulary
from server.model import vocabulary as model_vocabulary
from server.model.config import ModelConfig
from server.model.file_digest import Digests, stamps
from server.model.gguf_file import BLOCK, GgufFile
from server.model.quantization import GROUPS, Quantization, Rows, check_finite, quantize, quantize_table
from server.model.vocabulary import Vocabulary, read_json

MANIFEST = "loramux.json"
MANIFEST_FORMAT = 1
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
NAMED = 5
"""Names that an error lists at most."""

_IDENTITY = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", MANIFEST,
)  # fmt: skip
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED = 1 << 22  # values of two tables that are compared at once
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Checkpoint(ABC):
    """A source of a base, a folder unless it says otherwise. `notes` grows while weights are read: what people should
    be told about them. Its files are opened anew, by name, for each part.
    """

    config: ModelConfig
    notes: list[str]

    def __init__(self, source: Path) -> None:
        self._source, self._before = source, stamps(source)

    @abstractmethod
    def files(self) -> list[Path]:
        """All that the digest is of."""

    @abstractmethod
    def effective(self, asked: Quantization) -> Quantization:
        """The quantization that loading gives, which may be the source's own."""

    @abstractmethod
    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        """Every linear and table by its module path, in the stored layout. Raises BadModel."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every norm and bias by its name, float32. Raises BadModel."""

    def vocabulary(self) -> Vocabulary:
        return model_vocabulary.from_folder(self._source)

    def digest(self, digests: Digests) -> str:
        """SHA-256 of all that makes it what it is."""
        return digests.of_all(self._source, self.files())

    def check_unchanged(self) -> None:
        """Raises BadModel if a file that the digest is of is no longer what it was before it was opened."""
        now = stamps(self._source)
        if any(self._before.get(path) != now.get(path) for path in self.files()):
            raise BadModel(
                f"{self._source.name} changed while it was read, or its owner, mode or links did; start again"
            )


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint at `source`, a folder or a file. Raises BadModel if it is none that can be read."""
    if source.is_dir():
        if (source / MANIFEST).is_file():
            return QuantizedFolder(source)
        if (source / "config.json").is_file():
            return Folder(source)
        files = sorted(source.glob("*.gguf"))
        if len(files) == 1:
            return Gguf(files[0])
        raise BadModel(f"{source.name} holds neither a config.json nor exactly one GGUF file", "model")
    if source.is_file():
        if source.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise BadModel(f"{source.name} is a pickle, which can run code; give safetensors or a GGUF file", "model")
        return Gguf(source)
    raise BadModel(f"there is no model at {source}", "model")


def _linear(rows: Rows, quantization: Quantization, name: str) -> Weight:
    return quantize(rows, quantization.scheme, quantization.linear_group, quantization.double_quant, name)


def _table(rows: Rows, quantization: Quantization, name: str) -> Weight:
    if quantization.scheme == "none":
        return quantize(rows, "none", name=name)
    return quantize_table(rows, quantization.table_bits, name)


# -- GGUF

_GGUF_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"0|[1-9][0-9]*")


class Gguf(Checkpoint):
    """A GGUF file. Q4_0 and Q4_1 linears and Q8_0 tables are taken over without loss, others re-quantized.

    llama.cpp keeps the rows of q and k of the `llama` and `smollm3` architectures in another order, in which the two
    halves of a head alternate; here they are put back into Transformers' order, codes and scales as they are.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = GgufFile(path)
        metadata, tensors = self._file.metadata, self._file.tensors
        parts = metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise BadModel(f"{path.name} is one of {parts} parts; merge them into one file first")
        factors = self._file.floats(_ROPE_FACTORS).flatten().tolist() if _ROPE_FACTORS in tensors else None
        self.config = gguf_config.from_gguf(metadata, {n: t.shape for n, t in tensors.items()}, factors)
        self.notes: list[str] = []
        self._names = {_from_gguf(name): name for name in tensors if name != _ROPE_FACTORS}
        self._permuted = metadata["general.architecture"] in ("llama", "smollm3")
        shapes = {_from_gguf(name): info.shape for name, info in tensors.items() if name != _ROPE_FACTORS}
        _check_shapes(shapes, self.config)

    def vocabulary(self) -> Vocabulary:
        return gguf_vocabulary.from_gguf(self._file.metadata)

    def files(self) -> list[Path]:
        return [self._file.path]

    def digest(self, digests: Digests) -> str:
        return digests.of(self._file.path)

    def effective(self, asked: Quantization) -> Quantization:
        if asked.scheme == "int4" and asked.group is None:
            return replace(asked, group=BLOCK)
        return asked

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        changed: dict[str, int] = {}
        for path in (*self.config.table_shapes(), *self.config.linear_shapes()):
            name = self._names[f"{path}.weight"]
            table = path in ("model.embed_tokens", "lm_head")
            weight = self._lossless(name, quantization, table)
            if weight is None:
                info = self._file.tensors[name]
                if info.type_name not in ("F32", "F16", "BF16"):
                    changed[info.type_name] = changed.get(info.type_name, 0) + 1
                weight = self._requantized(path, name, quantization, table)
            elif (order := self._row_order(path)) is not None:
                weight = replace(weight, tensors={key: t[order] for key, t in weight.tensors.items()})
            yield path, weight
        done = "widened to bf16" if quantization.scheme == "none" else "re-quantized"
        for kind, count in sorted(changed.items()):
            self.notes.append(f"{count} tensors of the GGUF type {kind} were {done}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.config.tensor_shapes():
            tensor = self._file.floats(self._names[name]).float()
            check_finite(name, tensor)
            order = self._row_order(name.removesuffix(".bias"))
            yield name, tensor if order is None else tensor[order]

    def _lossless(self, name: str, quantization: Quantization, table: bool) -> Weight | None:
        if table:
            wanted = "int8" if quantization.scheme != "none" and quantization.table_bits == 8 else None
        elif quantization.scheme == "int4" and quantization.group == BLOCK and not quantization.double_quant:
            wanted = "int4"
        else:
            wanted = None
        stored = self._file.stored(name) if wanted else None
        return stored if stored is not None and stored.scheme == wanted else None

    def _requantized(self, path: str, name: str, quantization: Quantization, table: bool) -> Weight:
        rows: Rows = self._file.rows(name)
        order = self._row_order(path)
        if quantization.scheme == "none" and self._file.tensors[name].type_name not in ("F32", "F16", "BF16"):
            rows = rows[: rows.shape[0]].bfloat16()
        if order is not None:
            rows = rows[: rows.shape[0]][order]
        return _table(rows, quantization, path) if table else _linear(rows, quantization, path)

    def _row_order(self, path: str) -> torch.Tensor | None:
        """For each row of q or k as Transformers has it, where llama.cpp has it; None where both agree."""
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(path.rsplit(".", 1)[-1])
        if heads is None or not self._permuted:
            return None
        rows = torch.arange(heads * self.config.head_dim)
        return rows.view(heads, self.config.head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _from_gguf(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises BadModel for a name not known."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _GGUF_TOP:
        return f"{_GGUF_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and _LAYER.fullmatch(parts[1]):
        known = _GGUF_LINEARS.get(parts[2]) or _GGUF_NORMS.get(parts[2])
        if known is not None:
            return f"model.layers.{parts[1]}.{known}.{parts[3]}"
    raise BadModel(f"the GGUF file has the tensor {name}, which no architecture that is served has")


# -- folders


class Folder(Checkpoint):
    """A Hugging Face folder: config.json, tokenizer.json, one or several safetensors files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = model_config.from_hf(read_json(folder / "config.json"))
        self.notes: list[str] = []
        names, self._index = _shard_names(folder)
        if self._index is None and (folder / WEIGHTS_INDEX).is_file():
            self.notes.append(f"{WEIGHTS} is read; {WEIGHTS_INDEX} beside it, and the files that it names, are not")
        self._shards = _Shards(folder, names)
        self._embedding = self._tied()
        shapes = {n: s for n, s in self._shards.shapes.items() if not self._ignored(n)}
        if self._embedding == _HEAD:
            shapes[_EMBEDDING] = self._shards.shapes[_HEAD]
        _check_shapes(shapes, self.config)

    def files(self) -> list[Path]:
        index = [] if self._index is None else [self._index]
        return _identity_files(self._source, [*self._shards.files, *index])

    def effective(self, asked: Quantization) -> Quantization:
        return asked if asked.scheme == "none" else replace(asked, group=asked.linear_group)

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        # The tables first: they are the largest by far, and nothing else is in memory yet.
        for paths, kind in ((self.config.table_shapes(), _table), (self.config.linear_shapes(), _linear)):
            asked = {self._embedding if path == "model.embed_tokens" else f"{path}.weight": path for path in paths}
            for name, tensor in self._shards.read(asked):
                _check_float(name, tensor)
                path = asked[name]
                yield path, kind(tensor, quantization, path)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._shards.floats(self.config.tensor_shapes())

    def _tied(self) -> str:
        """The name that the embedding table is stored under. Unties the config if there is a head that differs.

        What is stored rules over `tie_word_embeddings`, as Transformers has it: one of two tied tables is enough,
        whichever it is, and training and merging can leave two tables under a config that still says there is one.
        """
        stored = self._shards.shapes.keys() & {_EMBEDDING, _HEAD}
        if not self.config.tie_word_embeddings or _HEAD not in stored:
            return _EMBEDDING
        if _EMBEDDING not in stored:
            return _HEAD
        if not self._shards.equal(_EMBEDDING, _HEAD):
            self.config = replace(self.config, tie_word_embeddings=False)
            self.notes.append(f"config.json ties {_HEAD} to {_EMBEDDING}, but the two differ: each is read as it is")
        return _EMBEDDING

    def _ignored(self, name: str) -> bool:
        """Tensors that some checkpoints carry and no model reads."""
        return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and self.config.tie_word_embeddings)


class QuantizedFolder(Checkpoint):
    """A folder of the stored layout, as `quantize_folder` writes it: its tensors are taken over as they are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != MANIFEST_FORMAT:
            raise BadModel(
                f"{MANIFEST} is of format {repr(manifest.get('format'))}; this version reads {MANIFEST_FORMAT}"
            )
        self.config = model_config.from_hf(read_json(folder / "config.json"))
        try:
            self._weights: dict[str, dict[str, Any]] = manifest["weights"]
            self._quantization = Quantization(**manifest["quantization"])
            self.notes = [str(note) for note in manifest["notes"]]
            self._shards = _Shards(folder, [str(name) for name in manifest["files"]])
            shapes = {f"{path}.weight": tuple(entry["shape"]) for path, entry in self._weights.items()}
            for entry in self._weights.values():
                _check_entry(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadModel(f"{MANIFEST} is not whole: {repr(error)}") from error
        norms = {name: shape for name, shape in self._shards.shapes.items() if name in self.config.tensor_shapes()}
        _check_shapes(shapes | norms, self.config)
        needed = [f"{path}.{part}" for path, entry in self._weights.items() for part in entry["tensors"]]
        _check_names({*needed, *norms}, set(self._shards.shapes))

    def files(self) -> list[Path]:
        return _identity_files(self._source, self._shards.files)

    def effective(self, asked: Quantization) -> Quantization:
        if asked not in (self._quantization, replace(self._quantization, group=None)):
            note = f"the folder is quantized already ({self._quantization.label}) and is served as it is"
            if note not in self.notes:
                self.notes.append(note)
        return self._quantization

    def weights(self, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        owners = {f"{path}.{part}": (path, part) for path, entry in self._weights.items() for part in entry["tensors"]}
        for name, tensor in self._shards.read(owners):
            if tensor.is_floating_point():
                check_finite(name, tensor)
            path, part = owners[name]
            gathered, entry = parts.setdefault(path, {}), self._weights[path]
            gathered[part] = tensor
            if len(gathered) == len(entry["tensors"]):
                yield path, _stored(path, entry, parts.pop(path))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._shards.floats(self.config.tensor_shapes())


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raises TypeError, KeyError or ValueError unless a manifest's entry has what `_stored` needs."""
    rows, columns = entry["shape"]
    if entry["scheme"] not in ("int4", "nf4", "int8", "none") or "codes" not in entry["tensors"]:
        raise ValueError(f"there is no scheme {entry['scheme']!r} of {entry['tensors']}")
    if entry["scheme"] != "none" and (entry["group"] not in GROUPS or columns % entry["group"]):
        raise ValueError(f"groups of {entry['group']} do not divide {columns}")


def _stored(path: str, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Weight:
    """A matrix of a quantized folder. Raises BadModel unless its parts have exactly the types and shapes they must,
    since kernels read them through plain pointers."""
    scheme, (rows, columns), group = entry["scheme"], entry["shape"], entry["group"]
    weight = Weight(scheme, STORED, (rows, columns), columns if scheme == "none" else group, tensors)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if scheme == "none":
        whole = found.keys() == {"codes"} and tensors["codes"].dtype in _FLOATS and found["codes"][1] == weight.shape
    else:
        whole = found == stored_parts(scheme, weight.shape, group, weight.double_quantized)
    if not whole:
        raise BadModel(f"the quantized folder's {path} is not a matrix of {rows} by {columns} in {scheme}")
    return weight


class _Shards:
    """Several safetensors files as one mapping, read one file after the other."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            if Path(name).name != name or not os.path.isfile(folder / name):
                raise BadModel(f"the model names the file {name!r}, which is not in its folder")
        self.files = [folder / name for name in names]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, Path] = {}
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in self._owner:
                        raise BadModel(f"{name} is in both {self._owner[name].name} and {path.name}")
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._owner[name] = path

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices have the same values, whatever types they are stored in. A few rows at a time."""
        shape = self.shapes[one]
        if shape != self.shapes[other] or len(shape) != 2:
            return False
        step = max(1, _COMPARED // max(1, shape[1]))
        with _opened(self._owner[one]) as first, _opened(self._owner[other]) as second:
            a, b = first.get_slice(one), second.get_slice(other)
            parts = (slice(start, start + step) for start in range(0, shape[0], step))
            pairs = ((a[part], b[part]) for part in parts)
            return all(torch.equal(*((x, y) if x.dtype == y.dtype else (x.float(), y.float()))) for x, y in pairs)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of `names` that there are, as views of the mapped files."""
        for path in self.files:
            with _opened(path) as file:
                for name in file.keys():
                    if name in names:
                        yield name, file.get_tensor(name)

    def floats(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same in float32. Raises BadModel for another type than floats, and for values that are not finite."""
        for name, tensor in self.read(names):
            _check_float(name, tensor)
            check_finite(name, tensor)
            yield name, tensor.float()


def _check_float(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise BadModel(f"{name} is of the type {tensor.dtype}, which is not read; give 16- or 32-bit floats")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        path.open("rb").close()  # which says why it cannot be: to the library each file that it cannot open is missing
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _shard_names(folder: Path) -> tuple[list[str], Path | None]:
    """The files with the weights, and the index that names them if one does.

    As Transformers has it, one whole file is read alone: an index beside it is what an earlier save in parts left.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], None
    index = read_json(folder / WEIGHTS_INDEX)
    if index:
        named = index.get("weight_map", {})
        if not isinstance(named, dict):
            raise BadModel(f"{WEIGHTS_INDEX} is not whole: its weight_map does not say which file has which tensor")
        return sorted({str(name) for name in named.values()}), folder / WEIGHTS_INDEX
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise BadModel("the model folder holds pickles, which can run code, and no safetensors; convert it first")
    raise BadModel("the model folder holds no model.safetensors")


def _identity_files(folder: Path, shards: Sequence[Path]) -> list[Path]:
    return [*shards, *(folder / name for name in _IDENTITY if (folder / name).is_file())]


def _check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises BadModel, naming the tensors, unless `found` are exactly those of `config`."""
    expected: dict[str, tuple[int, ...]] = {
        f"{path}.weight": shape for path, shape in (config.linear_shapes() | config.table_shapes()).items()
    }
    expected |= config.tensor_shapes()
    _check_names(set(expected), set(found))
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise BadModel(f"{name} has the shape {list(found[name])}, the model's config asks for {list(shape)}")


def _check_names(expected: set[str], found: set[str]) -> None:
    if missing := expected - found:
        raise BadModel(f"the model lacks {_some(missing)}")
    if surplus := found - expected:
        raise BadModel(f"the model has tensors that its config does not: {_some(surplus)}")


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED} more" if len(listed) > NAMED else "")
