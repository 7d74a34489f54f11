/* Makes calls on files fail, and records them: a library for LD_PRELOAD that tests/faults.py controls.

   It stands between a process and libc. Before arm(), and for paths outside the folder given there, it only
   passes calls on. Processes forked after arm() share its count of calls. Calls that bypass libc stay unseen;
   of those that matter that is only a rename inside safetensors, which inode numbers in the record reveal. */

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

/* Count the calls on paths in `folder` from now on. Call number `call` fails with `error`, with `forever` all
   later ones too. Error 0, and a full disk that stays full, let a write do half of its work first. */
void arm(const char *folder, long call, int error, int forever) {
    failing_call = call, failure = error, lasting = forever;
    calls = mmap(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(prefix, sizeof prefix, "%s", folder);
}

void disarm(void) { prefix[0] = 0; }

long count(void) { return calls ? atomic_load(calls) : 0; }

/* Append to a file, for each call: name, path, second path, inode, offset, number of bytes and error between
   tabs, then a newline and the bytes written. An error above 0 was made here, one below 0 is the system's. */
void record(const char *path) { log_file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600); }

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

/* Make a path absolute that begins in `folder`, or take it as it is (TEXT); without a path, what is open. */
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
static void begin(struct call *call, const char *name, int kind, int folder, const char *path,
                  int other_folder, const char *other) {
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
        int size = snprintf(line, sizeof line, "%s%s\t%s\t%s\t%ld\t%ld\t%zu\t%d\n",
                            call->halved ? "short-" : "", call->name, call->path, call->other, call->inode,
                            call->offset, length, error);
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

#define PATH AT_FDCWD, path
#define OPENED fd, NULL
#define ALONE NONE, NULL
#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name); struct call call

#define FUNCTION(type, name, parameters, arguments, ...)                                                  \
    type name parameters {                                                                                \
        NEXT(name);                                                                                       \
        begin(&call, __VA_ARGS__);                                                                        \
        return (type)end(&call, call.error ? -1 : (long)next arguments, NULL, 0);                         \
    }
FUNCTION(int, mkdir, (const char *path, mode_t mode), (path, mode), "mkdir", CHANGES, PATH, ALONE)
FUNCTION(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), "mkdir", CHANGES, fd, path,
         ALONE)
FUNCTION(int, rmdir, (const char *path), (path), "rmdir", CHANGES, PATH, ALONE)
FUNCTION(int, unlink, (const char *path), (path), "unlink", CHANGES, PATH, ALONE)
FUNCTION(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags),
         flags & AT_REMOVEDIR ? "rmdir" : "unlink", CHANGES, fd, path, ALONE)
FUNCTION(int, rename, (const char *path, const char *to), (path, to), "rename", CHANGES, PATH, AT_FDCWD, to)
FUNCTION(int, renameat, (int fd, const char *path, int to_fd, const char *to), (fd, path, to_fd, to),
         "rename", CHANGES, fd, path, to_fd, to)
FUNCTION(int, link, (const char *path, const char *to), (path, to), "link", CHANGES, PATH, AT_FDCWD, to)
FUNCTION(int, symlink, (const char *to, const char *path), (to, path), "symlink", CHANGES, PATH, TEXT, to)
FUNCTION(int, symlinkat, (const char *to, int fd, const char *path), (to, fd, path), "symlink", CHANGES, fd,
         path, TEXT, to)
FUNCTION(int, chmod, (const char *path, mode_t mode), (path, mode), "chmod", CHANGES, PATH, ALONE)
FUNCTION(int, fchmod, (int fd, mode_t mode), (fd, mode), "chmod", CHANGES, OPENED, ALONE)
FUNCTION(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), "read", READS, OPENED, ALONE)
FUNCTION(int, flock, (int fd, int operation), (fd, operation), "flock", READS, OPENED, ALONE)
FUNCTION(int, statvfs, (const char *path, struct statvfs *to), (path, to), "statvfs", READS, PATH, ALONE)
FUNCTION(int, statvfs64, (const char *path, struct statvfs64 *to), (path, to), "statvfs", READS, PATH, ALONE)

#define TRUNCATE(name, parameters, arguments, ...)                                                        \
    int name parameters {                                                                                 \
        NEXT(name);                                                                                       \
        begin(&call, "truncate", CHANGES, __VA_ARGS__, ALONE);                                            \
        call.offset = size;                                                                               \
        return end(&call, call.error ? -1 : next arguments, NULL, 0);                                     \
    }
