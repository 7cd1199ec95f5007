// Checks whether the kernels can run here. Uses integer instructions only, whatever the other files are compiled for.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Also requests permission for AMX tiles, which a process must do before its threads use them.
extern "C" const char* loramux_unsupported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__AVX512VNNI__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return "the processor has no AVX-512 (F, BW, DQ, VL)";
  if (!__builtin_cpu_supports("avx512vnni")) return "the processor has no AVX512-VNNI";
#else
  if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
  if (!__builtin_cpu_supports("fma")) return "the processor has no FMA";
  if (!__builtin_cpu_supports("bmi2")) return "the processor has no BMI2";
  unsigned cpuid[4] = {};  // AVX2 support implies that the system saves the registers
  if (!__get_cpuid(1, cpuid, cpuid + 1, cpuid + 2, cpuid + 3) || !(cpuid[2] >> 29 & 1))
    return "the processor has no F16C";
#if defined(__AVXVNNI__)
  if (!__get_cpuid_count(7, 1, cpuid, cpuid + 1, cpuid + 2, cpuid + 3) || !(cpuid[0] >> 4 & 1))
    return "the processor has no AVX-VNNI";
#endif
#endif
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return "the processor has no AVX512-BF16";
#endif
#if defined(__AMX_INT8__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1) ||
      !(d >> 22 & 1))  // tiles, INT8, BF16
    return "the processor has no AMX-INT8 and AMX-BF16";
  if (!(c >> 6 & 1)) return "the processor has no AVX512-VBMI2";
  constexpr int PERMISSION = 0x1023, TILES = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, PERMISSION, TILES) != 0) return "the system does not let this process use AMX";
#endif
  return nullptr;
#else
  return "the processor is not an x86-64";
#endif
}

// The instruction sets of this build.
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

// The digest of the sources of this build (source_digest.py). A checkout may have changed since.
extern "C" const char* loramux_sources() { return LORAMUX_SOURCES; }
