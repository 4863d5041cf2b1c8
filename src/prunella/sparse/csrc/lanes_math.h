/* Functions of a vector of floats, in the names of lanes_*.h, which is included before. NaN stays NaN everywhere. The
 * polynomials are least in their largest error, fitted for this file. */

INLINE lanes_t exponential_inside(lanes_t x) {
    const lanes_t n = nearest(mul(x, all(1.442695041f)));
    lanes_t r = muladd(n, all(-0.693359375f), x); /* ln 2 in two parts */
    r = muladd(n, all(2.12194440e-4f), r);
    lanes_t series = muladd(r, all(0.00831247866f), all(0.0418905504f));
    series = muladd(series, r, all(0.166671157f));
    series = muladd(series, r, all(0.499992281f));
    series = muladd(series, r, all(1));
    return times_power(muladd(series, r, all(1)), n);
}

/* e^x, wrong by 2e-7 of it at most; below -87.3 it is what it is there, 1.2e-38. */
INLINE lanes_t exponential(lanes_t x) { return exponential_inside(smaller(all(88.75f), larger(all(-87.33f), x))); }

/* The same for x <= 0, and 0 below -87.3. */
INLINE lanes_t exponential_or_0(lanes_t x) {
    const lanes_t floor = all(-87.33f);
    return where_less(x, floor, all(0), exponential_inside(larger(floor, x)));
}

/* x / (1 + e^-y): with y = x SiLU, with x = 1 the logistic function. */
INLINE lanes_t logistic_part(lanes_t x, lanes_t y) { return quotient(x, add(all(1), exponential(sub(all(0), y)))); }

/* Below 0.63 an odd polynomial, above 1 - 2 / (e^2x + 1). */
INLINE lanes_t hyperbolic_tangent(lanes_t x) {
    const lanes_t size = absolute(x), square = mul(x, x);
    lanes_t series = muladd(square, all(-0.00566687901f), all(0.0206060912f));
    series = muladd(series, square, all(-0.0537299812f));
    series = muladd(series, square, all(0.133313313f));
    series = muladd(series, square, all(-0.333332777f));
    series = muladd(mul(series, square), x, x);
    const lanes_t large = sub(all(1), quotient(all(2), add(exponential(add(size, size)), all(1))));
    return where_less(size, all(0.63f), series, signed_as(large, x));
}

/* x times the normal distribution function at x, 1/2 + x P(x^2) / Q(x^2) up to 5.2, beyond which it is 0 and 1: wrong
 * by 2e-7 |x| at most. */
INLINE lanes_t gelu(lanes_t x) {
    const lanes_t y = smaller(all(5.2f), larger(all(-5.2f), x)), square = mul(y, y);
    lanes_t p = muladd(square, all(5.84056343e-6f), all(3.14259003e-4f));
    lanes_t q = muladd(square, all(5.01895979e-7f), all(1.12739286e-4f));
    p = muladd(p, square, all(0.00551870226f));
    q = muladd(q, square, all(0.00270372115f));
    p = muladd(p, square, all(0.0495930800f));
    q = muladd(q, square, all(0.0373395957f));
    p = muladd(p, square, all(0.398941917f));
    q = muladd(q, square, all(0.290972182f));
    q = muladd(q, square, all(1));
    return mul(x, where_less(x, all(-5.2f), all(0), muladd(y, quotient(p, q), all(0.5f))));
}

INLINE lanes_t hard_logistic(lanes_t x) {
    return mul(smaller(all(6), larger(all(0), add(x, all(3)))), all(1.0f / 6));
}

/* ACT_… of steps.h. */
INLINE lanes_t activated(int64_t act, lanes_t x) {
    switch (act) {
        case ACT_RELU: return larger(all(0), x);
        case ACT_RELU6: return smaller(all(6), larger(all(0), x));
        case ACT_SILU: return logistic_part(x, x);
        case ACT_GELU: return gelu(x);
        case ACT_GELU_TANH: /* (1 + tanh u) / 2 is the logistic function of 2 u */
            return logistic_part(x, mul(x, muladd(mul(x, x), all(0.0713548163f), all(1.59576912f))));
        case ACT_SIGMOID: return logistic_part(all(1), x);
        case ACT_HARDSWISH: return mul(x, hard_logistic(x));
        case ACT_HARDSIGMOID: return hard_logistic(x);
        case ACT_TANH: return hyperbolic_tangent(x);
        default: return x;
    }
}

/* The same where the kind of function is not known before: no branches for the first three, a call for the others. */
typedef struct {
    int64_t other; /* ACT_…, or 0 */
    lanes_t low, high;
} NAME(bounds_t);

INLINE NAME(bounds_t) bounds_of(int64_t act) {
    return (NAME(bounds_t)){act > ACT_RELU6 ? act : 0, all(act == ACT_RELU || act == ACT_RELU6 ? 0 : -INFINITY),
                            all(act == ACT_RELU6 ? 6 : INFINITY)};
}

TARGET static __attribute__((noinline)) lanes_t NAME(activated_other)(int64_t act, lanes_t x) {
    return activated(act, x);
}

INLINE lanes_t bounded(const NAME(bounds_t) *bounds, lanes_t x) {
    return bounds->other ? NAME(activated_other)(bounds->other, x) : smaller(bounds->high, larger(bounds->low, x));
}
