/* Makes calls on files fail, and records them: a library for LD_PRELOAD that tests/faults.py controls.

   It stands between a process and libc. Before arm(), and for paths outside the folder given there, it only
   passes calls on. Processes forked after arm() share its count of calls. Calls that do not go through libc stay
   unseen: of those that matter only a rename inside safetensors, which a recording shows by the inode numbers. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX]; /* empty: not armed */
static atomic_long *calls;
static long failing_call; /* counted from 1; 0: none */
static int failure, lasting, log_file = -1;

/* ---- What Python calls ---- */

/* Count the calls on paths in `folder` from now on. Call number `call` fails with `error`, as do all later ones
   if it is `forever`. Error 0, and a full disk that stays full, let a write do half of its work first. */
void arm(const char *folder, long call, int error, int forever) {
    failing_call = call, failure = error, lasting = forever;
    calls = mmap(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(prefix, sizeof prefix, "%s", folder);
}

void disarm(void) { prefix[0] = 0; }

long count(void) { return calls ? atomic_load(calls) : 0; }

/* Append to a file, for each call: name, path, second path, inode, offset, number of bytes and error, separated
   by tabs, then a newline and the bytes written. An error above 0 was made here, one below 0 is the system's. */
int record(const char *path) { return log_file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600); }

/* Append a line of the caller's own. */
void mark(const char *text) { dprintf(log_file, "mark\t%s\t\t0\t0\t0\t0\n", text); }

/* ---- Deciding and recording ---- */

enum { READS, CHANGES };
enum { TEXT = -1000, NONE };

struct call {
    const char *name;
    int watched, error, halved; /* error: to fail with; 0: none */
    long inode, offset;
    char path[PATH_MAX], other[PATH_MAX];
};

/* Make a path absolute. `folder` is where it begins, TEXT to take it as it is; without a path, what is open. */
static void find_path(char *found, int folder, const char *path) {
    char link[40];
    ssize_t length = 0;
    if (path && (path[0] == '/' || folder == TEXT)) {
        length = snprintf(found, PATH_MAX, "%s", path);
    } else if (folder != NONE) {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, found, PATH_MAX - 1);
        if (path && length > 0) length += snprintf(found + length, PATH_MAX - length, "/%s", path);
    }
    found[length < 0 ? 0 : length] = 0;
}

static int is_inside(const char *path) {
    size_t length = strlen(prefix);
    return !strncmp(path, prefix, length) && (path[length] == '/' || !path[length]);
}

/* Find out on what a call is, count it, and decide whether it fails. */
static void begin(struct call *call, const char *name, int kind, int folder, const char *path, int other_folder,
                  const char *other) {
    call->name = name, call->watched = call->error = call->halved = 0, call->inode = call->offset = 0;
    if (!prefix[0]) return;
    int before = errno;
    find_path(call->path, folder, path);
    find_path(call->other, other_folder, other);
    call->watched = is_inside(call->path) || is_inside(call->other);
    if (call->watched) {
        struct stat status;
        if (!path && !fstat(folder, &status)) call->inode = status.st_ino;
        long number = atomic_fetch_add(calls, 1) + 1;
        int is_full = failure == ENOSPC || failure == EDQUOT, is_first = number == failing_call;
        if (failing_call && (is_first || (lasting && number > failing_call))) {
            call->halved = is_first && !strcmp(name, "write") && (failure == 0 || (is_full && lasting));
            /* A disk that is full or read-only can still be read. */
            if (kind == CHANGES || failure == EIO || failure == ESTALE) call->error = failure;
        }
    }
    errno = before;
}

static long end(struct call *call, long result, const void *data, size_t length) {
    if (call->watched && log_file >= 0) {
        int before = errno, error = call->error ? call->error : result == -1 ? -before : 0;
        char line[2 * PATH_MAX + 200];
        int size = snprintf(line, sizeof line, "%s%s\t%s\t%s\t%ld\t%ld\t%zu\t%d\n", call->halved ? "short-" : "",
                            call->name, call->path, call->other, call->inode, call->offset, length, error);
        struct iovec parts[] = {{line, size}, {(void *)data, length}};
        static __typeof__(&writev) next;
        if (!next) next = dlsym(RTLD_NEXT, "writev");
        next(log_file, parts, 2);
        errno = before;
    }
    if (call->error) errno = call->error;
    return result;
}

