/* What the C files share. They know nothing of Python or torch: arrays, sizes, and a range of the work.

   Every function works on the items from `first` up to `end` and writes only what belongs to them, so that the caller may give
   disjoint ranges to as many threads as it likes; results do not depend on how the work was cut. */
#ifndef MASKSET_H
#define MASKSET_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* A checksum of all signatures and structures, which tests/kernels/test_checks.py computes. */
#define SIGNATURES 0x352fa617

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

/* Compiled once for each generation of processors; the loader takes the best that the machine has. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(PLAIN)
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif

/* Where a file says EXACT, a product and the sum it goes into are rounded one after the other, as PyTorch does. */
#if defined(__clang__)
#define EXACT _Pragma("clang fp contract(off)")
#elif defined(__GNUC__)
#define EXACT _Pragma("GCC optimize(\"fp-contract=off\")")
#else
#define EXACT
#endif

#endif
