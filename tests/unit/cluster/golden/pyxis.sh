#!/bin/bash
# Layersweep: calibrate on 2 nodes of 8 ranks
# Written by layersweep-submit. To submit it again by hand: sbatch THIS_FILE
# shellcheck disable=SC2016 # what stands in quotes is meant as it stands
#SBATCH --job-name=layersweep-Ultra-NVFP4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --output="/data/jobs/layersweep-jobs/layersweep-Ultra-NVFP4-%j.log"
#SBATCH --open-mode=append
#SBATCH --requeue
# USR1 comes to this script alone (B:), 180 s or a little more before the time limit.
#SBATCH --signal=B:USR1@180

cd -- /data/jobs || exit 2

restarts=${SLURM_RESTART_COUNT:-0}
echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: $restarts"
if [ "$restarts" -gt 3 ]; then # Slurm itself queues again when a node fails
  echo "not started: more restarts than cluster.max_restarts=3"
  exit 75
fi

# One task on each node, which starts that node's ranks. They meet on this node, the first one.
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node do not meet
start=(
  srun --nodes=2 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"
  --kill-on-bad-exit=0 --wait=90
  '--container-image=nvcr.io#site/layersweep:1'
  '--container-mounts=/lustre/models:/models,/lustre/data,/data/jobs:/data/jobs'
  --container-workdir=/data/jobs
  python3 -m torch.distributed.run
  --nnodes=2 --nproc-per-node=8 --max-restarts=0
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$(hostname):$port"
)
job=(
  -m launch.calibrate
  checkpoint=/models/Ultra-BF16
  output=/models/Ultra-NVFP4
  parallel.ep=16
)

output=/lustre/models/Ultra-NVFP4
work=$output.partial # where it works until it is done
asked=no
trap 'asked=yes; echo "$(date "+%F %T") USR1: stopping after the layer in hand"' USR1
trap 'echo "$(date "+%F %T") TERM: ending at once"' TERM # the ranks get it too

started_at=$(date +%s)
"${start[@]}" "${job[@]}" &
step=$!
wait "$step" # until it ends, or a signal comes
while kill -0 "$step" 2>/dev/null; do
  # Again and again: a run that is only beginning removes the file.
  if [ "$asked" = yes ] && [ -d "$work" ]; then touch -- "$work/stop"; fi
  sleep 2
done

# What the run's files tell decides: torchrun exits with 1 whatever its ranks said.
echo
srun --nodes=1 --ntasks=1 '--container-image=nvcr.io#site/layersweep:1' '--container-mounts=/lustre/models:/models,/lustre/data,/data/jobs:/data/jobs' --container-workdir=/data/jobs python3 -m launch.status /models/Ultra-NVFP4 started_at="$started_at"
verdict=$?
case $verdict in
  75) ;; # stopped
  *) exit "$verdict" ;;
esac
if [ "$asked" = no ] && [ -e "$work/stop" ]; then
  echo "not queued again: someone asked it to stop, by $work/stop"
  exit "$verdict"
fi
case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r') in
  *TimeLimit*) ;;
  COMPLETING*) echo "not queued again: it was cancelled"; exit "$verdict" ;;
esac
if [ "$restarts" -ge 3 ]; then
  echo "not queued again: cluster.max_restarts=3 is reached"
  exit "$verdict"
fi
echo "queued again: it goes on from the layers that are done"
trap '' TERM # by which Slurm ends this script
scontrol requeue "$SLURM_JOB_ID"
exit "$verdict"
