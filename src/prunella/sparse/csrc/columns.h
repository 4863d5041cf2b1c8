/* The jobs of columns.c, which compiles columns_rows.h once for every instruction set. */
#ifndef PRUNELLA_COLUMNS_H
#define PRUNELLA_COLUMNS_H

#include <stdint.h>

enum { LANES = 16 }; /* rows that are swept side by side */

typedef struct {
    float *weight; /* (rows, columns), rows `stride` apart */
    int64_t stride;
    const float *upper; /* [columns / 8][columns][8]: U by strips of 8 columns, zeros below the diagonal */
    uint8_t *mask;      /* (rows, columns), rows `mask_stride` apart: 1 where kept */
    int64_t mask_stride;
    float *errors; /* (columns, rows) */
    int64_t rows, columns;
    int64_t kept, span; /* keep `kept` of every `span` columns, or with span 0 what the mask says */
    const float *scale; /* of each row's grid, or NULL */
    float limit;        /* the largest integer of the grid */
    float *scratch;     /* scratch_size for each thread */
    int64_t scratch_size;
} columns_t;

#endif
