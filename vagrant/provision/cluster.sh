# What all scripts of the small cluster share: its hosts, its user, where its secrets lie, and a few
# functions.  Sourced, never run.  The hosts run systemd; what is called here is to be repeatable.

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
checkout=$(readlink -f "$here/../..")

declare -A address=([storage]=192.168.56.10 [node1]=192.168.56.11 [node2]=192.168.56.12
                    [grid]=192.168.56.13)
# What `secrets.sh` made, copied to every host.
secrets=${STAGEFS_CLUSTER_SECRETS:-/etc/stagefs-cluster}
# Who runs jobs, and has the data on the storage host.
job_user=pilot
job_uid=2000

say() { printf 'provision: %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "this changes the whole machine: run it as root."; exit 1; }

packages() { "$here/debian.sh" --only "$@"; }

# write PATH MODE [OWNER]: standard input becomes the file, which nobody sees half written.
write() {
  mkdir -p "$(dirname "$1")"
  install -m "$2" -o "${3:-root}" -g "${3:-root}" /dev/stdin "$1.new"
  mv "$1.new" "$1"
}

# Services with the settings they have now, from now on and at each boot.
serve() {
  systemctl --quiet enable "$@"  # it reads the units anew
  systemctl restart "$@"
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { say "waited in vain for $what on $(hostname)."; return 1; }
    sleep 0.2
  done
}

# The hosts know each other by name, and themselves by the address that others use.
name_hosts() {
  local name
  {
    echo "127.0.0.1 localhost"
    for name in "${!address[@]}"; do echo "${address[$name]} $name"; done | LC_ALL=C sort
  } | write /etc/hosts 644
}

add_job_user() {
  getent passwd "$job_user" >/dev/null ||
    useradd --uid "$job_uid" --user-group --create-home --shell /bin/bash "$job_user"
  install -d -m 700 -o "$job_user" -g "$job_user" "/home/$job_user/.ssh"
}
