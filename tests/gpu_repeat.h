/* Do a row's bits repeat? */
#ifndef GPU_REPEAT_H
#define GPU_REPEAT_H

#include <stdbool.h>

/* A line on stdout for each row of the file, fwd and bwd: `runs` runs of the row's plan on the same buffers, every output compared
   with the first run's. False where a bit differs or a number is not finite. A file that cannot be read ends the program. */
bool repeat_rows(long runs, const char *path);

#endif
