/* Included once for each type of numbers, REAL. A head's cells lie `heads * width` numbers apart. */

/* Where a sample lies between four cells: 0 left above, 1 right above, 2 left below, 3 right below. */
typedef struct {
    ptrdiff_t cell[4]; /* index of each cell within all levels; undefined where it is not inside */
    int inside[4];
    REAL dx, dy; /* distance to the right of and below cell 0 */
} NAME(Sample);

/* Return whether a sample at x, y reads any cell of the level. Coordinates are in cells; 0 is the center of the first one. */
INLINE int NAME(locate)(NAME(Sample) * s, REAL x, REAL y, ptrdiff_t height, ptrdiff_t width, ptrdiff_t start) {
    if (!(x > -1 && y > -1 && x < (REAL)width && y < (REAL)height)) return 0;
    ptrdiff_t left = (ptrdiff_t)(x + 1) - 1, top = (ptrdiff_t)(y + 1) - 1; /* floor, since both sums are positive */
    if ((REAL)left > x) left--; /* where x + 1 was rounded up */
    if ((REAL)top > y) top--;
    s->dx = x - (REAL)left;
    s->dy = y - (REAL)top;
    int in_left = left >= 0, in_right = left + 1 < width, in_top = top >= 0, in_bottom = top + 1 < height;
    ptrdiff_t cell = start + top * width + left;
    s->cell[0] = cell, s->cell[1] = cell + 1, s->cell[2] = cell + width, s->cell[3] = cell + width + 1;
    s->inside[0] = in_left && in_top, s->inside[1] = in_right && in_top;
    s->inside[2] = in_left && in_bottom, s->inside[3] = in_right && in_bottom;
    return 1;
}

INLINE REAL NAME(corner_weight)(const NAME(Sample) * s, int corner) {
    return (corner & 1 ? s->dx : 1 - s->dx) * (corner & 2 ? s->dy : 1 - s->dy);
}

/* Write the output of one query and head, of at most MAX_CHANNELS channels. */
INLINE void NAME(attend)(const REAL *value, const REAL *locations, const REAL *weights, REAL *out, const Sizes *sizes,
                         ptrdiff_t width) {
    REAL sum[MAX_CHANNELS] = {0}; /* in registers if the width is a compile-time constant */
    ptrdiff_t start = 0, apart = sizes->heads * sizes->width;
    for (ptrdiff_t level = 0; level < sizes->levels; level++) {
        ptrdiff_t high = sizes->shapes[2 * level], wide = sizes->shapes[2 * level + 1];
        for (ptrdiff_t p = 0; p < sizes->points; p++, locations += 2, weights++) {
            NAME(Sample) s;
            REAL x = locations[0] * (REAL)wide - (REAL)0.5, y = locations[1] * (REAL)high - (REAL)0.5, a = *weights;
            if (!NAME(locate)(&s, x, y, high, wide, start)) {
                if (isnan(x) || isnan(y)) /* a NaN in the locations must reach the loss */
                    for (ptrdiff_t d = 0; d < width; d++) sum[d] = NAN;
                continue;
            }
            if (s.inside[0] && s.inside[3]) {
                const REAL *v = value + s.cell[0] * apart, *below = v + wide * apart;
                REAL w0 = NAME(corner_weight)(&s, 0) * a, w1 = NAME(corner_weight)(&s, 1) * a;
                REAL w2 = NAME(corner_weight)(&s, 2) * a, w3 = NAME(corner_weight)(&s, 3) * a;
                for (ptrdiff_t d = 0; d < width; d++)
                    sum[d] += (w0 * v[d] + w1 * v[apart + d]) + (w2 * below[d] + w3 * below[apart + d]);
                continue;
            }
            for (int corner = 0; corner < 4; corner++) {
                if (!s.inside[corner]) continue;
                const REAL *v = value + s.cell[corner] * apart;
                REAL w = NAME(corner_weight)(&s, corner) * a;
                for (ptrdiff_t d = 0; d < width; d++) sum[d] += w * v[d];
            }
        }
        start += high * wide;
    }
    for (ptrdiff_t d = 0; d < width; d++) out[d] = sum[d];
}

