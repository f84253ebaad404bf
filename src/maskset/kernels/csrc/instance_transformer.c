/* SOIT's instance-aware transformer: one pass over the cells for each instance, without intermediate results.
   The plain version is maskset/masks/heads/instance_transformer.py. */
#include <string.h>

#include "maskset.h"

#define LIMIT 32 /* of the channels, and of heads * points */

typedef struct {
    ptrdiff_t instances, height, width, channels, heads, points;
} Sizes;

/* e to the power of x, for x <= 0, to the last bit or two: simple enough for the compiler to compute many at once. */
INLINE float exp_f32(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the last bits now hold the nearest whole power of two */
    float whole = shifted - 12582912.0f, r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float series = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

INLINE double exp_f64(double x) { return exp(x); }

#define REAL float
#define NAME(name) name##_f32
#include "instance_transformer_body.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_f64
#include "instance_transformer_body.h"
