/* The steps of a plan in the vectors of lanes_portable.h. */

#include <math.h>
#include <stdlib.h>

#include "internal.h"
#include "lanes_portable.h"
#include "parallel.h"
#include "steps.h"

#include "lanes_math.h"
#include "planes.h"
#include "striped.h"

const step_run_t portable_steps[STEPS] = {
    [STEP_PRODUCT] = portable_product,
    [STEP_CONV] = portable_conv,
    PLANES_STEPS,
};

