#!/bin/sh
# Answers git when a remote asks for a user name and a password; reads the token from its file each time.
case "$1" in
Username*) echo "${RETUNE_GIT_USER:-git}" ;;
*) cat "${RETUNE_SECRETS:-/run/secrets}/git_token" ;;
esac
