/* Lines from the user: with editing and a history file on a terminal, plain otherwise.
 *
 * One editor per process. Lines belong to the editor and hold until the next read.
 */
#ifndef QLUA_LINE_H
#define QLUA_LINE_H

#include <stddef.h>

typedef enum { QLUA_LINE_OK, QLUA_LINE_END, QLUA_LINE_INTERRUPTED } qlua_line_status;

/* Start editing if standard input and output are a terminal. The history is kept in $QLUA_HISTORY, by default
 * ~/.qlua_history; set but empty: nowhere. */
void qlua_line_open(void);

/* Show `prompt`, read a line; *text [OUT] has `*length` [OUT] bytes without the newline. */
qlua_line_status qlua_line_read(const char *prompt, const char **text, size_t *length);

/* Remember a statement; it may have several lines. */
void qlua_line_remember(const char *statement);

/* Write the history, free the editor, give the terminal back. */
void qlua_line_close(void);

#endif
