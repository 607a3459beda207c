/* The command line, as the stand-alone lua reads it. Borrows argv; owns nothing. */
#ifndef QLUA_OPTIONS_H
#define QLUA_OPTIONS_H

#include <stdbool.h>

typedef struct {
    bool interactive;    /* -i */
    bool version;        /* -v, and -i */
    bool statements;     /* at least one -e */
    bool no_environment; /* -E */
    int script;          /* index in argv of the script or "-"; 0: none */
    int end;             /* options stand in argv[1 .. end - 1] */
    int bad;             /* index of the option that is wrong; 0: all well */
    bool bad_needs_argument;
} qlua_options;

qlua_options qlua_options_parse(int argc, char **argv);

/* Step through the options with something to do, in order: 'e', 'l' with *argument set, 'W' without; 0 at the
 * end. Start with *index = 1. */
int qlua_options_next(const qlua_options *options, char **argv, int *index, const char **argument);

/* What is wrong with argv[options->bad], and the list of options, to stderr. */
void qlua_options_usage(const qlua_options *options, char **argv, const char *program);

#endif
