/* Fields (maps of numbers) resized, and thresholded to masks without storing the resized field. Items are fields.

   Every number is computed in float32 and in the order of the plain versions (maskset/masks/paint.py and resize.py): first between
   rows (vertically), then between columns, each product rounded before it is added. */
#include "runs.h"
EXACT

/* The value of each pixel along an axis: near * (cell low) + far * (cell high). */
typedef struct {
    const int32_t *low, *high;
    const float *near, *far;
} Taps;

/* Part of a field, and which part of the resized field to compute from it. Rows and columns are counted in the whole field. */
typedef struct {
    int64_t cells;       /* index of its first cell */
    int64_t apart;       /* distance between its rows */
    int64_t row, column; /* of its first cell */
    int64_t top, bottom, left, right;
} Part;

/* What `threshold` resizes. */
typedef struct {
    const float *cells;
    Taps rows, columns; /* low and high of the rows are offsets from `cells` */
    int64_t column;     /* of the first cell */
    int64_t top, left;  /* of the result in the image */
    ptrdiff_t height, width;
} Resize;

/* Interpolate `count` pixels from cells, the first of which is number `start`. */
INLINE void interpolate(const float *restrict cells, int32_t start, Taps taps, ptrdiff_t count, float *restrict pixels) {
    for (ptrdiff_t i = 0; i < count; i++)
        pixels[i] = cells[taps.low[i] - start] * taps.near[i] + cells[taps.high[i] - start] * taps.far[i];
}

/* Write which pixels of a column exceed a bound, given the two columns that they are interpolated from. */
INLINE void compare(const float *restrict near, const float *restrict far, float left, float right, float bound, ptrdiff_t height,
                    uint8_t *restrict set) {
    for (ptrdiff_t y = 0; y < height; y++) set[y] = near[y] * left + far[y] * right > bound;
}

/* Write where the resized field exceeds a bound, column by column. Scratch has 3 * height elements. */
INLINE void threshold(Writer *w, const Resize *s, float bound, ptrdiff_t image_height, float *scratch) {
    float *near = scratch, *far = near + s->height; /* columns of cells on both sides of a column of pixels, resized */
    uint8_t *set = (uint8_t *)(far + s->height);
    int64_t in_near = -1, in_far = -1;
    for (ptrdiff_t x = 0; x < s->width; x++) {
        int64_t low = s->columns.low[x] - s->column, high = s->columns.high[x] - s->column;
        if (in_far == low) {
            float *swapped = near;
            near = far, far = swapped, in_far = in_near, in_near = low;
        }
        if (in_near != low) interpolate(s->cells + low, 0, s->rows, s->height, near), in_near = low;
        if (in_far != high) interpolate(s->cells + high, 0, s->rows, s->height, far), in_far = high;
        compare(near, far, s->columns.near[x], s->columns.far[x], bound, s->height, set);
        write_column(w, set, s->height, (s->left + x) * image_height + s->top);
    }
}

/* Interpolate a row between two rows of cells. */
INLINE void interpolate_row(const float *restrict low, const float *restrict high, float near, float far, ptrdiff_t count,
                            float *restrict row) {
    for (ptrdiff_t x = 0; x < count; x++) row[x] = low[x] * near + high[x] * far;
}

/* Resize parts of fields; the result of part i is written from out[to[i]] on, row by row. Scratch has one row of cells. */
FAST EXPORT void fields_resize(const float *cells, const Part *parts, const int32_t *row_low, const int32_t *row_high,
                               const float *row_near, const float *row_far, const int32_t *column_low, const int32_t *column_high,
                               const float *column_near, const float *column_far, float *out, const int64_t *to, float *scratch,
                               ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const Part *p = parts + i;
        int64_t across = p->right > p->left ? column_high[p->right - 1] + 1 - p->column : 0; /* cells that are read */
        Taps taps = {column_low + p->left, column_high + p->left, column_near + p->left, column_far + p->left};
        float *pixels = out + to[i];
        for (int64_t y = p->top; y < p->bottom; y++, pixels += p->right - p->left) {
            const float *low = cells + p->cells + (row_low[y] - p->row) * p->apart;
            const float *high = cells + p->cells + (row_high[y] - p->row) * p->apart;
            interpolate_row(low, high, row_near[y], row_far[y], across, scratch);
            interpolate(scratch, (int32_t)p->column, taps, p->right - p->left, pixels);
        }
    }
}

/* Resize parts of fields to parts of an image, and write where these exceed a bound as run lengths (see runs.c). Scratch has
   5 * height elements. */
