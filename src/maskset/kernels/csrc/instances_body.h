/* Included once for each type of numbers, REAL. A cell has S = heads * points samples, s = head * points + point.

   mixing: [instance][channel, and one more for the bias][x, y, score][S]; how a query becomes places and their scores.
   output: [instance][channel, and one more for the bias]. */

typedef struct {
    const REAL *features, *values;     /* [cell][channel]; what asks and, zero on padding, what is seen */
    const REAL *rows, *columns;        /* places, [instance][0 beside the image, 1 in it][row or column][channels / 2] */
    const uint8_t *row_in, *column_in; /* whether a row, a column is one of the image's */
    const REAL *mixing, *output;
} NAME(Inputs);

/* What a cell looks at, sample by sample. */
typedef struct {
    REAL query[LIMIT + 1], weight[LIMIT], dx[LIMIT], dy[LIMIT], inside[4][LIMIT];
    int32_t at[4][LIMIT]; /* where the first channel of the sample's head is in the values: left and right above, then below */
    REAL seen[LIMIT];     /* [channel] */
} NAME(Look);

INLINE void NAME(ask)(NAME(Look) * l, const NAME(Inputs) * in, const Sizes *z, ptrdiff_t channels, ptrdiff_t instance,
                      ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t half = channels / 2, cell = row * z->width + column;
    const REAL *from_row = in->rows + ((instance * 2 + (in->column_in[column] != 0)) * z->height + row) * half;
    const REAL *from_column = in->columns + ((instance * 2 + (in->row_in[row] != 0)) * z->width + column) * half;
    for (ptrdiff_t c = 0; c < half; c++) {
        l->query[c] = in->features[cell * channels + c] + from_row[c];
        l->query[half + c] = in->features[cell * channels + half + c] + from_column[c];
    }
    l->query[channels] = 1;
}

/* Return the place, or the nearest that lies as far outside of the map as any sees it from; NaN becomes one outside. */
INLINE REAL NAME(near)(REAL place, ptrdiff_t length) {
    REAL low = place > -2 ? place : -2, high = (REAL)length + 1;
    return low < high ? low : high;
}

INLINE void NAME(place)(NAME(Look) * l, const REAL *x, const REAL *y, const Sizes *z, ptrdiff_t channels, ptrdiff_t heads,
                        ptrdiff_t points) {
    int32_t wide = (int32_t)z->width, high = (int32_t)z->height, apart = (int32_t)channels;
    for (ptrdiff_t s = 0; s < heads * points; s++) {
        REAL px = NAME(near)(x[s], wide), py = NAME(near)(y[s], high);
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
        REAL most = score[m * points];
        for (ptrdiff_t k = 1; k < points; k++) most = score[m * points + k] > most ? score[m * points + k] : most;
        for (ptrdiff_t k = 0; k < points; k++) of_head[m * points + k] = most;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] = NAME(exp)(score[s] - of_head[s]);
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL sum = 0;
        for (ptrdiff_t k = 0; k < points; k++) sum += score[m * points + k];
        for (ptrdiff_t k = 0; k < points; k++) of_head[m * points + k] = sum;
    }
    for (ptrdiff_t s = 0; s < heads * points; s++) score[s] /= of_head[s];
}

INLINE void NAME(look)(NAME(Look) * l, const NAME(Inputs) * in, const Sizes *z, ptrdiff_t channels, ptrdiff_t heads,
                       ptrdiff_t points, ptrdiff_t instance, ptrdiff_t row, ptrdiff_t column) {
    ptrdiff_t samples = heads * points, per_head = channels / heads;
    const REAL *mixing = in->mixing + instance * (channels + 1) * 3 * samples;
    REAL x[LIMIT], y[LIMIT];
    NAME(ask)(l, in, z, channels, instance, row, column);
    for (ptrdiff_t s = 0; s < samples; s++) x[s] = (REAL)column, y[s] = (REAL)row, l->weight[s] = 0;
    for (ptrdiff_t c = 0; c <= channels; c++, mixing += 3 * samples)
        for (ptrdiff_t s = 0; s < samples; s++) {
            x[s] += l->query[c] * mixing[s], y[s] += l->query[c] * mixing[samples + s];
            l->weight[s] += l->query[c] * mixing[2 * samples + s];
        }
    NAME(softmax)(l->weight, heads, points);
    NAME(place)(l, x, y, z, channels, heads, points);
    for (ptrdiff_t s = 0; s < samples; s++) /* a place that is no number shows no number: training must notice */
        if (x[s] != x[s] || y[s] != y[s]) l->weight[s] = NAN;
    for (ptrdiff_t d = 0; d < per_head; d++) {
        REAL shown[LIMIT];
        const REAL *v = in->values + d;
#pragma omp simd
        for (ptrdiff_t s = 0; s < samples; s++) {
            REAL left = (1 - l->dy[s]) * l->inside[0][s] * v[l->at[0][s]] + l->dy[s] * l->inside[2][s] * v[l->at[2][s]];
            REAL right = (1 - l->dy[s]) * l->inside[1][s] * v[l->at[1][s]] + l->dy[s] * l->inside[3][s] * v[l->at[3][s]];
            shown[s] = l->weight[s] * ((1 - l->dx[s]) * left + l->dx[s] * right);
        }
        for (ptrdiff_t m = 0; m < heads; m++) {
            REAL sum = 0;
            for (ptrdiff_t k = 0; k < points; k++) sum += shown[m * points + k];
            l->seen[m * per_head + d] = sum;
        }
    }
}

