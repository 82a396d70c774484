// >>cpu_level: which instructions this machine has

#if FLASHQLA__X86
#include <cpuid.h>

/* Conversions from and to fp16: not among the names that every compiler's __builtin_cpu_supports knows. */
static bool fqla__cpu_has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

/* Also asks whether the system saves the wide registers; __builtin_cpu_supports does. */
static fqla_cpu_level fqla__cpu_best_level(void) {
#if FLASHQLA__X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && fqla__cpu_has_f16c())
        return __builtin_cpu_supports("avx512f") ? FQLA_CPU_AVX512 : FQLA_CPU_AVX2;
#endif
    return FQLA_CPU_PLAIN;
}

static const char *fqla__cpu_level_name(fqla_cpu_level level) {
    return level == FQLA_CPU_AVX512 ? "avx512" : level == FQLA_CPU_AVX2 ? "avx2" : "plain";
}
