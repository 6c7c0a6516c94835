/* Put before the C library (LD_PRELOAD): makes reads, writes, syncs and allocations of files fail as the file named by
 * POSTHASTE_FAULTS says. Each of its lines is OPERATION PART FAULT: operations are read, write, sync and allocate, PART is
 * a part of the file's path, faults are an error number, short, slow and hang. What hangs goes on when the line is gone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE = 0, SHORT = -1, SLOW = -2, HANG = -3 };

/* The error number that an operation on a file meets, or one of the above. */
static int look(const char *operation, const char *file)
{
    const char *faults = getenv("POSTHASTE_FAULTS");
    if (!faults)
        return NONE;
    char text[4096], word[32], part[256], fault[32];
    int fd = (int)syscall(SYS_openat, AT_FDCWD, faults, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NONE;
    long length = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    text[length < 0 ? 0 : length] = 0;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (sscanf(line, "%31s %255s %31s", word, part, fault) != 3)
            continue;
        if (strcmp(word, operation) || !strstr(file, part))
            continue;
        if (!strcmp(fault, "short"))
            return SHORT;
        if (!strcmp(fault, "slow"))
            return SLOW;
        if (!strcmp(fault, "hang"))
            return HANG;
        return atoi(fault);
    }
    return NONE;
}

static void pause_ms(long ms)
{
    struct timespec pause = { ms / 1000, ms % 1000 * 1000000 };
    nanosleep(&pause, NULL);
}

static int meets(const char *operation, int fd)
{
    char link[64], file[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, file, sizeof file - 1);
    file[length < 0 ? 0 : length] = 0;
    int fault = look(operation, file);
    if (fault == SLOW)
        pause_ms(100);
    while (fault == HANG) {
        pause_ms(5);
        fault = look(operation, file);
    }
    return fault;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static ssize_t fail(int fault)
{
    errno = fault;
    return -1;
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset)
{
    int fault = meets("write", fd);
    if (fault > 0)
        return fail(fault);
    return REAL(pwrite64)(fd, bytes, fault == SHORT ? (count + 1) / 2 : count, offset);
}

ssize_t pread(int fd, void *bytes, size_t count, off_t offset)
{
    int fault = meets("read", fd);
    return fault > 0 ? fail(fault) : REAL(pread)(fd, bytes, count, offset);
}

/* Reads of what is in memory. Where reads fail or wait, nothing is. */
ssize_t preadv2(int fd, const struct iovec *slices, int count, off_t offset, int flags)
{
    char link[64], file[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, file, sizeof file - 1);
    file[length < 0 ? 0 : length] = 0;
    return look("read", file) != NONE ? fail(EAGAIN) : REAL(preadv2)(fd, slices, count, offset, flags);
}

int fdatasync(int fd)
{
    int fault = meets("sync", fd);
    return fault > 0 ? (int)fail(fault) : REAL(fdatasync)(fd);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    int fault = meets("allocate", fd);
    return fault > 0 ? (int)fail(fault) : REAL(fallocate)(fd, mode, offset, length);
}
