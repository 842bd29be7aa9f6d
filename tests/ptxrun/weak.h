/* Weak memory: what programs (CTAs) see of one another's stores within a launch.

   A store waits in its program until a fence, a release or an atomic makes it visible, or until chance does: in any order, at
   any time, at the latest when the launch ends.  Of its own program a thread sees what its warp stored, and what other warps
   stored before the last barrier; the rest by chance.  An atomic works on what is visible, at once, unless nobody uses its
   result: then it waits as a store does.  A release (or a fence) makes visible what its thread stored, what the CTA stored
   before its last barrier, and what the warp stored before its last bar.warp.sync.

   A plain load may return what the first-level cache held: its sector as it was at any time since the thread's last acquire,
   which a barrier passes on to the CTA and a collective to the warp; `.nc` since the launch began.  The sector that a program
   has read does not become older.  `.cg`, `.cv`, volatile and relaxed loads, and atomics, go past the cache.

   Visible writes are kept with the bytes that they replaced, so a sector can be taken back to an earlier time. */
enum { W_CACHED, W_STALE, W_STRONG, W_ACQUIRE = 4, W_RELEASE = 8 };
#ifdef WEAK
typedef void (*Atomic)(uint8_t *, uint64_t);
typedef struct Write { /* waits: `bytes` are those to store (or an atomic's operand); visible: those that were replaced */
  uint64_t at, time, operand; uint32_t n, warp, lin, epoch, wepoch, place; uint64_t cta; Atomic atomic;
  struct Write *older; uint8_t bytes[32];
} Write;
typedef struct { Write **of; uint32_t n, cap, lazy; uint64_t sectors[16]; /* a bit for those that may be waited for */ } Waiting;
typedef struct { uint64_t *key, *value, n, cap; } Map;
typedef struct Weak {
  Waiting *waiting;      /* of each resident CTA, and behind them those of CTAs that have ended */
  Map visible, lines;    /* sector -> its last visible Write; (CTA, sector) -> the time at which the cache read it */
  uint64_t now, quiet; uint32_t slots; uint8_t buffer[32];
} Weak;

static uint64_t *map_at(Map *m, uint64_t key) {
  if (m->n * 2 >= m->cap) {
    Map old = *m; m->cap = old.cap ? 2 * old.cap : 256; m->n = 0;
    m->key = calloc(m->cap, 8); m->value = calloc(m->cap, 8);
    for (uint64_t i = 0; i < old.cap; i++) if (old.key[i]) *map_at(m, old.key[i]) = old.value[i];
    free(old.key); free(old.value);
  }
  uint64_t i = (key * 0x9e3779b97f4a7c15ull >> 20) & (m->cap - 1);
  while (m->key[i] && m->key[i] != key) i = (i + 1) & (m->cap - 1);
  if (!m->key[i]) m->key[i] = key, m->n++;
  return &m->value[i];
}
static int chance(Ctx *c, uint32_t one_in) { return rnd(c) % one_in == 0; }
static int is_global(Ctx *c, Thr *t, const uint8_t *q) { return (uint64_t)(q - c->smem) >= c->smem_bytes && (uint64_t)(q - t->local) >= LOCAL_BYTES; }
static int overlap(const Write *w, uint64_t at, uint32_t n) { return w->at < at + n && at < w->at + w->n; }
static uint64_t *sector_bit(Waiting *list, uint64_t at, uint64_t *bit) {
  uint32_t h = (uint32_t)((at >> 5) * 0x9e3779b1u) >> 22;
  *bit = 1ull << (h & 63);
  return &list->sectors[h >> 6];
}
static int may_wait(Waiting *list, uint64_t at) { uint64_t bit; return (*sector_bit(list, at, &bit) & bit) != 0; }
static Waiting *own(Ctx *c) { return c->weak->waiting + c->slot; }

