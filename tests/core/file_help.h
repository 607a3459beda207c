/* Files for tests: a folder of a test's own under /tmp, removed with all that is in it. */
#ifndef FILE_HELP_H
#define FILE_HELP_H

#include <dirent.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char temp_root[64];

__attribute__((unused)) static int make_temp(void **state)
{
    (void)state;
    strcpy(temp_root, "/tmp/qlua-test-XXXXXX");
    return mkdtemp(temp_root) ? 0 : -1;
}

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *walk)
{
    (void)info, (void)type, (void)walk;
    return remove(path);
}

__attribute__((unused)) static int remove_temp(void **state)
{
    (void)state;
    return nftw(temp_root, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* temp_root/name, valid throughout the test: the same name gives the same text. */
__attribute__((unused)) static const char *temp_path(const char *name)
{
    static char paths[64][256];
    char path[sizeof paths[0]];
    int length = snprintf(path, sizeof path, "%s/%s", temp_root, name);
    assert_true(length > 0 && (size_t)length < sizeof path);
    size_t i = 0;
    while (i < 64 && paths[i][0] && strcmp(paths[i], path)) i++;
    assert_true(i < 64);
    return strcpy(paths[i], path);
}

__attribute__((unused)) static const char *write_temp(const char *name, const void *data, size_t size)
{
    const char *path = temp_path(name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
    return path;
}

__attribute__((unused)) static const char *write_text(const char *name, const char *text)
{
    return write_temp(name, text, strlen(text));
}

/* Entries of a folder under temp_root. */
__attribute__((unused)) static int count_entries(const char *name)
{
    DIR *dir = opendir(temp_path(name));
    int count = 0;
    assert_non_null(dir);
    for (const struct dirent *item; (item = readdir(dir));) count += item->d_name[0] != '.';
    closedir(dir);
    return count;
}

__attribute__((unused)) static void assert_contains(const char *text, const char *part)
{
    if (!strstr(text, part)) fail_msg("\"%s\" does not contain \"%s\"", text, part);
}

#endif
