/* Machine code for a pruned weight.
 *
 * Sparse products lose their time in finding the weights: an index to load, an address to make, sums that wait in memory
 * because which rows a column meets is not known before. For a weight that never changes all of that can be written down
 * once, as instructions. The code of BLOCK rows and one strip of columns goes through the columns: it loads the 16 positions
 * of a column (if one of the rows keeps a weight there) and adds, for each kept weight, to the register that holds the row's
 * sums, the weight being spread by the very multiplication:
 *
 *     vmovups      zmm28, [x + 64 j]
 *     vfmadd231ps  zmm3, zmm28, dword [values + 4 k]{1to16}
 *     vfmadd231ps  zmm17, zmm28, dword [values + 4 k + 4]{1to16}
 *
 * So a kept weight costs one instruction of seven bytes and nothing else. The code has no jumps and no addresses of its own:
 * it may be moved. It takes x (columns, 16) in rdi, sums (BLOCK, SUMS) in rsi, of which it changes the first 16 of each row,
 * and the values, in the order in which it needs them, in rdx: the System V convention. Registers: AVX-512, ours to change.
 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */

#include "internal.h"

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__) && !defined(_WIN32)

#include <string.h>
#include <sys/mman.h>

enum { RDX = 2, RSI = 6, RDI = 7 };
enum { LOAD = 0x10, STORE = 0x11, MULADD = 0xb8 };
enum { SHORTEST = -128, LONGEST = 127 }; /* displacements of one byte */

typedef struct {
    uint8_t *code, *end;
} writer_t;

static void put(writer_t *w, const void *bytes, int64_t n) {
    if (w->end - w->code >= n) {
        memcpy(w->code, bytes, (size_t)n);
        w->code += n;
    } else
        w->code = w->end + 1; /* too much: noticed at the end */
}

/* One instruction of AVX-512 with memory at `base` + a displacement: in units of what it reads (64 bytes, or 4 where
 * `spread`) it fills one byte, in bytes otherwise four. */
static void instruction(writer_t *w, int op, int reg, int second, int base, int spread, int64_t units) {
    const int muladd = op == MULADD, r = reg >> 3 & 1, high = reg >> 4 & 1, is_short = units >= SHORTEST && units <= LONGEST;
    uint8_t bytes[10] = {
        0x62,
        (uint8_t)(!r << 7 | 1 << 6 | 1 << 5 | !high << 4 | (muladd ? 2 : 1)),
        (uint8_t)((~second & 15) << 3 | 1 << 2 | (muladd ? 1 : 0)),
        (uint8_t)(2 << 5 | spread << 4 | !(second >> 4 & 1) << 3),
        (uint8_t)op,
        (uint8_t)((is_short ? 1 : 2) << 6 | (reg & 7) << 3 | base),
    };
    const int32_t displacement = (int32_t)(is_short ? units : units * (spread ? 4 : 64));
    memcpy(bytes + 6, &displacement, 4);
    put(w, bytes, is_short ? 7 : 10);
}

static void advance_by(writer_t *w, int base, int32_t bytes) { /* add base, bytes */
    uint8_t code[7] = {0x48, 0x81, (uint8_t)(0xc0 | base)};
    memcpy(code + 3, &bytes, 4);
    put(w, code, 7);
}

/* The code of `rows` rows and `columns` columns of a dense weight whose rows are `stride` apart. Returns how many values it
 * uses, which it puts into `values`. */
