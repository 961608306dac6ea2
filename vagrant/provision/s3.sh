#!/usr/bin/env bash
# S3 on the storage host, at http://storage:7480: Ceph's gateway with one monitor and one object store,
# which lies in memory: what is put there is gone after a crash.  Makes the job user's keys and the
# bucket `stage`.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/cluster.sh"

fsid=9c1f4b5e-2d53-4c8e-8a7b-5a1d3f8f2a10
osd_id=4d1f5a62-7b7e-4a53-9a25-0f9f2f1f6c33
top=/var/lib/ceph
access_key=$(cat "$secrets/s3_access_key")
secret_key=$(cat "$secrets/s3_secret_key")

write /etc/ceph/ceph.conf 644 <<END
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:3300/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
keyring = /etc/ceph/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.05
paxos min wait = 0.01
[mon.a]
host = localhost
[osd]
osd objectstore = memstore
memstore device bytes = 2147483648
osd crush update on start = true
osd crush initial weight = 1
osd check max object name len on startup = false
[client.rgw]
rgw frontends = beast port=7480 tcp_nodelay=1
ms mon client mode = crc
rgw data = $top/radosgw/ceph-rgw
rgw rados pool pg num min = 1
rgw dns name = storage
END

as_ceph() { runuser -u ceph -- "$@" >&2; }

install -d -m 750 -o ceph -g ceph $top/mon $top/osd $top/radosgw $top/osd/ceph-0 $top/radosgw/ceph-rgw
install -d -m 770 -o ceph -g ceph /run/ceph
if [ ! -e $top/mon/ceph-a/done ]; then
  made=$(mktemp -d)
  rm -rf $top/mon/ceph-a
  install -d -m 750 -o ceph -g ceph $top/mon/ceph-a
  ceph-authtool -C "$made/keyring" -g -n mon. --cap mon 'allow *' >&2
  ceph-authtool "$made/keyring" -g -n client.admin --cap mon 'allow *' --cap osd 'allow *' >&2
  write /etc/ceph/keyring 640 ceph <"$made/keyring"
  monmaptool --create --fsid $fsid --addv a '[v2:127.0.0.1:3300]' "$made/monmap" >&2
  chown -R ceph "$made"
  as_ceph ceph-mon -i a --mkfs --monmap "$made/monmap" --keyring "$made/keyring"
  touch $top/mon/ceph-a/done
  rm -r "$made"
fi
serve ceph-mon@a
if [ ! -e $top/osd/ceph-0/fsid ]; then
  timeout 60 ceph osd new $osd_id 0 >&2
  as_ceph ceph-osd -i 0 --mkfs --osd-uuid $osd_id
fi
serve ceph-osd@0 ceph-radosgw@rgw

wait_for 90 "the S3 gateway" bash -c 'exec 3<>/dev/tcp/127.0.0.1/7480'
admin=(radosgw-admin -n client.rgw)
if ! "${admin[@]}" user info --uid="$job_user" >/dev/null 2>&1; then
  "${admin[@]}" user create --uid="$job_user" --display-name="$job_user" >/dev/null
  # Everybody sees command lines: his keys go in as metadata, on standard input.
  "${admin[@]}" metadata get "user:$job_user" |
    S3_ACCESS=$access_key S3_SECRET=$secret_key python3 -c '
import json, os, sys
user = json.load(sys.stdin)
key = {"access_key": os.environ["S3_ACCESS"], "secret_key": os.environ["S3_SECRET"], "subuser": ""}
user["data"]["keys"] = [{"user": user["data"]["user_id"], **key}]
json.dump(user, sys.stdout)' |
    "${admin[@]}" metadata put "user:$job_user" >/dev/null
fi
# `rclone` reads its settings from variables as well.
RCLONE_CONFIG=/dev/null RCLONE_CONFIG_S3_TYPE=s3 RCLONE_CONFIG_S3_PROVIDER=Ceph \
  RCLONE_CONFIG_S3_ENDPOINT=http://127.0.0.1:7480 RCLONE_CONFIG_S3_ACCESS_KEY_ID=$access_key \
  RCLONE_CONFIG_S3_SECRET_ACCESS_KEY=$secret_key rclone --retries 20 --retries-sleep 500ms mkdir s3:stage
