/* Training targets drawn from run lengths: masks inside boxes, and masks on coarser grids. */
#include "runs.h"
EXACT

/* The samples of RoIAlign along one axis of a box, in torchvision's arithmetic. */
typedef struct {
    float start, bin;
    ptrdiff_t samples, cells; /* in each bin; of the map */
} Samples;

/* No samples where there would be so many that most of them lie beside the map: no mean reaches one half. */
INLINE Samples samples(float low, float high, ptrdiff_t bins, ptrdiff_t cells) {
    float start = low - 0.5f, span = (high - 0.5f) - start, each = ceilf(span / (float)bins);
    Samples s = {start, span / (float)bins, each >= 1 && each < 5 * (float)(cells + 2) ? (ptrdiff_t)each : 0, cells};
    return s;
}

/* Return whether a sample lies on the map, and if so between which cells. */
INLINE int find(const Samples *s, ptrdiff_t bin, ptrdiff_t sample, ptrdiff_t *low, ptrdiff_t *high, float *share) {
    float place = s->start + (float)bin * s->bin + ((float)sample + 0.5f) * s->bin / (float)s->samples;
    if (!(place >= -1 && place <= (float)s->cells)) return 0;
    if (place < 0) place = 0;
    *low = (ptrdiff_t)place, *high = *low + 1;
    if (*low >= s->cells - 1) *low = *high = s->cells - 1, place = (float)*low;
    *share = place - (float)*low;
    return 1;
}

/* The cells that a bin's samples look at, and whether all samples lie on the map. */
typedef struct {
    int32_t first, end, whole;
} Span;

INLINE Span span(const Samples *s, ptrdiff_t bin) {
    Span found = {0, 0, 1};
    ptrdiff_t low, high;
    float share;
    for (ptrdiff_t i = 0; i < s->samples; i++) {
        if (!find(s, bin, i, &low, &high, &share)) {
            found.whole = 0;
            continue;
        }
        if (found.end == 0) found.first = (int32_t)low;
        found.end = (int32_t)high + 1;
    }
    return found;
}

/* Return whether the mean of a bin's samples reaches one half. Pixels are [columns rows]. */
static int reaches_half(const uint8_t *pixels, const Samples *rows, const Samples *columns, ptrdiff_t row, ptrdiff_t column) {
    float sum = 0;
    for (ptrdiff_t i = 0; i < rows->samples; i++) {
        ptrdiff_t top, bottom, left, right;
        float dy, dx;
        if (!find(rows, row, i, &top, &bottom, &dy)) continue;
        for (ptrdiff_t j = 0; j < columns->samples; j++) {
            if (!find(columns, column, j, &left, &right, &dx)) continue;
            const uint8_t *before = pixels + left * rows->cells, *after = pixels + right * rows->cells;
            float above = 1 - dy, beside = 1 - dx;
            sum += above * beside * before[top] + above * dx * after[top] + dy * beside * before[bottom] + dy * dx * after[bottom];
        }
    }
    return sum / (float)(rows->samples * columns->samples) >= 0.5f;
}

/* A part of the view, drawn as [columns rows]. */
typedef struct {
    ptrdiff_t left, top, right, bottom;
} Window;

/* Return a coordinate as a whole number that is far outside where the coordinate is. */
INLINE ptrdiff_t whole(double place) { return place > 1e9 ? 1000000000 : place > -1e9 ? (ptrdiff_t)place : -1000000000; }

/* Return the window in which samples are the same as in the whole image. */
INLINE Window window(const double *box, const View *view) {
    Window w = {whole(box[0]) - 2, whole(box[1]) - 2, whole(box[2]) + 3, whole(box[3]) + 3};
    if (w.left < 0) w.left = 0;
    if (w.top < 0) w.top = 0;
    if (w.right > view->width) w.right = view->width;
    if (w.bottom > view->rows) w.bottom = view->rows;
    return w;
}

INLINE void draw_window(const View *view, ptrdiff_t mask, Window w, uint8_t *pixels) {
    Cursor at = cursor(view, mask);
    ptrdiff_t height = w.bottom - w.top, from, to;
    memset(pixels, 0, (size_t)(height * (w.right - w.left)));
    for (ptrdiff_t x = w.left; x < w.right; x++, pixels += height) {
        if (view->columns[x] < 0) continue;
        int64_t pixel = view->columns[x] * view->height, end = pixel + view->height;
        while (next_stretch(&at, view, &pixel, end, &from, &to)) {
            if (from < w.top) from = w.top;
            if (to > w.bottom) to = w.bottom;
            if (from < to) memset(pixels + from - w.top, 1, (size_t)(to - from));
        }
    }
}

/* Write a mask inside its box, [bins bins], 0 at first. `below` has a place for each row of the window and one more. */
INLINE void crop(const uint8_t *pixels, const Samples *rows, const Samples *columns, ptrdiff_t bins, uint8_t *out,
                 Span *spans, int32_t *below) {
    for (ptrdiff_t row = 0; row < bins; row++) spans[row] = span(rows, row);
    for (ptrdiff_t column = 0; column < bins; column++) {
        Span across = span(columns, column);
        memset(below, 0, (size_t)(rows->cells + 1) * sizeof(int32_t));
        for (ptrdiff_t x = across.first; x < across.end; x++)
            for (ptrdiff_t y = 0; y < rows->cells; y++) below[y + 1] += pixels[x * rows->cells + y];
        for (ptrdiff_t y = 0; y < rows->cells; y++) below[y + 1] += below[y]; /* how many pixels are set above row y + 1 */
        if (!below[rows->cells]) continue;
        for (ptrdiff_t row = 0; row < bins; row++) {
            Span down = spans[row];
            int32_t set = below[down.end] - below[down.first], seen = (down.end - down.first) * (across.end - across.first);
            if (set && set == seen && down.whole && across.whole)
                out[row * bins + column] = 1;
            else if (set)
                out[row * bins + column] = (uint8_t)reaches_half(pixels, rows, columns, row, column);
        }
    }
}

