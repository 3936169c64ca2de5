#!/usr/bin/env bash
# Status 1 if the newest run below runs/ has neither ended nor written for an hour.
set -euo pipefail
newest=$(find -L runs -maxdepth 3 \( -name metrics.jsonl -o -name events.jsonl -o -name exit.json \) -printf '%T@ %p\n' |
    sort -n | tail -n 1)
[ -z "$newest" ] && exit 0                 # nothing runs yet
[ "${newest##*/}" = exit.json ] && exit 0  # the last thing that happened is an end
written=${newest%%.*}
[ $(($(date +%s) - written)) -lt "${M3I_HEALTH_SECONDS:-3600}" ]
