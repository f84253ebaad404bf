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
INLINE void NAME(compute_query)(NAME(Samples) * l, const NAME(Inputs) * in, const Sizes *z, ptrdiff_t channels,
                                ptrdiff_t instance, ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t half = channels / 2, cell = row * z->width + column;
    const REAL *from_row = in->rows + ((instance * 2 + (in->column_in[column] != 0)) * z->height + row) * half;
    const REAL *from_column = in->columns + ((instance * 2 + (in->row_in[row] != 0)) * z->width + column) * half;
    for (ptrdiff_t c = 0; c < half; c++) {
        l->query[c] = in->features[cell * channels + c] + from_row[c];
        l->query[half + c] = in->features[cell * channels + half + c] + from_column[c];
    }
    l->query[channels] = 1;
}

/* Return the position limited to -2 ... length + 1, beyond which every sample is zero; NaN gives -2. */
INLINE REAL NAME(limited)(REAL position, ptrdiff_t length) {
    REAL low = position > -2 ? position : -2, high = (REAL)length + 1;
    return low < high ? low : high;
}

/* Store the four cells around each sample at x, y, and the distance from the first one. */
INLINE void NAME(locate)(NAME(Samples) * l, const REAL *x, const REAL *y, const Sizes *z, ptrdiff_t channels, ptrdiff_t heads,
                         ptrdiff_t points) {
    int32_t wide = (int32_t)z->width, high = (int32_t)z->height, apart = (int32_t)channels;
    for (ptrdiff_t s = 0; s < heads * points; s++) {
        REAL px = NAME(limited)(x[s], wide), py = NAME(limited)(y[s], high);
        int32_t left = (int32_t)(px + 2) - 2, top = (int32_t)(py + 2) - 2; /* floor: both sums are 0 or more */
        l->dx[s] = px - (REAL)left, l->dy[s] = py - (REAL)top;
        REAL in_left = left >= 0 && left < wide, in_right = left >= -1 && left < wide - 1;
        REAL in_top = top >= 0 && top < high, in_bottom = top >= -1 && top < high - 1;
        l->inside[0][s] = in_left * in_top, l->inside[1][s] = in_right * in_top;
        l->inside[2][s] = in_left * in_bottom, l->inside[3][s] = in_right * in_bottom;
        int32_t x0 = left < 0 ? 0 : left < wide ? left : wide - 1, x1 = left < -1 ? 0 : left < wide - 1 ? left + 1 : wide - 1;
        int32_t y0 = top < 0 ? 0 : top < high ? top : high - 1, y1 = top < -1 ? 0 : top < high - 1 ? top + 1 : high - 1;
        int32_t first = (int32_t)(s / points * (channels / heads));
        l->at[0][s] = (y0 * wide + x0) * apart + first, l->at[1][s] = (y0 * wide + x1) * apart + first;
        l->at[2][s] = (y1 * wide + x0) * apart + first, l->at[3][s] = (y1 * wide + x1) * apart + first;
    }
}

/* Turn the scores into weights that sum to 1 for each head. */
INLINE void NAME(softmax)(REAL *score, ptrdiff_t heads, ptrdiff_t points) {
    REAL of_head[LIMIT];
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL largest = score[m * points];
        for (ptrdiff_t k = 1; k < points; k++) largest = score[m * points + k] > largest ? score[m * points + k] : largest;
        for (ptrdiff_t k = 0; k < points; k++) of_head[m * points + k] = largest;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] = NAME(exp)(score[s] - of_head[s]);
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL sum = 0;
        for (ptrdiff_t k = 0; k < points; k++) sum += score[m * points + k];
        for (ptrdiff_t k = 0; k < points; k++) of_head[m * points + k] = sum;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] /= of_head[s];
}

