/* Included once for each type of numbers, REAL. A cell has S = heads * points samples, s = head * points + point.

   mixing: [instance][channel, and one more for the bias][x, y, score][S], from a query to the samples' positions and scores.
   output: [instance][channel, and one more for the bias], from the attended values to the logit. */

typedef struct {
    const REAL *features, *values;     /* [cell][channel]; of the queries and, zero on padding, of the samples */
    const REAL *rows, *columns;        /* position encodings, [instance][0 padding, 1 image][row or column][channels / 2] */
    const uint8_t *row_in, *column_in; /* whether a row or column is inside the image */
    const REAL *mixing, *output;
} NAME(Inputs);

/* The samples of one cell: s = head * points + point. */
typedef struct {
    REAL query[LIMIT + 1], weight[LIMIT], dx[LIMIT], dy[LIMIT], inside[4][LIMIT];
    int32_t at[4][LIMIT]; /* offset of the first channel of the sample's head: cells above left and right, then below */
    REAL attended[LIMIT]; /* [channel] */
} NAME(Samples);

/* Compute the query of a cell: features plus position encoding, and 1 for the bias. */
INLINE void NAME(compute_query)(NAME(Samples) * samples, const NAME(Inputs) * in, const Sizes *sizes, ptrdiff_t channels,
                                ptrdiff_t instance, ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t half = channels / 2, cell = row * sizes->width + column;
    const REAL *from_row = in->rows + ((instance * 2 + (in->column_in[column] != 0)) * sizes->height + row) * half;
    const REAL *from_column = in->columns + ((instance * 2 + (in->row_in[row] != 0)) * sizes->width + column) * half;
    for (ptrdiff_t c = 0; c < half; c++) {
        samples->query[c] = in->features[cell * channels + c] + from_row[c];
        samples->query[half + c] = in->features[cell * channels + half + c] + from_column[c];
    }
    samples->query[channels] = 1;
}

/* Return the position limited to -2 ... length + 1, beyond which every sample is zero; NaN gives -2. */
INLINE REAL NAME(limited)(REAL position, ptrdiff_t length) {
    REAL low = position > -2 ? position : -2, high = (REAL)length + 1;
    return low < high ? low : high;
}

/* Store the four cells around each sample at x, y, and the distance from the first one. */
INLINE void NAME(locate)(NAME(Samples) * samples, const REAL *x, const REAL *y, const Sizes *sizes, ptrdiff_t channels,
                         ptrdiff_t heads, ptrdiff_t points) {
    int32_t wide = (int32_t)sizes->width, high = (int32_t)sizes->height, apart = (int32_t)channels;
    for (ptrdiff_t s = 0; s < heads * points; s++) {
        REAL px = NAME(limited)(x[s], wide), py = NAME(limited)(y[s], high);
        int32_t left = (int32_t)(px + 2) - 2, top = (int32_t)(py + 2) - 2; /* floor: both sums are 0 or more */
        samples->dx[s] = px - (REAL)left, samples->dy[s] = py - (REAL)top;
        REAL in_left = left >= 0 && left < wide, in_right = left >= -1 && left < wide - 1;
        REAL in_top = top >= 0 && top < high, in_bottom = top >= -1 && top < high - 1;
        samples->inside[0][s] = in_left * in_top, samples->inside[1][s] = in_right * in_top;
        samples->inside[2][s] = in_left * in_bottom, samples->inside[3][s] = in_right * in_bottom;
        int32_t x0 = left < 0 ? 0 : left < wide ? left : wide - 1, x1 = left < -1 ? 0 : left < wide - 1 ? left + 1 : wide - 1;
        int32_t y0 = top < 0 ? 0 : top < high ? top : high - 1, y1 = top < -1 ? 0 : top < high - 1 ? top + 1 : high - 1;
        int32_t first = (int32_t)(s / points * (channels / heads));
        samples->at[0][s] = (y0 * wide + x0) * apart + first, samples->at[1][s] = (y0 * wide + x1) * apart + first;
        samples->at[2][s] = (y1 * wide + x0) * apart + first, samples->at[3][s] = (y1 * wide + x1) * apart + first;
    }
}

