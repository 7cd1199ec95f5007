// The instruction set that the build targets; setup.py passes the compiler flags. Included by every file but
// cpu_probe.cpp.
#pragma once
#include <immintrin.h>

#ifndef __AVX512VNNI__
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "the kernels are written for AVX512 with VNNI, or AVX2 with FMA and F16C; see setup.py for the flags"
#endif
#include "avx2_compat.h"
#endif

namespace loramux {

// AMX, for int8 and bf16; see amx_gemm.h and amx_attention.h.
#ifdef __AMX_INT8__
constexpr bool HAS_AMX = true;
#else
constexpr bool HAS_AMX = false;
#endif

// 512-bit vectors; otherwise see avx2_compat.h.
#ifdef __AVX512VNNI__
constexpr bool HAS_AVX512 = true;
#else
constexpr bool HAS_AVX512 = false;
#endif

// vpdpbusd.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif

}  // namespace loramux