/* Compute query, samples and attended values of a cell. */
INLINE void NAME(attend)(NAME(Samples) * l, const NAME(Inputs) * in, const Sizes *z, ptrdiff_t channels, ptrdiff_t heads,
                         ptrdiff_t points, ptrdiff_t instance, ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t samples = heads * points, per_head = channels / heads;
    const REAL *mixing = in->mixing + instance * (channels + 1) * 3 * samples;
    REAL x[LIMIT], y[LIMIT];
    NAME(compute_query)(l, in, z, channels, instance, row, column);
    for (ptrdiff_t s = 0; s < samples; s++) x[s] = (REAL)column, y[s] = (REAL)row, l->weight[s] = 0;
    for (ptrdiff_t c = 0; c <= channels; c++, mixing += 3 * samples)
        for (ptrdiff_t s = 0; s < samples; s++) {
            x[s] += l->query[c] * mixing[s], y[s] += l->query[c] * mixing[samples + s];
            l->weight[s] += l->query[c] * mixing[2 * samples + s];
        }
    NAME(softmax)(l->weight, heads, points);
    NAME(locate)(l, x, y, z, channels, heads, points);
    for (ptrdiff_t s = 0; s < samples; s++) /* a NaN in the positions must reach the loss */
        if (x[s] != x[s] || y[s] != y[s]) l->weight[s] = NAN;
    for (ptrdiff_t d = 0; d < per_head; d++) {
        REAL sampled[LIMIT];
        const REAL *v = in->values + d;
#pragma omp simd
        for (ptrdiff_t s = 0; s < samples; s++) {
            REAL left = (1 - l->dy[s]) * l->inside[0][s] * v[l->at[0][s]] + l->dy[s] * l->inside[2][s] * v[l->at[2][s]];
            REAL right = (1 - l->dy[s]) * l->inside[1][s] * v[l->at[1][s]] + l->dy[s] * l->inside[3][s] * v[l->at[3][s]];
            sampled[s] = l->weight[s] * ((1 - l->dx[s]) * left + l->dx[s] * right);
        }
        for (ptrdiff_t m = 0; m < heads; m++) {
            REAL sum = 0;
            for (ptrdiff_t k = 0; k < points; k++) sum += sampled[m * points + k];
            l->attended[m * per_head + d] = sum;
        }
    }
}

/* Arrays that gradients are added to. */
typedef struct {
    REAL *features, *values, *mixing, *output;
} NAME(Gradients);

/* Add the gradients of one cell's logit. */
INLINE void NAME(differentiate)(const NAME(Samples) * l, const NAME(Inputs) * in, const NAME(Gradients) * to, REAL grad,
                                ptrdiff_t channels, ptrdiff_t heads, ptrdiff_t points, ptrdiff_t instance, ptrdiff_t cell) {
    ptrdiff_t samples = heads * points, per_head = channels / heads, row = 3 * samples;
    const REAL *output = in->output + instance * (channels + 1), *mixing = in->mixing + instance * (channels + 1) * row;
    REAL of_attended[LIMIT], of_mix[3 * LIMIT]; /* x, y, score */
    for (ptrdiff_t c = 0; c < channels; c++) {
        to->output[c] += l->attended[c] > 0 ? grad * l->attended[c] : 0;
        of_attended[c] = l->attended[c] > 0 ? grad * output[c] : 0;
    }
    to->output[channels] += grad;
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL mean = 0; /* of the gradients of the weights, weighted by these: the softmax subtracts it */
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) {
            REAL dot[4], near_x[2] = {1 - l->dx[s], l->dx[s]}, near_y[2] = {1 - l->dy[s], l->dy[s]};
            for (int corner = 0; corner < 4; corner++) {
                const REAL *v = in->values + l->at[corner][s], *g = of_attended + m * per_head;
                REAL *add = to->values + l->at[corner][s], sum = 0, here = l->inside[corner][s];
                REAL share = here * l->weight[s] * near_x[corner & 1] * near_y[corner >> 1];
                for (ptrdiff_t d = 0; d < per_head; d++) sum += v[d] * g[d], add[d] += share * g[d];
                dot[corner] = here * sum;
            }
            of_mix[s] = l->weight[s] * (near_y[0] * (dot[1] - dot[0]) + near_y[1] * (dot[3] - dot[2]));
            of_mix[samples + s] = l->weight[s] * (near_x[0] * (dot[2] - dot[0]) + near_x[1] * (dot[3] - dot[1]));
            REAL of_weight = near_y[0] * (near_x[0] * dot[0] + near_x[1] * dot[1]) +
                             near_y[1] * (near_x[0] * dot[2] + near_x[1] * dot[3]);
            of_mix[2 * samples + s] = l->weight[s] * of_weight;
            mean += of_mix[2 * samples + s];
        }
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) of_mix[2 * samples + s] -= l->weight[s] * mean;
    }
    for (ptrdiff_t c = 0; c <= channels; c++) {
        REAL sum = 0, q = l->query[c], *add = to->mixing + c * row;
        const REAL *mix = mixing + c * row;
#pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = 0; i < row; i++) sum += of_mix[i] * mix[i], add[i] += of_mix[i] * q;
        if (c < channels) to->features[cell * channels + c] += sum;
    }
}