/* ---- libc's functions ---- */

#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name); struct call call
#define FUNCTION(type, name, parameters, arguments, ...)                                                       \
    type name parameters {                                                                                     \
        NEXT(name);                                                                                            \
        begin(&call, __VA_ARGS__);                                                                             \
        return (type)end(&call, call.error ? -1 : (long)next arguments, NULL, 0);                              \
    }
#define ON_PATH(name, kind, parameters, arguments) \
    FUNCTION(int, name, parameters, arguments, #name, kind, AT_FDCWD, path, NONE, NULL)
#define ON_OPEN_FILE(name, kind, parameters, arguments) \
    FUNCTION(int, name, parameters, arguments, #name, kind, fd, NULL, NONE, NULL)

ON_PATH(mkdir, CHANGES, (const char *path, mode_t mode), (path, mode))
ON_PATH(rmdir, CHANGES, (const char *path), (path))
ON_PATH(unlink, CHANGES, (const char *path), (path))
ON_PATH(chmod, CHANGES, (const char *path, mode_t mode), (path, mode))
ON_PATH(statvfs, READS, (const char *path, struct statvfs *values), (path, values))
ON_PATH(statvfs64, READS, (const char *path, struct statvfs64 *values), (path, values))
ON_OPEN_FILE(fchmod, CHANGES, (int fd, mode_t mode), (fd, mode))
ON_OPEN_FILE(flock, READS, (int fd, int operation), (fd, operation))
FUNCTION(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), "read", READS, fd, NULL, NONE, NULL)
FUNCTION(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), "mkdir", CHANGES, fd, path, NONE,
         NULL)
FUNCTION(int, fchmodat, (int fd, const char *path, mode_t mode, int flags), (fd, path, mode, flags), "chmod",
         CHANGES, fd, path, NONE, NULL)
FUNCTION(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags),
         flags &AT_REMOVEDIR ? "rmdir" : "unlink", CHANGES, fd, path, NONE, NULL)
FUNCTION(int, symlink, (const char *target, const char *path), (target, path), "symlink", CHANGES, AT_FDCWD, path,
         TEXT, target)
FUNCTION(int, symlinkat, (const char *target, int fd, const char *path), (target, fd, path), "symlink", CHANGES, fd,
         path, TEXT, target)
FUNCTION(int, link, (const char *path, const char *other), (path, other), "link", CHANGES, AT_FDCWD, path, AT_FDCWD,
         other)
FUNCTION(int, rename, (const char *path, const char *other), (path, other), "rename", CHANGES, AT_FDCWD, path,
         AT_FDCWD, other)
FUNCTION(int, renameat, (int fd, const char *path, int other_fd, const char *other), (fd, path, other_fd, other),
         "rename", CHANGES, fd, path, other_fd, other)

int fsync(int fd) { /* where it is watched, without waiting for a disk, which would take longer than all the rest */
    NEXT(fsync);
    begin(&call, "fsync", CHANGES, fd, NULL, NONE, NULL);
    return end(&call, call.error ? -1 : call.watched ? 0 : next(fd), NULL, 0);
}

#define OPEN(name, folder, parameters, arguments)                                                              \
    int name parameters {                                                                                      \
        NEXT(name);                                                                                            \
        va_list more;                                                                                          \
        va_start(more, flags);                                                                                 \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0;                                 \
        va_end(more);                                                                                          \
        int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);                          \
        const char *what = !changes ? "open" : flags & O_TRUNC ? "empty" : "create";                           \
        begin(&call, what, changes ? CHANGES : READS, folder, path, NONE, NULL);                               \
        int opened = call.error ? -1 : next arguments;                                                         \
        struct stat status;                                                                                    \
        if (call.watched && opened >= 0 && !fstat(opened, &status)) call.inode = status.st_ino;                \
        return end(&call, opened, NULL, 0);                                                                    \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
OPEN(openat64, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, mode))

