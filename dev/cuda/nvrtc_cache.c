/* A cache in front of NVRTC, the compiler of CUDA kernels: preload it into processes that use MLX.

   NVRTC_CACHE   folder of compiled programs (KEY.txt, KEY.cubin). All processes may share it: files appear whole,
                 and one compiles a program while the others wait for it.
   NVRTC_RECORD  folder to which a program that is not in the cache is written (KEY.cu, KEY.names, headers, options),
                 so that compile_kernels.py can compile it elsewhere, or side by side with others.
   NVRTC_LOG     file to which a line is added for each program that was compiled: key, seconds, status, name.

   gcc -shared -fPIC -O1 -w -o nvrtc_cache.so nvrtc_cache.c -ldl -lpthread */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <unistd.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <pthread.h>
typedef struct Prog { void *real; char *src, *name; int nh; const char **h, **hn; char **exprs; int ne;
  char **lowered; char *bin; size_t size; int ours; } Prog;
static void *lib; static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *sym(const char *n) {
  if (!lib) lib = dlopen("libnvrtc.so.13", RTLD_NOLOAD | RTLD_LAZY);
  if (!lib) lib = dlopen("libnvrtc.so.13", RTLD_LAZY);
  void *f = lib ? dlsym(lib, n) : 0; if (!f) { fprintf(stderr, "shim: no %s\n", n); abort(); } return f; }
#define REAL(n) ((int (*)())sym(n))
static uint64_t fnv(uint64_t h, const char *s) { for (; *s; s++) { h ^= (unsigned char)*s; h *= 1099511628211ULL; } h ^= 255; return h * 1099511628211ULL; }
static void key(Prog *p, char *out) { uint64_t a = 14695981039346656037ULL, b = 88172645463325252ULL;
  a = fnv(a, p->src); b = fnv(b, p->src); for (int i = 0; i < p->ne; i++) { a = fnv(a, p->exprs[i]); b = fnv(b, p->exprs[i]); }
  sprintf(out, "%016lx%016lx", a, b); }
static char *slurp(const char *path, size_t *n) { FILE *f = fopen(path, "rb"); if (!f) return 0; fseek(f, 0, SEEK_END); *n = ftell(f); rewind(f);
  char *b = malloc(*n + 1); if (fread(b, 1, *n, f) != *n) { fclose(f); free(b); return 0; } b[*n] = 0; fclose(f); return b; }
static void put(const char *path, const void *b, size_t n) { char t[4096]; snprintf(t, sizeof t, "%s.%d.%lx", path, getpid(), (long)pthread_self());
  FILE *f = fopen(t, "wb"); if (!f) return; fwrite(b, 1, n, f); fclose(f); rename(t, path); }
static int load(Prog *p, const char *k) { const char *c = getenv("NVRTC_CACHE"); if (!c) return 0; char path[4096]; size_t n, m;
  snprintf(path, sizeof path, "%s/%s.cubin", c, k); char *bin = slurp(path, &n); if (!bin) return 0;
  snprintf(path, sizeof path, "%s/%s.txt", c, k); char *txt = slurp(path, &m); if (!txt) return 0;
  p->lowered = calloc(p->ne + 1, sizeof(char *)); char *s = txt;
  for (int i = 0; i < p->ne; i++) { char *e = strchr(s, '\n'); if (!e) return 0; *e = 0; p->lowered[i] = s; s = e + 1; }
  p->bin = bin; p->size = n; p->ours = 1; return 1; }
int nvrtcCreateProgram(Prog **out, const char *src, const char *name, int nh, const char **h, const char **hn) {
  Prog *p = calloc(1, sizeof *p); p->src = strdup(src); p->name = strdup(name ? name : ""); p->nh = nh; p->h = h; p->hn = hn; *out = p; return 0; }
int nvrtcDestroyProgram(Prog **pp) { Prog *p = *pp; if (p->real) REAL("nvrtcDestroyProgram")(&p->real); *pp = 0; return 0; }
int nvrtcAddNameExpression(Prog *p, const char *e) { p->exprs = realloc(p->exprs, (p->ne + 1) * sizeof(char *)); p->exprs[p->ne++] = strdup(e); return 0; }
/* Whether another process compiles it, in the end successfully. */
static int await(Prog *p, const char *k, const char *cache) { char lock[4096]; snprintf(lock, sizeof lock, "%s/%s.lock", cache, k);
  for (int i = 0; i < 2000; i++) {
    int f = open(lock, O_CREAT | O_EXCL, 0666); if (f >= 0) { close(f); return load(p, k); }
    if (load(p, k)) return 1; usleep(100000); }
  return 0; }
