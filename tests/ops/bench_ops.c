/* Speed of single operations: the cases of tests/ops that have a real model's size, beside what the device
 * reached in reading memory and in products in the same run.
 *
 *   bench_ops [--device NAME] [--cases TEXT] [--rounds N] [--small] [--csv]
 *
 * A sample is one turn through all copies of the weights (at least 8, and more than caches hold), queued at
 * once and waited for, divided by their number; so it is the throughput of a queue, launches included. The
 * share is that of the limit, the longer of bytes / bandwidth and operations / rate. Weights are random,
 * never zero: zeros draw less power and flatter. */
#include "cases.h"

#include "clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COPIES = 8, MOST_COPIES = 256 };
static const double ROTATE_BYTES = 256e6; /* several times the largest L2 (50 MB on an H200) */

typedef struct {
    const char *device, *cases;
    int rounds;
    bool small, csv;
} options;

static int compare_seconds(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static int usage(const char *what)
{
    fprintf(stderr,
            "bench_ops: %s\n"
            "usage: bench_ops [--device NAME] [--cases TEXT] [--rounds N] [--small] [--csv]\n",
            what);
    return 2;
}

static int fail(const ql_err *err)
{
    fprintf(stderr, "bench_ops: %s\n", err->message);
    if (err->hint[0]) fprintf(stderr, "  %s\n", err->hint);
    return 1;
}

static int parse(int argc, char **argv, options *o)
{
    *o = (options){.device = "cuda", .cases = "", .rounds = 20};
    for (int i = 1; i < argc; i++) {
        bool value = i + 1 < argc;
        if (strcmp(argv[i], "--device") == 0 && value)
            o->device = argv[++i];
        else if (strcmp(argv[i], "--cases") == 0 && value)
            o->cases = argv[++i];
        else if (strcmp(argv[i], "--rounds") == 0 && value)
            o->rounds = atoi(argv[++i]);
        else if (strcmp(argv[i], "--small") == 0)
            o->small = true;
        else if (strcmp(argv[i], "--csv") == 0)
            o->csv = true;
        else
            return usage(argv[i]);
    }
    return o->rounds >= 10 && o->rounds <= 100000 ? 0 : usage("--rounds is 10 to 100000");
}

/* Median, 10th and 90th percentile of seconds a step. */
static ql_status time_case(ql_device *dev, const ops_case *c, int rounds, double out[3], bool *skipped,
                           ql_err *err)
{
    ops_run run;
    double bytes = ops_case_bytes(c);
    int copies = bytes * COPIES < ROTATE_BYTES ? (int)(ROTATE_BYTES / (bytes + 1)) : COPIES;
    if (copies > MOST_COPIES) copies = MOST_COPIES;
    if (copies < COPIES) copies = COPIES;
    double *seconds = calloc((size_t)rounds, sizeof *seconds);
    ql_status status = ops_run_open(dev, c, copies, &run, err);
    if (!seconds) status = ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int r = -2; status == QL_OK && r < rounds; r++) { /* two to warm up */
        double started = ql_clock_seconds();
        for (int i = 0; status == QL_OK && i < copies; i++) status = ops_run_step(&run, i, err);
        if (status == QL_OK) status = dev->backend->sync(dev->ctx, err);
        if (r >= 0) seconds[r] = (ql_clock_seconds() - started) / copies;
    }
    *skipped = run.skipped;
    if (status == QL_OK) {
        qsort(seconds, (size_t)rounds, sizeof *seconds, compare_seconds);
        out[0] = seconds[rounds / 2];
        out[1] = seconds[rounds / 10];
        out[2] = seconds[rounds - 1 - rounds / 10];
    }
    ops_run_close(&run);
    free(seconds);
    return status;
}

static void print_row(const options *o, const ops_case *c, const double s[3], const ql_ceiling *top)
{
    char name[128];
    ops_case_name(c, name, sizeof name);
    double bytes = ops_case_bytes(c), flops = ops_case_flops(c);
    double rate = top->matrix_flops_per_second > 0 && c->format != OPS_F32 ? top->matrix_flops_per_second
                                                                           : top->flops_per_second;
    double by_bytes = bytes / top->read_bytes_per_second, by_flops = flops / rate;
    double limit = by_bytes > by_flops ? by_bytes : by_flops;
    if (o->csv)
        printf("\"%s\",%.0f,%.0f,%.9g,%.9g,%.9g,%.6g,%.6g,%.9g,%.4f\n", name, bytes, flops, s[0], s[1], s[2],
               bytes / s[0], flops / s[0], limit, limit / s[0]);
    else
        printf("%-58s %9.1f %7.1f-%-7.1f %8.1f %9.1f %9.1f %6.1f\n", name, s[0] * 1e6, s[1] * 1e6, s[2] * 1e6,
               bytes / s[0] / 1e9, flops / s[0] / 1e9, limit * 1e6, 100 * limit / s[0]);
}

int main(int argc, char **argv)
{
    options o;
    int wrong = parse(argc, argv, &o);
    if (wrong) return wrong;
    ql_err err;
    ql_device *dev;
    ql_device_info info;
    ql_ceiling top;
    if (ql_device_open(o.device, NULL, &dev, &err) != QL_OK) return fail(&err);
    if (dev->backend->info(dev->ctx, &info, &err) != QL_OK ||
        dev->backend->ceiling(dev->ctx, (size_t)1 << 29, &top, &err) != QL_OK) {
        ql_device_release(dev);
        return fail(&err);
    }
    if (o.csv)
        printf("case,bytes,flops,seconds,p10,p90,bytes_per_second,flops_per_second,limit_seconds,share\n");
    else
        printf("%s: %s, %s %s\nreads %.1f GB/s, %.1f GFLOP/s in float32, %.1f GFLOP/s in products\n\n"
               "%-58s %9s %15s %8s %9s %9s %6s\n",
               dev->label, info.name, info.isa, info.driver, top.read_bytes_per_second / 1e9,
               top.flops_per_second / 1e9, top.matrix_flops_per_second / 1e9, "case", "us", "p10-p90", "GB/s",
               "GFLOP/s", "limit us", "%");

    int failed = 0, ran = 0;
    for (size_t i = 0; i < ops_case_count; i++) {
        const ops_case *c = &ops_cases[i];
        char name[128];
        double seconds[3];
        bool skipped = false;
        ops_case_name(c, name, sizeof name);
        if (c->full == o.small || !strstr(name, o.cases)) continue;
        if (time_case(dev, c, o.rounds, seconds, &skipped, &err) != QL_OK) {
            fprintf(stderr, "%s: ", name);
            failed = fail(&err);
        } else if (!skipped) {
            print_row(&o, c, seconds, &top);
            ran++;
        }
        fflush(stdout);
    }
    ql_device_release(dev);
    if (!ran && !failed) return usage("no case has such a name");
    return failed;
}