/* Do `call(channels, heads, points)` with compile-time constants for the published setting. */
#define WITH_CONSTANTS(z, call)                                                        \
    if (z->channels == 8 && z->heads == 4 && z->points == 4) call(8, 4, 4);        \
    else call(z->channels, z->heads, z->points);

/* Write logits [instance][row][column]. Items are the instances. */
FAST EXPORT void NAME(instance_transformer)(const NAME(Inputs) * in, REAL *logits, const Sizes *z, ptrdiff_t first,
                                            ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const REAL *output = in->output + i * (z->channels + 1);
        for (ptrdiff_t row = 0; row < z->height; row++)
            for (ptrdiff_t column = 0; column < z->width; column++) {
                NAME(Samples) l;
#define ATTEND(channels, heads, points) NAME(attend)(&l, in, z, channels, heads, points, i, row, column)
                WITH_CONSTANTS(z, ATTEND)
                REAL sum = output[z->channels];
                for (ptrdiff_t c = 0; c < z->channels; c++) {
                    REAL x = l.attended[c];
                    sum += output[c] * (x > 0 || x != x ? x : 0); /* ReLU; NaN stays */
                }
                logits[(i * z->height + row) * z->width + column] = sum;
            }
    }
}

/* Add to the gradients, which are zero before. Those of mixing and output have their shapes; those of features and values have one
   copy [cell][channel] per item. Items are `groups` groups of instances, so that sums do not depend on the number of threads. */
FAST EXPORT void NAME(instance_transformer_backward)(const NAME(Inputs) * in, const REAL *grad, const NAME(Gradients) * all,
                                                     ptrdiff_t groups, const Sizes *z, ptrdiff_t first, ptrdiff_t end) {
    ptrdiff_t cells = z->height * z->width, mixing = (z->channels + 1) * 3 * z->heads * z->points;
    for (ptrdiff_t group = first; group < end; group++) {
        NAME(Gradients) to = {all->features + group * cells * z->channels, all->values + group * cells * z->channels, 0, 0};
        for (ptrdiff_t i = z->instances * group / groups; i < z->instances * (group + 1) / groups; i++) {
            to.mixing = all->mixing + i * mixing, to.output = all->output + i * (z->channels + 1);
            for (ptrdiff_t cell = 0; cell < cells; cell++) {
                NAME(Samples) l;
                ptrdiff_t row = cell / z->width, column = cell % z->width;
                WITH_CONSTANTS(z, ATTEND)
#define DIFFERENTIATE(channels, heads, points) \
    NAME(differentiate)(&l, in, &to, grad[i * cells + cell], channels, heads, points, i, cell)
                WITH_CONSTANTS(z, DIFFERENTIATE)
            }
        }
    }
}
#undef ATTEND
#undef DIFFERENTIATE
#undef WITH_CONSTANTS
