"""`Weight`: one matrix of the base, as it is stored or as a backend has packed it.

Owns the vocabulary of layouts. Does not know how to quantize (model/quantization.py) or multiply (the backends).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

STORED = "stored"


@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] in one of four schemes and one of several layouts.

    Schemes: `int4` (w = code * scale + zero, code 0..15), `nf4` (w = table[code] * scale), `int8`
    (w = code * scale, code -127..127), `none` (bfloat16 or float16 or float32 as it is).

    The `stored` layout, the only one that is ever written for others to read, has these tensors:
      codes      uint8 [out, in/2] for int4 and nf4: column 2i in the low nibble, 2i+1 in the high one;
                 int8 [out, in] for int8; the values themselves [out, in] for none
      scale      float16 [out, in/group]            zero   float16 [out, in/group] (int4 only)
    or, double-quantized, for each of `scale` and `zero` (call it s):
      s_codes    uint8 [out, in/group]
      s_step, s_base  float32 [ceil(out/16), ceil(in/group/16)], one pair for a tile of 16 rows by 16 groups:
                 s = float16(s_codes * s_step + s_base), the product and the sum rounded to float32 one by one.

    Any other layout is a backend's own; its `dequantize` gives back exactly the values of the stored form.
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