static int64_t generate(writer_t *w, const float *dense, int64_t rows, int64_t columns, int64_t stride, float *values) {
    int64_t used = 0, at = SHORTEST, from = SHORTEST;
    advance_by(w, RDX, -4 * SHORTEST);
    advance_by(w, RDI, -64 * SHORTEST);
    for (int64_t i = 0; i < rows; i++) instruction(w, LOAD, (int)i, 0, RSI, 0, i * (CODE_SUMS / 16));
    for (int64_t j = 0; j < columns; j++, from++) {
        int loaded = 0;
        const int x = CODE_ROWS + (int)(j & 3);
        if (from > LONGEST) {
            advance_by(w, RDI, 64 * 256);
            from = SHORTEST;
        }
        for (int64_t i = 0; i < rows; i++) {
            const float value = dense[i * stride + j];
            if (value == 0) continue;
            if (!loaded) instruction(w, LOAD, x, 0, RDI, 0, from);
            loaded = 1;
            if (at > LONGEST) {
                advance_by(w, RDX, 4 * 256);
                at = SHORTEST;
            }
            instruction(w, MULADD, (int)i, x, RDX, 1, at++);
            values[used++] = value;
        }
    }
    for (int64_t i = 0; i < rows; i++) instruction(w, STORE, (int)i, 0, RSI, 0, i * (CODE_SUMS / 16));
    static const uint8_t end[4] = {0xc5, 0xf8, 0x77, 0xc3}; /* vzeroupper, ret */
    put(w, end, 4);
    return used;
}

/* The code of a weight (rows, columns), `group` rows of which make up a group that shares no block with the next, in strips
 * of columns. `where` (blocks, strips, 2) gets, for each, where its code begins in `code` and its values in `values`. Returns
 * how many bytes of code there are, -1 if `size` is too small or an argument makes no sense. */
EXPORT int64_t prunella_generate(
    const float *dense, int64_t rows, int64_t columns, int64_t group, int64_t strip, uint8_t *code, int64_t size,
    float *values, int64_t *where) {
    if (rows < 1 || columns < 1 || group < 1 || rows % group || strip < 1) return -1;
    writer_t w = {code, code + size};
    int64_t used = 0;
    for (int64_t first = 0; first < rows; first += group)
        for (int64_t r = first; r < first + group; r += CODE_ROWS)
            for (int64_t c = 0; c < columns; c += strip) {
                const int64_t high = first + group - r < CODE_ROWS ? first + group - r : CODE_ROWS;
                const int64_t wide = columns - c < strip ? columns - c : strip;
                *where++ = w.code - code;
                *where++ = used;
                used += generate(&w, dense + r * columns + c, high, wide, columns, values + used);
                static const uint8_t nothing[64] = {0};
                put(&w, nothing, (code - w.code) & 63);
                if (w.code > w.end) return -1;
            }
    return w.code - code;
}

/* A copy of code that can be run, and no longer written; NULL where the system does not allow that. */
EXPORT void *prunella_seal(const uint8_t *code, int64_t size) {
    const size_t page = 1 << 21; /* finding small pages takes time in straight code */
    const size_t whole = ((size_t)size + 4095) & ~(size_t)4095;
    uint8_t *memory = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    const size_t ahead = -(uintptr_t)memory & (page - 1);
    if (ahead) munmap(memory, ahead);
    munmap(memory + ahead + whole, page - ahead);
    memory += ahead;
#ifdef MADV_HUGEPAGE
    madvise(memory, whole, MADV_HUGEPAGE);
#endif
    memcpy(memory, code, (size_t)size);
    if (!mprotect(memory, whole, PROT_READ | PROT_EXEC)) return memory;
    munmap(memory, whole);
    return NULL;
}

EXPORT void prunella_unseal(void *memory, int64_t size) { munmap(memory, ((size_t)size + 4095) & ~(size_t)4095); }

#else

EXPORT int64_t prunella_generate(
    const float *dense, int64_t rows, int64_t columns, int64_t group, int64_t strip, uint8_t *code, int64_t size,
    float *values, int64_t *where) {
    (void)dense, (void)rows, (void)columns, (void)group, (void)strip, (void)code, (void)size, (void)values, (void)where;
    return -1;
}

EXPORT void *prunella_seal(const uint8_t *code, int64_t size) {
    (void)code, (void)size;
    return NULL;
}

EXPORT void prunella_unseal(void *memory, int64_t size) { (void)memory, (void)size; }

#endif
