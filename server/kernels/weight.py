"""`Weight`: a matrix of the base model, stored or packed by a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

STORED = "stored"


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] in one of four schemes and one of several layouts.

    Schemes: `int4` (w = code * scale + zero, code 0..15), `nf4` (w = table[code] * scale), `int8`
    (w = code * scale, code -127..127), `none` (bfloat16, float16 or float32).

    The `stored` layout, the only one that is exchanged between backends, has these tensors:
      codes      uint8 [out, in/2] for int4 and nf4: column 2i in the low nibble, 2i+1 in the high one;
                 int8 [out, in] for int8; the values themselves [out, in] for none
      scale      float16 [out, in/group]            zero   float16 [out, in/group] (int4 only)
    or, double-quantized, for each of `scale` and `zero` (here s):
      s_codes    uint8 [out, in/group]
      s_step, s_base  float32 [ceil(out/16), ceil(in/group/16)], one pair per tile of 16 rows by 16 groups:
                 s = float16(s_codes * s_step + s_base), with product and sum rounded to float32 separately.

    Other layouts belong to one backend each. Its `dequantize` returns exactly the values of the stored form.
    """

    scheme: str
    layout: str
    shape: tuple[int, int]
    group: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def double_quantized(self) -> bool:
        return "scale_codes" in self.tensors
