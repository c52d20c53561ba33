#!/usr/bin/env bash
# Every operation of the Build Execution API, one after the other, with curl.
#
#   BUILDMILL=http://127.0.0.1:3000 EMAIL=owner@buildmill.local PASSWORD=... PROJECT_ID=... docs/api/curl-examples.sh
#
# The project needs a repository and a workflow; branch main is built. A runner has to be there.
# PROJECT_ID and PASSWORD are the only things this cannot guess. Needs curl and python3, which reads the JSON.
set -euo pipefail

api=${BUILDMILL:-http://127.0.0.1:3000}/api/v1
email=${EMAIL:-owner@buildmill.local}

say() { echo; echo "# $*"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)'"$1"')'; } # reads JSON from standard input
call() { # METHOD PATH [curl's arguments]: asks with the token and the tenant, and fails with the error's own words
    local answer status method=$1 path=$2
    shift 2
    answer=$(curl -sS -X "$method" "$api$path" -H "Authorization: Bearer $token" -H "X-Tenant-ID: $tenant" \
        -H "Content-Type: application/json" -w '\n%{http_code}' "$@")
    status=${answer##*$'\n'}
    printf '%s' "${answer%$'\n'*}"
    [ "$status" -lt 400 ] || { echo " <- $method $path was answered with $status" >&2 && return 1; }
}
await_end() { # BUILD: until it has ended, at most two minutes
    local status=queued
    for _ in $(seq 240); do
        status=$(call GET "/builds/$1/status" | field '["status"]')
        case $status in success | failed | cancelled) echo "$status" && return ;; esac
        sleep 0.5
    done
    echo "the build is still $status" >&2 && return 1
}

say "Log in"
login=$(curl -sS -X POST "$api/auth/login" -H "Content-Type: application/json" \
    -d "{\"email\": \"$email\", \"password\": \"$PASSWORD\"}")
token=$(field '["token"]' <<<"$login")
refresh=$(field '["refresh_token"]' <<<"$login")
tenant=${TENANT:-$(field '["tenants"][0]["id"]' <<<"$login")}
echo "tenant $tenant"

say "Who am I"
call GET /auth/me

say "The projects, one project, and what its builds take"
call GET "/projects?limit=5"
call GET "/projects/$PROJECT_ID"
call PATCH "/projects/$PROJECT_ID" -d '{"default_branch": "main"}'

say "Create a build; sent again with the same key it is the same build"
body="{\"project_id\": \"$PROJECT_ID\", \"git_branch\": \"main\"}"
key="example-$RANDOM-$RANDOM"
build=$(call POST /builds -d "$body" -H "Idempotency-Key: $key" | field '["id"]')
again=$(call POST /builds -d "$body" -H "Idempotency-Key: $key" | field '["id"]')
[ "$build" = "$again" ]
call GET "/builds/$build"

say "List builds"
call GET "/builds?status=queued&project_id=$PROJECT_ID&page=1&limit=20&sort_by=build_number&sort_order=desc"

say "Start it"
call POST "/builds/$build/start"

say "How far is it"
call GET "/builds/$build/status"

say "Follow its log: a ticket, then a WebSocket; curl shows the frames as they come"
ticket=$(call POST /auth/ws-tickets -d "{\"build_id\": \"$build\"}" | field '["ticket"]')
curl -sS -N --http1.1 --max-time 120 "$api/builds/$build/logs/stream?ticket=$ticket" --output - \
    -H "Connection: Upgrade" -H "Upgrade: websocket" -H "Sec-WebSocket-Version: 13" \
    -H "Sec-WebSocket-Key: $(head -c 16 /dev/urandom | base64)" | tr -cd '[:print:]\n' || true

say "It has ended as"
await_end "$build"

say "Its log, as messages and as text"
call GET "/builds/$build/logs"
call GET "/builds/$build/logs?format=text"

say "Cancel a build, retry it, cancel the retry, and delete both"
cancelled=$(call POST /builds -d "$body" | field '["id"]')
call POST "/builds/$cancelled/cancel"
retried=$(call POST "/builds/$cancelled/retry" | field '["id"]')
call POST "/builds/$retried/cancel"
call DELETE "/builds/$retried"
call DELETE "/builds/$cancelled"

say "Renew the login, and log out"
token=$(curl -sS -X POST "$api/auth/refresh" -H "Content-Type: application/json" \
    -d "{\"refresh_token\": \"$refresh\"}" | field '["token"]')
if [ -n "${NEW_PASSWORD:-}" ]; then
    call POST /auth/password -d "{\"current_password\": \"$PASSWORD\", \"new_password\": \"$NEW_PASSWORD\"}"
else
    call POST /auth/logout
fi
echo "done"
