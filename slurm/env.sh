# Environment of every Slurm job, for `sorahpc <job> --cluster slurm` (which puts these lines into its script) and for
# slurm/*.sbatch (which source this file). Lines marked SITE are yours to edit.

# SITE: what your cluster needs before python runs, for example
# module load cuda/12.8
# SITE: the interface that gloo and NCCL talk over, where the default is wrong
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

umask 077
# Since Slurm 22.05 srun does not inherit --cpus-per-task: without this each task gets one CPU.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# Exit code 10 means "stopped on request, progress saved, requeue me". Only a job that still runs is requeued: one that
# was cancelled ends in the same way, and must not come back.
sorahpc_requeue() {
  local code=$? id=$SLURM_JOB_ID
  trap - EXIT
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if [ "$code" -eq 10 ] && [ "$(squeue --noheader --job "$id" --format %T)" = RUNNING ]; then
    scontrol requeue "$id"
  fi
  exit "$code"
}
trap sorahpc_requeue EXIT
