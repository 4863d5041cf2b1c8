/* The steps of a plan in the vectors of lanes_avx512.h. */
#if defined(__x86_64__)

#include "internal.h"
#include "lanes_avx512.h"
#include "parallel.h"
#include "steps.h"

const step_run_t avx512_steps[STEPS] = {0};

#endif
