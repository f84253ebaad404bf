/* Definitions that all C files share. The files do not depend on Python or torch, only on arrays, sizes and ranges.

   Every function processes the items from `first` up to `end` and writes only their results, so that the caller can give disjoint
   ranges to any number of threads; results do not depend on the ranges. Callers check shapes and ranges before (Python does). */
#ifndef MASKSET_H
#define MASKSET_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* A checksum of all signatures and structures, which tests/kernels/test_checks.py computes. */
#define SIGNATURES 0x0b1f8bb2

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Compiled once for each generation of processors; the dynamic loader selects the best for the machine. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(PLAIN)
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif

/* In a file with EXACT, a product is rounded before it is added, as in PyTorch. */
#if defined(__clang__)
#define EXACT _Pragma("clang fp contract(off)")
#elif defined(__GNUC__)
#define EXACT _Pragma("GCC optimize(\"fp-contract=off\")")
#else
#define EXACT
#endif

#endif
