#!/bin/sh
# Slurm's Epilog; see README.md beside this file.
#
# A job without a mount costs nothing here.  An exit code other than 0 would drain the node.
stagefs=/usr/local/bin/stagefs
mounts=/run/stagefs

[ -L "$mounts/$SLURM_JOB_ID" ] || [ -e "$mounts/.failed/$SLURM_JOB_ID" ] || exit 0
/usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  SLURM_JOB_ID="$SLURM_JOB_ID" SLURM_JOB_UID="$SLURM_JOB_UID" \
  SLURM_JOB_WORK_DIR="$SLURM_JOB_WORK_DIR" \
  "$stagefs" epilog --scheduler slurm >/dev/null 2>&1
exit 0
