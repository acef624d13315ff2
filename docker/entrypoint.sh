#!/bin/sh
# What `docker run IMAGE ...` starts:
#
#   calibrate ...              a launcher by its short name: layersweep-calibrate ...
#   torchrun 8 calibrate ...   one on so many ranks of this host
#   anything else              as it is: bash, python, torchrun --nnodes ...
#
# The process that is started takes the place of this one, so it gets the signals; nothing is
# installed or fetched, and the umask is the caller's.
set -eu

# Of a read-only image, or of another system's HOME that is not mounted.
if [ ! -d "${HOME:-}" ] || [ ! -w "${HOME:-}" ]; then
  HOME=$(mktemp -d "${TMPDIR:-/tmp}/layersweep-home-XXXXXX")
  export HOME
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HOME/.cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$HOME/.cache/torchinductor}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$HOME/.cache/matplotlib}"

case "${1:-}" in
  calibrate | compare | evaluate | plan | status | submit | verify)
    job=$1
    shift
    set -- "layersweep-$job" "$@"
    ;;
  torchrun)
    case "${2:-}" in
      "" | *[!0-9]*) ;; # torchrun's own options
      *)
        if [ $# -lt 3 ]; then
          echo "usage: torchrun RANKS calibrate|compare|evaluate OPTIONS..." >&2
          exit 2
        fi
        ranks=$2
        job=$3
        shift 3
        # The address: without a network the host's name leads nowhere.
        set -- torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$ranks" -m "launch.$job" "$@"
        ;;
    esac
    ;;
  "")
    set -- layersweep-calibrate --help
    ;;
esac

# NVIDIA's images look there whether the driver needs the libraries of forward compatibility. What
# they say goes to stderr: stdout belongs to the command.
nvidia=${LAYERSWEEP_BASE_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}
if [ -x "$nvidia" ]; then
  exec 3>&1
  # shellcheck disable=SC2016 # the inner shell's arguments
  exec "$nvidia" /bin/sh -c 'exec "$@" 1>&3 3>&-' sh "$@" 1>&2
fi
exec "$@"
