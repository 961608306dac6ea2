#!/usr/bin/env bash
# The storage host: /srv/data over ssh and over http, and S3.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/cluster.sh"

packages openssh-server nginx-light radosgw ceph-mon ceph-osd ceph-common rclone
name_hosts
add_job_user

write /etc/ssh/ssh_host_ed25519_key 600 <"$secrets/storage_host_key"
write /etc/ssh/ssh_host_ed25519_key.pub 644 <"$secrets/storage_host_key.pub"
write "/home/$job_user/.ssh/authorized_keys" 600 "$job_user" <"$secrets/job_user_key.pub"
# A pilot's tasks log in side by side.
write /etc/ssh/sshd_config.d/stagefs.conf 644 <<<'MaxStartups 200'
serve ssh

install -d -m 755 -o "$job_user" -g "$job_user" /srv/data
rm -f /etc/nginx/sites-enabled/default
write /etc/nginx/sites-enabled/data 644 <<'END'
server {
  listen 80;
  root /srv/data;
}
END
serve nginx

"$here/s3.sh"