TRUNCATE(truncate, (const char *path, off_t size), (path, size), PATH)
TRUNCATE(ftruncate, (int fd, off_t size), (fd, size), OPENED)
TRUNCATE(ftruncate64, (int fd, off_t size), (fd, size), OPENED)

/* Where it is watched, without waiting for a disk, which would take longer than all the rest. */
#define SYNC(name)                                                                                        \
    int name(int fd) {                                                                                    \
        NEXT(name);                                                                                       \
        begin(&call, "fsync", CHANGES, OPENED, ALONE);                                                    \
        return end(&call, call.error ? -1 : call.watched ? 0 : next(fd), NULL, 0);                        \
    }
SYNC(fsync)
SYNC(fdatasync)

#define OPEN(name, parameters, arguments, ...)                                                            \
    int name parameters {                                                                                 \
        NEXT(name);                                                                                       \
        va_list more;                                                                                     \
        va_start(more, flags);                                                                            \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0;                            \
        va_end(more);                                                                                     \
        int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);                     \
        const char *what = !changes ? "open" : flags & O_TRUNC ? "empty" : "create";                      \
        begin(&call, what, changes ? CHANGES : READS, __VA_ARGS__, ALONE);                                \
        int opened = call.error ? -1 : next arguments;                                                    \
        struct stat status;                                                                               \
        if (call.watched && opened >= 0 && !fstat(opened, &status)) call.inode = status.st_ino;           \
        return end(&call, opened, NULL, 0);                                                               \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), PATH)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), PATH)
OPEN(openat, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd, path)
OPEN(openat64, (int fd, const char *path, int flags, ...), (fd, path, flags, mode), fd, path)

#define OPEN_FOLDER(name, parameter, argument, ...)                                                       \
    DIR *name(parameter) {                                                                                \
        NEXT(name);                                                                                       \
        begin(&call, "opendir", READS, __VA_ARGS__, ALONE);                                               \
        DIR *opened = call.error ? NULL : next(argument);                                                 \
        end(&call, opened ? 0 : -1, NULL, 0);                                                             \
        return opened;                                                                                    \
    }
OPEN_FOLDER(opendir, const char *path, path, PATH)
OPEN_FOLDER(fdopendir, int fd, fd, OPENED)

int close(int fd) { /* only that of a written file counts; it closes the file even if it fails */
    NEXT(close);
    call.watched = call.error = 0;
    int flags = prefix[0] ? fcntl(fd, F_GETFL) : -1;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) begin(&call, "close", CHANGES, OPENED, ALONE);
    int result = next(fd);
    return end(&call, call.error ? -1 : result, NULL, 0);
}

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    begin(&call, "write", CHANGES, OPENED, ALONE);
    call.halved = call.halved && size > 1;
    if (call.halved) call.error = 0, size /= 2;
    ssize_t result = call.error ? -1 : next(fd, data, size);
    if (call.watched && result > 0) call.offset = lseek(fd, 0, SEEK_CUR) - result;
    return end(&call, result, data, result > 0 ? result : 0);
}

/* Other ways to write and copy are refused: what wants to use them goes on with read and write, or fails. */
#define REFUSED(name, arguments, ...)                                                                     \
    ssize_t name(__VA_ARGS__) {                                                                           \
        NEXT(name);                                                                                       \
        if (prefix[0]) find_path(call.path, OPENED);                                                      \
        if (!prefix[0] || !is_inside(call.path)) return next arguments;                                   \
        errno = ENOSYS;                                                                                   \
        return -1;                                                                                        \
    }
REFUSED(sendfile, (fd, from, place, size), int fd, int from, off_t *place, size_t size)
REFUSED(sendfile64, (fd, from, place, size), int fd, int from, off64_t *place, size_t size)
REFUSED(copy_file_range, (from, place, fd, to, size, flags), int from, off64_t *place, int fd, off64_t *to,
        size_t size, unsigned flags)
REFUSED(writev, (fd, parts, count), int fd, const struct iovec *parts, int count)
REFUSED(pwrite, (fd, data, size, place), int fd, const void *data, size_t size, off_t place)
REFUSED(pwrite64, (fd, data, size, place), int fd, const void *data, size_t size, off64_t place)
