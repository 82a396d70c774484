// >>system: what the implementation takes from outside: libc, threads, and intrinsics where the compiler has them

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#endif

/* AVX2 and AVX-512 code needs intrinsics and target attributes: gcc, clang and mingw on x86-64. tcc has neither. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__TINYC__)
#define FLASHQLA__X86 1
#include <immintrin.h>
#else
#define FLASHQLA__X86 0
#endif

/* NVIDIA's driver is a library of 64 bits. */
#if UINTPTR_MAX <= 0xffffffffu && !defined(FLASHQLA_NO_CUDA)
#define FLASHQLA_NO_CUDA
#endif

#if !defined(FLASHQLA_MALLOC) && !defined(FLASHQLA_FREE)
#define FLASHQLA_MALLOC(bytes) malloc(bytes)
#define FLASHQLA_FREE(pointer) free(pointer)
#elif !defined(FLASHQLA_MALLOC) || !defined(FLASHQLA_FREE)
#error "flashqla.h: define FLASHQLA_MALLOC and FLASHQLA_FREE both or neither"
#endif
