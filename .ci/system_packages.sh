#!/usr/bin/env bash
# Installs the packages of Debian and Ubuntu that tests use, if something is missing and this user may. Always ends with status 0.
set -uo pipefail

has_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }
PATH=$PATH:/usr/sbin:/sbin
missing=()
command -v slurmctld >/dev/null || missing+=(slurm-wlm)
command -v munged >/dev/null || missing+=(munge)
has_library 'libpmix\.so ' || missing+=(libpmix-dev) # srun --mpi=pmix opens the name without a version
command -v mpirun >/dev/null || missing+=(openmpi-bin)
has_library 'libmpi\.so ' || missing+=(libopenmpi-dev)
has_library 'libaio\.so ' || missing+=(libaio-dev) # DeepSpeed compiles its NVMe offload against it
command -v gcc >/dev/null || missing+=(gcc)
command -v g++ >/dev/null || missing+=(g++)
if [ ${#missing[@]} = 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo ".ci: ${missing[*]} cannot be installed here (no apt-get, or no right to): their tests are skipped" >&2
    exit 0
fi
echo ".ci: installing ${missing[*]}" >&2
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq >"$log" 2>&1
for package in "${missing[@]}"; do # one by one: one that is not there does not keep out the others
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >>"$log" 2>&1; then
        echo ".ci: $package cannot be installed: $(tail -n 1 "$log")" >&2
    fi
done
rm -f "$log"
exit 0
