/* A file system for SQLite whose n-th operation fails, and that knows what a power cut would leave.
 *
 * It lies over the system's and is the default once registered. Syncing copies a file to `durable_root`,
 * where so is only what was synced: nothing else survives a power cut that the disk's cache does not help.
 */
#ifndef STORE_VFS_H
#define STORE_VFS_H

#include "file_help.h"

#include <errno.h>
#include <sqlite3.h>

typedef enum { FAULT_IO, FAULT_FULL, FAULT_SHORT, FAULT_POWER } fault_kind;

static struct {
    sqlite3_vfs *real;
    fault_kind kind;
    long fail_at, made; /* operations; fail_at < 0: none fails */
    int open_files;
    bool no_shared_memory;
    const char *durable_root; /* NULL: syncing does nothing */
} vfs_state = {.fail_at = -1};

typedef struct {
    sqlite3_file base;
    const char *path; /* SQLite's */
    sqlite3_file *real;
} vfs_file;

static bool vfs_fails(void)
{
    long mine = vfs_state.made++;
    if (vfs_state.fail_at < 0) return false;
    bool fails = vfs_state.kind == FAULT_POWER ? mine >= vfs_state.fail_at : mine == vfs_state.fail_at;
    if (fails) errno = vfs_state.kind == FAULT_FULL ? ENOSPC : EIO;
    return fails;
}

#define VFS_REAL(file) (((vfs_file *)(file))->real)

static int vfs_close(sqlite3_file *file)
{
    vfs_state.open_files--;
    int code = VFS_REAL(file)->pMethods->xClose(VFS_REAL(file));
    sqlite3_free(VFS_REAL(file));
    return code;
}

static int vfs_read(sqlite3_file *file, void *data, int bytes, sqlite3_int64 offset)
{
    if (vfs_fails()) return SQLITE_IOERR_READ;
    return VFS_REAL(file)->pMethods->xRead(VFS_REAL(file), data, bytes, offset);
}

static int vfs_write(sqlite3_file *file, const void *data, int bytes, sqlite3_int64 offset)
{
    bool fails = vfs_fails();
    int code = SQLITE_OK;
    if (!fails || vfs_state.kind == FAULT_SHORT)
        code = VFS_REAL(file)->pMethods->xWrite(VFS_REAL(file), data, fails ? bytes / 2 : bytes, offset);
    if (!fails) return code;
    errno = vfs_state.kind == FAULT_FULL ? ENOSPC : EIO;
    return vfs_state.kind == FAULT_FULL ? SQLITE_FULL : SQLITE_IOERR_WRITE;
}

static int vfs_truncate(sqlite3_file *file, sqlite3_int64 size)
{
    if (vfs_fails()) return SQLITE_IOERR_TRUNCATE;
    return VFS_REAL(file)->pMethods->xTruncate(VFS_REAL(file), size);
}

/* The name that a file of SQLite has among the durable ones. */
static void vfs_durable_path(const char *path, char *out, size_t size)
{
    const char *slash = strrchr(path, '/');
    snprintf(out, size, "%s/%s", vfs_state.durable_root, slash ? slash + 1 : path);
}

static int vfs_sync(sqlite3_file *file, int flags)
{
    (void)flags;
    if (vfs_fails()) return SQLITE_IOERR_FSYNC;
    const vfs_file *f = (const vfs_file *)file;
    sqlite3_int64 size = 0;
    char path[512], page[4096];
    if (!vfs_state.durable_root) return SQLITE_OK;
    vfs_durable_path(f->path, path, sizeof path);
    FILE *copy = fopen(path, "wb");
    assert_non_null(copy);
    assert_int_equal(f->real->pMethods->xFileSize(f->real, &size), SQLITE_OK);
    for (sqlite3_int64 at = 0; at < size; at += (sqlite3_int64)sizeof page) {
        int n = size - at < (sqlite3_int64)sizeof page ? (int)(size - at) : (int)sizeof page;
        assert_int_equal(f->real->pMethods->xRead(f->real, page, n, at), SQLITE_OK);
        assert_int_equal(fwrite(page, 1, (size_t)n, copy), n);
    }
    assert_int_equal(fclose(copy), 0);
    return SQLITE_OK;
}

static int vfs_size(sqlite3_file *file, sqlite3_int64 *size)
{
    if (vfs_fails()) return SQLITE_IOERR_FSTAT;
    return VFS_REAL(file)->pMethods->xFileSize(VFS_REAL(file), size);
}

static int vfs_lock(sqlite3_file *file, int level)
{
    if (vfs_fails()) return SQLITE_IOERR_LOCK;
    return VFS_REAL(file)->pMethods->xLock(VFS_REAL(file), level);
}

