/* All steps but sparse products and convolutions, for the instruction set whose lanes_*.h was included before. */
enum { SMALL = 1 << 14 }; /* numbers that are no work for a second thread */

#include "planes_attend.h"
#include "planes_maps.h"
#include "planes_norm.h"
#include "planes_pack.h"
#include "planes_window.h" /* which these two need */
#include "planes_depthwise.h"
#include "planes_pool.h"

#define PLANES_STEPS                                                                                              \
    [STEP_DEPTHWISE] = NAME(depthwise), [STEP_POOL] = NAME(pool), [STEP_MEAN] = NAME(mean),                       \
    [STEP_SCALE] = NAME(scale), [STEP_ADD] = NAME(add), [STEP_MAP] = NAME(map), [STEP_NORM] = NAME(norm),         \
    [STEP_ATTEND] = NAME(attend), [STEP_PACK] = NAME(pack), [STEP_UNPACK] = NAME(unpack)
