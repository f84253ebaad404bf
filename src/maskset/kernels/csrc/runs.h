/* Reading and writing run lengths; maskset/rle.py describes them.

   The values of run lengths need no check: a negative one counts as 0, runs beyond the pixels of a mask are ignored, and pixels
   without a run are background. An image has fewer than 2^31 pixels. */
#ifndef RUNS_H
#define RUNS_H

#include "maskset.h"
#include <string.h>

/* A selection of whole rows and columns of masks, as flips, crops and nearest-neighbor scaling make. */
typedef struct {
    const int32_t *counts;  /* of all masks, concatenated */
    const int64_t *starts;  /* [masks + 1] where the counts of each begin */
    const int64_t *above;   /* [height + 1] above[y]: number of rows of the view that come from mask rows before y */
    const int64_t *columns; /* [columns of the view] which column of the mask it is; -1: background */
    ptrdiff_t height;       /* of the masks */
    ptrdiff_t rows, width;  /* of the view */
} View;

/* A position in the run lengths of one mask that moves in both directions. */
typedef struct {
    const int32_t *counts;
    ptrdiff_t number, run;
    int64_t start; /* the first pixel of the run */
} Cursor;

INLINE Cursor cursor(const View *view, ptrdiff_t mask) {
    Cursor at = {view->counts + view->starts[mask], view->starts[mask + 1] - view->starts[mask], 0, 0};
    return at;
}

INLINE int64_t run_length(const Cursor *at, ptrdiff_t run) { return at->counts[run] > 0 ? at->counts[run] : 0; }

/* Go to the run that holds a pixel. */
INLINE void seek(Cursor *at, int64_t pixel) {
    while (at->start > pixel) at->start -= run_length(at, --at->run);
    while (at->run < at->number && at->start + run_length(at, at->run) <= pixel) at->start += run_length(at, at->run++);
}

/* Find the next set rows of a column of the view, *from up to *to; return 0 when there are no more. The search continues at *pixel,
   which is moved; `bottom` is the end of the column. */
INLINE int next_stretch(Cursor *at, const View *view, int64_t *pixel, int64_t bottom, ptrdiff_t *from, ptrdiff_t *to) {
    while (*pixel < bottom) {
        seek(at, *pixel);
        if (at->run >= at->number) return 0;
        int64_t top = bottom - view->height, stop = at->start + run_length(at, at->run);
        if (stop > bottom) stop = bottom;
        *from = view->above[*pixel - top], *to = view->above[stop - top];
        *pixel = stop;
        if (at->run % 2 && *from < *to) return 1;
    }
    return 0;
}

/* Writes run lengths from stretches of set pixels in order. Counts that do not fit are counted, not written. */
typedef struct {
    int32_t *out;
    ptrdiff_t room, needed;
    int64_t written;  /* sum of the counts so far, pixels */
    int64_t from, to; /* the last stretch, not written yet, because the next one may touch it */
} Writer;

INLINE Writer writer(int32_t *out, ptrdiff_t room) {
    Writer w = {out, room, 0, 0, 0, 0};
    return w;
}

INLINE void write_count(Writer *w, int64_t end) {
    if (w->needed < w->room) w->out[w->needed] = (int32_t)(end - w->written);
    w->needed++;
    w->written = end;
}

INLINE void write_last(Writer *w) {
    if (w->to > w->from) write_count(w, w->from), write_count(w, w->to);
}

INLINE void write_stretch(Writer *w, int64_t from, int64_t to) {
    if (from != w->to || w->to == w->from) {
        write_last(w);
        w->from = from;
    }
    w->to = to;
}

/* Return how many counts there are. */
INLINE ptrdiff_t write_end(Writer *w, int64_t pixels) {
    write_last(w);
    if (w->written < pixels) write_count(w, pixels);
    return w->needed;
}

/* Return the first of `length` bytes from y on that is not `value`, which like all of them is 0 or 1. */
INLINE ptrdiff_t skip(const uint8_t *bytes, ptrdiff_t y, ptrdiff_t length, uint8_t value) {
    const uint64_t eight = value * UINT64_C(0x0101010101010101);
    for (uint64_t word; y + 8 <= length; y += 8) {
        memcpy(&word, bytes + y, 8);
        if (word != eight) break;
    }
    while (y < length && bytes[y] == value) y++;
    return y;
}

/* Write the stretches of ones in the bytes of a column, the first of which is pixel `at` of the image. */
INLINE void write_column(Writer *w, const uint8_t *bytes, ptrdiff_t length, int64_t at) {
    for (ptrdiff_t from = skip(bytes, 0, length, 0), to; from < length; from = skip(bytes, to, length, 0)) {
        to = skip(bytes, from, length, 1);
        write_stretch(w, at + from, at + to);
    }
}

#endif
