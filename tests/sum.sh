#!/bin/sh
# sum.sh LOG...: what run.sh left behind, a line each; the last line counts all tests of all programs. Fails where one of them did.
set -u
for log in "$@"; do
    [ -f "$log" ] || log=$log.failed
    if [ -f "$log" ]; then echo "$(tail -n 1 "$log") $log"; else echo "0 passed, 1 failed, 0 skipped $log was not written"; fi
done | awk '
    { passed += $1; failed += $3; skipped += $5; print }
    $7 ~ /\.failed$/ && $3 == 0 { failed++ } # it crashed, or reported success and failed
    END {
        print passed + 0 " passed, " failed + 0 " failed, " skipped + 0 " skipped"
        exit failed > 0 || passed == 0
    }'
