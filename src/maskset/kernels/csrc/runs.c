/* Run lengths: encoding, decoding, views, boxes and areas, and COCO's compressed text. Items are masks.

   The output of mask i has room for `starts[i + 1] - starts[i]` counts from `starts[i]` on; `needed[i]` receives their number. If
   that is more, the others are missing, and the caller repeats the call with more room. */
#include "runs.h"

#define BLOCK 64 /* columns that are transposed at a time */

/* Write the run lengths of masks [T height width] of 0 and 1. Scratch has BLOCK * height bytes. */
FAST EXPORT void runs_encode(const uint8_t *masks, ptrdiff_t height, ptrdiff_t width, int32_t *out, const int64_t *starts,
                             int64_t *needed, uint8_t *scratch, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Writer w = writer(out + starts[mask], starts[mask + 1] - starts[mask]);
        for (ptrdiff_t left = 0; left < width; left += BLOCK) {
            const uint8_t *pixels = masks + mask * height * width + left;
            ptrdiff_t columns = width - left < BLOCK ? width - left : BLOCK;
            ptrdiff_t top = 0, bottom = height;
            while (top < bottom && skip(pixels + top * width, 0, columns, 0) == columns) top++;
            while (top < bottom && skip(pixels + (bottom - 1) * width, 0, columns, 0) == columns) bottom--;
            ptrdiff_t rows = bottom - top;
            for (ptrdiff_t y = 0; y < rows; y++)
                for (ptrdiff_t x = 0; x < columns; x++) scratch[x * rows + y] = pixels[(top + y) * width + x] != 0;
            for (ptrdiff_t x = 0; x < columns; x++) write_column(&w, scratch + x * rows, rows, (left + x) * height + top);
        }
        needed[mask] = write_end(&w, (int64_t)height * width);
    }
}

/* Write the run lengths of the masks in a view. */
EXPORT void runs_view(const View *view, int32_t *out, const int64_t *starts, int64_t *needed, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Writer w = writer(out + starts[mask], starts[mask + 1] - starts[mask]);
        Cursor at = cursor(view, mask);
        for (ptrdiff_t x = 0, from, to; x < view->width; x++) {
            if (view->columns[x] < 0) continue;
            int64_t pixel = view->columns[x] * view->height, bottom = pixel + view->height;
            while (next_stretch(&at, view, &pixel, bottom, &from, &to))
                write_stretch(&w, x * view->rows + from, x * view->rows + to);
        }
        needed[mask] = write_end(&w, (int64_t)view->rows * view->width);
    }
}

/* Write 1 for the set pixels of a view into pixels [T width rows], which are 0 before. */
EXPORT void runs_draw(const View *view, uint8_t *pixels, ptrdiff_t first, ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        Cursor at = cursor(view, mask);
        for (ptrdiff_t x = 0, from, to; x < view->width; x++) {
            if (view->columns[x] < 0) continue;
            int64_t pixel = view->columns[x] * view->height, bottom = pixel + view->height;
            uint8_t *column = pixels + (mask * view->width + x) * view->rows;
            while (next_stretch(&at, view, &pixel, bottom, &from, &to)) memset(column + from, 1, (size_t)(to - from));
        }
    }
}

/* Write x0 y0 x1 y1 (both ends exclusive; zeros if nothing is set) and the area of each mask into measures [T 5]. */
EXPORT void runs_measure(const int32_t *counts, const int64_t *starts, ptrdiff_t height, int64_t *measures, ptrdiff_t first,
                         ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        int64_t *box = measures + 5 * mask, start = 0, area = 0, left = 0, right = 0, top = height, bottom = 0;
        for (int64_t run = starts[mask]; run < starts[mask + 1] && height > 0; run++) {
            int64_t length = counts[run] > 0 ? counts[run] : 0, last = start + length - 1;
            if ((run - starts[mask]) % 2 && length) {
                int wraps = start / height != last / height; /* it continues in the next column, so it touches bottom and top */
                int64_t from = wraps ? 0 : start % height, to = wraps ? height : last % height + 1;
                if (!area) left = start / height;
                right = last / height + 1;
                if (from < top) top = from;
                if (to > bottom) bottom = to;
                area += length;
            }
            start += length;
        }
        box[0] = left, box[1] = area ? top : 0, box[2] = right, box[3] = bottom, box[4] = area;
    }
}

/* Write COCO's text of each mask from text[7 * starts[mask]] on, which always suffices, and its length. */
EXPORT void runs_to_text(const int32_t *counts, const int64_t *starts, char *text, int64_t *lengths, ptrdiff_t first,
                         ptrdiff_t end) {
    for (ptrdiff_t mask = first; mask < end; mask++) {
        char *to = text + 7 * starts[mask];
        for (int64_t run = starts[mask]; run < starts[mask + 1]; run++) {
            int64_t number = counts[run];
            if (run - starts[mask] > 2) number -= counts[run - 2]; /* neighboring runs have similar lengths */
            for (int more = 1; more;) {
                int group = (int)(number & 31);
                number >>= 5;
                more = number != (group & 16 ? -1 : 0); /* the remaining bits are not only copies of the group's sign bit */
                *to++ = (char)('0' + group + 32 * more);
            }
        }
        lengths[mask] = to - (text + 7 * starts[mask]);
    }
}

/* Read one mask's text into `counts`, which has one element per character of the text. Return the number of counts, or
   -1: invalid character, -2: ends inside a number, -3: a number has more than 32 bits, -4: a run length has more than 32 bits. */
EXPORT ptrdiff_t runs_from_text(const char *text, ptrdiff_t length, int32_t *counts) {
    for (ptrdiff_t i = 0; i < length; i++)
        if (text[i] < '0' || text[i] > 'o') return -1;
    if (length && (text[length - 1] - '0') & 32) return -2;
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < length; count++) {
        int64_t number = 0, unit = 1;
        for (int more = 1, groups = 0; more; unit *= 32) {
            if (groups++ == 7) return -3;
            int group = text[i++] - '0';
            more = group & 32;
            number += (group & 31) * unit;
            if (!more && group & 16) number -= 32 * unit;
        }
        if (count > 2) number += counts[count - 2];
        if (number > INT32_MAX || number < INT32_MIN) return -4;
        counts[count] = (int32_t)number;
    }
    return count;
}
