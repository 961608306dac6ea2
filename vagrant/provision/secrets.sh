#!/usr/bin/env bash
# secrets.sh DIRECTORY: the keys of one cluster, made anew where they are missing.  They are made once,
# outside of the hosts, because several hosts need the same ones; nothing of them is in the repository.
set -euo pipefail
umask 077
mkdir -p "$1"
cd "$1"

for name in storage_host_key job_user_key; do
  [ -e $name ] || ssh-keygen -q -t ed25519 -N '' -C '' -f $name
done
[ -e munge.key ] || head -c 128 /dev/urandom >munge.key
for name in s3_access_key s3_secret_key; do
  [ -e $name ] || head -c 20 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >$name
done
