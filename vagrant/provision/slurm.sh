#!/usr/bin/env bash
# A node of the Slurm cluster, after stagefs.sh; node1 is the controller, too.  Jobs that ask for
# StageFS in their comment get it by the scripts of mount/slurm.
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/cluster.sh"

controller=node1
if [ "$(hostname)" = $controller ]; then
  packages munge slurmctld slurmd slurm-client
else
  packages munge slurmd slurm-client
fi

write /etc/munge/munge.key 400 munge <"$secrets/munge.key"
serve munge

for script in prolog epilog task_prolog; do
  write /usr/local/lib/stagefs/$script.sh 755 <"$checkout/mount/slurm/$script.sh"
done
install -d -m 755 -o slurm -g slurm /var/log/slurm
install -d -m 700 -o slurm -g slurm /var/lib/slurm/slurmctld
install -d -m 755 /var/lib/slurm/slurmd
write /etc/slurm/slurm.conf 644 <<END
ClusterName=stagefs
SlurmctldHost=$controller
AuthType=auth/munge
CredType=cred/munge
SlurmUser=slurm
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
PrologFlags=Alloc
Prolog=/usr/local/lib/stagefs/prolog.sh
TaskProlog=/usr/local/lib/stagefs/task_prolog.sh
Epilog=/usr/local/lib/stagefs/epilog.sh
NodeName=node[1-2] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
# Nothing here needs control groups, but slurmd does not start with the plug-in for version 2 where there
# is version 1, too.
if grep -q '^[1-9]' /proc/1/cgroup; then
  write /etc/slurm/cgroup.conf 644 <<<'CgroupPlugin=cgroup/v1'
fi
if [ "$(hostname)" = $controller ]; then
  serve slurmctld
  wait_for 60 "slurmctld" sh -c 'scontrol ping | grep -q UP'
fi
serve slurmd
