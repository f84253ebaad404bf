/* Multi-scale deformable attention, forward and backward. The plain version is maskset/kernels/attention_plain.py. */
#include "maskset.h"

/* Sizes of all tensors. Shapes are height and width of each level; cells of all levels lie one after the other. */
typedef struct {
    const int64_t *shapes;
    ptrdiff_t cells, queries, heads, width, levels, points;
} Sizes;

#define MAX_CHANNELS 64 /* channels that are summed at a time */

#define REAL float
#define NAME(name) name##_f32
#include "attention_body.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_f64
#include "attention_body.h"
