/* Polygons as run lengths, pixel for pixel those of COCO's own code.

   Its rule: corners are rounded to a grid that is five times as fine as the pixels, sides are lines of cells on it, and wherever a
   line crosses the middle of a column of pixels, all pixels of the column from there on down are inverted. Where a side crosses a
   column is computed without drawing the line, so time and memory depend only on the number of corners and crossings. */
#include "runs.h"
EXACT
#include <stdlib.h>

#define FINE 5
#define FARTHEST 1e11 /* cells; limit of a coordinate; NaN becomes -FARTHEST */

typedef struct {
    int64_t x, y;
} Cell;

INLINE double cell(double position) {
    position = FINE * position + 0.5;
    return position > FARTHEST ? FARTHEST : position > -FARTHEST ? position : -FARTHEST;
}

/* A side from one cell to another, in ascending order of the coordinate along its longer axis. */
typedef struct {
    Cell from, to;
    int64_t first, last; /* the columns of pixels whose middles it crosses: between cells 5 c + 2 and 5 c + 3 */
} Side;

INLINE Side side(const double *corner, const double *next, ptrdiff_t width) {
    Cell from = {(int64_t)cell(corner[0]), (int64_t)cell(corner[1])}, to = {(int64_t)cell(next[0]), (int64_t)cell(next[1])};
    int64_t wide = llabs(to.x - from.x), high = llabs(to.y - from.y);
    Side s = {from, to, 0, 0};
    if (wide >= high ? from.x > to.x : from.y > to.y) s.from = to, s.to = from;
    int64_t left = from.x < to.x ? from.x : to.x, right = from.x < to.x ? to.x : from.x;
    s.first = left > 2 ? (left + 2) / FINE : 0;
    s.last = right < 3 ? -1 : (right - 3) / FINE;
    if (s.last > width - 1) s.last = width - 1;
    return s;
}

INLINE int64_t rounded(int64_t start, double slope, int64_t step) { return (int64_t)((double)start + slope * (double)step + 0.5); }

/* Return the upper one of the two cells between which a side crosses the middle of a column. */
INLINE int64_t crossing(const Side *s, int64_t column) {
    int64_t wide = llabs(s->to.x - s->from.x), high = llabs(s->to.y - s->from.y), left = FINE * column + 2;
    if (wide >= high) {
        double slope = (double)(s->to.y - s->from.y) / (double)wide;
        int64_t here = rounded(s->from.y, slope, left - s->from.x), there = rounded(s->from.y, slope, left + 1 - s->from.x);
        return here < there ? here : there;
    }
    double slope = (double)(s->to.x - s->from.x) / (double)high;
    int64_t step = (int64_t)(((double)(left - s->from.x) + 0.5) / slope); /* an estimate; rounding may differ by some steps */
    step = step < 1 ? 1 : step > high ? high : step;
    if (slope > 0) {
        while (step < high && rounded(s->from.x, slope, step) <= left) step++;
        while (step > 1 && rounded(s->from.x, slope, step - 1) > left) step--;
    } else {
        while (step < high && rounded(s->from.x, slope, step) > left) step++;
        while (step > 1 && rounded(s->from.x, slope, step - 1) <= left) step--;
    }
    return s->from.y + step - 1;
}

/* Write the number of columns that the sides of each polygon cross. Polygon p has the corners
   corners[p] ... corners[p + 1], x and y each. */
EXPORT void polygons_crossings(const double *points, const int64_t *corners, ptrdiff_t width, int64_t *crossings, ptrdiff_t first,
                               ptrdiff_t end) {
    for (ptrdiff_t polygon = first; polygon < end; polygon++) {
        crossings[polygon] = 0;
        for (int64_t i = corners[polygon]; i < corners[polygon + 1]; i++) {
            Side s = side(points + 2 * i, points + 2 * (i + 1 < corners[polygon + 1] ? i + 1 : corners[polygon]), width);
            if (s.last >= s.first) crossings[polygon] += s.last - s.first + 1;
        }
    }
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Write 2 * pixel for the start of each run inside a polygon, and 2 * pixel + 1 for its end; return how many there are. */
static ptrdiff_t changes(const double *points, int64_t first, int64_t end, ptrdiff_t height, ptrdiff_t width, int64_t *out) {
    ptrdiff_t count = 0;
    for (int64_t i = first; i < end; i++) {
        Side s = side(points + 2 * i, points + 2 * (i + 1 < end ? i + 1 : first), width);
        for (int64_t column = s.first; column <= s.last; column++) {
            int64_t y = crossing(&s, column), row = y <= 2 ? 0 : (y + 2) / FINE; /* the first pixel whose middle is not above */
            out[count++] = column * height + (row < height ? row : height);
        }
    }
    qsort(out, (size_t)count, sizeof(int64_t), compare);
    for (ptrdiff_t i = 0; i < count; i++) out[i] = 2 * out[i] + i % 2;
    return count;
}

/* Write the run lengths of masks, each the union of its polygons: mask i has the polygons parts[i] ... parts[i + 1]. Scratch has one
   element per crossing of a mask's polygons; a result has at most one more. */
EXPORT void polygons_draw(const double *points, const int64_t *corners, const int64_t *parts, ptrdiff_t height, ptrdiff_t width,
                          int32_t *out, const int64_t *starts, int64_t *needed, int64_t *scratch, ptrdiff_t first,
                          ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Writer w = writer(out + starts[mask], starts[mask + 1] - starts[mask]);
        ptrdiff_t count = 0;
        int64_t depth = 0, from = 0;
        for (int64_t part = parts[mask]; part < parts[mask + 1]; part++)
            count += changes(points, corners[part], corners[part + 1], height, width, scratch + count);
        if (parts[mask + 1] - parts[mask] > 1) qsort(scratch, (size_t)count, sizeof(int64_t), compare);
        for (ptrdiff_t i = 0; i < count; i++) {
            int64_t pixel = scratch[i] / 2;
            if (scratch[i] % 2 == 0 && depth++ == 0) from = pixel;
            if (scratch[i] % 2 && --depth == 0 && pixel > from) write_stretch(&w, from, pixel);
        }
        needed[mask] = write_end(&w, (int64_t)height * width);
    }
}