/* `w` becomes visible: its bytes change places with those in memory */
static void keep_visible(Weak *k, Write *w, const uint8_t *before) {
  uint64_t *last = map_at(&k->visible, w->at >> 5);
  memcpy(w->bytes, before, w->n);
  w->time = ++k->now; w->older = (Write *)*last; *last = (uint64_t)w;
}
static void perform(Weak *k, Waiting *list, uint32_t i) {
  Write *w = list->of[i]; uint8_t before[32];
  list->of[i] = list->of[--list->n]; list->of[i]->place = i;
  if (!list->n) memset(list->sectors, 0, sizeof list->sectors);
  memcpy(before, (void *)w->at, w->n);
  if (w->atomic) w->atomic((uint8_t *)w->at, w->operand); else memcpy((void *)w->at, w->bytes, w->n);
  keep_visible(k, w, before);
}
static Write *new_write(Ctx *c, Thr *t, const uint8_t *q, uint32_t n) {
  Write *w = calloc(1, sizeof *w);
  w->at = (uint64_t)q; w->n = n; w->cta = c->number; w->warp = t->warp; w->lin = t->lin; w->epoch = c->epoch; w->wepoch = t->wepoch;
  return w;
}
static void put_off(Waiting *list, Write *w) {
  if (list->n == list->cap) list->of = realloc(list->of, (list->cap = 2 * list->cap + 64) * sizeof *list->of);
  uint64_t bit; *sector_bit(list, w->at, &bit) |= bit;
  w->place = list->n; list->of[list->n++] = w;
}
/* own stores to these bytes become visible before anything newer of the CTA does */
static void in_order(Ctx *c, const uint8_t *q, uint32_t n) {
  Waiting *list = own(c);
  if (!may_wait(list, (uint64_t)q)) return;
  for (uint32_t i = list->n; i-- > 0;) if (overlap(list->of[i], (uint64_t)q, n)) perform(c->weak, list, i);
}
static void release(Ctx *c, Thr *t) {
  Waiting *list = own(c);
  for (uint32_t i = list->n; i-- > 0;) {
    Write *w = list->of[i];
    if (w->lin == t->lin || w->epoch < c->epoch || (w->warp == t->warp && w->wepoch < t->wepoch)) perform(c->weak, list, i);
  }
}
static void weak_fence(Ctx *c, Thr *t) { release(c, t); t->since = c->weak->now; }

