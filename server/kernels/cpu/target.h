// The instruction set of the kernels, which setup.py asks the compiler for. Included by every file but cpu_probe.cpp.
#pragma once
#include <immintrin.h>

#ifndef __AVX512VNNI__
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the kernels are written for AVX512 with VNNI, or AVX2 with FMA and F16C; see setup.py for the flags"
#endif
#include "avx2_compat.h"
#endif

namespace loramux {

// Whether there is a matrix unit, for products of codes and of bf16; see amx_gemm.h and amx_attention.h.
#ifdef __AMX_INT8__
constexpr bool MATRIX_UNIT = true;
#else
constexpr bool MATRIX_UNIT = false;
#endif

// Whether vectors of 512 bits are the processor's own; see avx2_compat.h.
#ifdef __AVX512VNNI__
constexpr bool WHOLE_VECTORS = true;
#else
constexpr bool WHOLE_VECTORS = false;
#endif

// Whether products of bytes are instructions.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool BYTE_PRODUCTS = true;
#else
constexpr bool BYTE_PRODUCTS = false;
#endif

}  // namespace loramux
