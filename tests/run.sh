#!/bin/sh
# run.sh LOG COMMAND...: run a test program, its output into LOG, which ends with a line `N passed, N failed, N skipped`, the
# program's own or one that counts it as one. Where it fails there is LOG.failed instead, shown at once, so that the next `ninja
# test` runs it again; the other tests go on, and sum.sh fails at the end.
set -u
log=$1
shift
rm -f "$log" "$log.failed"
"$@" >"$log.part" 2>&1 </dev/null
status=$?
closing='^[0-9][0-9]* passed, [0-9][0-9]* failed, [0-9][0-9]* skipped$'
tail -n 1 "$log.part" | grep -q "$closing" || {
    if [ $status -eq 0 ]; then echo '1 passed, 0 failed, 0 skipped'; else echo '0 passed, 1 failed, 0 skipped'; fi >>"$log.part"
}
if [ $status -eq 0 ]; then
    mv "$log.part" "$log"
else
    echo "exit status $status of: $*"
    tail -n 60 "$log.part"
    mv "$log.part" "$log.failed"
fi
