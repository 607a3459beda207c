#include "line.h"

#include <errno.h>
#include <histedit.h>
#include <limits.h>
#include <locale.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wchar.h>

#include "../core/interrupt.h"

enum { HISTORY_LINES = 2000 };

static struct {
    EditLine *edit; /* NULL: plain lines */
    History *history;
    const char *prompt;
    char history_path[PATH_MAX]; /* "": none */
    char *plain;
    size_t plain_size;
} line;

static char *prompt_now(EditLine *edit)
{
    (void)edit;
    /* histedit takes a char * that it only reads */
    return (char *)line.prompt;
}

/* One character for the editor: 1, 0 at the end, -1 on an error. histedit's own reader starts again after a
 * signal; this one gives up when the signal was Ctrl-C. */
static int next_char(EditLine *edit, wchar_t *out)
{
    (void)edit;
    mbstate_t state;
    memset(&state, 0, sizeof state);
    for (;;) {
        if (ql_interrupted()) {
            errno = EINTR;
            return -1;
        }
        struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
        /* The timeout bounds how late a signal is seen that came just before poll. */
        int ready = poll(&input, 1, 200);
        if (ready == 0 || (ready < 0 && errno == EINTR)) continue;
        if (ready < 0) return -1;
        char byte;
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n <= 0) return (int)n;
        size_t done = mbrtowc(out, &byte, 1, &state);
        if (done == (size_t)-2) continue; /* more bytes to come */
        if (done == (size_t)-1) {         /* not text in this locale: drop it */
            memset(&state, 0, sizeof state);
            continue;
        }
        return 1;
    }
}

static void find_history(void)
{
    const char *named = getenv("QLUA_HISTORY");
    const char *home = getenv("HOME");
    line.history_path[0] = '\0';
    int n = 0;
    if (named)
        n = snprintf(line.history_path, sizeof line.history_path, "%s", named);
    else if (home && home[0])
        n = snprintf(line.history_path, sizeof line.history_path, "%s/.qlua_history", home);
    if (n < 0 || n >= (int)sizeof line.history_path) line.history_path[0] = '\0';
}

void qlua_line_open(void)
{
    if (line.edit || !isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO)) return;
    /* Only characters: numbers keep the C locale's decimal point, which Lua's reader and printer use. */
    setlocale(LC_CTYPE, "");
    line.edit = el_init("qlua", stdin, stdout, stderr);
    if (!line.edit) return;
    line.history = history_init();
    find_history();
    el_set(line.edit, EL_PROMPT, prompt_now);
    el_set(line.edit, EL_EDITOR, "emacs");
    el_set(line.edit, EL_GETCFN, next_char);
    el_set(line.edit, EL_BIND, "^I", "ed-insert", NULL);
    if (line.history) {
        HistEvent event;
        history(line.history, &event, H_SETSIZE, HISTORY_LINES);
        history(line.history, &event, H_SETUNIQUE, 1);
        if (line.history_path[0]) history(line.history, &event, H_LOAD, line.history_path);
        el_set(line.edit, EL_HIST, history, line.history);
    }
    el_source(line.edit, NULL);
}

static qlua_line_status finish(const char *bytes, int count, const char **text, size_t *length)
{
    while (count > 0 && (bytes[count - 1] == '\n' || bytes[count - 1] == '\r')) count--;
    *text = bytes;
    *length = (size_t)count;
    return QLUA_LINE_OK;
}

qlua_line_status qlua_line_read(const char *prompt, const char **text, size_t *length)
{
    *text = "";
    *length = 0;
    if (line.edit) {
        int count = 0;
        line.prompt = prompt;
        const char *bytes = el_gets(line.edit, &count);
        if (ql_interrupted()) {
            el_reset(line.edit);
            printf("^C\n");
            fflush(stdout);
            return QLUA_LINE_INTERRUPTED;
        }
        if (!bytes || count <= 0) return QLUA_LINE_END;
        return finish(bytes, count, text, length);
    }
    fputs(prompt, stdout);
    fflush(stdout);
    clearerr(stdin);
    ssize_t n = getline(&line.plain, &line.plain_size, stdin);
    if (n < 0) return ql_interrupted() ? QLUA_LINE_INTERRUPTED : QLUA_LINE_END;
    return finish(line.plain, (int)n, text, length);
}

void qlua_line_remember(const char *statement)
{
    HistEvent event;
    if (line.history && statement[0]) history(line.history, &event, H_ENTER, statement);
}

void qlua_line_close(void)
{
    if (line.history) {
        HistEvent event;
        if (line.history_path[0]) {
            /* What was typed may hold secrets: the file is the user's alone from the start. */
            mode_t before = umask(077);
            history(line.history, &event, H_SAVE, line.history_path);
            umask(before);
        }
        history_end(line.history);
    }
    if (line.edit) el_end(line.edit);
    free(line.plain);
    memset(&line, 0, sizeof line);
}