/* Turn the scores into weights that sum to 1 for each head. */
INLINE void NAME(softmax)(REAL *score, ptrdiff_t heads, ptrdiff_t points) {
    REAL head_values[LIMIT];
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL largest = score[m * points];
        for (ptrdiff_t k = 1; k < points; k++) largest = score[m * points + k] > largest ? score[m * points + k] : largest;
        for (ptrdiff_t k = 0; k < points; k++) head_values[m * points + k] = largest;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] = NAME(exp)(score[s] - head_values[s]);
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL sum = 0;
        for (ptrdiff_t k = 0; k < points; k++) sum += score[m * points + k];
        for (ptrdiff_t k = 0; k < points; k++) head_values[m * points + k] = sum;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] /= head_values[s];
}

/* Compute query, samples and attended values of a cell. */
INLINE void NAME(attend)(NAME(Samples) * samples, const NAME(Inputs) * in, const Sizes *sizes, ptrdiff_t channels,
                         ptrdiff_t heads, ptrdiff_t points, ptrdiff_t instance, ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t count = heads * points, per_head = channels / heads;
    const REAL *mixing = in->mixing + instance * (channels + 1) * 3 * count;
    REAL x[LIMIT], y[LIMIT];
    NAME(compute_query)(samples, in, sizes, channels, instance, row, column);
    for (ptrdiff_t s = 0; s < count; s++) x[s] = (REAL)column, y[s] = (REAL)row, samples->weight[s] = 0;
    for (ptrdiff_t c = 0; c <= channels; c++, mixing += 3 * count)
        for (ptrdiff_t s = 0; s < count; s++) {
            x[s] += samples->query[c] * mixing[s], y[s] += samples->query[c] * mixing[count + s];
            samples->weight[s] += samples->query[c] * mixing[2 * count + s];
        }
    NAME(softmax)(samples->weight, heads, points);
    NAME(locate)(samples, x, y, sizes, channels, heads, points);
    for (ptrdiff_t s = 0; s < count; s++) /* a NaN in the positions must reach the loss */
        if (x[s] != x[s] || y[s] != y[s]) samples->weight[s] = NAN;
    for (ptrdiff_t d = 0; d < per_head; d++) {
        REAL sampled[LIMIT];
        const REAL *v = in->values + d;
#pragma omp simd
        for (ptrdiff_t s = 0; s < count; s++) {
            REAL dx = samples->dx[s], dy = samples->dy[s];
            REAL left = (1 - dy) * samples->inside[0][s] * v[samples->at[0][s]] +
                        dy * samples->inside[2][s] * v[samples->at[2][s]];
            REAL right = (1 - dy) * samples->inside[1][s] * v[samples->at[1][s]] +
                         dy * samples->inside[3][s] * v[samples->at[3][s]];
            sampled[s] = samples->weight[s] * ((1 - dx) * left + dx * right);
        }
        for (ptrdiff_t m = 0; m < heads; m++) {
            REAL sum = 0;
            for (ptrdiff_t k = 0; k < points; k++) sum += sampled[m * points + k];
            samples->attended[m * per_head + d] = sum;
        }
    }
}

/* Arrays that gradients are added to. */
typedef struct {
    REAL *features, *values, *mixing, *output;
} NAME(Gradients);

/* Add the gradients of one cell's logit. */
INLINE void NAME(differentiate)(const NAME(Samples) * samples, const NAME(Inputs) * in, const NAME(Gradients) * to, REAL grad,
                                ptrdiff_t channels, ptrdiff_t heads, ptrdiff_t points, ptrdiff_t instance, ptrdiff_t cell) {
    ptrdiff_t count = heads * points, per_head = channels / heads, row = 3 * count;
    const REAL *output = in->output + instance * (channels + 1), *mixing = in->mixing + instance * (channels + 1) * row;
    REAL grad_attended[LIMIT], grad_mixing[3 * LIMIT]; /* x, y, score */
    for (ptrdiff_t c = 0; c < channels; c++) {
        to->output[c] += samples->attended[c] > 0 ? grad * samples->attended[c] : 0;
        grad_attended[c] = samples->attended[c] > 0 ? grad * output[c] : 0;
    }
    to->output[channels] += grad;
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL mean = 0; /* of the gradients of the weights, weighted by these: the softmax subtracts it */
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) {
            REAL dot[4], near_x[2] = {1 - samples->dx[s], samples->dx[s]}, near_y[2] = {1 - samples->dy[s], samples->dy[s]};
            for (int corner = 0; corner < 4; corner++) {
                const REAL *v = in->values + samples->at[corner][s], *g = grad_attended + m * per_head;
                REAL *add = to->values + samples->at[corner][s], sum = 0, here = samples->inside[corner][s];
                REAL share = here * samples->weight[s] * near_x[corner & 1] * near_y[corner >> 1];
                for (ptrdiff_t d = 0; d < per_head; d++) sum += v[d] * g[d], add[d] += share * g[d];
                dot[corner] = here * sum;
            }
            grad_mixing[s] = samples->weight[s] * (near_y[0] * (dot[1] - dot[0]) + near_y[1] * (dot[3] - dot[2]));
            grad_mixing[count + s] = samples->weight[s] * (near_x[0] * (dot[2] - dot[0]) + near_x[1] * (dot[3] - dot[1]));
            REAL grad_weight = near_y[0] * (near_x[0] * dot[0] + near_x[1] * dot[1]) +
                             near_y[1] * (near_x[0] * dot[2] + near_x[1] * dot[3]);
            grad_mixing[2 * count + s] = samples->weight[s] * grad_weight;
            mean += grad_mixing[2 * count + s];
        }
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) grad_mixing[2 * count + s] -= samples->weight[s] * mean;
    }
    for (ptrdiff_t c = 0; c <= channels; c++) {
        REAL sum = 0, q = samples->query[c], *add = to->mixing + c * row;
        const REAL *mix = mixing + c * row;
#pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = 0; i < row; i++) sum += grad_mixing[i] * mix[i], add[i] += grad_mixing[i] * q;
        if (c < channels) to->features[cell * channels + c] += sum;
    }
}

