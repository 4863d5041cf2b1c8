/* A plan's steps, one after the other. */
#include "internal.h"
#include "parallel.h"
#include "steps.h"

/* -1: a step of no known kind; -2: out of memory. */
__attribute__((visibility("default"))) int prunella_plan(const step_t *const *steps, int64_t count, int threads) {
    const step_run_t *run = prunella_isa_in_use()->steps;
    threads = usable(threads);
    for (int64_t i = 0; i < count; i++) {
        if (steps[i]->kind < 0 || steps[i]->kind >= STEPS || !run[steps[i]->kind]) return -1;
        const int code = run[steps[i]->kind](steps[i], threads);
        if (code) return code;
    }
    return 0;
}
