#!/bin/sh
# Uploads a picture, and has a job of each kind done, with curl alone:
#
#   blipq up &  blipq api &
#   sh jobs.sh cat.png
#
# BLIPQ_URL names another door, and BLIPQ_KEY is sent as its key.
set -eu
url=${BLIPQ_URL:-http://127.0.0.1:8321}
picture=$1

call() { # path, then curl's options
    path=$1
    shift
    curl --silent --show-error --fail-with-body --max-time 90 \
        ${BLIPQ_KEY:+--header "Authorization: Bearer $BLIPQ_KEY"} "$@" "$url$path"
    echo
}

job() { # body
    call '/v1/jobs?wait=60' --header 'Content-Type: application/json' --data "$1"
}

image=$(call /v1/uploads --header 'Content-Type: image/png' --data-binary "@$picture" |
    sed 's/.*"uri": *"\([^"]*\)".*/\1/')

job "{\"kind\": \"caption\", \"image\": \"$image\"}"
job "{\"kind\": \"vqa\", \"image\": \"$image\", \"questions\": [\"what color is it?\"]}"
job "{\"kind\": \"match\", \"image\": \"$image\", \"texts\": [\"a red square\", \"a dog\"]}"
job "{\"kind\": \"describe\", \"image\": \"$image\", \"questions\": [\"what is it?\"]}"
job "{\"kind\": \"embed\", \"image\": \"$image\", \"index\": \"example-curl\"}"
job "{\"kind\": \"search\", \"index\": \"example-curl\", \"text\": \"a red square\"}"
