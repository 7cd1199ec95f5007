// The instruction set of the kernels, which setup.py asks the compiler for. Included by every file but probe.cpp.
#pragma once
#if !defined(__AVX512VNNI__)
#error "the kernels are written for AVX512 with VNNI; see setup.py for the flags"
#endif
#include <immintrin.h>

namespace loramux {

// Whether there is a matrix unit, for products of codes and of bf16; see matrix_unit.h and attention_unit.h.
#ifdef __AMX_INT8__
constexpr bool MATRIX_UNIT = true;
#else
constexpr bool MATRIX_UNIT = false;
#endif

}  // namespace loramux
