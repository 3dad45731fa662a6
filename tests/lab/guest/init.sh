#!/bin/bash
# What the guest's kernel starts: sets the machine up, carries out the plan, hands the results over, powers off.
# Rules of this file:
#
# * /dev/ttyS0 is the kernel's console; /dev/ttyS1 is the progress that the host shows. A line "@SECONDS WORD..." is
#   a mark: the host ends the guest if the next mark does not come within so many seconds. A line "!pull NAME" or
#   "!plug NAME" has the host pull a device out of the machine, or put it back.
# * Results are files below /out; as a tar archive they go onto the raw disk, again after every suite: what a
#   crash leaves is then there too.
# * Whatever a suite started ends with it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8

mount -t devtmpfs dev /dev
exec 3>/dev/ttyS1
mark() { printf '\n@%s\n' "$*" >&3; }
grace=60 # seconds for what takes one or two
uptime_ms() { local now; read -r now _ </proc/uptime; echo "${now/./}0"; }

set_up_system() {
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t cgroup2 cgroup /sys/fs/cgroup
    mkdir -p /dev/pts /dev/shm /out
    mount -t devpts devpts /dev/pts
    mount -t tmpfs shm /dev/shm
    mount -t tmpfs run /run
    mount -t tmpfs tmp /tmp
    hostname lab
    echo "127.0.0.1 localhost lab" >/etc/hosts
    ip link set lo up
    ulimit -l unlimited
    ulimit -Hn 524288
    modprobe -a virtio_blk nvme veth sch_netem loop rdma_rxe ib_uverbs rdma_ucm
}

# Two nodes: namespaces n1 and n2 with two links between them, and a NIC at each end of each link.
set_up_nodes() {
    rdma system set netns exclusive
    for node in 1 2; do
        ip netns add n$node
        ip -n n$node link set lo up
    done
    link "" 10.0.0
    link b 10.0.1
}

link() {
    ip link add "v1$1" type veth peer name "v2$1"
    for node in 1 2; do
        ip link set "v$node$1" netns n$node
        ip -n n$node link set "v$node$1" mtu 9000 up
        ip -n n$node addr add "$2.$node/24" dev "v$node$1"
        ip netns exec n$node rdma link add "rxe$node$1" type rxe netdev "v$node$1"
        rdma dev set "rxe$node$1" netns n$node
    done
}

state_facts() {
    {
        echo "kernel=$(uname -r)"
        echo "python=$(python3 -c 'import platform; print(platform.python_version())')"
        for package in rdma-core python3-pyverbs perftest; do
            echo "$package=$(dpkg-query --show --showformat '${Version}' $package)"
        done
        echo "set_up_seconds=$(cut -d' ' -f1 /proc/uptime)"
    } >/out/facts
}

# suite NAME NAMESPACE SECONDS COMMAND...: run a command and keep its output, its status and how long it took.
suite() {
    local name=$1 namespace=$2 limit=$3 out=/out/$1 begun status
    shift 3
    mkdir -p "$out"
    mark "$((limit + grace)) suite $name"
    begun=$(uptime_ms)
    # The shell is the first process of a namespace: when it ends or is killed, so is everything that it started.
    PEERMEM_LAB_OUT=$out timeout --signal=KILL "$limit" \
        unshare --pid --fork --kill-child --mount-proc -- \
        ${namespace:+ip netns exec "$namespace"} bash -c '"$@"; exit $?' bash "$@" 2>&1 | tee "$out/log" >&3
    status=${PIPESTATUS[0]}
    echo "$status" >"$out/status"
    echo $(($(uptime_ms) - begun)) >"$out/milliseconds"
    mark "$grace ended $name $status"
    hand_over
}

hand_over() {
    dmesg >/out/dmesg
    tar --create --file - --directory /out . | dd of=/dev/vda bs=1M conv=fsync status=none
}

set_up_system
set_up_nodes
state_facts
hand_over
mark "$grace ready"
cd /project || exit 1
. /plan
hand_over
mark "$grace over"
echo o >/proc/sysrq-trigger
sleep 60
