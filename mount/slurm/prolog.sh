#!/bin/sh
# Slurm's Prolog; see README.md beside this file.
#
# A job that does not ask for StageFS costs nothing here.  Whatever goes wrong is told by the job's
# TaskProlog: an exit code other than 0 would drain the node.
stagefs=/usr/local/bin/stagefs

case $SLURM_JOB_COMMENT in
  stagefs:*) ;;
  *) exit 0 ;;
esac
/usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  SLURM_JOB_ID="$SLURM_JOB_ID" SLURM_JOB_UID="$SLURM_JOB_UID" \
  SLURM_JOB_WORK_DIR="$SLURM_JOB_WORK_DIR" SLURM_JOB_COMMENT="$SLURM_JOB_COMMENT" \
  "$stagefs" prolog --scheduler slurm >/dev/null 2>&1
exit 0
