#!/usr/bin/env bash
# Starts a command in an enroot container with this task's environment: enroot_start.sh MOUNT,MOUNT FOLDER IMAGE COMMAND...
# enroot itself passes no variables of the host, and the ranks need those of srun.
set -euo pipefail
mounts=$1 folder=$2 image=$3
shift 3
options=()
for mount in ${mounts//,/ }; do options+=(--mount "$mount"); done
for name in $(compgen -e); do
    case $name in
        PATH | HOME | LD_LIBRARY_PATH | PWD | OLDPWD | SHLVL | TMPDIR | BASH_FUNC_*) ;; # the image's own
        *) options+=(--env "$name") ;;
    esac
done
exec enroot start "${options[@]}" "$image" bash -c 'cd -- "$0" && exec "$@"' "$folder" "$@"
