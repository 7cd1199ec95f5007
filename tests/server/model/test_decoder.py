"""The decoder against Transformers on tiny random models of each family: packed, chunked, cached, batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from adapters.weights import LoraWeights, LowRank
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch
from server.kernels import choose
from server.model.attention import Context, PackedAttention
from server.model.config import from_hf
from server.model.decoder import Decoder
from server.model.quantization import quantize
from tests.server.kernels.tiny import Tiny

TOLERANCE = 1e-4
BLOCK = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "smollm2": (
        "Llama",
        {"tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {}),
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
}


def build(family: str, kernels: str = "reference", **extra: Any) -> tuple[nn.Module, Tiny]:
    """A random Transformers model of that family and the base of its tensors."""
    name, own = FAMILIES[family]
    settings = SHAPE | {"tie_word_embeddings": False} | own | extra
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    ours = from_hf(config.to_dict() | {"architectures": [f"{name}ForCausalLM"]})
    backend, state = choose(kernels), model.state_dict()
    weights = {
        path: backend.pack(quantize(state[f"{path}.weight"], "none"))
        for path in (ours.linear_shapes() | ours.table_shapes())
    }
    return model, Tiny(ours, weights, {name: state[name] for name in ours.tensor_shapes()}, backend)


def expected(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + 5 * (i + 1) for i in range(count)]
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def packed(base: Tiny, sequences: list[list[int]]) -> list[torch.Tensor]:
    decoder, attention = Decoder(base), PackedAttention([len(ids) for ids in sequences])
    with torch.no_grad():
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        logits = decoder.logits(decoder(decoder.embed(ids), Context(attention.positions, attention)))
    return list(logits.split(attention.lengths))


class Cached:
    """Drives a runner as an engine would: sequences with their blocks, any number of new tokens each."""

    def __init__(self, base: Tiny, mixes: list[tuple[tuple[int, float], ...]], slots: int = 16) -> None:
        self.runner = TorchRunner(base, slots, threads=1)
        self.runner.allocate(len(mixes) * 16, BLOCK)
        self.mixes = mixes
        self.done = [0] * len(mixes)

    def step(self, new: dict[int, list[int]]) -> torch.Tensor:
        """Logits of every new token, sequence after sequence in the order of `new`."""
        rows, positions, starts, context = [], [], [0], []
        blocks = np.full((len(new), 16), -1, np.int32)
        for i, (s, tokens) in enumerate(new.items()):
            rows += tokens
            positions += range(self.done[s], self.done[s] + len(tokens))
            self.done[s] += len(tokens)
            starts.append(len(rows))
            context.append(self.done[s])
            used = -(-self.done[s] // BLOCK)
            # Blocks of neighbouring sequences are interleaved and descending: nothing may rely on their order.
            blocks[i, :used] = [(15 - b) * len(self.mixes) + s for b in range(used)]
        return self.runner.run(
            Batch(
                tokens=np.array(rows),
                positions=np.array(positions),
                row_start=np.array(starts, np.int32),
                context=np.array(context, np.int32),
                blocks=blocks,
                logit_rows=np.arange(len(rows)),
                mixes=tuple(self.mixes[s] for s in new),
            )
        ).rows


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_transformers(family: str) -> None:
    model, base = build(family)
    sequences = prompts(4)
    for ids, logits in zip(sequences, packed(base, sequences), strict=True):
        torch.testing.assert_close(logits, expected(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_logits_equal_transformers(family: str) -> None:
    model, base = build(family)
    sequences = prompts(4, seed=1)
    cached = Cached(base, [()] * 4)
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    chunks = [1, 3, 7, 5]  # how many tokens each takes at a time: decode rows beside prefill chunks
    while any(cached.done[s] < len(ids) for s, ids in enumerate(sequences)):
        new = {
            s: ids[cached.done[s] : cached.done[s] + chunks[s]]
            for s, ids in enumerate(sequences)
            if cached.done[s] < len(ids)
        }
        logits = cached.step(new)
        for s, part in zip(new, logits.split([len(tokens) for tokens in new.values()]), strict=True):
            got[s].append(part)
    for ids, parts in zip(sequences, got, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings_equal_transformers(scaling: str) -> None:
    rope = SCALINGS[scaling] | {"rope_theta": 10000.0}
    model, base = build("llama", rope_parameters=rope)
    ids = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    [logits] = packed(base, [ids])
    torch.testing.assert_close(logits, expected(model, ids), atol=TOLERANCE, rtol=0)


def random_adapter(base: Tiny, seed: int, rank: int, targets: tuple[str, ...], only: int | None = None) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (out, width) in base.config.linear_shapes().items():
        if path.rsplit(".", 1)[-1] in targets and (only is None or f".{only}." in path):
            a = torch.randn(rank, width, generator=generator) * 0.1
            b = torch.randn(out, rank, generator=generator) * 0.1
            modules[path] = LowRank(a, b, 1.0 + 0.25 * seed)
    return base.prepare(LoraWeights(f"a{seed}", f"{seed:064x}", modules))


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIXES: list[tuple[tuple[int, float], ...]] = [
    (),
    ((0, 1.0),),
    ((0, 0.5), (1, 0.5)),
    ((2, -1.0),),
    ((0, 0.3), (1, -0.7), (2, 1.9), (3, 0.25)),
    ((3, 2.0),),
    ((0, 1.0),),
]


def merged(
    model: nn.Module, adapters: list[LoraWeights], mix: tuple[tuple[int, float], ...], ids: list[int]
) -> torch.Tensor:
    """Logits of the model with W + sum of weight * scale * B A in place of W."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for slot, weight in mix:
        for path in adapters[slot].modules:
            state[f"{path}.weight"] += weight * adapters[slot].delta(path)
    with torch.no_grad():
        return torch.func.functional_call(model, state, (torch.tensor([ids]),)).logits[0]


