/* Machine code for a pruned weight.
 *
 * Sparse products lose their time in finding the weights: an index to load, an address to make, sums that wait in memory
 * because which rows a column meets is not known before. For a weight that never changes all of that can be written down
 * once, as instructions. The code of CODE_ROWS rows and one strip of columns goes through the columns: it loads the 16
 * positions of a column (if one of the rows keeps a weight there) and adds, for each kept weight, to the register that holds
 * the row's sums, the weight being spread by the very multiplication:
 *
 *     vmovups      zmm28, [x + 64 j]
 *     vfmadd231ps  zmm3, zmm28, dword [values + 4 k]{1to16}
 *     vfmadd231ps  zmm17, zmm28, dword [values + 4 k + 4]{1to16}
 *
 * So a kept weight costs one instruction of seven bytes and nothing else. The sums begin with the bias in the first strip
 * and with what lies in y in the others; the last strip adds the residual and cuts off at 0 and 6 where that is the
 * activation. The code has no jumps and no addresses of its own: it may be moved. It is called by the System V convention as
 * code_t says in steps.h; of the registers it changes rax, rdx, rdi, r10 and the vectors.
 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */

#include "internal.h"

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__) && !defined(_WIN32)

#include <string.h>
#include <sys/mman.h>

enum { RAX = 0, RCX = 1, RDX = 2, RSI = 6, RDI = 7 };
enum { SHORTEST = -128, LONGEST = 127 }; /* displacements of one byte */

/* Instructions: the opcode, its map and its prefix, and how many bytes it reads or writes. */
typedef struct {
    uint8_t op, map, prefix, bytes;
} op_t;

static const op_t LOAD = {0x10, 1, 0, 64}, STORE = {0x11, 1, 0, 64}, ADD = {0x58, 1, 0, 64};
static const op_t SPREAD = {0x18, 2, 1, 4}, MULADD = {0xb8, 2, 1, 4}; /* of one float: {1to16} */
static const op_t LARGER = {0x5f, 1, 0, 64}, SMALLER = {0x5d, 1, 0, 64}, XOR = {0xef, 1, 1, 64}, FILL = {0x7c, 2, 1, 64};

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

static void begin(uint8_t bytes[6], op_t op, int reg, int second, int spread, int high, int higher) {
    const int r = reg >> 3 & 1, r2 = reg >> 4 & 1;
    bytes[0] = 0x62;
    bytes[1] = (uint8_t)(!r << 7 | !higher << 6 | !high << 5 | !r2 << 4 | op.map);
    bytes[2] = (uint8_t)((~second & 15) << 3 | 1 << 2 | op.prefix);
    bytes[3] = (uint8_t)(2 << 5 | spread << 4 | !(second >> 4 & 1) << 3);
    bytes[4] = op.op;
}

/* An instruction with memory at `base` + a displacement, in units of what it reads. */
static void memory(writer_t *w, op_t op, int reg, int second, int base, int64_t units) {
    const int is_short = units >= SHORTEST && units <= LONGEST;
    uint8_t bytes[10];
    begin(bytes, op, reg, second, op.op == MULADD.op && op.map == 2, 0, 0);
    bytes[5] = (uint8_t)((is_short ? 1 : 2) << 6 | (reg & 7) << 3 | base);
    const int32_t displacement = (int32_t)(is_short ? units : units * op.bytes);
    memcpy(bytes + 6, &displacement, 4);
    put(w, bytes, is_short ? 7 : 10);
}

/* One with registers alone. */
static void registers(writer_t *w, op_t op, int reg, int second, int third) {
    uint8_t bytes[6];
    begin(bytes, op, reg, second, 0, third >> 3 & 1, third >> 4 & 1);
    bytes[5] = (uint8_t)(3 << 6 | (reg & 7) << 3 | (third & 7));
    put(w, bytes, 6);
}

static void advance_by(writer_t *w, int base, int32_t bytes) { /* add base, bytes */
    uint8_t code[7] = {0x48, 0x81, (uint8_t)(0xc0 | base)};
    memcpy(code + 3, &bytes, 4);
    put(w, code, 7);
}

/* One instruction for each row, with the row's place in memory, from rsi or r9 on and r8 bytes apart. */
static void rows_in_memory(writer_t *w, op_t op, int64_t rows, int residual) {
    static const uint8_t from[2][3] = {{0x48, 0x89, 0xf0}, {0x4c, 0x89, 0xc8}}; /* mov rax, rsi; mov rax, r9 */
    static const uint8_t next[3] = {0x4c, 0x01, 0xc0};                          /* add rax, r8 */
    put(w, from[residual], 3);
    for (int i = 0; i < rows; i++) {
        memory(w, op, i, op.op == ADD.op ? i : 0, RAX, 0);
        if (i + 1 < rows) put(w, next, 3);
    }
}

