/* Every function of the C library over random and hostile arrays, each in memory of exactly its size: built with sanitizers, this
   must end in silence. What callers promise (indices within arrays, positions that never go back) is kept; nothing else is. */
#include <stdio.h>
#include <stdlib.h>

#include "runs.h"

static uint64_t state;

static uint64_t next(void) { /* xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}
static ptrdiff_t whole(ptrdiff_t first, ptrdiff_t end) { return first + (ptrdiff_t)(next() % (uint64_t)(end - first)); }
static double uniform(void) { return (double)(next() >> 11) / 9007199254740992.0; }

/* Return a number that is mostly near 0 ... size, sometimes none at all. */
static double place(double size) {
    static const double strange[] = {0, -0.0, NAN, INFINITY, -INFINITY, 1e30, -1e30, 1e300, -1e300, 2147483648.0, 1e9, -1e9, 1e-40};
    return whole(0, 12) ? (uniform() * 1.6 - 0.3) * size : strange[whole(0, (ptrdiff_t)(sizeof strange / sizeof *strange))];
}

static void *kept[256];
static int used;

static void *array(ptrdiff_t count, size_t size) {
    void *made = calloc(1, (size_t)count * size ? (size_t)count * size : 1);
    if (!made || used == 256) exit(3);
    if (count == 0) made = realloc(made, 1);
    return kept[used++] = made;
}
#define ARRAY(type, count) ((type *)array(count, sizeof(type)))

static void forget(void) {
    while (used) free(kept[--used]);
}

#define FILLED(type)                                                      \
    static type *filled_##type(ptrdiff_t count, double size) {            \
        type *made = ARRAY(type, count);                                  \
        for (ptrdiff_t i = 0; i < count; i++) made[i] = (type)place(size); \
        return made;                                                      \
    }
FILLED(float)
FILLED(double)

static uint8_t *bits(ptrdiff_t count) {
    uint8_t *made = ARRAY(uint8_t, count);
    ptrdiff_t often = whole(1, 20);
    for (ptrdiff_t i = 0; i < count; i++) made[i] = (uint8_t)(whole(0, 20) < often);
    return made;
}

/* Return numbers that never go back, from 0 up to `greatest`. */
#define RISING(type)                                                                                \
    static type *rising_##type(ptrdiff_t count, ptrdiff_t greatest) {                                \
        type *made = ARRAY(type, count);                                                            \
        ptrdiff_t at = 0;                                                                           \
        for (ptrdiff_t i = 0; i < count; i++) {                                                     \
            if (whole(0, 3)) at += whole(0, 1 + greatest / (count + 1) + (whole(0, 9) ? 1 : greatest)); \
            if (at > greatest) at = greatest;                                                       \
            made[i] = (type)at;                                                                     \
        }                                                                                           \
        return made;                                                                                \
    }
RISING(int64_t)
RISING(int32_t)

static int64_t *starts(ptrdiff_t items, ptrdiff_t most) {
    int64_t *made = ARRAY(int64_t, items + 1);
    for (ptrdiff_t i = 0; i < items; i++) made[i + 1] = made[i] + whole(0, most + 1);
    return made;
}

/* Call something for two ranges that make up all items. */
#define IN_RANGES(items, call)                    \
    do {                                          \
        ptrdiff_t first = 0, end = whole(0, (items) + 1); \
        call;                                     \
        first = end, end = (items);               \
        call;                                     \
    } while (0)

/* attention.c */
typedef struct {
    const int64_t *shapes;
    ptrdiff_t cells, queries, heads, width, levels, points;
} Levels;

#define ATTENTION(type, suffix)                                                                                          \
    void deformable_attention_##suffix(const type *, const type *, const type *, type *, const Levels *, ptrdiff_t, ptrdiff_t); \
    void deformable_attention_backward_##suffix(const type *, const type *, const type *, const type *, type *, type *,   \
                                                type *, const Levels *, ptrdiff_t, ptrdiff_t);                            \
    static void attention_##suffix(void) {                                                                               \
        Levels z = {0, 0, whole(0, 5), whole(1, 4), whole(1, 80), whole(0, 4), whole(0, 4)};                              \
        int64_t *shapes = ARRAY(int64_t, 2 * z.levels);                                                                  \
        for (ptrdiff_t i = 0; i < z.levels; i++) {                                                                       \
            shapes[2 * i] = whole(0, 6), shapes[2 * i + 1] = whole(0, 6);                                                \
            z.cells += shapes[2 * i] * shapes[2 * i + 1];                                                                \
        }                                                                                                                \
        z.shapes = shapes;                                                                                               \
        ptrdiff_t batch = whole(0, 3), values = batch * z.cells * z.heads * z.width, rows = batch * z.queries * z.heads;   \
        ptrdiff_t samples = rows * z.levels * z.points;                                                                  \
        type *value = filled_##type(values, 1), *locations = filled_##type(2 * samples, 1);                              \
        type *weights = filled_##type(samples, 1), *out = ARRAY(type, rows * z.width);                                   \
        IN_RANGES(batch * z.queries, deformable_attention_##suffix(value, locations, weights, out, &z, first, end));      \
        type *of_value = ARRAY(type, values), *of_locations = ARRAY(type, 2 * samples), *of_weights = ARRAY(type, samples); \
        IN_RANGES(batch * z.heads, deformable_attention_backward_##suffix(value, locations, weights, out, of_value,       \
                                                                          of_locations, of_weights, &z, first, end));     \
    }
