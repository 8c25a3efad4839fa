#!/bin/sh
# What git asks for when a remote wants a name and a password; the token is read from its file each time.
case "$1" in
Username*) echo "${RETUNE_GIT_USER:-git}" ;;
*) cat "${RETUNE_SECRETS:-/run/secrets}/git_token" ;;
esac