FAST EXPORT void fields_cut(const float *cells, const Part *parts, const int32_t *row_low, const int32_t *row_high,
                            const float *row_near, const float *row_far, const int32_t *column_low, const int32_t *column_high,
                            const float *column_near, const float *column_far, const float *bound, ptrdiff_t height,
                            ptrdiff_t width, int32_t *out, const int64_t *starts, int64_t *needed, float *scratch,
                            ptrdiff_t first, ptrdiff_t end) {
    int32_t *low = (int32_t *)scratch, *high = low + height;
    for (ptrdiff_t i = first; i < end; i++) {
        const Part *p = parts + i;
        Writer w = writer(out + starts[i], starts[i + 1] - starts[i]);
        for (int64_t y = p->top; y < p->bottom; y++) {
            low[y - p->top] = (int32_t)((row_low[y] - p->row) * p->apart);
            high[y - p->top] = (int32_t)((row_high[y] - p->row) * p->apart);
        }
        Resize s = {cells + p->cells,
                   {low, high, row_near + p->top, row_far + p->top},
                   {column_low + p->left, column_high + p->left, column_near + p->left, column_far + p->left},
                   p->column,
                   p->top,
                   p->left,
                   p->bottom - p->top,
                   p->right - p->left};
        threshold(&w, &s, *bound, height, scratch + 2 * height);
        needed[i] = write_end(&w, (int64_t)height * width);
    }
}

/* Write the taps of the pixels from `first` up to `end` in a box that `cells` cells span (see maskset/masks/paint.py). */
INLINE void taps_of_box(int32_t *low, int32_t *high, float *near, float *far, ptrdiff_t first, ptrdiff_t end, double from,
                        double to, int32_t cells, int32_t apart) {
    float start = (float)from, span = (float)(to - from);
    for (ptrdiff_t i = 0; i < end - first; i++) {
        float position = ((float)(first + i) + 0.5f - start) / span * (float)cells - 0.5f;
        int inside = position > -1 && position < (float)cells;
        int32_t before = inside ? (int32_t)(position + 1) - 1 : 0; /* floor, since the sum is positive */
        if ((float)before > position) before--;                    /* where the sum was rounded up */
        float share = fabsf(position - (float)before), rest = fabsf(position - (float)(before + 1));
        near[i] = before >= 0 && share < 1 ? 1 - share : 0;
        far[i] = before + 1 < cells && rest < 1 ? 1 - rest : 0;
        low[i] = (before < 0 ? 0 : before) * apart;
        high[i] = (before + 1 < cells ? before + 1 : cells - 1) * apart;
    }
}

/* Return a coordinate truncated to an integer, limited to 0 ... length. */
INLINE ptrdiff_t limited(double position, ptrdiff_t length) {
    return position > 0 ? position < (double)length ? (ptrdiff_t)position : length : 0;
}

/* Paste square fields [n side side] into boxes [n 4], and write where they exceed a bound. Scratch has 7 * height + 4 * width. */
FAST EXPORT void fields_paste(const float *fields, const double *boxes, ptrdiff_t side, const float *bound, ptrdiff_t height,
                              ptrdiff_t width, int32_t *out, const int64_t *starts, int64_t *needed, float *scratch,
                              ptrdiff_t first, ptrdiff_t end) {
    float *row_near = scratch + 3 * height, *row_far = row_near + height, *column_near = row_far + height;
    float *column_far = column_near + width;
    int32_t *row_low = (int32_t *)(column_far + width), *row_high = row_low + height, *column_low = row_high + height;
    int32_t *column_high = column_low + width;
    for (ptrdiff_t i = first; i < end; i++) {
        const double *box = boxes + 4 * i;
        Writer w = writer(out + starts[i], starts[i + 1] - starts[i]);
        if (box[2] > box[0] && box[3] > box[1]) {
            double beside = (box[2] - box[0]) / (double)side + 1, above = (box[3] - box[1]) / (double)side + 1;
            ptrdiff_t left = limited(box[0] - beside, width), right = limited(box[2] + beside, width);
            ptrdiff_t top = limited(box[1] - above, height), bottom = limited(box[3] + above, height);
            taps_of_box(row_low, row_high, row_near, row_far, top, bottom, box[1], box[3], (int32_t)side, (int32_t)side);
            taps_of_box(column_low, column_high, column_near, column_far, left, right, box[0], box[2], (int32_t)side, 1);
            Resize s = {fields + i * side * side,
                       {row_low, row_high, row_near, row_far},
                       {column_low, column_high, column_near, column_far},
                       0,
                       top,
                       left,
                       bottom - top,
                       right - left};
            threshold(&w, &s, *bound, height, scratch);
        }
        needed[i] = write_end(&w, (int64_t)height * width);
    }
}
