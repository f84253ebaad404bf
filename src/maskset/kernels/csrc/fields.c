/* Fields (maps of numbers) resized, and thresholded to masks without storing the resized field. Items are fields.

   Every number is computed in float32 and in the order of the plain twins (maskset/masks/paint.py and resize.py): along the rows
   first, then along the columns, each product rounded before it is added. */
#include "runs.h"
EXACT

/* The value of each pixel along an axis: near * (cell low) + far * (cell high). */
typedef struct {
    const int32_t *low, *high;
    const float *near, *far;
} Taps;

/* Where a part of a resized field comes from, and which part it is. Rows and columns are those of the whole field. */
typedef struct {
    int64_t cells;       /* where the source begins */
    int64_t apart;       /* how far apart its rows lie */
    int64_t row, column; /* of its first cell */
    int64_t top, bottom, left, right;
} Part;

/* One field that is cut: see `cut`. */
typedef struct {
    const float *cells;
    Taps rows, columns; /* low and high of the rows are already times how far apart the rows lie, and less the first one */
    int64_t column;     /* the first cell's */
    int64_t top, left;  /* where in the image */
    ptrdiff_t height, width;
} Sheet;

/* Write what `count` pixels see of cells, the first of which is number `start`. */
INLINE void look(const float *restrict cells, int32_t start, Taps taps, ptrdiff_t count, float *restrict seen) {
    for (ptrdiff_t i = 0; i < count; i++)
        seen[i] = cells[taps.low[i] - start] * taps.near[i] + cells[taps.high[i] - start] * taps.far[i];
}

/* Write which pixels of a column exceed a bound, from what it sees of the columns of cells on both sides. */
INLINE void compare(const float *restrict near, const float *restrict far, float left, float right, float bound, ptrdiff_t height,
                    uint8_t *restrict set) {
    for (ptrdiff_t y = 0; y < height; y++) set[y] = near[y] * left + far[y] * right > bound;
}

/* Write where the pixels exceed a bound, column by column. Scratch has 3 * height places. */
INLINE void cut(Writer *w, const Sheet *s, float bound, ptrdiff_t image_height, float *scratch) {
    float *near = scratch, *far = near + s->height; /* the two columns of cells that a column of pixels lies between */
    uint8_t *set = (uint8_t *)(far + s->height);
    int64_t in_near = -1, in_far = -1;
    for (ptrdiff_t x = 0; x < s->width; x++) {
        int64_t low = s->columns.low[x] - s->column, high = s->columns.high[x] - s->column;
        if (in_far == low) {
            float *swapped = near;
            near = far, far = swapped, in_far = in_near, in_near = low;
        }
        if (in_near != low) look(s->cells + low, 0, s->rows, s->height, near), in_near = low;
        if (in_far != high) look(s->cells + high, 0, s->rows, s->height, far), in_far = high;
        compare(near, far, s->columns.near[x], s->columns.far[x], bound, s->height, set);
        write_column(w, set, s->height, (s->left + x) * image_height + s->top);
    }
}

/* Write the rows of cells that a row of pixels lies between as that row sees them. */
INLINE void between(const float *restrict low, const float *restrict high, float near, float far, ptrdiff_t count,
                    float *restrict seen) {
    for (ptrdiff_t x = 0; x < count; x++) seen[x] = low[x] * near + high[x] * far;
}

/* Resize parts of fields; what becomes of part i is written from out[to[i]] on, row by row. Scratch has a row of
   cells. */
FAST EXPORT void fields_resize(const float *cells, const Part *parts, const int32_t *row_low, const int32_t *row_high,
                               const float *row_near, const float *row_far, const int32_t *column_low,
                               const int32_t *column_high, const float *column_near, const float *column_far, float *out,
                               const int64_t *to, float *scratch, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const Part *p = parts + i;
        int64_t across = p->right > p->left ? column_high[p->right - 1] + 1 - p->column : 0; /* the cells that are seen */
        Taps taps = {column_low + p->left, column_high + p->left, column_near + p->left, column_far + p->left};
        float *pixels = out + to[i];
        for (int64_t y = p->top; y < p->bottom; y++, pixels += p->right - p->left) {
            const float *low = cells + p->cells + (row_low[y] - p->row) * p->apart;
            const float *high = cells + p->cells + (row_high[y] - p->row) * p->apart;
            between(low, high, row_near[y], row_far[y], across, scratch);
            look(scratch, (int32_t)p->column, taps, p->right - p->left, pixels);
        }
    }
}

/* Resize parts of fields to parts of an image, and write where these exceed a bound as run lengths (see runs.c). Scratch has
   5 * height places. */
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
        Sheet s = {cells + p->cells,
                   {low, high, row_near + p->top, row_far + p->top},
                   {column_low + p->left, column_high + p->left, column_near + p->left, column_far + p->left},
                   p->column,
                   p->top,
                   p->left,
                   p->bottom - p->top,
                   p->right - p->left};
        cut(&w, &s, *bound, height, scratch + 2 * height);
        needed[i] = write_end(&w, (int64_t)height * width);
    }
}

/* Write what the pixels from `first` up to `end` see of `cells` cells that span a box from low to high: maskset/masks/paint.py. */
INLINE void see(int32_t *low, int32_t *high, float *near, float *far, ptrdiff_t first, ptrdiff_t end, double from, double to,
                int32_t cells, int32_t apart) {
    float start = (float)from, span = (float)(to - from);
    for (ptrdiff_t i = 0; i < end - first; i++) {
        float place = ((float)(first + i) + 0.5f - start) / span * (float)cells - 0.5f;
        int inside = place > -1 && place < (float)cells;
        int32_t before = inside ? (int32_t)(place + 1) - 1 : 0; /* floor, since the sum is positive */
        if ((float)before > place) before--;                    /* where it was rounded up */
        float share = fabsf(place - (float)before), rest = fabsf(place - (float)(before + 1));
        near[i] = before >= 0 && share < 1 ? 1 - share : 0;
        far[i] = before + 1 < cells && rest < 1 ? 1 - rest : 0;
        low[i] = (before < 0 ? 0 : before) * apart;
        high[i] = (before + 1 < cells ? before + 1 : cells - 1) * apart;
    }
}

/* Return the first (or the end) of the pixels, out of `length`, that a field in a box can touch. */
INLINE ptrdiff_t reach(double place, ptrdiff_t length) {
    return place > 0 ? place < (double)length ? (ptrdiff_t)place : length : 0;
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
            ptrdiff_t left = reach(box[0] - beside, width), right = reach(box[2] + beside, width);
            ptrdiff_t top = reach(box[1] - above, height), bottom = reach(box[3] + above, height);
            see(row_low, row_high, row_near, row_far, top, bottom, box[1], box[3], (int32_t)side, (int32_t)side);
            see(column_low, column_high, column_near, column_far, left, right, box[0], box[2], (int32_t)side, 1);
            Sheet s = {fields + i * side * side,
                       {row_low, row_high, row_near, row_far},
                       {column_low, column_high, column_near, column_far},
                       0,
                       top,
                       left,
                       bottom - top,
                       right - left};
            cut(&w, &s, *bound, height, scratch);
        }
        needed[i] = write_end(&w, (int64_t)height * width);
    }
}
