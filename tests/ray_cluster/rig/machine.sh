#!/bin/bash
# Machines without a hypervisor, for the end-to-end test of cluster.yaml. A machine is a set of namespaces (network,
# processes, mounts, host name, IPC) with a copy-on-write view of this machine's files and an SSH server of its own.
# Processes of one machine cannot see those of another, which matters: `ray stop` kills all that it can see.
#
#   machine.sh network-up | network-down
#   machine.sh up NAME ADDRESS [PUBLIC_ADDRESS]     starts one; returns when SSH answers
#   machine.sh in NAME COMMAND...                   runs a command on it
#   machine.sh down NAME                            it is gone at once, with all that it had
#
# RIG        folder for the state of the test
# RIG_VENV   a virtual environment with raysl's packages, what would be in the image; each machine writes to its own copy
# RIG_KEYS   file of public keys that may log in (up)
# RIG_ENV    lines for the profile of its users, what a real machine would get from its instance profile (up)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
state=${RIG:?}
venv=${RIG_VENV:?}
verb=$1
name=${2:-}
network=raysl-rig
space=raysl-rig-$name
home=$state/machines/$name

network_up() {
  ip netns add $network
  ip -n $network link set lo up
  # With an address of its own: a bridge otherwise takes one from its ports and changes it as they come, and machines
  # then talk to nobody until they have forgotten the old one.
  ip -n $network link add bridge address 02:00:00:77:00:01 type bridge
  ip -n $network link set bridge up
  ip -n $network addr add 10.77.0.1/16 dev bridge        # of the cloud's API
  ip -n $network addr add 172.31.255.254/16 dev bridge   # of the gateway of the cloud's default network
  ip -n $network route add 54.0.0.0/8 dev bridge         # public addresses lead to the same machines
}

wire() {  # ADDRESS [PUBLIC_ADDRESS]
  local link
  link=rig$(printf %s "$name" | md5sum | cut -c1-10)
  ip netns add "$space"
  ip link add "$link" netns $network type veth peer name eth0 netns "$space"
  ip -n $network link set "$link" master bridge up
  ip -n "$space" link set lo up
  ip -n "$space" addr add "$1/16" dev eth0
  ip -n "$space" link set eth0 up
  ip -n "$space" route add default dev eth0
  if [ -n "${2:-}" ]; then ip -n "$space" addr add "$2/32" dev eth0; fi
}

up() {  # ADDRESS [PUBLIC_ADDRESS]
  mkdir -p "$home"
  wire "$@"
  setsid ip netns exec "$space" unshare --mount --pid --fork --uts --ipc --propagation private --kill-child \
    bash "$0" boot "$name" "$1" >"$home/log" 2>&1 </dev/null &
  local outer=$! inner
  for _ in $(seq 400); do if [ -s "$home/ready" ]; then break; fi; sleep 0.05; done
  # The first process of the namespace is the one that nsenter needs, and whose death is the machine's.
  inner=$outer
  while [ "$(readlink "/proc/$inner/ns/pid")" = "$(readlink /proc/self/ns/pid)" ]; do
    inner=$(cut -d' ' -f1 "/proc/$inner/task/$inner/children")
  done
  echo "$inner" >"$home/pid"
}

boot() {  # ADDRESS; runs inside the namespaces and becomes the SSH server
  local root=$home/disk/root user
  mkdir -p "$home/disk"
  mount -t tmpfs -o size=6g none "$home/disk"
  mkdir -p "$home"/disk/{upper,work,venv-upper,venv-work,root}
  mount -t overlay overlay -o "lowerdir=/,upperdir=$home/disk/upper,workdir=$home/disk/work" "$root"
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs -o size=2g none "$root/dev/shm"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
  mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
  mount -t tmpfs none "$root/run"
  mount -t tmpfs -o mode=1777,size=6g none "$root/tmp"
  mkdir -p "$root/run/sshd" "$root$venv"
  mount -t overlay overlay -o "lowerdir=$venv,upperdir=$home/disk/venv-upper,workdir=$home/disk/venv-work" "$root$venv"
  # The image has raysl's packages and not raysl.
  rm -rf "$root$venv"/lib/python3*/site-packages/{__editable__*raysl*,raysl*}
  cp "$here/pretend_gpu.py" "$(echo "$root$venv"/lib/python3*/site-packages)/"
  echo 'import pretend_gpu' >"$(echo "$root$venv"/lib/python3*/site-packages)/pretend_gpu.pth"
  hostname "$name"
  printf '127.0.0.1 localhost\n%s %s\n' "$1" "$name" >"$root/etc/hosts"
  : >"$root/etc/resolv.conf"
  install -m 755 "$here/docker" "$root/usr/local/bin/docker"
  chroot "$root" useradd -m -s /bin/bash ubuntu
  chroot "$root" usermod -p '*' ubuntu    # without a password, and not locked, which sshd would refuse
  echo 'ubuntu ALL=(ALL) NOPASSWD:ALL' >"$root/etc/sudoers.d/ubuntu"
  chmod 711 "$root/root"                  # an interpreter that lives there stays reachable
  for user in root home/ubuntu; do
    rm -rf "$root/$user/.ray" "$root/$user/.ssh"
    install -d -m 700 "$root/$user/.ssh"
    cat "${RIG_KEYS:-/dev/null}" >"$root/$user/.ssh/authorized_keys"
    { echo "export PATH=$venv/bin:\$PATH"; echo "${RIG_ENV:-}"; } >"$root/$user/.bashrc"
    echo '. ~/.bashrc' >"$root/$user/.bash_profile"
  done
  chroot "$root" chown -R ubuntu:ubuntu /home/ubuntu
  chroot "$root" sh -c "chown ubuntu $venv/lib/python3*/site-packages"
  [ -f "$state/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -f "$state/hostkey"
  install -m 600 "$state/hostkey" "$root/etc/ssh/rig_key"
  printf '%s\n' 'HostKey /etc/ssh/rig_key' 'PermitRootLogin prohibit-password' 'PasswordAuthentication no' \
    'UsePAM no' 'PidFile none' 'MaxStartups 50' >"$root/etc/ssh/rig_config"
  echo ready >"$home/ready"
  exec chroot "$root" /usr/sbin/sshd -D -e -f /etc/ssh/rig_config
}

case "$verb" in
  network-up) network_up ;;
  network-down) ip netns del $network ;;
  up) shift 2; up "$@" ;;
  boot) boot "$3" ;;
  in) shift 2; exec nsenter -t "$(cat "$home/pid")" -m -u -i -n -p -r -w -- "$@" ;;
  down)
    kill -9 "$(cat "$home/pid")" 2>/dev/null || true
    sleep 0.2
    ip netns del "$space" 2>/dev/null || true
    rm -rf "$home"
    ;;
  *) echo "machine.sh: unknown verb $verb" >&2; exit 2 ;;
esac
