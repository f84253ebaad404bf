/* Training targets from run lengths: masks cropped to boxes, and masks resized to coarser grids. Items are masks. */
#include "runs.h"
EXACT

/* The samples of RoIAlign along one axis of a box, in torchvision's arithmetic. */
typedef struct {
    float start, bin;
    ptrdiff_t samples, cells; /* in each bin; of the map */
} Samples;

/* The result has no samples if there would be so many that most of them lie outside of the map: no mean reaches one half. */
INLINE Samples samples(float low, float high, ptrdiff_t bins, ptrdiff_t cells) {
    float start = low - 0.5f, span = (high - 0.5f) - start, each = ceilf(span / (float)bins);
    Samples s = {start, span / (float)bins, each >= 1 && each < 5 * (float)(cells + 2) ? (ptrdiff_t)each : 0, cells};
    return s;
}

/* Return whether a sample lies on the map, and if so, store the two cells around it and the weight of the higher one. */
INLINE int locate(const Samples *s, ptrdiff_t bin, ptrdiff_t sample, ptrdiff_t *low, ptrdiff_t *high, float *share) {
    float position = s->start + (float)bin * s->bin + ((float)sample + 0.5f) * s->bin / (float)s->samples;
    if (!(position >= -1 && position <= (float)s->cells)) return 0;
    if (position < 0) position = 0;
    *low = (ptrdiff_t)position, *high = *low + 1;
    if (*low >= s->cells - 1) *low = *high = s->cells - 1, position = (float)*low;
    *share = position - (float)*low;
    return 1;
}

/* The cells that the samples of a bin read, and whether all samples lie on the map. */
typedef struct {
    int32_t first, end, all_inside;
} Span;

INLINE Span span(const Samples *s, ptrdiff_t bin) {
    Span read = {0, 0, 1};
    ptrdiff_t low, high;
    float share;
    for (ptrdiff_t i = 0; i < s->samples; i++) {
        if (!locate(s, bin, i, &low, &high, &share)) {
            read.all_inside = 0;
            continue;
        }
        if (read.end == 0) read.first = (int32_t)low;
        read.end = (int32_t)high + 1;
    }
    return read;
}

