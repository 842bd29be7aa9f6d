/* Approximations: with c->approximate, results of `.approx` and `div.full` as far off as the PTX manual allows, up or down.  Which of the
   two depends on the input, the instruction's kind and the seed: a GPU gives every lane the same result for the same input.
   The bounds are those of PTX ISA 9.1, section 9.7.3, "Floating Point Instructions": div (9.7.3.8), rcp (.13), sqrt (.15), rsqrt (.16), sin (.18),
   cos (.19), lg2 (.20), ex2 (.21), tanh (.22); and of 9.7.4, "Half Precision Floating Point Instructions": tanh (9.7.4.9), ex2 (.10). */
static double off(Ctx *c, uint32_t kind, uint64_t input, double exact, double most) {
  uint64_t h = (input + 0x9e3779b97f4a7c15ull * (c->seed * 64ull + kind + 1)) * 0xbf58476d1ce4e5b9ull;
  if (!isfinite(exact) || !(most > 0)) return exact;
  h = (h ^ h >> 31) * 0x94d049bb133111ebull;
  return h >> 63 ? exact + most : exact - most;
}
/* `value` as a float that is at most `most` from `exact` */
static float within(double value, double exact, double most) {
  float r = (float)value;
  if (isfinite(exact) && fabs((double)r - exact) > most) r = nextafterf(r, (float)exact);
  return r;
}
static double ulp(double x) { float a = fabsf((float)x); return isfinite(a) && a > 0 ? (double)nextafterf(a, INFINITY) - a : 0; }
static float off_f32(Ctx *c, uint32_t kind, uint64_t input, double exact, double most) { return within(off(c, kind, input, exact, most), exact, most); }
#define RELATIVE(N, KIND, E, BITS) \
  static float apx_##N(Ctx *c, float x) { double a = x, e = E; return x == 0 ? (float)e : off_f32(c, KIND, B32(x), e, fabs(e) * exp2(-BITS)); }
RELATIVE(sqrt, 2, sqrt(a), 23) RELATIVE(rsqrt, 3, 1 / sqrt(a), 22.9) RELATIVE(tanh, 4, tanh(a), 11)
/* two units in the last place from the correctly rounded result */
static float apx_ex2(Ctx *c, float x) { double e = (float)exp2(x); return x == 0 ? (float)e : off_f32(c, 1, B32(x), e, 2 * ulp(e)); }
static float apx_lg2(Ctx *c, float x) {
  double e = log2(x);
  return off_f32(c, 5, B32(x), e, exp2(-22) * (x > 0.5 && x < 2 ? 1 : fabs(e)));
}
/* beyond 100 pi the manual promises nothing */
static double angle_error(double x) { return exp2(fabs(x) <= 2 * M_PI ? -20.5 : -14.7); }
static float apx_sin(Ctx *c, float x) { return x == 0 ? x : off_f32(c, 6, B32(x), sin(x), angle_error(x)); }
static float apx_cos(Ctx *c, float x) { return off_f32(c, 7, B32(x), cos(x), angle_error(x)); }
static float apx_rcp(Ctx *c, float x) { double e = 1 / (double)x; return off_f32(c, 8, B32(x), e, ulp(e)); }
static float apx_div(Ctx *c, float x, float y, int full) {
  double e = (double)x / y;
  if (!full && fabsf(y) > 0x1p126f && isfinite(y)) return isinf(x) ? NAN : copysign(0, e);
  return off_f32(c, 9, (uint64_t)B32(x) << 32 | B32(y), e, 2 * ulp(e));
}
/* the seeds in double precision (.14, .17): the manual states no error; one unit of the upper word */
static double apx_seed(Ctx *c, uint32_t kind, double x, double e) {
  return isfinite(e) && e != 0 ? hiword(fz64(off(c, kind, B64(x), e, F64((B64(fabs(e)) & 0x7ff0000000000000ull)) * 0x1p-20))) : hiword(fz64(e));
}
static float apx_half(Ctx *c, uint32_t kind, float x, double e, double most) { return x == 0 ? (float)e : off_f32(c, kind, B32(x), e, most); }