ATTENTION(float, f32)
ATTENTION(double, f64)

/* instance_transformer.c: what features, values, rows, columns, row_in, column_in, mixing and output point at, and the gradients' four */
typedef struct {
    ptrdiff_t instances, height, width, channels, heads, points;
} Instances;

#define INSTANCES(type, suffix)                                                                                         \
    void instance_transformer_##suffix(void *const *, type *, const Instances *, ptrdiff_t, ptrdiff_t);                   \
    void instance_transformer_backward_##suffix(void *const *, const type *, void *const *, ptrdiff_t, const Instances *, \
                                                ptrdiff_t, ptrdiff_t);                                                    \
    static void instances_##suffix(void) {                                                                              \
        ptrdiff_t heads = whole(1, 5), each = 2 * whole(1, 4);                                                           \
        Instances z = {whole(0, 4), whole(1, 6), whole(1, 6), heads * each, heads, whole(1, 5)};                         \
        ptrdiff_t map = z.height * z.width * z.channels, half = z.channels / 2, n = z.instances;                         \
        ptrdiff_t mixing = n * (z.channels + 1) * 3 * heads * z.points, output = n * (z.channels + 1);                   \
        void *in[] = {filled_##type(map, 1),        filled_##type(map, 1),                                               \
                      filled_##type(n * 2 * z.height * half, 1), filled_##type(n * 2 * z.width * half, 1),               \
                      bits(z.height),               bits(z.width),                                                       \
                      filled_##type(mixing, 2),     filled_##type(output, 1)};                                           \
        type *logits = ARRAY(type, n * z.height * z.width);                                                              \
        IN_RANGES(n, instance_transformer_##suffix(in, logits, &z, first, end));                                          \
        ptrdiff_t groups = n < 2 ? n : 2;                                                                                \
        void *to[] = {ARRAY(type, groups * map), ARRAY(type, groups * map), ARRAY(type, mixing), ARRAY(type, output)};   \
        IN_RANGES(groups, instance_transformer_backward_##suffix(in, logits, to, groups, &z, first, end));               \
    }
INSTANCES(float, f32)
INSTANCES(double, f64)

/* runs.c */
void runs_encode(const uint8_t *, ptrdiff_t, ptrdiff_t, int32_t *, const int64_t *, int64_t *, uint8_t *, ptrdiff_t, ptrdiff_t);
void runs_view(const View *, int32_t *, const int64_t *, int64_t *, ptrdiff_t, ptrdiff_t);
void runs_draw(const View *, uint8_t *, ptrdiff_t, ptrdiff_t);
void runs_measure(const int32_t *, const int64_t *, ptrdiff_t, int64_t *, ptrdiff_t, ptrdiff_t);
void runs_to_text(const int32_t *, const int64_t *, char *, int64_t *, ptrdiff_t, ptrdiff_t);
ptrdiff_t runs_from_text(const char *, ptrdiff_t, int32_t *);

static int32_t length(ptrdiff_t pixels) {
    static const int32_t strange[] = {0, 0, -1, -7, INT32_MAX, INT32_MIN, 1000000};
    return whole(0, 10) ? (int32_t)whole(0, 2 + pixels / 4) : strange[whole(0, 7)];
}

/* Return a view of masks whose run lengths fit nothing. */
static View view(ptrdiff_t masks, ptrdiff_t rows, ptrdiff_t width) {
    ptrdiff_t height = whole(0, 20), columns = whole(1, 20);
    int64_t *begin = starts(masks, 30), *shown = ARRAY(int64_t, width), *above = rising_int64_t(height + 1, rows);
    int32_t *counts = ARRAY(int32_t, begin[masks]);
    for (ptrdiff_t i = 0; i < begin[masks]; i++) counts[i] = length(height * columns);
    for (ptrdiff_t x = 0; x < width; x++) shown[x] = whole(-1, columns);
    View made = {counts, begin, above, shown, height, rows, width};
    return made;
}

static void runs(void) {
    ptrdiff_t masks = whole(0, 4), height = whole(0, 20), width = whole(0, 150);
    uint8_t *pixels = bits(masks * height * width), *scratch = ARRAY(uint8_t, 64 * height);
    int64_t *room = starts(masks, 40), *needed = ARRAY(int64_t, masks), *measured = ARRAY(int64_t, 5 * masks);
    int32_t *out = ARRAY(int32_t, room[masks]);
    IN_RANGES(masks, runs_encode(pixels, height, width, out, room, needed, scratch, first, end));
    View seen = view(masks, whole(0, 20), whole(0, 20));
    IN_RANGES(masks, runs_view(&seen, out, room, needed, first, end));
    uint8_t *drawn = ARRAY(uint8_t, masks * seen.width * seen.rows);
    IN_RANGES(masks, runs_draw(&seen, drawn, first, end));
    IN_RANGES(masks, runs_measure(seen.counts, seen.starts, seen.height, measured, first, end));
    char *text = ARRAY(char, 7 * seen.starts[masks]);
    IN_RANGES(masks, runs_to_text(seen.counts, seen.starts, text, needed, first, end));
    for (ptrdiff_t i = 0; i < masks; i++) {
        int32_t *read = ARRAY(int32_t, needed[i]);
        ptrdiff_t found = runs_from_text(text + 7 * seen.starts[i], needed[i], read), same = seen.starts[i + 1] - seen.starts[i];
        if (found != same || memcmp(read, seen.counts + seen.starts[i], (size_t)same * sizeof *read)) exit(4);
    }
    ptrdiff_t letters = whole(0, 30);
    char *nonsense = ARRAY(char, letters);
    for (ptrdiff_t i = 0; i < letters; i++) nonsense[i] = (char)(whole(0, 40) ? whole('0', 'p') : whole(-128, 128));
    if (runs_from_text(nonsense, letters, ARRAY(int32_t, letters)) > letters) exit(5);
}

/* polygons.c */
void polygons_crossings(const double *, const int64_t *, ptrdiff_t, int64_t *, ptrdiff_t, ptrdiff_t);
void polygons_draw(const double *, const int64_t *, const int64_t *, ptrdiff_t, ptrdiff_t, int32_t *, const int64_t *, int64_t *,
                   int64_t *, ptrdiff_t, ptrdiff_t);

static void polygons(void) {
    ptrdiff_t masks = whole(0, 4), height = whole(0, 30), width = whole(0, 30), most = 0;
    int64_t *parts = starts(masks, 3), *corners = starts(parts[masks], 6), *crossings = ARRAY(int64_t, parts[masks]);
    double *points = filled_double(2 * corners[parts[masks]], 30);
    IN_RANGES(parts[masks], polygons_crossings(points, corners, width, crossings, first, end));
    int64_t *room = ARRAY(int64_t, masks + 1), *needed = ARRAY(int64_t, masks);
    for (ptrdiff_t i = 0; i < masks; i++) {
        ptrdiff_t of_mask = 0;
        for (int64_t part = parts[i]; part < parts[i + 1]; part++) of_mask += crossings[part];
        room[i + 1] = room[i] + of_mask + 1;
        if (of_mask > most) most = of_mask;
    }
    int32_t *out = ARRAY(int32_t, room[masks]);
    int64_t *scratch = ARRAY(int64_t, most);
    IN_RANGES(masks, polygons_draw(points, corners, parts, height, width, out, room, needed, scratch, first, end));
    for (ptrdiff_t i = 0; i < masks; i++)
        if (needed[i] > room[i + 1] - room[i]) exit(6);
}

/* fields.c */
typedef int64_t Part[8]; /* cells, apart, row, column, top, bottom, left, right */
void fields_resize(const float *, const Part *, const int32_t *, const int32_t *, const float *, const float *, const int32_t *,
                   const int32_t *, const float *, const float *, float *, const int64_t *, float *, ptrdiff_t, ptrdiff_t);
void fields_cut(const float *, const Part *, const int32_t *, const int32_t *, const float *, const float *, const int32_t *,
                const int32_t *, const float *, const float *, const float *, ptrdiff_t, ptrdiff_t, int32_t *, const int64_t *,
                int64_t *, float *, ptrdiff_t, ptrdiff_t);
void fields_paste(const float *, const double *, ptrdiff_t, const float *, ptrdiff_t, ptrdiff_t, int32_t *, const int64_t *,
                  int64_t *, float *, ptrdiff_t, ptrdiff_t);

/* Cut the part of a field [height width] that is needed to make a part of the image. */
static void part(Part p, int64_t *cells, ptrdiff_t size[2], const int32_t *low[2], const int32_t *high[2]) {
    ptrdiff_t source[2];
    for (int axis = 0; axis < 2; axis++) {
        ptrdiff_t first = whole(0, size[axis] + 1), end = whole(first, size[axis] + 1);
        p[4 + 2 * axis] = first, p[5 + 2 * axis] = end;
        p[2 + axis] = end > first ? low[axis][first] : 0;
        source[axis] = end > first ? high[axis][end - 1] + 1 - p[2 + axis] : 0;
    }
    p[0] = *cells, p[1] = source[1];
    *cells += source[0] * source[1];
}

static void fields(void) {
    ptrdiff_t count = whole(0, 4), source[2] = {whole(1, 12), whole(1, 12)}, size[2] = {whole(0, 40), whole(0, 40)};
    const int32_t *low[2], *high[2];
    const float *near[2], *far[2];
    for (int axis = 0; axis < 2; axis++) {
        int32_t *from = rising_int32_t(size[axis], source[axis] - 1), *to = ARRAY(int32_t, size[axis]);
        for (ptrdiff_t i = 0; i < size[axis]; i++) to[i] = from[i] + 1 < source[axis] ? from[i] + 1 : from[i];
        low[axis] = from, high[axis] = to, near[axis] = filled_float(size[axis], 1), far[axis] = filled_float(size[axis], 1);
    }
    Part *parts = ARRAY(Part, count);
    int64_t *to = ARRAY(int64_t, count + 1), *room = starts(count, 40), *needed = ARRAY(int64_t, count), cells = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        part(parts[i], &cells, size, low, high);
        to[i + 1] = to[i] + (parts[i][5] - parts[i][4]) * (parts[i][7] - parts[i][6]);
    }
    float *field = filled_float(cells, 1), *made = ARRAY(float, to[count]), *bound = filled_float(1, 1);
    float *scratch = ARRAY(float, source[1]);
    int32_t *out = ARRAY(int32_t, room[count]);
    IN_RANGES(count, fields_resize(field, parts, low[0], high[0], near[0], far[0], low[1], high[1], near[1], far[1], made, to, scratch,
                                   first, end));
    scratch = ARRAY(float, 5 * size[0]);
    IN_RANGES(count, fields_cut(field, parts, low[0], high[0], near[0], far[0], low[1], high[1], near[1], far[1], bound, size[0],
                                size[1], out, room, needed, scratch, first, end));
    ptrdiff_t side = whole(1, 20);
    float *squares = filled_float(count * side * side, 1);
    double *boxes = filled_double(4 * count, 40);
    scratch = ARRAY(float, 7 * size[0] + 4 * size[1]);
    IN_RANGES(count, fields_paste(squares, boxes, side, bound, size[0], size[1], out, room, needed, scratch, first, end));
}

/* targets.c */
void targets_crop(const View *, const double *, ptrdiff_t, uint8_t *, uint8_t *, int32_t *, ptrdiff_t, ptrdiff_t);
void targets_resize(const View *, const View *, const float *, const float *, const float *, const float *, float *, uint8_t *,
                    ptrdiff_t, ptrdiff_t);
void targets_resize_opencv(const View *, const View *, const int32_t *, const int32_t *, const int32_t *, const int32_t *,
                           uint8_t *, uint8_t *, ptrdiff_t, ptrdiff_t);

static void targets(void) {
    ptrdiff_t masks = whole(0, 4), bins = whole(1, 20), rows = whole(0, 20), width = whole(0, 20);
    View seen = view(masks, rows, width), far = seen;
    double *boxes = filled_double(4 * masks, 25);
    uint8_t *crops = ARRAY(uint8_t, masks * bins * bins), *pixels = ARRAY(uint8_t, rows * width);
    int32_t *places = ARRAY(int32_t, rows + 3 * bins + 1);
    IN_RANGES(masks, targets_crop(&seen, boxes, bins, crops, pixels, places, first, end));
    far.above = rising_int64_t(seen.height + 1, rows);
    uint8_t *scratch = ARRAY(uint8_t, 4 * rows), *quarters = ARRAY(uint8_t, masks * rows * width);
    float *means = ARRAY(float, masks * rows * width), *of_rows = filled_float(rows, 1), *of_columns = filled_float(width, 1);
    IN_RANGES(masks, targets_resize(&seen, &far, of_rows, of_rows, of_columns, of_columns, means, scratch, first, end));
    int32_t *row_weights = rising_int32_t(rows, 2048), *column_weights = rising_int32_t(width, 2048);
    IN_RANGES(masks, targets_resize_opencv(&seen, &far, row_weights, row_weights, column_weights, column_weights, quarters, scratch,
                                           first, end));
}

int main(int arguments, char **argument) {
    static void (*const each[])(void) = {attention_f32, attention_f64, instances_f32, instances_f64, runs, polygons, fields, targets};
    int rounds = arguments > 1 ? atoi(argument[1]) : 100;
    for (int round = 0; round < rounds; round++)
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
            state = 0x9E3779B97F4A7C15u * (uint64_t)(round + 1) ^ (i + 1); /* so that a round can be repeated alone */
            each[i]();
            forget();
        }
    printf("%d rounds\n", rounds);
    return 0;
}
