/* Counts, logs and breaks what a process does to some files: see shim.py, which builds it for LD_PRELOAD.
 *
 * All variables are read at every call, so that a running process can set them for itself:
 * FAULT_PATHS    pattern of fnmatch, in which * takes slashes too: calls on other files pass
 * FAULT_LOG      file to which each call is appended: its name, its paths and what it returned
 * FAULT_KILL_AT  number of the call, from 1, in place of which the process is killed
 * FAULT_ERRNO    what calls fail with: from number FAULT_AT on (1), FAULT_CALLS of them (all)
 * FAULT_WHILE    they fail only while this file exists
 * FAULT_SHORT    a write that is to fail first writes half of its bytes, as on a disk that has just become full
 * FAULT_DELAY    milliseconds that each call takes longer
 * FAULT_RANK     only in this process of a launched run
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long calls;
static __thread char first[2 * PATH_MAX], second[2 * PATH_MAX]; /* the paths of the call at hand */

static long number(const char *variable, long otherwise) {
    const char *value = getenv(variable);
    return value ? atol(value) : otherwise;
}

static int matches(const char *path) {
    const char *pattern = getenv("FAULT_PATHS"), *rank = getenv("FAULT_RANK"), *own = getenv("PADDLE_TRAINER_ID");
    return pattern && (!rank || (own && !strcmp(rank, own))) && !fnmatch(pattern, path, 0);
}

static void of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void of_name(int folder, const char *name, char *path) {
    *path = 0;
    if (*name != '/') {
        if (folder != AT_FDCWD)
            of_descriptor(folder, path);
        else if (!getcwd(path, PATH_MAX))
            *path = 0;
        strcat(path, "/");
    }
    strncat(path, name, PATH_MAX - 1);
}

/* Counts a call; 0 where it is to be done, else what it is to fail with. `begins`: no call has failed before. */
static int fault(int *begins) {
    long now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST), at = number("FAULT_AT", 1);
    const char *only_while = getenv("FAULT_WHILE");
    if (now == number("FAULT_KILL_AT", 0))
        kill(getpid(), SIGKILL);
    *begins = now == at;
    usleep(1000 * number("FAULT_DELAY", 0));
    if (now < at || now - at >= number("FAULT_CALLS", LONG_MAX) || (only_while && access(only_while, F_OK)))
        return 0;
    return number("FAULT_ERRNO", 0);
}

static void record(const char *call, long result) {
    const char *log = getenv("FAULT_LOG");
    char line[5 * PATH_MAX];
    if (!log)
        return;
    int error = errno, length = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\n", call, first, second, result);
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
    errno = error;
}

/* Returns what `expression`, the call proper, returns, or lets it fail; `part` is done where a write fails in its middle. */
#define CALL(name, part, expression)                                   \
    do {                                                               \
        int begins, error = fault(&begins);                            \
        long result = -1;                                              \
        if (!error)                                                    \
            result = (expression);                                     \
        else if (begins && getenv("FAULT_SHORT"))                      \
            result = (part);                                           \
        if (error && result < 0)                                       \
            errno = error;                                             \
        record(name, result);                                          \
        return result;                                                 \
    } while (0)

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list list;                                                           \
        va_start(list, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        of_name(AT_FDCWD, path, first);                                         \
        *second = 0;                                                            \
        if ((flags & O_ACCMODE) == O_RDONLY || !matches(first))                 \
            return REAL(name)(path, flags, mode);                               \
        CALL("open", -1, REAL(name)(path, flags, mode));                        \
    }

#define OPENAT(name)                                                            \
    int name(int folder, const char *path, int flags, ...) {                    \
        va_list list;                                                           \
        va_start(list, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        of_name(folder, path, first);                                           \
        *second = 0;                                                            \
        if ((flags & O_ACCMODE) == O_RDONLY || !matches(first))                 \
            return REAL(name)(folder, path, flags, mode);                       \
        CALL("open", -1, REAL(name)(folder, path, flags, mode));                \
    }

/* A call on a descriptor. */
#define DESCRIPTOR(type, name, parameters, part, arguments) \
    type name parameters {                                  \
        of_descriptor(file, first);                         \
        *second = 0;                                        \
        if (!matches(first))                                \
            return REAL(name) arguments;                    \
        CALL(#name, part, REAL(name) arguments);            \
    }

/* A call on a name. */
#define NAME(name, parameters, folder, arguments) \
    int name parameters {                         \
        of_name(folder, path, first);             \
        *second = 0;                              \
        if (!matches(first))                      \
            return REAL(name) arguments;          \
        CALL(#name, -1, REAL(name) arguments);    \
    }

/* A call on two names. */
#define NAMES(name, parameters, folder, other_folder, arguments) \
    int name parameters {                                        \
        of_name(folder, path, first);                            \
        of_name(other_folder, other, second);                    \
        if (!matches(first) && !matches(second))                 \
            return REAL(name) arguments;                         \
        CALL("rename", -1, REAL(name) arguments);                \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
DESCRIPTOR(ssize_t, write, (int file, const void *data, size_t size), REAL(write)(file, data, size / 2),
           (file, data, size))
DESCRIPTOR(ssize_t, pwrite, (int file, const void *data, size_t size, off_t offset),
           REAL(pwrite)(file, data, size / 2, offset), (file, data, size, offset))
DESCRIPTOR(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t offset),
           REAL(pwrite64)(file, data, size / 2, offset), (file, data, size, offset))
DESCRIPTOR(ssize_t, writev, (int file, const struct iovec *parts, int count), -1, (file, parts, count))
DESCRIPTOR(int, fsync, (int file), -1, (file))
DESCRIPTOR(int, fdatasync, (int file), -1, (file))
DESCRIPTOR(int, close, (int file), -1, (file))
NAME(mkdir, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
NAME(unlink, (const char *path), AT_FDCWD, (path))
NAME(unlinkat, (int folder, const char *path, int flags), folder, (folder, path, flags))
NAME(rmdir, (const char *path), AT_FDCWD, (path))
NAMES(rename, (const char *path, const char *other), AT_FDCWD, AT_FDCWD, (path, other))
NAMES(renameat, (int folder, const char *path, int to, const char *other), folder, to, (folder, path, to, other))
NAMES(renameat2, (int folder, const char *path, int to, const char *other, unsigned flags), folder, to,
      (folder, path, to, other, flags))
