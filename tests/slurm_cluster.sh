#!/bin/sh
# A SLURM of two nodes on 127.0.0.1, for `make slurm`: Debian's packages slurm-wlm and munge, as root.
#   slurm_cluster.sh start FOLDER    start it, with its configuration, state and logs in FOLDER
#   slurm_cluster.sh stop FOLDER
set -eu
folder=$(mkdir -p "$2" && cd "$2" && pwd)
if [ "$1" = stop ]; then
    for file in "$folder"/*.pid; do
        [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
    exit
fi
for program in slurmctld slurmd munged; do
    command -v $program >/dev/null || { echo "Error: $program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done
mkdir -p /run/munge "$folder/state"
chown munge /run/munge
if [ ! -f /etc/munge/munge.key ]; then
    head -c 1024 /dev/urandom >/etc/munge/munge.key
    chown munge /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
fi
munge -n >/dev/null 2>&1 || su -s /bin/sh munge -c munged
host=$(hostname -s)
cat >"$folder/slurm.conf" <<CONFIGURATION
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobs.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
ReturnToService=2
KillWait=30
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
CONFIGURATION
export SLURM_CONF="$folder/slurm.conf"
slurmctld
sleep 1
slurmd -N n1
slurmd -N n2