static int vfs_unlock(sqlite3_file *file, int level)
{
    return VFS_REAL(file)->pMethods->xUnlock(VFS_REAL(file), level);
}

static int vfs_check_lock(sqlite3_file *file, int *held)
{
    if (vfs_fails()) return SQLITE_IOERR_CHECKRESERVEDLOCK;
    return VFS_REAL(file)->pMethods->xCheckReservedLock(VFS_REAL(file), held);
}

static int vfs_control(sqlite3_file *file, int op, void *arg)
{
    return VFS_REAL(file)->pMethods->xFileControl(VFS_REAL(file), op, arg);
}

static int vfs_sector(sqlite3_file *file)
{
    return VFS_REAL(file)->pMethods->xSectorSize(VFS_REAL(file));
}

static int vfs_traits(sqlite3_file *file)
{
    return VFS_REAL(file)->pMethods->xDeviceCharacteristics(VFS_REAL(file));
}

static int vfs_shm_map(sqlite3_file *file, int page, int size, int extend, void volatile **out)
{
    *out = NULL;
    if (vfs_fails()) return SQLITE_IOERR_SHMMAP;
    return VFS_REAL(file)->pMethods->xShmMap(VFS_REAL(file), page, size, extend, out);
}

static int vfs_shm_lock(sqlite3_file *file, int offset, int n, int flags)
{
    if ((flags & SQLITE_SHM_LOCK) && vfs_fails()) return SQLITE_IOERR_SHMLOCK;
    return VFS_REAL(file)->pMethods->xShmLock(VFS_REAL(file), offset, n, flags);
}

static void vfs_shm_barrier(sqlite3_file *file)
{
    VFS_REAL(file)->pMethods->xShmBarrier(VFS_REAL(file));
}

static int vfs_shm_unmap(sqlite3_file *file, int remove_it)
{
    return VFS_REAL(file)->pMethods->xShmUnmap(VFS_REAL(file), remove_it);
}

static int vfs_open(sqlite3_vfs *vfs, const char *path, sqlite3_file *file, int flags, int *out_flags)
{
    static sqlite3_io_methods methods[2];
    vfs_file *f = (vfs_file *)file;
    (void)vfs;
    *f = (vfs_file){.path = path};
    if (vfs_fails()) return SQLITE_CANTOPEN;
    f->real = sqlite3_malloc(vfs_state.real->szOsFile);
    if (!f->real) return SQLITE_NOMEM;
    memset(f->real, 0, (size_t)vfs_state.real->szOsFile);
    int code = vfs_state.real->xOpen(vfs_state.real, path, f->real, flags, out_flags);
    if (code != SQLITE_OK) {
        sqlite3_free(f->real);
        return code;
    }
    methods[0] = methods[1] = (sqlite3_io_methods){
        2,          vfs_close,   vfs_read,     vfs_write,       vfs_truncate,  vfs_sync,
        vfs_size,   vfs_lock,    vfs_unlock,   vfs_check_lock,  vfs_control,   vfs_sector,
        vfs_traits, vfs_shm_map, vfs_shm_lock, vfs_shm_barrier, vfs_shm_unmap, NULL,
        NULL};
    methods[1].iVersion = 1;
    f->base.pMethods = &methods[vfs_state.no_shared_memory];
    vfs_state.open_files++;
    return SQLITE_OK;
}

static int vfs_delete(sqlite3_vfs *vfs, const char *path, int sync_folder)
{
    char durable[512];
    (void)vfs;
    if (vfs_fails()) return SQLITE_IOERR_DELETE;
    if (vfs_state.durable_root && sync_folder) {
        vfs_durable_path(path, durable, sizeof durable);
        unlink(durable);
    }
    return vfs_state.real->xDelete(vfs_state.real, path, 0);
}

static int vfs_access(sqlite3_vfs *vfs, const char *path, int flags, int *out)
{
    (void)vfs;
    if (vfs_fails()) return SQLITE_IOERR_ACCESS;
    return vfs_state.real->xAccess(vfs_state.real, path, flags, out);
}

/* Call before anything else of SQLite but sqlite3_config. */
static void vfs_register(void)
{
    static sqlite3_vfs vfs;
    vfs_state.real = sqlite3_vfs_find(NULL);
    vfs = *vfs_state.real;
    vfs.zName = "faults";
    vfs.szOsFile = sizeof(vfs_file);
    vfs.xOpen = vfs_open;
    vfs.xDelete = vfs_delete;
    vfs.xAccess = vfs_access;
    sqlite3_vfs_register(&vfs, 1);
}

/* Let `n` operations pass, then fail one, or with FAULT_POWER all that follow; n < 0: none. */
static void vfs_fail_after(long n, fault_kind kind)
{
    vfs_state.made = 0;
    vfs_state.fail_at = n;
    vfs_state.kind = kind;
}

#endif
