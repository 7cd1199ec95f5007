// The instruction set of the kernels, named once. Included first by every file but probe.cpp, which must run anywhere.
#pragma once
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c,bmi2")
#include <immintrin.h>
