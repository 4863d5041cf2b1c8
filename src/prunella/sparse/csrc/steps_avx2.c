/* The steps of a plan in the vectors of lanes_avx2.h. */
#if defined(__x86_64__)

#include <math.h>
#include <stdlib.h>

#include "internal.h"
#include "lanes_avx2.h"
#include "parallel.h"
#include "planes.h"
#include "steps.h"

#include "lanes_math.h"
#include "striped.h"

#include "planes_maps.h"
#include "planes_norm.h"
#include "planes_pack.h"
#include "planes_window.h"
#include "planes_attend.h"
#include "planes_depthwise.h"
#include "planes_pool.h"

const step_run_t avx2_steps[STEPS] = {
    [STEP_PRODUCT] = NAME(product),     [STEP_CONV] = NAME(conv),
    [STEP_DEPTHWISE] = NAME(depthwise), [STEP_POOL] = NAME(pool),     [STEP_MEAN] = NAME(mean), [STEP_SCALE] = NAME(scale),
    [STEP_ADD] = NAME(add),             [STEP_MAP] = NAME(map),       [STEP_NORM] = NAME(norm), [STEP_ATTEND] = NAME(attend),
    [STEP_PACK] = NAME(pack),           [STEP_UNPACK] = NAME(unpack),
};

#endif
