// Says whether the kernels can run here. Asks nothing of the machine but integers, whatever the rest is compiled for.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// AMX's tiles are asked for here: a process has to, once, before any of its threads uses them.
extern "C" const char* loramux_missing() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__AVX512VNNI__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return "the processor has no AVX-512 (F, BW, DQ, VL)";
  if (!__builtin_cpu_supports("avx512vnni")) return "the processor has no AVX512-VNNI";
#else
  if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
  if (!__builtin_cpu_supports("fma")) return "the processor has no FMA";
  if (!__builtin_cpu_supports("bmi2")) return "the processor has no BMI2";
  unsigned of[4] = {};  // what not all compilers know by name; whether the system keeps its registers, AVX2 has told
  if (!__get_cpuid(1, of, of + 1, of + 2, of + 3) || !(of[2] >> 29 & 1)) return "the processor has no F16C";
#if defined(__AVXVNNI__)
  if (!__get_cpuid_count(7, 1, of, of + 1, of + 2, of + 3) || !(of[0] >> 4 & 1)) return "the processor has no AVX-VNNI";
#endif
#endif
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return "the processor has no AVX512-BF16";
#endif
#if defined(__AMX_INT8__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1) || !(d >> 22 & 1))  // tiles, INT8, BF16
    return "the processor has no AMX-INT8 and AMX-BF16";
  if (!(c >> 6 & 1)) return "the processor has no AVX512-VBMI2";
  constexpr int PERMISSION = 0x1023, TILES = 18;  // Linux: ARCH_REQ_XCOMP_PERM, and the state of AMX's tiles
  if (syscall(SYS_arch_prctl, PERMISSION, TILES) != 0) return "the system does not let this process use AMX";
#endif
  return nullptr;
#else
  return "the processor is not an x86-64";
#endif
}

// What they are compiled for, in the words that people know.
extern "C" const char* loramux_instructions() {
#if defined(__AMX_INT8__)
  return "AMX-INT8, AMX-BF16, AVX512-VNNI, AVX512-BF16";
#elif defined(__AVX512BF16__)
  return "AVX512-VNNI, AVX512-BF16";
#elif defined(__AVX512VNNI__)
  return "AVX512-VNNI";
#elif defined(__AVXVNNI__)
  return "AVX2, AVX-VNNI";
#else
  return "AVX2";
#endif
}

// The sources that it was built from, as sources.py tells them: a checkout may have moved on since.
extern "C" const char* loramux_sources() { return LORAMUX_SOURCES; }
