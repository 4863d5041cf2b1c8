/* The steps of a plan in the vectors of lanes_avx2.h. */
#if defined(__x86_64__)

#include <math.h>
#include <stdlib.h>

#include "internal.h"
#include "lanes_avx2.h"
#include "parallel.h"
#include "steps.h"

#include "lanes_math.h"
#include "planes.h"
#include "striped.h"

const step_run_t avx2_steps[STEPS] = {
    [STEP_PRODUCT] = avx2_product,
    [STEP_CONV] = avx2_conv,
    PLANES_STEPS,
};

#endif
