// >>cpu_level: which instructions this machine has

/* Also asks whether the system saves the wide registers; __builtin_cpu_supports does. */
static fqla_cpu_level fqla__cpu_best_level(void) {
#if FLASHQLA__X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return FQLA_CPU_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FQLA_CPU_AVX2;
#endif
    return FQLA_CPU_PLAIN;
}

static const char *fqla__cpu_level_name(fqla_cpu_level level) {
    return level == FQLA_CPU_AVX512 ? "avx512" : level == FQLA_CPU_AVX2 ? "avx2" : "plain";
}
