#!/bin/bash
# Layersweep: verify on 1 node
# Written by layersweep-submit. To submit it again by hand: sbatch THIS_FILE
# shellcheck disable=SC2016 # what stands in quotes is meant as it stands
#SBATCH --job-name=layersweep-verify
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output="/data/jobs/layersweep-jobs/layersweep-verify-%j.log"
#SBATCH --open-mode=append
#SBATCH --no-requeue

cd -- /data/jobs || exit 2

restarts=${SLURM_RESTART_COUNT:-0}
echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: $restarts"

# One process.
start=(
  srun --nodes=1 --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"
  --kill-on-bad-exit=0 --wait=90
  /opt/layersweep/bin/python
)
job=(
  -m launch.verify
  /models/X
)

"${start[@]}" "${job[@]}"
