// Preloaded into a program, it makes a folder's disk fail from some call on: files below FAILING_FOLDER are opened,
// read and written FAILING_AFTER times in each process; every call after that ends in FAILING_ERRNO, as on a lost
// mount.
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

namespace {

std::atomic<long> calls{0};

bool fails(const char *path) {
  static const char *folder = getenv("FAILING_FOLDER");
  static const long after = atol(getenv("FAILING_AFTER") ? getenv("FAILING_AFTER") : "0");
  if (!folder || !path || strncmp(path, folder, strlen(folder)) != 0) return false;
  if (calls++ < after) return false;
  errno = atoi(getenv("FAILING_ERRNO"));
  return true;
}

bool fails(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return fails(path);
}

template <class Function>
Function *next(const char *name) {
  return reinterpret_cast<Function *>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

#define FIRST(name, type, parameters, arguments, what, failed) \
  type name parameters {                                       \
    static auto *real = next<type parameters>(#name);          \
    return fails(what) ? failed : real arguments;              \
  }

FIRST(read, ssize_t, (int file, void *data, size_t n), (file, data, n), file, -1)
FIRST(write, ssize_t, (int file, const void *data, size_t n), (file, data, n), file, -1)
FIRST(mkdir, int, (const char *path, mode_t mode), (path, mode), path, -1)
FIRST(rename, int, (const char *from, const char *to), (from, to), from, -1)
FIRST(unlink, int, (const char *path), (path), path, -1)
FIRST(rmdir, int, (const char *path), (path), path, -1)
FIRST(opendir, DIR *, (const char *path), (path), path, nullptr)
FIRST(stat64, int, (const char *path, struct stat64 *found), (path, found), path, -1)
FIRST(lstat64, int, (const char *path, struct stat64 *found), (path, found), path, -1)

int open64(const char *path, int flags, ...) {
  static auto *real = next<int(const char *, int, ...)>("open64");
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return fails(path) ? -1 : real(path, flags, mode);
}

}  // extern "C"
