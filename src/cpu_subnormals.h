// >>cpu_subnormals: numbers under 2^-126 are 0 while a task computes

/*
    Decays of a strong gate pass 2^-126 on their way to 0. What they multiply is lost beside everything else there, but an x86
    core takes over a hundred cycles for every operation on such a number: at g = -6 a token, 15 times as long for a whole backward.
*/
static unsigned fqla__subnormals_off(void) {
#if FLASHQLA__X86
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040u); /* results to zero, operands as zero */
    return mode;
#else
    return 0;
#endif
}

/* As they were for the caller. */
static void fqla__subnormals_restore(unsigned mode) {
#if FLASHQLA__X86
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}