int close(int fd) { /* only that of a written file counts; it closes the file even if it fails */
    NEXT(close);
    call.watched = call.error = 0;
    int flags = prefix[0] ? fcntl(fd, F_GETFL) : -1;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) begin(&call, "close", CHANGES, fd, NULL, NONE, NULL);
    int result = next(fd);
    return end(&call, call.error ? -1 : result, NULL, 0);
}

static ssize_t write_at(struct call *call, int fd, const void *data, size_t size, off_t place) {
    static __typeof__(&write) next;
    static __typeof__(&pwrite) next_at;
    if (!next) next = dlsym(RTLD_NEXT, "write"), next_at = dlsym(RTLD_NEXT, "pwrite");
    begin(call, "write", CHANGES, fd, NULL, NONE, NULL);
    call->halved = call->halved && size > 1;
    if (call->halved) call->error = 0, size /= 2;
    ssize_t result = call->error ? -1 : place < 0 ? next(fd, data, size) : next_at(fd, data, size, place);
    if (call->watched && result > 0) call->offset = place < 0 ? lseek(fd, 0, SEEK_CUR) - result : place;
    return end(call, result, data, result > 0 ? result : 0);
}

ssize_t write(int fd, const void *data, size_t size) {
    struct call call;
    return write_at(&call, fd, data, size, -1);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    struct call call;
    return write_at(&call, fd, data, size, place);
}
ssize_t pwrite64(int, const void *, size_t, off_t) __attribute__((alias("pwrite")));

ssize_t writev(int fd, const struct iovec *parts, int number) {
    NEXT(writev);
    find_path(call.path, fd, NULL);
    if (!prefix[0] || !is_inside(call.path)) return next(fd, parts, number);
    size_t size = 0;
    for (int part = 0; part < number; part++) size += parts[part].iov_len;
    char *data = malloc(size + 1), *free_part = data;
    for (int part = 0; part < number; free_part += parts[part++].iov_len)
        memcpy(free_part, parts[part].iov_base, parts[part].iov_len);
    ssize_t result = write_at(&call, fd, data, size, -1);
    free(data);
    return result;
}

/* Copies inside the kernel are refused; what wants to copy then reads and writes. */
#define COPY(name, next_arguments, ...)                                            \
    ssize_t name(__VA_ARGS__) {                                                    \
        NEXT(name);                                                                \
        find_path(call.path, to, NULL);                                            \
        if (!prefix[0] || !is_inside(call.path)) return next next_arguments;       \
        errno = ENOSYS;                                                            \
        return -1;                                                                 \
    }
COPY(sendfile, (to, from, place, size), int to, int from, off_t *place, size_t size)
COPY(sendfile64, (to, from, place, size), int to, int from, off_t *place, size_t size)
COPY(copy_file_range, (from, place, to, to_place, size, flags), int from, off_t *place, int to, off_t *to_place,
     size_t size, unsigned flags)

#define TRUNCATE(name, folder, path, parameters, arguments)                        \
    int name parameters {                                                          \
        NEXT(name);                                                                \
        begin(&call, "truncate", CHANGES, folder, path, NONE, NULL);               \
        call.offset = size;                                                        \
        return end(&call, call.error ? -1 : next arguments, NULL, 0);              \
    }
TRUNCATE(truncate, AT_FDCWD, path, (const char *path, off_t size), (path, size))
TRUNCATE(truncate64, AT_FDCWD, path, (const char *path, off_t size), (path, size))
TRUNCATE(ftruncate, fd, NULL, (int fd, off_t size), (fd, size))
TRUNCATE(ftruncate64, fd, NULL, (int fd, off_t size), (fd, size))

DIR *opendir(const char *path) {
    NEXT(opendir);
    begin(&call, "opendir", READS, AT_FDCWD, path, NONE, NULL);
    DIR *opened = call.error ? NULL : next(path);
    end(&call, opened ? 0 : -1, NULL, 0);
    return opened;
}

DIR *fdopendir(int fd) {
    NEXT(fdopendir);
    begin(&call, "opendir", READS, fd, NULL, NONE, NULL);
    DIR *opened = call.error ? NULL : next(fd);
    end(&call, opened ? 0 : -1, NULL, 0);
    return opened;
}
