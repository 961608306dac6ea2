#!/bin/sh
# Slurm's TaskProlog; see README.md beside this file.
#
# It runs as the job's user before each task: one that does not use StageFS costs nothing here.
stagefs=/usr/local/bin/stagefs
mounts=/run/stagefs

[ -L "$mounts/$SLURM_JOB_ID" ] || [ -e "$mounts/.failed/$SLURM_JOB_ID" ] ||
  [ -n "$STAGEFS_IN$STAGEFS_OUT$STAGEFS_MANIFEST" ] || exit 0
# The job's own Python and libraries are not for StageFS.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP LD_LIBRARY_PATH LD_PRELOAD
exec "$stagefs" task-prolog --scheduler slurm 2>/dev/null
