/* One CPU device for a test program: group set-up and tear-down. */
#ifndef DEVICE_HELP_H
#define DEVICE_HELP_H

#include "backend.h"

static ql_device *dev;

static int setup(void **state)
{
    (void)state;
    return ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, NULL);
}

static int teardown(void **state)
{
    (void)state;
    ql_device_release(dev);
    return 0;
}

#endif
