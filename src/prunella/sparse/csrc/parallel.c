/* Threads are borrowed from the OpenMP runtime that torch has loaded (`prunella_threads` is given its entry,
 * GOMP_parallel, which LLVM's and Intel's runtimes have too): a second runtime in the same process would keep a
 * second set of threads spinning beside torch's.
 */
#include "parallel.h"

#include <stddef.h>

typedef void (*parallel_t)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_t parallel;

__attribute__((visibility("default"))) void prunella_threads(void *gomp_parallel) {
    parallel = (parallel_t)gomp_parallel;
}

int usable(int threads) { return parallel && threads > 1 ? threads : 1; }

typedef struct {
    void (*body)(const void *, int64_t, int);
    const void *job;
    int64_t items, next;
    int workers;
} share_t;

static void work(void *data) {
    share_t *share = data;
    int me = __atomic_fetch_add(&share->workers, 1, __ATOMIC_RELAXED);
    for (;;) { /* items are handed out one by one: a thread that was interrupted holds nobody up */
        int64_t item = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED);
        if (item >= share->items) return;
        share->body(share->job, item, me);
    }
}

void parallel_for(void (*body)(const void *, int64_t, int), const void *job, int64_t items, int threads) {
    share_t share = {body, job, items, 0, 0};
    if (threads > 1 && items > 1)
        parallel(work, &share, (unsigned)threads, 0);
    else
        work(&share);
}