/* Write masks inside boxes [T 4] into out [T bins bins], 0 at first, in the arithmetic of torchvision's RoIAlign: item i is the
   view's mask i. Scratch has a byte for each of the view's pixels; places has its rows, 3 * bins, and one more. */
FAST EXPORT void targets_crop(const View *view, const double *boxes, ptrdiff_t bins, uint8_t *out, uint8_t *scratch,
                              int32_t *places, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const double *box = boxes + 4 * i;
        Window w = window(box, view);
        if (!(box[0] < box[2] && box[1] < box[3]) || w.right <= w.left || w.bottom <= w.top) continue;
        float left = (float)w.left, top = (float)w.top;
        Samples columns = samples((float)box[0] - left, (float)box[2] - left, bins, w.right - w.left);
        Samples rows = samples((float)box[1] - top, (float)box[3] - top, bins, w.bottom - w.top);
        draw_window(view, i, w, scratch);
        crop(scratch, &rows, &columns, bins, out + i * bins * bins, (Span *)places, places + 3 * bins);
    }
}

/* Set the rows of a column that the view shows as set, and extend `first` up to `end` by them. */
INLINE void draw_column(Cursor *at, const View *view, int64_t column, uint8_t *set, ptrdiff_t *first, ptrdiff_t *end) {
    if (column < 0) return;
    int64_t pixel = column * view->height, bottom = pixel + view->height;
    for (ptrdiff_t from, to; next_stretch(at, view, &pixel, bottom, &from, &to);) {
        memset(set + from, 1, (size_t)(to - from));
        if (from < *first) *first = from;
        if (to > *end) *end = to;
    }
}

/* The four pixels that the cells of one column of a coarser grid look at: 1 or 0 for each cell. */
typedef struct {
    uint8_t *near_above, *near_below, *far_above, *far_below;
    ptrdiff_t first, end; /* the cells that see anything */
} Seen;

INLINE void look(Seen *s, Cursor *at, const View *near, const View *far, ptrdiff_t column) {
    for (ptrdiff_t y = s->first; y < s->end; y++) s->near_above[y] = s->near_below[y] = s->far_above[y] = s->far_below[y] = 0;
    s->first = near->rows, s->end = 0;
    draw_column(at, near, near->columns[column], s->near_above, &s->first, &s->end);
    draw_column(at, far, near->columns[column], s->near_below, &s->first, &s->end);
    draw_column(at, near, far->columns[column], s->far_above, &s->first, &s->end);
    draw_column(at, far, far->columns[column], s->far_below, &s->first, &s->end);
}

INLINE Seen nothing_seen(uint8_t *scratch, ptrdiff_t rows) {
    memset(scratch, 0, (size_t)(4 * rows));
    Seen s = {scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows, 0, 0};
    return s;
}

/* Write the weighted means of four pixels, [T rows width], 0 at first: first along the rows, then along the columns. Two views of the
   same masks show the near and the far ones of the two pixels along each axis. Scratch has 4 * rows bytes. */
FAST EXPORT void targets_mean(const View *near, const View *far, const float *row_near, const float *row_far,
                              const float *column_near, const float *column_far, float *out, uint8_t *scratch, ptrdiff_t first,
                              ptrdiff_t end) {
    Seen s = nothing_seen(scratch, near->rows);
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Cursor at = cursor(near, mask);
        for (ptrdiff_t x = 0; x < near->width; x++) {
            float *column = out + mask * near->rows * near->width + x;
            look(&s, &at, near, far, x);
            for (ptrdiff_t y = s.first; y < s.end; y++) {
                float before = s.near_above[y] * row_near[y] + s.near_below[y] * row_far[y];
                float after = s.far_above[y] * row_near[y] + s.far_below[y] * row_far[y];
                column[y * near->width] = before * column_near[x] + after * column_far[x];
            }
        }
    }
}

/* The same as OpenCV resizes bytes of 0 and 1: along the columns first, weights in 2048ths, products cut to fewer bits. */
FAST EXPORT void targets_quarter(const View *near, const View *far, const int32_t *row_near, const int32_t *row_far,
                                 const int32_t *column_near, const int32_t *column_far, uint8_t *out, uint8_t *scratch,
                                 ptrdiff_t first, ptrdiff_t end) {
    Seen s = nothing_seen(scratch, near->rows);
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Cursor at = cursor(near, mask);
        for (ptrdiff_t x = 0; x < near->width; x++) {
            uint8_t *column = out + mask * near->rows * near->width + x;
            look(&s, &at, near, far, x);
            for (ptrdiff_t y = s.first; y < s.end; y++) {
                int32_t above = (s.near_above[y] * column_near[x] + s.far_above[y] * column_far[x]) >> 4;
                int32_t below = (s.near_below[y] * column_near[x] + s.far_below[y] * column_far[x]) >> 4;
                column[y * near->width] = (((above * row_near[y]) >> 16) + ((below * row_far[y]) >> 16) + 2) >> 2 > 0;
            }
        }
    }
}
