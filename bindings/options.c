#include "options.h"

#include <stdio.h>
#include <string.h>

qlua_options qlua_options_parse(int argc, char **argv)
{
    qlua_options o = {0};
    int i = 1;
    for (; i < argc && argv[i][0] == '-' && argv[i][1] != '\0'; i++) {
        const char *text = argv[i];
        bool alone = text[2] == '\0';
        if (strcmp(text, "--") == 0) {
            i++;
            break;
        }
        if ((text[1] == 'e' || text[1] == 'l') && alone) {
            o.bad_needs_argument = i + 1 >= argc || argv[i + 1][0] == '-';
            if (o.bad_needs_argument) o.bad = i;
            i++;
        } else if (text[1] == 'e' || text[1] == 'l') {
            /* argument in the same word */
        } else if (!alone || !strchr("ivEW", text[1])) {
            o.bad = i;
        }
        if (o.bad) return o;
        o.statements |= text[1] == 'e';
        o.interactive |= text[1] == 'i';
        o.version |= text[1] == 'i' || text[1] == 'v';
        o.no_environment |= text[1] == 'E';
    }
    o.end = i;
    o.script = i < argc ? i : 0;
    return o;
}

int qlua_options_next(const qlua_options *options, char **argv, int *index, const char **argument)
{
    while (*index < options->end) {
        const char *text = argv[(*index)++];
        if (text[1] == 'W') return 'W';
        if (text[1] != 'e' && text[1] != 'l') continue;
        *argument = text[2] != '\0' ? text + 2 : argv[(*index)++];
        return text[1];
    }
    return 0;
}

void qlua_options_usage(const qlua_options *options, char **argv, const char *program)
{
    const char *bad = argv[options->bad];
    if (options->bad_needs_argument)
        fprintf(stderr, "%s: '%s' needs argument\n", program, bad);
    else
        fprintf(stderr, "%s: unrecognized option '%s'\n", program, bad);
    fprintf(stderr,
            "usage: %s [options] [script [args]]\n"
            "       %s doctor [args]\n"
            "  -e stat   run the string stat\n"
            "  -i        read from the prompt after running the script\n"
            "  -l mod    load the module mod into the global mod\n"
            "  -l g=mod  load the module mod into the global g\n"
            "  -v        print the versions\n"
            "  -E        ignore environment variables\n"
            "  -W        turn warnings on\n"
            "  --        end of options\n"
            "  -         run standard input and end options\n",
            program, program);
    fflush(stderr);
}