def four_adapters(base: Tiny) -> list[LoraWeights]:
    return [
        random_adapter(base, 1, 8, ("q_proj", "v_proj")),
        random_adapter(base, 2, 3, ALL),
        random_adapter(base, 3, 16, ("o_proj", "down_proj"), only=2),
        random_adapter(base, 4, 1, ("gate_proj", "k_proj")),
    ]


def test_each_sequence_uses_its_own_mix() -> None:
    model, base = build("llama")
    adapters = four_adapters(base)
    cached = Cached(base, MIXES)
    for slot, adapter in enumerate(adapters):
        cached.runner.load_adapter(slot, adapter)
    sequences = prompts(len(MIXES), seed=5)
    first = cached.step({s: ids[:-2] for s, ids in enumerate(sequences)}).split([len(ids) - 2 for ids in sequences])
    second = cached.step({s: ids[-2:-1] for s, ids in enumerate(sequences)}).split(1)
    third = cached.step({s: ids[-1:] for s, ids in reversed(list(enumerate(sequences)))}).split(1)[::-1]
    for s, ids in enumerate(sequences):
        got = torch.cat((first[s], second[s], third[s]))
        torch.testing.assert_close(got, merged(model, adapters, MIXES[s], ids), atol=TOLERANCE, rtol=0)


def test_batched_mix_weights_equal_each_alone() -> None:
    model, base = build("llama")
    adapter = random_adapter(base, 2, 6, ALL)
    weights = [-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0]
    # The canonical mix drops zero weights, so weight 0 is the base alone.
    mixes: list[tuple[tuple[int, float], ...]] = [((0, w),) if w else () for w in weights]
    cached = Cached(base, [*mixes, ()])
    cached.runner.load_adapter(0, adapter)
    ids = prompts(3)[2]
    rows = cached.step(dict.fromkeys(range(len(weights) + 1), ids)).split(len(ids))
    assert torch.equal(rows[weights.index(0.0)], rows[-1])
    for mix, got in zip(mixes, rows, strict=False):
        torch.testing.assert_close(got, merged(model, [adapter], mix, ids), atol=TOLERANCE, rtol=0)
        alone = Cached(base, [mix])
        alone.runner.load_adapter(0, adapter)
        torch.testing.assert_close(alone.step({0: ids}), got, atol=TOLERANCE, rtol=0)


def test_stale_kv_blocks_are_cleared() -> None:
    """A row that overflows fills its blocks with NaN; their next owner and its neighbours do not see it."""
    _, base = build("llama")
    ids = prompts(3)[1]
    clean = Cached(base, [(), ()]).step({0: ids, 1: ids[:3]})
    huge = random_adapter(base, 1, 2, ("k_proj", "v_proj"))
    huge = LoraWeights("huge", "f" * 64, {p: LowRank(m.A * 1e30, m.B * 1e30, m.scale) for p, m in huge.modules.items()})
    cached = Cached(base, [((0, 1.0),), ()])
    cached.runner.load_adapter(0, huge)
    broken = cached.step({0: ids, 1: ids[:3]})
    assert not torch.isfinite(broken[: len(ids)]).all()
    torch.testing.assert_close(broken[len(ids) :], clean[len(ids) :], atol=TOLERANCE, rtol=0)
    cached.mixes, cached.done = [(), ()], [0, 0]
    torch.testing.assert_close(cached.step({0: ids, 1: ids[:3]}), clean, atol=TOLERANCE, rtol=0)
    after = cached.step({0: ids[:1], 1: ids[:1]})
    assert torch.isfinite(after).all()


def test_gradients_equal_transformers() -> None:
    model, base = build("qwen3")
    sequences = prompts(3)
    decoder, attention = Decoder(base), PackedAttention([len(ids) for ids in sequences])
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    embeddings = decoder.embed(ids).requires_grad_()
    logits = decoder.logits(decoder(embeddings, Context(attention.positions, attention)))
    probe = torch.randn(97, generator=torch.Generator().manual_seed(1))
    (logits.tanh() @ probe).sum().backward()
    assert embeddings.grad is not None
    for sequence, grad in zip(sequences, embeddings.grad.split(attention.lengths), strict=True):
        theirs = model.get_input_embeddings()(torch.tensor([sequence])).detach().requires_grad_()
        (model(inputs_embeds=theirs).logits.tanh() @ probe).sum().backward()
        torch.testing.assert_close(grad, theirs.grad[0], atol=1e-3, rtol=1e-3)
