/* Work shared out over the threads of the OpenMP runtime that torch has loaded: see parallel.c. */
#ifndef PRUNELLA_PARALLEL_H
#define PRUNELLA_PARALLEL_H

#include <stdint.h>

/* How many of `threads` threads will work: 1 where there is no runtime to borrow them from. */
int usable(int threads);

/* body(job, item, worker) for every item from 0 on, each once. `worker` counts from 0 and stays below `threads`, which
 * `usable` returned; no two items at a time have the same one. */
void parallel_for(void (*body)(const void *job, int64_t item, int worker), const void *job, int64_t items, int threads);

#endif