int nvrtcCompileProgram(Prog *p, int n, const char *const *opts) {
  char k[40], path[4096]; key(p, k); if (load(p, k)) return 0;
  const char *rec = getenv("NVRTC_RECORD"), *cache = getenv("NVRTC_CACHE"), *log = getenv("NVRTC_LOG");
  pthread_mutex_lock(&lock);
  if (rec) {
    snprintf(path, sizeof path, "%s/headers", rec); if (access(path, 0)) { mkdir(path, 0777);
      for (int i = 0; i < p->nh; i++) { char t[4096]; snprintf(t, sizeof t, "%s/%s", path, p->hn[i]); for (char *c = t + strlen(path) + 1; *c; c++) if (*c == '/') *c = '@'; put(t, p->h[i], strlen(p->h[i])); } }
    size_t cap = 64; for (int i = 0; i < p->ne; i++) cap += strlen(p->exprs[i]) + 1; char *names = calloc(1, cap);
    for (int i = 0; i < p->ne; i++) { strcat(names, p->exprs[i]); strcat(names, "\n"); }
    snprintf(path, sizeof path, "%s/%s.names", rec, k); put(path, names, strlen(names));
    snprintf(path, sizeof path, "%s/%s.cu", rec, k); put(path, p->src, strlen(p->src));
    snprintf(path, sizeof path, "%s/options", rec); if (access(path, 0)) { char o[8192] = ""; for (int i = 0; i < n; i++) { strcat(o, opts[i]); strcat(o, "\n"); } put(path, o, strlen(o)); } }
  if (cache && await(p, k, cache)) { pthread_mutex_unlock(&lock); return 0; }
  struct timespec a, b; clock_gettime(CLOCK_MONOTONIC, &a);
  REAL("nvrtcCreateProgram")(&p->real, p->src, p->name, p->nh, p->h, p->hn);
  for (int i = 0; i < p->ne; i++) REAL("nvrtcAddNameExpression")(p->real, p->exprs[i]);
  int rc = REAL("nvrtcCompileProgram")(p->real, n, opts);
  clock_gettime(CLOCK_MONOTONIC, &b);
  if (log) { FILE *f = fopen(log, "a"); if (f) { fprintf(f, "%s %.1f %d %.80s\n", k, b.tv_sec - a.tv_sec + (b.tv_nsec - a.tv_nsec) * 1e-9, rc, p->name); fclose(f); } }
  if (!rc && cache) { size_t cap = 64, s; const char *m; for (int i = 0; i < p->ne; i++) { REAL("nvrtcGetLoweredName")(p->real, p->exprs[i], &m); cap += strlen(m) + 1; }
    char *txt = calloc(1, cap); for (int i = 0; i < p->ne; i++) { REAL("nvrtcGetLoweredName")(p->real, p->exprs[i], &m); strcat(txt, m); strcat(txt, "\n"); }
    REAL("nvrtcGetCUBINSize")(p->real, &s); char *bin = malloc(s); REAL("nvrtcGetCUBIN")(p->real, bin);
    snprintf(path, sizeof path, "%s/%s.txt", cache, k); put(path, txt, strlen(txt));
    snprintf(path, sizeof path, "%s/%s.cubin", cache, k); put(path, bin, s); free(bin); free(txt); }
  if (cache) { snprintf(path, sizeof path, "%s/%s.lock", cache, k); unlink(path); }
  pthread_mutex_unlock(&lock); return rc; }
int nvrtcGetLoweredName(Prog *p, const char *e, const char **out) {
  if (!p->ours) return REAL("nvrtcGetLoweredName")(p->real, e, out);
  for (int i = 0; i < p->ne; i++) if (!strcmp(p->exprs[i], e)) { *out = p->lowered[i]; return 0; } return 7; }
int nvrtcGetCUBINSize(Prog *p, size_t *s) { if (!p->ours) return REAL("nvrtcGetCUBINSize")(p->real, s); *s = p->size; return 0; }
int nvrtcGetCUBIN(Prog *p, char *b) { if (!p->ours) return REAL("nvrtcGetCUBIN")(p->real, b); memcpy(b, p->bin, p->size); return 0; }
int nvrtcGetPTXSize(Prog *p, size_t *s) { return REAL("nvrtcGetPTXSize")(p->real, s); }
int nvrtcGetPTX(Prog *p, char *b) { return REAL("nvrtcGetPTX")(p->real, b); }
int nvrtcGetProgramLogSize(Prog *p, size_t *s) { if (!p->real) { *s = 1; return 0; } return REAL("nvrtcGetProgramLogSize")(p->real, s); }
int nvrtcGetProgramLog(Prog *p, char *b) { if (!p->real) { *b = 0; return 0; } return REAL("nvrtcGetProgramLog")(p->real, b); }
