/* The steps of a plan in the vectors of lanes_portable.h. */

#include "internal.h"
#include "lanes_portable.h"
#include "parallel.h"
#include "steps.h"

const step_run_t portable_steps[STEPS] = {0};

