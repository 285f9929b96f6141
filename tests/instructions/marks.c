/* What Python asks of callgrind, which watches the process. Without callgrind these do nothing. */
#include <valgrind/callgrind.h>

void marks_start(void) { CALLGRIND_START_INSTRUMENTATION; }
void marks_toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void marks_dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
