// The instruction set of the kernels, which setup.py asks the compiler for. Included by every file but probe.cpp.
#pragma once
#if !defined(__AVX512VNNI__)
#error "the kernels are written for AVX512 with VNNI; see setup.py for the flags"
#endif
#include <immintrin.h>