/* Where the gradients of one cell's logit go. */
typedef struct {
    REAL *features, *values, *mixing, *output;
} NAME(Gradients);

INLINE void NAME(learn)(const NAME(Look) * l, const NAME(Inputs) * in, const NAME(Gradients) * to, REAL grad,
                        ptrdiff_t channels, ptrdiff_t heads, ptrdiff_t points, ptrdiff_t instance, ptrdiff_t cell) {
    ptrdiff_t samples = heads * points, per_head = channels / heads, row = 3 * samples;
    const REAL *output = in->output + instance * (channels + 1), *mixing = in->mixing + instance * (channels + 1) * row;
    REAL of_seen[LIMIT], of_mix[3 * LIMIT]; /* x, y, score */
    for (ptrdiff_t c = 0; c < channels; c++) {
        to->output[c] += l->seen[c] > 0 ? grad * l->seen[c] : 0;
        of_seen[c] = l->seen[c] > 0 ? grad * output[c] : 0;
    }
    to->output[channels] += grad;
    for (ptrdiff_t m = 0; m < heads; m++) {
        REAL whole = 0; /* of the softmax: the mean of its gradients */
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) {
            REAL dot[4], near_x[2] = {1 - l->dx[s], l->dx[s]}, near_y[2] = {1 - l->dy[s], l->dy[s]};
            for (int corner = 0; corner < 4; corner++) {
                const REAL *v = in->values + l->at[corner][s], *g = of_seen + m * per_head;
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
            whole += of_mix[2 * samples + s];
        }
        for (ptrdiff_t s = m * points; s < (m + 1) * points; s++) of_mix[2 * samples + s] -= l->weight[s] * whole;
    }
    for (ptrdiff_t c = 0; c <= channels; c++) {
        REAL sum = 0, q = l->query[c], *add = to->mixing + c * row;
        const REAL *mix = mixing + c * row;
#pragma omp simd reduction(+ : sum)
        for (ptrdiff_t i = 0; i < row; i++) sum += of_mix[i] * mix[i], add[i] += of_mix[i] * q;
        if (c < channels) to->features[cell * channels + c] += sum;
    }
}

/* Do `call(channels, heads, points)` with numbers that the compiler knows, for the published setting. */
#define WITH_KNOWN(z, call)                                                        \
    if (z->channels == 8 && z->heads == 4 && z->points == 4) call(8, 4, 4);        \
    else call(z->channels, z->heads, z->points);

/* Writes logits [instance][row][column]. Items are the instances. */
FAST EXPORT void NAME(instance_transformer)(const NAME(Inputs) * in, REAL *logits, const Sizes *z, ptrdiff_t first,
                                            ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const REAL *output = in->output + i * (z->channels + 1);
        for (ptrdiff_t row = 0; row < z->height; row++)
            for (ptrdiff_t column = 0; column < z->width; column++) {
                NAME(Look) l;
#define LOOK(channels, heads, points) NAME(look)(&l, in, z, channels, heads, points, i, row, column)
                WITH_KNOWN(z, LOOK)
                REAL sum = output[z->channels];
                for (ptrdiff_t c = 0; c < z->channels; c++) sum += output[c] * (l.seen[c] > 0 || l.seen[c] != l.seen[c] ? l.seen[c] : 0);
                logits[(i * z->height + row) * z->width + column] = sum;
            }
    }
}

/* Adds to gradients, all zero at first: those of mixing and output are shaped like these; those of the cells have one copy,
   [cell][channel], for each item. Items are `groups` groups of instances, so that a sum does not depend on who computed it. */
FAST EXPORT void NAME(instance_transformer_backward)(const NAME(Inputs) * in, const REAL *grad, const NAME(Gradients) * all,
                                                     ptrdiff_t groups, const Sizes *z, ptrdiff_t first, ptrdiff_t end) {
    ptrdiff_t cells = z->height * z->width, mixing = (z->channels + 1) * 3 * z->heads * z->points;
    for (ptrdiff_t group = first; group < end; group++) {
        NAME(Gradients) to = {all->features + group * cells * z->channels, all->values + group * cells * z->channels, 0, 0};
        for (ptrdiff_t i = z->instances * group / groups; i < z->instances * (group + 1) / groups; i++) {
            to.mixing = all->mixing + i * mixing, to.output = all->output + i * (z->channels + 1);
            for (ptrdiff_t cell = 0; cell < cells; cell++) {
                NAME(Look) l;
                ptrdiff_t row = cell / z->width, column = cell % z->width;
                WITH_KNOWN(z, LOOK)
#define LEARN(channels, heads, points) NAME(learn)(&l, in, &to, grad[i * cells + cell], channels, heads, points, i, cell)
                WITH_KNOWN(z, LEARN)
            }
        }
    }
}
#undef LOOK
#undef LEARN
#undef WITH_KNOWN