/* Return whether the mean of a bin's samples reaches one half. Pixels are [columns rows]. */
static int reaches_half(const uint8_t *pixels, const Samples *rows, const Samples *columns, ptrdiff_t row, ptrdiff_t column) {
    float sum = 0;
    for (ptrdiff_t i = 0; i < rows->samples; i++) {
        ptrdiff_t top, bottom, left, right;
        float dy, dx;
        if (!locate(rows, row, i, &top, &bottom, &dy)) continue;
        for (ptrdiff_t j = 0; j < columns->samples; j++) {
            if (!locate(columns, column, j, &left, &right, &dx)) continue;
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

/* Return a coordinate truncated to an integer, limited to +-1e9. */
INLINE ptrdiff_t truncated(double position) {
    return position > 1e9 ? 1000000000 : position > -1e9 ? (ptrdiff_t)position : -1000000000;
}

/* Return the window that contains every pixel that the samples of a box read. */
INLINE Window window(const double *box, const View *view) {
    Window w = {truncated(box[0]) - 2, truncated(box[1]) - 2, truncated(box[2]) + 3, truncated(box[3]) + 3};
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

/* Write a mask cropped to its box into out [bins bins], which is 0 before. `count_above` has one element per row and one
   more: the number of set pixels above a row, in the columns that the samples of a bin read. */
INLINE void crop(const uint8_t *pixels, const Samples *rows, const Samples *columns, ptrdiff_t bins, uint8_t *out, Span *spans,
                 int32_t *count_above) {
    for (ptrdiff_t row = 0; row < bins; row++) spans[row] = span(rows, row);
    for (ptrdiff_t column = 0; column < bins; column++) {
        Span across = span(columns, column);
        memset(count_above, 0, (size_t)(rows->cells + 1) * sizeof(int32_t));
        for (ptrdiff_t x = across.first; x < across.end; x++)
            for (ptrdiff_t y = 0; y < rows->cells; y++) count_above[y + 1] += pixels[x * rows->cells + y];
        for (ptrdiff_t y = 0; y < rows->cells; y++) count_above[y + 1] += count_above[y];
        if (!count_above[rows->cells]) continue;
        for (ptrdiff_t row = 0; row < bins; row++) {
            Span down = spans[row];
            int32_t set = count_above[down.end] - count_above[down.first];
            int32_t read = (down.end - down.first) * (across.end - across.first);
            if (set && set == read && down.all_inside && across.all_inside)
                out[row * bins + column] = 1;
            else if (set)
                out[row * bins + column] = (uint8_t)reaches_half(pixels, rows, columns, row, column);
        }
    }
}

/* Write masks cropped to boxes [T 4] into out [T bins bins], which is 0 before, in the arithmetic of torchvision's RoIAlign.
   `scratch` has one byte per pixel of the view, `int_scratch` one element per row of the view, 3 * bins, and one more. */
FAST EXPORT void targets_crop(const View *view, const double *boxes, ptrdiff_t bins, uint8_t *out, uint8_t *scratch,
                              int32_t *int_scratch, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t i = first; i < end; i++) {
        const double *box = boxes + 4 * i;
        Window w = window(box, view);
        if (!(box[0] < box[2] && box[1] < box[3]) || w.right <= w.left || w.bottom <= w.top) continue;
        float left = (float)w.left, top = (float)w.top;
        Samples columns = samples((float)box[0] - left, (float)box[2] - left, bins, w.right - w.left);
        Samples rows = samples((float)box[1] - top, (float)box[3] - top, bins, w.bottom - w.top);
        draw_window(view, i, w, scratch);
        crop(scratch, &rows, &columns, bins, out + i * bins * bins, (Span *)int_scratch, int_scratch + 3 * bins);
    }
}

/* Write 1 for the set rows of a column of the view, and extend the range from `first` up to `end` to contain them. */
INLINE void draw_column(Cursor *at, const View *view, int64_t column, uint8_t *set, ptrdiff_t *first, ptrdiff_t *end) {
    if (column < 0) return;
    int64_t pixel = column * view->height, bottom = pixel + view->height;
    for (ptrdiff_t from, to; next_stretch(at, view, &pixel, bottom, &from, &to);) {
        memset(set + from, 1, (size_t)(to - from));
        if (from < *first) *first = from;
        if (to > *end) *end = to;
    }
}

/* The four pixels that each cell of one column of a coarser grid interpolates: 0 or 1 for each cell. */
typedef struct {
    uint8_t *near_above, *near_below, *far_above, *far_below;
    ptrdiff_t first, end; /* cells outside of this range have four zeros */
} Pixels;

INLINE void read_pixels(Pixels *s, Cursor *at, const View *near, const View *far, ptrdiff_t column) {
    for (ptrdiff_t y = s->first; y < s->end; y++) s->near_above[y] = s->near_below[y] = s->far_above[y] = s->far_below[y] = 0;
    s->first = near->rows, s->end = 0;
    draw_column(at, near, near->columns[column], s->near_above, &s->first, &s->end);
    draw_column(at, far, near->columns[column], s->near_below, &s->first, &s->end);
    draw_column(at, near, far->columns[column], s->far_above, &s->first, &s->end);
    draw_column(at, far, far->columns[column], s->far_below, &s->first, &s->end);
}

INLINE Pixels no_pixels(uint8_t *scratch, ptrdiff_t rows) {
    memset(scratch, 0, (size_t)(4 * rows));
    Pixels s = {scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows, 0, 0};
    return s;
}

/* Write bilinear samples, [T rows width], which are 0 before, interpolated first between rows (vertically), then between columns.
   Along each axis a sample reads a pixel of the view `near` and one of the view `far` of the same masks. Scratch has 4 * rows
   bytes. */
FAST EXPORT void targets_resize(const View *near, const View *far, const float *row_near, const float *row_far,
                                const float *column_near, const float *column_far, float *out, uint8_t *scratch, ptrdiff_t first,
                                ptrdiff_t end) {
    Pixels s = no_pixels(scratch, near->rows);
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Cursor at = cursor(near, mask);
        for (ptrdiff_t x = 0; x < near->width; x++) {
            float *column = out + mask * near->rows * near->width + x;
            read_pixels(&s, &at, near, far, x);
            for (ptrdiff_t y = s.first; y < s.end; y++) {
                float before = s.near_above[y] * row_near[y] + s.near_below[y] * row_far[y];
                float after = s.far_above[y] * row_near[y] + s.far_below[y] * row_far[y];
                column[y * near->width] = before * column_near[x] + after * column_far[x];
            }
        }
    }
}

/* The same as OpenCV does for bytes of 0 and 1: first between columns, then between rows (vertically), with weights in units of
   1 / 2048, products shifted. */
FAST EXPORT void targets_resize_opencv(const View *near, const View *far, const int32_t *row_near, const int32_t *row_far,
                                       const int32_t *column_near, const int32_t *column_far, uint8_t *out, uint8_t *scratch,
                                       ptrdiff_t first, ptrdiff_t end) {
    Pixels s = no_pixels(scratch, near->rows);
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Cursor at = cursor(near, mask);
        for (ptrdiff_t x = 0; x < near->width; x++) {
            uint8_t *column = out + mask * near->rows * near->width + x;
            read_pixels(&s, &at, near, far, x);
            for (ptrdiff_t y = s.first; y < s.end; y++) {
                int32_t above = (s.near_above[y] * column_near[x] + s.far_above[y] * column_far[x]) >> 4;
                int32_t below = (s.near_below[y] * column_near[x] + s.far_below[y] * column_far[x]) >> 4;
                column[y * near->width] = (((above * row_near[y]) >> 16) + ((below * row_far[y]) >> 16) + 2) >> 2 > 0;
            }
        }
    }
}