/* the sector's bytes as the first-level cache may hold them */
static void cached(Ctx *c, Thr *t, uint64_t at, uint32_t n, uint64_t since) {
  Weak *k = c->weak; Write *w = (Write *)*map_at(&k->visible, at >> 5);
  if (!w) return;
  uint64_t *line = map_at(&k->lines, (at >> 5) * 0x10001 + c->number + 1), time = *line;
  if (time < since || !time || chance(c, 8)) {
    if (time < since) time = since;
    if (chance(c, 2)) time = chance(c, 2) ? k->now : time + rnd(c) % (k->now - time + 1);
  }
  *line = time;
  for (; w && w->time > time; w = w->older) {
    if (!overlap(w, at, n)) continue;
    if (w->cta == c->number && (w->warp == t->warp || w->epoch < c->epoch)) return; /* a store of one's own */
    uint64_t lo = w->at > at ? w->at : at, hi = w->at + w->n < at + n ? w->at + w->n : at + n;
    memcpy(k->buffer + (lo - at), w->bytes + (lo - w->at), hi - lo);
  }
}
static uint8_t *weak_load(Ctx *c, Thr *t, uint8_t *q, uint32_t n, int how) {
  if (!is_global(c, t, q)) return q;
  Weak *k = c->weak; Waiting *list = own(c); uint64_t at = (uint64_t)q; int waits = may_wait(list, at);
  for (uint32_t i = waits ? list->n : 0; i-- > 0;) /* an atomic of one's own that waits */
    if (list->of[i]->atomic && overlap(list->of[i], at, n)) perform(k, list, i);
  memcpy(k->buffer, q, n);
  if ((how & 3) != W_STRONG) cached(c, t, at, n, (how & 3) == W_STALE ? 0 : t->since);
  for (uint32_t i = 0; waits && i < list->n; i++) {
    Write *w = list->of[i];
    if (!overlap(w, at, n) || !(w->warp == t->warp || w->epoch < c->epoch || chance(c, 2))) continue;
    uint64_t lo = w->at > at ? w->at : at, hi = w->at + w->n < at + n ? w->at + w->n : at + n;
    memcpy(k->buffer + (lo - at), w->bytes + (lo - w->at), hi - lo);
  }
  if (how & W_ACQUIRE) t->since = k->now;
  return k->buffer;
}
static uint8_t *weak_store(Ctx *c, Thr *t, uint8_t *q) { return is_global(c, t, q) ? c->weak->buffer : q; }
static void weak_stored(Ctx *c, Thr *t, uint8_t *q, uint32_t n, int how) {
  if (!is_global(c, t, q)) return;
  Write *w = new_write(c, t, q, n);
  memcpy(w->bytes, c->weak->buffer, n);
  in_order(c, q, n);
  if (how & W_RELEASE) release(c, t);
  put_off(own(c), w);
  if (how & W_RELEASE) perform(c->weak, own(c), w->place);
}
static void weak_atomic(Ctx *c, Thr *t, uint8_t *q, uint32_t n, int how) {
  if (!is_global(c, t, q)) return;
  in_order(c, q, n);
  if (how & W_RELEASE) release(c, t);
  memcpy(c->weak->buffer, q, n);
}
static void weak_atomic_done(Ctx *c, Thr *t, uint8_t *q, uint32_t n, int how) {
  if (!is_global(c, t, q)) return;
  keep_visible(c->weak, new_write(c, t, q, n), c->weak->buffer);
  if (how & W_ACQUIRE) t->since = c->weak->now;
}
/* an atomic whose result nobody uses; whether it waits */
static int weak_late(Ctx *c, Thr *t, uint8_t *q, uint32_t n, int how, Atomic atomic, uint64_t operand) {
  if (!is_global(c, t, q) || how & (W_ACQUIRE | W_RELEASE)) return 0;
  Write *w = new_write(c, t, q, n);
  w->atomic = atomic; w->operand = operand;
  in_order(c, q, n);
  put_off(own(c), w);
  return 1;
}
static void weak_begin(Ctx *c, uint32_t slots) {
  Weak *k = c->weak = calloc(1, sizeof *k);
  k->slots = slots; k->waiting = calloc(slots + 1, sizeof *k->waiting);
  for (uint32_t s = 0; s < slots; s++) k->waiting[s].lazy = rnd(c) % 3;
}
/* by chance, some of what waits becomes visible; at the latest when nothing else happens for long */
static void weak_step(Ctx *c) {
  Weak *k = c->weak; int all = ++k->quiet % 10000 == 0;
  for (uint32_t s = 0; s <= k->slots; s++) {
    Waiting *list = k->waiting + s; uint32_t lazy = s < k->slots ? list->lazy : 1;
    uint32_t now = all ? list->n : lazy == 0 ? (list->n + 1) / 2 : lazy == 1 ? (list->n + rnd(c) % 64) / 64 : 0;
    while (now-- && list->n) perform(k, list, rnd(c) % list->n);
  }
}
static void weak_retire(Ctx *c) { /* the program has ended; what still waits goes on waiting */
  Weak *k = c->weak; Waiting *list = own(c);
  while (list->n) put_off(k->waiting + k->slots, list->of[--list->n]);
  memset(list->sectors, 0, sizeof list->sectors);
  list->lazy = rnd(c) % 3; k->quiet = 0;
}
static void weak_end(Ctx *c) {
  Weak *k = c->weak;
  for (uint32_t s = 0; s <= k->slots; s++) {
    while (k->waiting[s].n) perform(k, k->waiting + s, rnd(c) % k->waiting[s].n);
    free(k->waiting[s].of);
  }
  for (uint64_t i = 0; i < k->visible.cap; i++)
    for (Write *w = (Write *)k->visible.value[i], *older; w; w = older) older = w->older, free(w);
  free(k->visible.key); free(k->visible.value); free(k->lines.key); free(k->lines.value); free(k->waiting); free(k);
}
#endif