/* Do `call(channels, heads, points)` with compile-time constants for the published setting. */
#define WITH_CONSTANTS(sizes, call)                                                      \
    if (sizes->channels == 8 && sizes->heads == 4 && sizes->points == 4) call(8, 4, 4); \
    else call(sizes->channels, sizes->heads, sizes->points);

/* Write logits [instance][row][column]. Items are the instances. */
FAST EXPORT void NAME(instance_transformer)(const NAME(Inputs) * in, REAL *logits, const Sizes *sizes, ptrdiff_t first,
                                            ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const REAL *output = in->output + i * (sizes->channels + 1);
        for (ptrdiff_t row = 0; row < sizes->height; row++)
            for (ptrdiff_t column = 0; column < sizes->width; column++) {
                NAME(Samples) samples;
#define ATTEND(channels, heads, points) NAME(attend)(&samples, in, sizes, channels, heads, points, i, row, column)
                WITH_CONSTANTS(sizes, ATTEND)
                REAL sum = output[sizes->channels];
                for (ptrdiff_t c = 0; c < sizes->channels; c++) {
                    REAL x = samples.attended[c];
                    sum += output[c] * (x > 0 || x != x ? x : 0); /* ReLU; NaN stays */
                }
                logits[(i * sizes->height + row) * sizes->width + column] = sum;
            }
    }
}

/* Add to the gradients, which are zero before. Those of mixing and output have their shapes; those of features and values have one
   copy [cell][channel] per item. Items are `groups` groups of instances, so that sums do not depend on the number of threads. */
FAST EXPORT void NAME(instance_transformer_backward)(const NAME(Inputs) * in, const REAL *grad, const NAME(Gradients) * all,
                                                     ptrdiff_t groups, const Sizes *sizes, ptrdiff_t first, ptrdiff_t end) {
    ptrdiff_t cells = sizes->height * sizes->width, mixing = (sizes->channels + 1) * 3 * sizes->heads * sizes->points;
    for (ptrdiff_t group = first; group < end; group++) {
        ptrdiff_t offset = group * cells * sizes->channels;
        NAME(Gradients) to = {all->features + offset, all->values + offset, 0, 0};
        for (ptrdiff_t i = sizes->instances * group / groups; i < sizes->instances * (group + 1) / groups; i++) {
            to.mixing = all->mixing + i * mixing, to.output = all->output + i * (sizes->channels + 1);
            for (ptrdiff_t cell = 0; cell < cells; cell++) {
                NAME(Samples) samples;
                ptrdiff_t row = cell / sizes->width, column = cell % sizes->width;
                WITH_CONSTANTS(sizes, ATTEND)
#define DIFFERENTIATE(channels, heads, points) \
    NAME(differentiate)(&samples, in, &to, grad[i * cells + cell], channels, heads, points, i, cell)
                WITH_CONSTANTS(sizes, DIFFERENTIATE)
            }
        }
    }
}
#undef ATTEND
#undef DIFFERENTIATE
#undef WITH_CONSTANTS
