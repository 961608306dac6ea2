#!/usr/bin/env bash
# A Grid Engine cell of one host, after stagefs.sh.  Jobs that ask for StageFS get it by the script of
# mount/gridengine.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/cluster.sh"

packages gridengine-master gridengine-exec gridengine-client
write /usr/local/lib/stagefs/stagefs-hook 755 <"$checkout/mount/gridengine/stagefs-hook"

me=$(hostname)
export SGE_ROOT=/var/lib/gridengine SGE_CELL=default SGE_SINGLE_LINE=1
spool=/var/spool/gridengine
# The package makes a cell only when its installer was let.
if [ ! -e $spool/spooldb/sge ]; then
  install -d -o sgeadmin -g sgeadmin $spool $spool/spooldb $spool/qmaster $spool/qmaster/job_scripts
  runuser -u sgeadmin -- /usr/share/gridengine/scripts/init_cluster $SGE_ROOT $SGE_CELL \
    $spool/spooldb sgeadmin >&2
fi
write $SGE_ROOT/$SGE_CELL/common/act_qmaster 644 sgeadmin <<<"$me"
serve gridengine-master
wait_for 60 "Grid Engine's master" runuser -u sgeadmin -- qconf -sh

# configure OPTION: a file in qconf's format, from standard input.
configure() {
  local file status=0
  file=$(mktemp) && cat >"$file" && chmod 644 "$file"
  runuser -u sgeadmin -- qconf "$1" "$file" >&2 || status=$?
  rm "$file"
  return "$status"
}
# changed NAME VALUE ...: lines `name value` with other values, new ones at the end.
changed() {
  awk -v pairs="$(printf '%s\n' "$@")" '
    BEGIN { n = split(pairs, word, "\n"); for (i = 1; i < n; i += 2) value[word[i]] = word[i + 1] }
    $1 in value { print $1, value[$1]; delete value[$1]; next }
    { print }
    END { for (name in value) print name, value[name] }'
}

runuser -u sgeadmin -- qconf -as "$me" >&2 || true  # a second time it is one already
runuser -u sgeadmin -- qconf -se "$me" >/dev/null 2>&1 || configure -Ae <<END
hostname $me
load_scaling NONE
complex_values NONE
user_lists NONE
xuser_lists NONE
projects NONE
xprojects NONE
usage_scaling NONE
report_variables NONE
END
install -d -o sgeadmin -g sgeadmin $spool/execd
hook=root@/usr/local/lib/stagefs/stagefs-hook
# qconf takes this one under its own name only.
work=$(mktemp -d)
chmod 755 "$work"
qconf -sconf global | changed execd_spool_dir $spool/execd load_report_time 00:00:02 \
  prolog "$hook prolog grid-engine" epilog "$hook epilog grid-engine" \
  delegated_file_staging true >"$work/global"
runuser -u sgeadmin -- qconf -Mconf "$work/global" >&2
rm -r "$work"
qconf -ssconf | changed schedule_interval 0:0:1 flush_submit_sec 1 flush_finish_sec 1 | configure -Msconf
serve gridengine-exec
qconf -sq all.q >/dev/null 2>&1 ||
  qconf -sq | changed qname all.q hostlist "$me" slots 2 shell /bin/bash load_thresholds NONE \
    shell_start_mode unix_behavior pe_list NONE tmpdir /tmp | configure -Aq
