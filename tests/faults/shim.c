/* LD_PRELOAD: faults of the file system at the n-th call that changes files whose path contains a given text.
 *
 * faults_arm(text, mode, at, number) begins to count calls. Modes: 0 count only; 1 SIGKILL at call `at`, in the middle of a write;
 * 2 fail call `at` and all later ones with errno `number`, as a disk that stays full. faults_seen() returns the count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL };
static char wanted[256];
static volatile int mode = -1, failure;
static volatile long at;
static atomic_long seen;

void faults_arm(const char *text, int m, long n, int number) {
    snprintf(wanted, sizeof wanted, "%s", text);
    at = n, failure = number;
    atomic_store(&seen, 0);
    mode = m;
}
long faults_seen(void) { return atomic_load(&seen); }

/* Returns 1 if the call must fail; errno is set. `half`: does half of a write before the process is killed. */
static int fault(const char *path, ssize_t (*half)(int, const void *, size_t), int fd, const void *data, size_t count) {
    if (mode < 0 || !strstr(path, wanted)) return 0;
    long n = atomic_fetch_add(&seen, 1) + 1;
    if (mode == KILL && n == at) {
        if (half) half(fd, data, count / 2);
        kill(getpid(), SIGKILL);
        pause();
    }
    if (mode == FAIL && n >= at) return errno = failure, 1;
    return 0;
}

static const char *path_of(int fd, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, size - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}
static const char *path_at(int dir, const char *path, char *buffer, size_t size) {
    char folder[2048];
    if (path[0] == '/' || dir == AT_FDCWD) return path;
    snprintf(buffer, size, "%s/%s", path_of(dir, folder, sizeof folder), path);
    return buffer;
}

#define NEXT(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define BY_PATH(name, parameters, arguments, path) \
    int name parameters { NEXT(name); char b[4096]; (void)b; return fault(path, 0, 0, 0, 0) ? -1 : real arguments; }
#define BY_DESCRIPTOR(name) \
    int name(int fd) { NEXT(name); char b[4096]; return mode >= 0 && fault(path_of(fd, b, sizeof b), 0, 0, 0, 0) ? -1 : real(fd); }
#define CREATING(flags) (flags & (O_CREAT | O_TRUNC))
#define OPEN(name) int name(const char *p, int flags, ...) { NEXT(name); va_list v; va_start(v, flags); \
    mode_t m = va_arg(v, mode_t); va_end(v); \
    return CREATING(flags) && fault(p, 0, 0, 0, 0) ? -1 : real(p, flags, m); }
#define OPENAT(name) int name(int d, const char *p, int flags, ...) { NEXT(name); va_list v; va_start(v, flags); \
    mode_t m = va_arg(v, mode_t); va_end(v); char b[4096]; \
    return CREATING(flags) && fault(path_at(d, p, b, sizeof b), 0, 0, 0, 0) ? -1 : real(d, p, flags, m); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
BY_PATH(mkdir, (const char *p, mode_t m), (p, m), p)
BY_PATH(rename, (const char *p, const char *q), (p, q), p)
BY_PATH(unlink, (const char *p), (p), p)
BY_PATH(rmdir, (const char *p), (p), p)
BY_PATH(unlinkat, (int d, const char *p, int f), (d, p, f), path_at(d, p, b, sizeof b))
BY_DESCRIPTOR(fsync)
BY_DESCRIPTOR(fdatasync)
ssize_t write(int fd, const void *data, size_t count) {
    NEXT(write);
    char b[4096];
    return mode >= 0 && fault(path_of(fd, b, sizeof b), real, fd, data, count) ? -1 : real(fd, data, count);
}