/* What the last strip does with the sums. */
static void finish(writer_t *w, int64_t rows, int ends) {
    const int zero = CODE_ROWS, six = CODE_ROWS + 1;
    if (ends & CODE_RESIDUAL) rows_in_memory(w, ADD, rows, 1);
    if (ends & (CODE_RELU | CODE_RELU6)) {
        registers(w, XOR, zero, zero, zero);
        for (int i = 0; i < rows; i++) registers(w, LARGER, i, zero, i);
    }
    if (ends & CODE_RELU6) {
        static const uint8_t mov[5] = {0xb8, 0x00, 0x00, 0xc0, 0x40}; /* mov eax, 6.0f */
        put(w, mov, 5);
        registers(w, FILL, six, 0, RAX);
        for (int i = 0; i < rows; i++) registers(w, SMALLER, i, six, i);
    }
}

/* The code of `rows` rows and `columns` columns of a dense weight whose rows are `stride` apart. Returns how many values it
 * uses, which it puts into `values`. */
static int64_t generate(
    writer_t *w, const float *dense, int64_t rows, int64_t columns, int64_t stride, float *values, int first, int last,
    int ends) {
    static const uint8_t fetch[5] = {0x4c, 0x8b, 0x54, 0x24, 0x08}; /* mov r10, [rsp + 8] */
    static const uint8_t next[3] = {0x4c, 0x01, 0xd7};              /* add rdi, r10 */
    const int apart = ends & CODE_APART;
    int64_t used = 0, at = SHORTEST, from = SHORTEST;
    advance_by(w, RDX, -4 * SHORTEST);
    if (apart)
        put(w, fetch, 5);
    else
        advance_by(w, RDI, -64 * SHORTEST);
    if (first)
        for (int i = 0; i < rows; i++) memory(w, SPREAD, i, 0, RCX, i);
    else
        rows_in_memory(w, LOAD, rows, 0);
    for (int64_t j = 0; j < columns; j++, from++) {
        int loaded = 0;
        const int x = CODE_ROWS + (int)(j & 3);
        if (apart) {
            if (j) put(w, next, 3);
        } else if (from > LONGEST) {
            advance_by(w, RDI, 64 * 256);
            from = SHORTEST;
        }
        for (int64_t i = 0; i < rows; i++) {
            const float value = dense[i * stride + j];
            if (value == 0) continue;
            if (!loaded) memory(w, LOAD, x, 0, RDI, apart ? 0 : from);
            loaded = 1;
            if (at > LONGEST) {
                advance_by(w, RDX, 4 * 256);
                at = SHORTEST;
            }
            memory(w, MULADD, (int)i, x, RDX, at++);
            values[used++] = value;
        }
    }
    if (last) finish(w, rows, ends);
    rows_in_memory(w, STORE, rows, 0);
    static const uint8_t end[4] = {0xc5, 0xf8, 0x77, 0xc3}; /* vzeroupper, ret */
    put(w, end, 4);
    return used;
}

/* The code of a weight (rows, columns), `group` rows of which make up a group that shares no block with the next, in strips
 * of columns; ends: CODE_... of steps.h. `where` (blocks, strips, 2) gets, for each, where its code begins in `code` and its
 * values in `values`. Returns how many bytes of code there are, -1 if `size` is too small or an argument makes no sense. */
EXPORT int64_t prunella_generate(
    const float *dense, int64_t rows, int64_t columns, int64_t group, int64_t strip, int64_t ends, uint8_t *code,
    int64_t size, float *values, int64_t *where) {
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
                used += generate(
                    &w, dense + r * columns + c, high, wide, columns, values + used, !c, c + strip >= columns, (int)ends);
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
    uint8_t *sealed = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sealed == MAP_FAILED) return NULL;
    const size_t ahead = -(uintptr_t)sealed & (page - 1);
    if (ahead) munmap(sealed, ahead);
    munmap(sealed + ahead + whole, page - ahead);
    sealed += ahead;
#ifdef MADV_HUGEPAGE
    madvise(sealed, whole, MADV_HUGEPAGE);
#endif
    memcpy(sealed, code, (size_t)size);
    if (!mprotect(sealed, whole, PROT_READ | PROT_EXEC)) return sealed;
    munmap(sealed, whole);
    return NULL;
}

EXPORT void prunella_unseal(void *memory, int64_t size) { munmap(memory, ((size_t)size + 4095) & ~(size_t)4095); }

#else

EXPORT int64_t prunella_generate(
    const float *dense, int64_t rows, int64_t columns, int64_t group, int64_t strip, int64_t ends, uint8_t *code,
    int64_t size, float *values, int64_t *where) {
    (void)dense, (void)rows, (void)columns, (void)group, (void)strip, (void)ends, (void)code, (void)size, (void)values, (void)where;
    return -1;
}

EXPORT void *prunella_seal(const uint8_t *code, int64_t size) {
    (void)code, (void)size;
    return NULL;
}

EXPORT void prunella_unseal(void *memory, int64_t size) { (void)memory, (void)size; }

#endif
