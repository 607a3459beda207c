#include "hub.h"
#include "file.h"
#include "mem.h"

#include <dirent.h>
#include <pwd.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define REVISION_LIMIT 256 /* bytes of refs/main; a commit has 40 */

static ql_status no_memory(ql_err *err)
{
    return ql_err_set(err, QL_ERR_MEMORY, "no memory to look for the model");
}

static const char *set(const char *name)
{
    const char *value = getenv(name);
    return value && value[0] ? value : NULL;
}

static const char *home(void)
{
    const char *path = set("HOME");
    if (path) return path;
    const struct passwd *user = getpwuid(getuid());
    return user && user->pw_dir ? user->pw_dir : ".";
}

/* base, with a leading ~ as the home folder, and tail behind it. */
static char *below(const char *base, const char *tail)
{
    bool tilde = base[0] == '~' && (base[1] == '/' || base[1] == '\0');
    char *start = tilde ? ql_file_join(home(), base + (base[1] ? 2 : 1)) : ql_strdup(base);
    char *path = start && tail[0] ? ql_file_join(start, tail) : ql_strdup(start ? start : "");
    if (!start) {
        ql_free(path);
        path = NULL;
    }
    ql_free(start);
    return path;
}

ql_status ql_hub_cache(char **path, ql_err *err)
{
    static const struct {
        const char *variable, *tail;
    } places[] = {
        {"HF_HUB_CACHE", ""},
        {"HUGGINGFACE_HUB_CACHE", ""}, /* its name before 2023 */
        {"HF_HOME", "hub"},
        {"XDG_CACHE_HOME", "huggingface/hub"},
    };
    const char *base = "~", *tail = ".cache/huggingface/hub";
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (!set(places[i].variable)) continue;
        base = set(places[i].variable);
        tail = places[i].tail;
        break;
    }
    *path = below(base, tail);
    return *path ? QL_OK : no_memory(err);
}

static bool is_name_byte(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
}

/* One path component that cannot lead elsewhere. */
static bool component_ok(const char *text, size_t size)
{
    if (size == 0 || size > 200 || text[0] == '.') return false;
    for (size_t i = 0; i < size; i++)
        if (!is_name_byte(text[i])) return false;
    return true;
}

/* "org/name" or "name" as the hub allows it. */
static bool repository_ok(const char *text, size_t size)
{
    const char *slash = memchr(text, '/', size);
    if (!slash) return component_ok(text, size);
    size_t org = (size_t)(slash - text);
    return component_ok(text, org) && component_ok(slash + 1, size - org - 1);
}

/* A branch may hold slashes: refs/pr/1 is refs/refs/pr/1 in the cache. */
static bool revision_ok(const char *text)
{
    for (;;) {
        size_t n = strcspn(text, "/");
        if (!component_ok(text, n)) return false;
        if (!text[n]) return true;
        text += n + 1;
    }
}

/* <cache>/models--org--name */
static char *repository_folder(const char *cache, const char *repository, size_t size)
{
    char *name = ql_malloc(sizeof "models--" + size + 1), *path = NULL;
    if (!name) return NULL;
    size_t n = (size_t)sprintf(name, "models--");
    for (size_t i = 0; i < size; i++) {
        if (repository[i] == '/') name[n++] = '-';
        name[n++] = repository[i] == '/' ? '-' : repository[i];
    }
    name[n] = '\0';
    path = ql_file_join(cache, name);
    ql_free(name);
    return path;
}

/* The commit that refs/<revision> holds; "" when there is no such ref or it holds no commit. */
static ql_status read_ref(const char *folder, const char *revision, char commit[REVISION_LIMIT + 1],
                          ql_err *err)
{
    char *refs = ql_file_join(folder, "refs"), *path = refs ? ql_file_join(refs, revision) : NULL,
         *text = NULL;
    size_t size = 0;
    commit[0] = '\0';
    ql_status status = QL_OK;
    if (!path) {
        status = no_memory(err);
    } else if (ql_file_exists(path) && !ql_file_is_folder(path)) {
        status = ql_file_read(path, REVISION_LIMIT, &text, &size, err);
        while (size > 0 && (unsigned char)text[size - 1] <= ' ') size--;
        if (!status && !component_ok(text, size))
            status = ql_err_set(err, QL_ERR_FORMAT, "%s: does not hold a commit", path);
        if (!status) snprintf(commit, REVISION_LIMIT + 1, "%.*s", (int)size, text);
    }
    ql_free(text);
    ql_free(path);
    ql_free(refs);
    return status;
}

/* The only folder in snapshots, for a cache without refs; "" when there are none or several. */
static void only_snapshot(const char *snapshots, char commit[REVISION_LIMIT + 1])
{
    DIR *dir = opendir(snapshots);
    int found = 0;
    for (const struct dirent *item; dir && (item = readdir(dir));) {
        size_t n = strlen(item->d_name);
        if (!component_ok(item->d_name, n)) continue;
        found++;
        memcpy(commit, item->d_name, n + 1);
    }
    if (dir) closedir(dir);
    if (found != 1) commit[0] = '\0';
}

/* The snapshot folder of a repository that is in the cache; *path stays NULL when it is not. */
static ql_status find_snapshot(const char *folder, const char *revision, char **path, ql_err *err)
{
    char commit[REVISION_LIMIT + 1];
    const char *ref = revision ? revision : "main";
    ql_status status = read_ref(folder, ref, commit, err);
    if (status) return status;
    char *snapshots = ql_file_join(folder, "snapshots");
    if (!snapshots) return no_memory(err);
    if (!commit[0] && revision) snprintf(commit, sizeof commit, "%s", revision);
    if (!commit[0]) only_snapshot(snapshots, commit);
    char *found = commit[0] ? ql_file_join(snapshots, commit) : NULL;
    if (commit[0] && !found) status = no_memory(err);
    ql_free(snapshots);
    if (found && ql_file_is_folder(found))
        *path = found;
    else
        ql_free(found);
    return status;
}

static ql_status not_found(const char *model, const char *cache, int size, ql_err *err)
{
    ql_err_set(err, QL_ERR_NOT_FOUND, "model %.200s: no such folder, and not in the Hugging Face cache %s",
               model, cache);
    if (err) ql_err_hint(err, "name a folder, or fetch it first: huggingface-cli download %.*s", size, model);
    return QL_ERR_NOT_FOUND;
}

ql_status ql_hub_resolve(const char *model, char **path, ql_err *err)
{
    char *cache = NULL, *folder = NULL;
    *path = NULL;
    if (ql_file_exists(model)) {
        *path = ql_strdup(model);
        return *path ? QL_OK : no_memory(err);
    }
    size_t size = strcspn(model, "@");
    const char *revision = model[size] ? model + size + 1 : NULL;
    if (!repository_ok(model, size) ||
        (revision && (strlen(revision) > REVISION_LIMIT || !revision_ok(revision)))) {
        ql_err_set(err, QL_ERR_NOT_FOUND, "model %.200s: no such file or folder", model);
        if (err) ql_err_hint(err, "name a model folder or a hub id like org/name");
        return QL_ERR_NOT_FOUND;
    }
    ql_status status = ql_hub_cache(&cache, err);
    if (!status) {
        folder = repository_folder(cache, model, size);
        status = folder ? find_snapshot(folder, revision, path, err) : no_memory(err);
    }
    if (!status && !*path) status = not_found(model, cache, (int)size, err);
    ql_free(folder);
    ql_free(cache);
    return status;
}
