/* The steps of a plan in the vectors of lanes_avx512.h. */
#if defined(__x86_64__)

#include <math.h>
#include <stdlib.h>

#include "internal.h"
#include "lanes_avx512.h"
#include "parallel.h"
#include "steps.h"

#include "lanes_math.h"
#include "planes.h"
#include "striped.h"

const step_run_t avx512_steps[STEPS] = {
    [STEP_PRODUCT] = avx512_product,
    [STEP_CONV] = avx512_conv,
    PLANES_STEPS,
};

#endif