/* Add to the value's gradient, and write the gradients of the locations and weights, of one query and head. */
INLINE void NAME(differentiate)(const REAL *restrict value, const REAL *locations, const REAL *weights, const REAL *restrict grad,
                                REAL *restrict grad_value, REAL *grad_locations, REAL *grad_weights, const Sizes *sizes,
                                ptrdiff_t width) {
    ptrdiff_t start = 0, apart = sizes->heads * sizes->width;
    for (ptrdiff_t level = 0; level < sizes->levels; level++) {
        ptrdiff_t high = sizes->shapes[2 * level], wide = sizes->shapes[2 * level + 1];
        for (ptrdiff_t p = 0; p < sizes->points; p++, locations += 2, weights++, grad_locations += 2, grad_weights++) {
            NAME(Sample) s;
            REAL x = locations[0] * (REAL)wide - (REAL)0.5, y = locations[1] * (REAL)high - (REAL)0.5, a = *weights;
            grad_locations[0] = grad_locations[1] = *grad_weights = 0;
            if (!NAME(locate)(&s, x, y, high, wide, start)) {
                if (isnan(x) || isnan(y)) grad_locations[0] = grad_locations[1] = *grad_weights = NAN;
                continue;
            }
            REAL dot[4] = {0, 0, 0, 0}; /* product of each corner's value and the gradient */
            if (s.inside[0] && s.inside[3]) {
                const REAL *v = value + s.cell[0] * apart, *below = v + wide * apart;
                REAL *to = grad_value + s.cell[0] * apart, *to_below = to + wide * apart;
                REAL w0 = NAME(corner_weight)(&s, 0) * a, w1 = NAME(corner_weight)(&s, 1) * a;
                REAL w2 = NAME(corner_weight)(&s, 2) * a, w3 = NAME(corner_weight)(&s, 3) * a;
                REAL d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
                for (ptrdiff_t d = 0; d < width; d++) {
                    d0 += v[d] * grad[d], d1 += v[apart + d] * grad[d];
                    d2 += below[d] * grad[d], d3 += below[apart + d] * grad[d];
                }
#pragma omp simd
                for (ptrdiff_t d = 0; d < width; d++) {
                    to[d] += w0 * grad[d], to[apart + d] += w1 * grad[d];
                    to_below[d] += w2 * grad[d], to_below[apart + d] += w3 * grad[d];
                }
                dot[0] = d0, dot[1] = d1, dot[2] = d2, dot[3] = d3;
            } else {
                for (int corner = 0; corner < 4; corner++) {
                    if (!s.inside[corner]) continue;
                    const REAL *v = value + s.cell[corner] * apart;
                    REAL *to = grad_value + s.cell[corner] * apart, w = NAME(corner_weight)(&s, corner) * a, sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (ptrdiff_t d = 0; d < width; d++) sum += v[d] * grad[d];
#pragma omp simd
                    for (ptrdiff_t d = 0; d < width; d++) to[d] += w * grad[d];
                    dot[corner] = sum;
                }
            }
            REAL above = dot[0] + s.dx * (dot[1] - dot[0]), under = dot[2] + s.dx * (dot[3] - dot[2]);
            *grad_weights = above + s.dy * (under - above);
            grad_locations[0] = (REAL)wide * a * ((1 - s.dy) * (dot[1] - dot[0]) + s.dy * (dot[3] - dot[2]));
            grad_locations[1] = (REAL)high * a * (under - above);
        }
        start += high * wide;
    }
}

/* Do `call(channels)` with a compile-time constant for the usual numbers. */
#define WITH_CONSTANT(channels, call)                                                                                        \
    switch (channels) {                                                                                                   \
        case 2: call(2); break;                                                                                           \
        case 16: call(16); break;                                                                                         \
        case 32: call(32); break;                                                                                         \
        case 48: call(48); break;                                                                                         \
        case 64: call(64); break;                                                                                         \
        default: call(channels);                                                                                          \
    }

/* Write out [B Q M D] for value [B S M D], locations [B Q M L P 2], weights [B Q M L P]. Items are the B * Q queries. */
FAST EXPORT void NAME(deformable_attention)(const REAL *value, const REAL *locations, const REAL *weights, REAL *out,
                                            const Sizes *sizes, ptrdiff_t first, ptrdiff_t end) {
    ptrdiff_t samples = sizes->levels * sizes->points, per_image = sizes->cells * sizes->heads * sizes->width;
    for (ptrdiff_t row = first * sizes->heads; row < end * sizes->heads; row++) {
        const REAL *from = value + row / (sizes->heads * sizes->queries) * per_image + row % sizes->heads * sizes->width;
        for (ptrdiff_t d = 0; d < sizes->width; d += MAX_CHANNELS) {
            ptrdiff_t channels = sizes->width - d < MAX_CHANNELS ? sizes->width - d : MAX_CHANNELS;
#define ATTEND(known) \
    NAME(attend)(from + d, locations + 2 * samples * row, weights + samples * row, out + sizes->width * row + d, sizes, known)
            WITH_CONSTANT(channels, ATTEND)
#undef ATTEND
        }
    }
}

/* Add to grad_value, which is zero before, and write the other gradients. Items are the B * M heads, each with its own cells. */
FAST EXPORT void NAME(deformable_attention_backward)(const REAL *value, const REAL *locations, const REAL *weights,
                                                     const REAL *grad, REAL *grad_value, REAL *grad_locations, REAL *grad_weights,
                                                     const Sizes *sizes, ptrdiff_t first, ptrdiff_t end) {
    ptrdiff_t samples = sizes->levels * sizes->points, per_image = sizes->cells * sizes->heads * sizes->width;
    for (ptrdiff_t item = first; item < end; item++) {
        ptrdiff_t image = item / sizes->heads, head = item % sizes->heads, offset = image * per_image + head * sizes->width;
        for (ptrdiff_t query = 0; query < sizes->queries; query++) {
            ptrdiff_t row = (image * sizes->queries + query) * sizes->heads + head, at = samples * row;
#define DIFFERENTIATE(known)                                                                                             \
    NAME(differentiate)(value + offset, locations + 2 * at, weights + at, grad + sizes->width * row, grad_value + offset, \
                        grad_locations + 2 * at, grad_weights + at, sizes, known)
            WITH_CONSTANT(sizes->width, DIFFERENTIATE)
#undef DIFFERENTIATE
        }
    }
}
#undef WITH_CONSTANT
