#!/usr/bin/env bash
# stagefs.sh SOURCE: StageFS on a compute host, mounted at /scratch/stage by systemd for the job user.
# SOURCE is the tarball of `make dist`, or the directory of an installation (with bin/stagefs in it).
#
# In the mount, staging/data is the storage host's /srv/data over ssh, staging/bucket its S3 bucket.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/cluster.sh"

point=/scratch/stage
packages fuse3 openssh-client
name_hosts
add_job_user

home=$1
if [ -f "$1" ]; then
  home=/opt/stagefs
  rm -rf $home.new
  mkdir -p $home.new
  tar -xzf "$1" -C $home.new --strip-components=1
  # Mounts go on with what they have open; a restart, or a reload, takes the new one.
  rm -rf $home && mv $home.new $home
fi
for name in stagefs stagefs-cache; do
  ln -sfn "$home/bin/$name" /usr/bin/$name
  ln -sfn "$home/bin/$name" /usr/local/bin/$name
done
ln -sfn "$home/bin/mount.stagefs" /sbin/mount.stagefs

own=/home/$job_user
write $own/.ssh/id_ed25519 600 "$job_user" <"$secrets/job_user_key"
{ printf 'storage '; cat "$secrets/storage_host_key.pub"; } | write $own/.ssh/known_hosts 644 "$job_user"
install -d -m 700 -o "$job_user" -g "$job_user" $own/.aws
write $own/.aws/credentials 600 "$job_user" <<END
[default]
aws_access_key_id = $(cat "$secrets/s3_access_key")
aws_secret_access_key = $(cat "$secrets/s3_secret_key")
END

write /etc/stagefs/stagefs.conf 644 <<'END'
[cache]
capacity_bytes = "2GiB"
[remote.s3]
endpoint = "http://storage:7480"
region = "us-east-1"
END
write /etc/stagefs/scratch-stage.env 644 <<END
MOUNT_OPTIONS=--allow-other --user $job_user
END
write /etc/systemd/system/stagefs@.service 644 <"$checkout/mount/systemd/stagefs@.service"
install -d $point
serve stagefs@scratch-stage

# Names outlive the mount: they are bound once.
[ -e $point/staging/data ] || stagefs bind ssh://storage/srv/data staging:///data --mount $point >&2
[ -e $point/staging/bucket ] || stagefs bind s3://stage/ staging:///bucket --mount $point >&2
