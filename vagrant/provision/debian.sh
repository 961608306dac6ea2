#!/usr/bin/env bash
# Installs the Debian packages that StageFS, its tests and its bench need, and mends what minimal
# machines lack: the mode of /dev/fuse, and /etc/mtab.
#
# Used by `make setup`, by .ci/run (through it) and by the Vagrant boxes, so that it cannot rot.
# Installs only what is missing, and says nothing when all is there.  Leaves no server running:
# the packages bring services, which are neither started now nor at the next boot.
set -euo pipefail

# Without these StageFS cannot be installed or run: pyfuse3 comes as source.
needed=(fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-venv python3-dev)
# Real servers and programs of the tests and the demo.
tests=(openssh-server openssh-client nginx-light radosgw ceph-mon ceph-osd ceph-common
       sqlite3 attr hdf5-tools samtools tar util-linux git make rsync)
# What the bench compares with.
bench=(sshfs bindfs s3fs rclone)
say() { printf 'setup: %s\n' "$*" >&2; }

installed() { dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null |
                sed -n 's/^installed //p' | LC_ALL=C sort; }

missing_of() {
  local have package
  have=$(installed "$@") || true
  for package in "$@"; do
    grep -qxF -- "$package" <<<"$have" || printf '%s\n' "$package"
  done
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif [ -t 0 ]; then sudo "$@"
  else sudo -n "$@"
  fi
}

may_be_root() {
  [ "$(id -u)" = 0 ] && return 0
  command -v sudo >/dev/null || return 1
  [ -t 0 ] || sudo -n true 2>/dev/null
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d made_policy=
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    made_policy=yes
  fi
  local status=0
  # A provisioned machine may have another apt at work; five minutes are enough for it to end.
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  as_root "${apt[@]}" install -y --no-install-recommends "$@" </dev/null >&2 ||
    { as_root "${apt[@]}" update </dev/null >&2 &&
      as_root "${apt[@]}" install -y --no-install-recommends "$@" </dev/null >&2; } ||
    status=$?
  [ -z "$made_policy" ] || as_root rm -f "$policy"
  return "$status"
}

# Disables the services of the packages named, which this run brought: a machine's own sshd stays
# as it is.
keep_services_off() {
  [ "$#" -gt 0 ] || return 0
  command -v systemctl >/dev/null || return 0
  local unit
  dpkg-query -L "$@" | sed -nE 's,^(/usr)?/lib/systemd/system/([^/@]+\.(service|target))$,\2,p' |
    while read -r unit; do
      as_root systemctl --quiet disable "$unit" </dev/null >/dev/null 2>&1 || true
    done
}

mend_fuse_device() {
  if [ ! -e /dev/fuse ]; then
    as_root modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] || as_root mknod -m 0666 /dev/fuse c 10 229 2>/dev/null || true
  fi
  if [ ! -c /dev/fuse ]; then
    say "/dev/fuse is missing and could not be made, so nothing can be mounted here; load the kernel module fuse, or start the container with --device /dev/fuse."
    return 1
  fi
  # udev makes it 0666; a minimal machine without udev has it at 0600, closed to ordinary users.
  if [ "$(stat -c %a /dev/fuse)" != 666 ]; then
    as_root chmod 0666 /dev/fuse ||
      say "/dev/fuse is closed to ordinary users and its mode could not be changed; run 'chmod 0666 /dev/fuse' as root."
  fi
}

# fusermount3 unmounts for ordinary users only where this link is; systemd makes it on real machines.
mend_mtab() {
  [ -e /etc/mtab ] || as_root ln -s ../proc/self/mounts /etc/mtab ||
    say "/etc/mtab is missing, and fusermount3 cannot unmount without it; run 'ln -s ../proc/self/mounts /etc/mtab' as root."
}

if ! command -v dpkg-query >/dev/null; then
  say "this is not a Debian system, so nothing was installed; StageFS needs what Debian calls ${needed[*]}."
  exit 0
fi

# Arguments are further packages (`make test-systems` needs batch systems).  After --only they are all:
# hosts of the cluster neither build StageFS nor run its tests.
if [ "${1-}" = --only ]; then
  shift
  needed=("$@") tests=() bench=()
fi
mapfile -t absent < <(missing_of "${needed[@]}" "${tests[@]}" "${bench[@]}" "$@")
mapfile -t absent_needed < <(missing_of "${needed[@]}")

if [ "${#absent[@]}" -gt 0 ]; then
  if may_be_root; then
    say "installing ${absent[*]}"
    before=$(installed)
    if ! install_packages "${absent[@]}"; then
      say "apt-get could not install ${absent[*]}; its messages above say why."
      exit 1
    fi
    mapfile -t brought < <(LC_ALL=C comm -13 <(printf '%s\n' "$before") <(installed))
    keep_services_off "${brought[@]}"
  elif [ "${#absent_needed[@]}" -gt 0 ]; then
    say "these Debian packages are missing and neither root nor sudo is at hand: run 'apt-get install --no-install-recommends ${absent[*]}' as root."
    exit 1
  else
    say "some tests and benches will not run: 'apt-get install --no-install-recommends ${absent[*]}' as root brings what they need."
  fi
fi

if [ ! -c /dev/fuse ] || [ "$(stat -c %a /dev/fuse)" != 666 ]; then
  if may_be_root; then
    mend_fuse_device
  else
    say "/dev/fuse is missing or closed to ordinary users; run 'chmod 0666 /dev/fuse' as root."
  fi
fi
if [ ! -e /etc/mtab ] && may_be_root; then
  mend_mtab
fi
